"""Operations that want more than there is, of shared memory, buffers or descriptors: none waits for ever."""

import errno
import gc
import os
import random
import select
import socket
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from mesh_workers import SECRET, Crew, Site, meshes, run, until
from stress.collectives_churn import footprint

from elastic_run.collectives import listening
from elastic_run.collectives.algorithms import chunks
from elastic_run.collectives.dyadic import blocks_of
from elastic_run.collectives.endpoint import DataView, Endpoint, this_host
from elastic_run.collectives.errors import CollectiveAborted, CollectiveError
from elastic_run.collectives.group import Group
from elastic_run.collectives.mesh import Mesh
from elastic_run.collectives.operation import Operation
from elastic_run.collectives.options import MIB, MeshOptions
from elastic_run.collectives.selection import Method
from elastic_run.runtime.protocol.errors import PeerError

OPERATION_S = 30.0
TINY = MeshOptions(arena_bytes=2 * MIB, stage_bytes=MIB // 8)
NUMEL = 30_003
"""Float32: eight such values, as many as operations of a group run at once, fill half of the tiny arena."""


# The ring -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [3, 4])
def test_a_ring_with_more_chunks_per_share_than_are_asked_for_ahead_does_not_stop(
    monkeypatch: pytest.MonkeyPatch, size: int, dtype: torch.dtype
) -> None:
    """Every member may have a share of partial results to pass on before the next one asks for the first of them."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES_MIN", 40 << 10)  # large enough to be asked for
    monkeypatch.setattr(chunks, "CHUNK_BYTES_MAX", 40 << 10)

    def program(site: Site) -> bool:
        group = site.install()
        numel = 3 * chunks.AHEAD * size * (40 << 10) // dtype.itemsize
        tensor = (torch.arange(numel).remainder(5) + group.rank).to(dtype)
        group.all_reduce([tensor], method=Method.RING, timeout_s=OPERATION_S).wait()
        wanted = torch.arange(numel).remainder(5) * size + sum(range(size))
        return torch.equal(tensor, wanted.to(dtype))

    assert all(run(size, program, MeshOptions(shared_memory=False)))


# Shared memory --------------------------------------------------------------------------------------------------------


def install(members: list[Mesh], number: int = 1) -> list[Group]:
    view = DataView(number=number, members=tuple(mesh.endpoint for mesh in members))
    return [mesh.install(view) for mesh in members]


def fills(group: Group, numel: int = 300_000) -> tuple[torch.Tensor, Operation]:
    """Begin an operation that takes more than half of the tiny arena."""
    value = torch.full((numel,), 1.0 + group.rank)
    return value, group.all_reduce([value], method=Method.SHARED)


def settle(running: list[tuple[torch.Tensor, Operation]], wanted: float) -> None:
    for value, operation in running:
        operation.wait(OPERATION_S)
        assert bool((value == wanted).all())


def test_operations_that_each_hold_what_the_other_waits_for_both_end() -> None:
    with meshes(2, TINY) as members:
        install(members)
        running = [fills(members[rank].group(name)) for rank, name in ((0, "one"), (1, "two"))]
        until(lambda: all(mesh.arena.used_bytes > MIB for mesh in members))
        running += [fills(members[rank].group(name)) for rank, name in ((0, "two"), (1, "one"))]
        settle(running, 3.0)
        until(lambda: all(mesh.arena.used_bytes == 0 for mesh in members))
        assert all(mesh.arena.segment_bytes <= TINY.arena_bytes for mesh in members)


@pytest.mark.parametrize("method", [Method.SHARED, Method.PAIRWISE], ids=["operation", "messages"])
def test_memory_is_not_kept_from_what_a_member_waits_for_before_it_takes_part_in_the_rest(method: Method) -> None:
    """Messages go through shared memory piece by piece: they need it as well."""
    with meshes(2, TINY) as members:
        install(members)
        early = fills(members[0].group("early"), 520_000)  # all of it
        values = [torch.full((300_000,), 1.0 + rank) for rank in range(2)]
        running = [members[rank].group("late").all_reduce([values[rank]], method=method) for rank in range(2)]
        settle(list(zip(values, running, strict=True)), 3.0)
        settle([early, fills(members[1].group("early"), 520_000)], 3.0)


def test_what_is_read_late_holds_up_whoever_sends_more() -> None:
    """A root ends when all is staged: without that it would stage one value after the other for members far behind."""
    with meshes(2, TINY) as members:
        groups = install(members)
        values = [[torch.full((NUMEL,), 1.0 + rank) for _ in range(40)] for rank in range(2)]
        sent = [groups[0].broadcast([value], 0) for value in values[0]]
        until(lambda: members[0].arena.used_bytes > 3 * MIB // 2)
        members[0].engine.call(lambda: None)
        assert members[0].arena.segment_bytes <= TINY.arena_bytes
        received = [groups[1].broadcast([value], 0) for value in values[1]]
        settle(list(zip(values[0] + values[1], sent + received, strict=True)), 1.0)


def test_more_memory_than_peers_map_is_an_error_of_that_operation() -> None:
    options = MeshOptions(arena_bytes=2 * MIB, peer_segments_bytes=4 * MIB)
    with meshes(2, options) as members:
        install(members)
        running = [fills(members[0].group(name)) for name in ("one", "two")]
        value, refused = fills(members[0].group("three"))
        with pytest.raises(CollectiveError, match="peers map no more than"):
            refused.wait(OPERATION_S)
        assert bool((value == 1.0).all())
        settle([*running, *(fills(members[1].group(name)) for name in ("two", "one"))], 3.0)


Start = Callable[[Group, torch.Tensor], Operation]
STARTS: dict[str, Start] = {
    "all_reduce": lambda group, value: group.all_reduce([value]),
    "shared": lambda group, value: group.all_reduce(
        [value], method=Method.SHARED if group.layout.one_host else Method.HIERARCHICAL
    ),
    "pairwise": lambda group, value: group.all_reduce([value], method=Method.PAIRWISE),
    "exact": lambda group, value: group.all_reduce_exact(
        value, {blocks_of([group.rank], group.size)[0]: value}, group.size
    ),
    "q8": lambda group, value: group.all_reduce_q8([value]),
    "broadcast": lambda group, value: group.broadcast([value], 0),
    "reduce": lambda group, value: group.reduce([value], 0),
}


def opposite_orders(site: Site) -> int:
    """Start operations of two groups, every other member those of the second first; return the most memory taken."""
    site.install()
    groups = [site.mesh.group(name) for name in ("one", "two")]
    taken_bytes = 0
    for seed in range(6):
        chance = random.Random(seed)
        kinds = [[chance.choice(list(STARTS)) for _ in range(10)] for _ in groups]
        running = []
        for number in (0, 1) if site.rank % 2 else (1, 0):
            for kind in kinds[number]:
                value = torch.full((NUMEL,), 1.0 + site.rank)
                running.append((kind, value, STARTS[kind](groups[number], value)))
        for kind, value, operation in running:
            operation.wait(OPERATION_S)
            torch.testing.assert_close(value, torch.full((NUMEL,), expected(kind, site)), rtol=0.02, atol=0.0)
        taken_bytes = max(taken_bytes, site.mesh.arena.segment_bytes)
        site.mesh.engine.call(site.mesh.arena.validate)
    groups[0].barrier().wait(OPERATION_S)
    return taken_bytes


def expected(kind: str, site: Site) -> float:
    if kind == "broadcast":
        return 1.0
    if kind == "reduce" and site.rank:
        return 1.0 + site.rank
    return float(sum(range(1, len(site.endpoints) + 1)))


@pytest.mark.parametrize("hosts", [(0, 0), (0, 0, 0), (0, 0, 1, 1)], ids=["two", "three", "two hosts"])
def test_groups_in_opposite_orders_end_with_too_little_memory(hosts: tuple[int, ...]) -> None:
    options = [replace(TINY, host_key=f"made up host {host}", arena_bytes=MIB) for host in hosts]
    with Crew(len(hosts), opposite_orders, options) as crew:
        assert max(crew.results()) <= 3 * MIB


def test_a_segment_nobody_was_told_of_yet_is_not_announced_after_its_end() -> None:
    """Its descriptor would be another file by then. The peer is one that never answers the greeting."""
    name = f"silent-{os.getpid()}"
    with meshes(1) as (mesh,), socket.socket(socket.AF_UNIX) as silent:
        silent.bind(b"\0" + name.encode())
        silent.listen()
        other = Endpoint(worker="w1", host=this_host(), address="127.0.0.1", port=1, unix=name)
        group = mesh.install(DataView(number=1, members=(mesh.endpoint, other)))
        running = fills(group)[1]
        until(lambda: mesh.arena.used_bytes > 0)
        mesh.install(DataView(number=2, members=(mesh.endpoint, other)))
        with pytest.raises(CollectiveAborted):
            running.wait(OPERATION_S)
        assert any(item.descriptors for item in mesh._peers["w1"]._control)
        mesh.engine.call(mesh.arena.trim)
        assert not any(item.descriptors for item in mesh._peers["w1"]._control)


# Descriptors ----------------------------------------------------------------------------------------------------------


def no_room(*_: object) -> None:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def test_a_mesh_that_cannot_listen_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[socket.socket] = []
    listener = listening._listener

    def only_tcp(family: socket.AddressFamily, address: tuple[str, int] | bytes) -> socket.socket:
        if family == socket.AF_UNIX:
            no_room()
        made.append(listener(family, address))
        return made[-1]

    gc.collect()
    before = footprint()
    monkeypatch.setattr(listening, "_listener", only_tcp)
    with pytest.raises(PeerError, match="unix socket"):
        Mesh("w0", SECRET)
    assert [sock.fileno() for sock in made] == [-1]
    monkeypatch.undo()
    for place, what in ((select, "epoll"), (os, "eventfd")):
        with monkeypatch.context() as patch:
            patch.setattr(place, what, no_room)
            with pytest.raises(PeerError, match="Too many open files"):
                Mesh("w0", SECRET)
    gc.collect()
    assert footprint() == before
