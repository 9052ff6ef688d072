"""A piece of a large message that comes twice counts for none that did not come: who sends it is left out."""

import os
from collections.abc import Sequence

import hostile_peer as hostile
import pytest
import torch
from hostile_peer import WORLD, HostileMember, data_frame, frame, memfd, region_frame
from mesh_workers import SECRET, meshes

from elastic_run.collectives.endpoint import DataView
from elastic_run.collectives.errors import CollectiveAborted
from elastic_run.collectives.signature import sign_message
from elastic_run.collectives.wire import POINT_TO_POINT, Header, Kind, RegionRef

NBYTES = 200_000
HALF, THIRD = NBYTES // 2, 66_667
WAIT_S = 30.0
PIECES = {
    "the same": [(0, HALF), (0, HALF), (HALF, HALF)],
    "overlapping": [(0, HALF), (HALF - 1, HALF), (NBYTES - 1, 1)],
    "around another": [(THIRD, THIRD), (0, NBYTES)],
    "within another": [(0, NBYTES - 10), (THIRD, 10)],
    "touching three": [(0, THIRD), (2 * THIRD, NBYTES - 2 * THIRD), (THIRD - 1, THIRD + 2)],
}
HONEST = [(2 * THIRD, NBYTES - 2 * THIRD), (0, THIRD), (THIRD, THIRD)]


def received(pieces: Sequence[tuple[int, int]], *, shared: bool) -> torch.Tensor:
    """Offer a message and send these pieces of it, bytes or regions; return what was received. Raises as the wait."""
    message = torch.arange(NBYTES).remainder(251).to(torch.uint8)
    with HostileMember(SECRET, local=shared) as sender, meshes(1) as (mesh,):
        group = mesh.install(DataView(number=1, members=(mesh.endpoint, sender.endpoint)))
        line = sender.join([mesh.endpoint], 1)[0]
        target = torch.zeros(NBYTES, dtype=torch.uint8)
        operation = group.receive(target, 1)
        check = sign_message("receive", target, 1).check ^ group.order
        place = {"view": 1, "group": WORLD, "slot": POINT_TO_POINT, "check": check, "total": NBYTES}
        line.sendall(frame(Header(Kind.OFFER, **place)))
        sender.hear("w0", Kind.GRANT)
        if shared:
            descriptor = memfd(1 << 20)
            os.pwrite(descriptor, b"\1", 8)
            os.pwrite(descriptor, (7).to_bytes(8, "little"), 4096 - 64)
            os.pwrite(descriptor, bytes(message), 4096)
            hostile.shoot(line, [(region_frame(Kind.SEGMENT, RegionRef(1, 0, 0, 1 << 20), view=1), (descriptor,))])
            os.close(descriptor)
        for offset, nbytes in pieces:
            header = Header(Kind.DATA, offset=offset, length=nbytes, **place)
            if shared:
                region = RegionRef(1, 4096, 7, nbytes)  # a piece need not lie where it belongs
                shot = region_frame(Kind.STAGED, region, offset=offset, **place)
            else:
                shot = data_frame(header, bytes(message[offset : offset + nbytes]))
            hostile.shoot(line, [(shot, ())])
        operation.wait(WAIT_S)
        return target


@pytest.mark.parametrize("shared", [False, True], ids=["bytes", "regions"])
@pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES)
def test_a_piece_that_comes_twice_ends_the_connection(pieces: list[tuple[int, int]], shared: bool) -> None:
    with pytest.raises(CollectiveAborted, match="came twice") as caught:
        received(pieces, shared=shared)
    assert caught.value.culprit == "evil"


def test_pieces_may_come_in_any_order() -> None:
    assert torch.equal(received(HONEST, shared=False), torch.arange(NBYTES).remainder(251).to(torch.uint8))
    received(HONEST, shared=True)
