"""q8: an all-reduce that moves 8-bit codes instead of floats, bit-equal on all members.

Every member encodes each slice for its owner; the owner decodes all parts, its own as well, sums them in float32 in
rank order and encodes the sum; everybody, the owner too, decodes those same bytes. So what a member gets does not
depend on whether it owns the slice. The value is only written after the last byte has come.
Invariants (tests/integration/test_q8.py): 1. bit-equal results, whatever the transport; 2. the documented error bound.
Not here: the code and its error bound (quantised.py).
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from elastic_run.collectives.channel import Channel
from elastic_run.collectives.operation import Algorithm
from elastic_run.collectives.partition import slices
from elastic_run.collectives.pending import Pending
from elastic_run.collectives.quantised import BLOCK_ELEMENTS, CHUNK_ELEMENTS, decode, encode, encoded_bytes
from elastic_run.collectives.reduction import Reduction, accumulate, finish
from elastic_run.collectives.selection import Method

PARTS, RESULT = 0, 1  # slots


def all_reduce(io: Channel, data: Tensor, reduction: Reduction, method: Method) -> Algorithm:
    """Sum or average `data` (one-dimensional, contiguous floats) over all members, in place."""
    shares = [slice(*bounds) for bounds in slices(data.numel(), io.size, BLOCK_ELEMENTS)]
    stops = [0]
    for share in shares:
        stops.append(stops[-1] + encoded_bytes(share.stop - share.start))
    places = [slice(*bounds) for bounds in pairwise(stops)]
    codes = torch.empty(stops[-1], dtype=torch.uint8)
    if method in (Method.SHARED, Method.SHARED_ONCE) and io.size > 1:
        yield from _shared(io, data, codes, shares, places, reduction)
    else:
        yield from _messages(io, data, codes, shares, places, reduction)
    for share, place in zip(shares, places, strict=True):
        _decode(codes[place], data[share])


def _messages(
    io: Channel, data: Tensor, codes: Tensor, shares: list[slice], places: list[slice], reduction: Reduction
) -> Algorithm:
    """Bring the encoded result to `codes`: slices to their owners, results to everybody."""
    own = codes[places[io.rank]]
    sent = torch.empty_like(codes)
    received = torch.empty((io.size, own.numel()), dtype=torch.uint8)
    received[io.rank] = _encode(data[shares[io.rank]], sent[places[io.rank]])
    waits: list[Pending] = []
    for rank in io.others:
        waits.append(io.receive(rank, PARTS, received[rank]))
        waits.append(io.send(rank, PARTS, _encode(data[shares[rank]], sent[places[rank]])))
    yield waits
    _sum(own, list(received), shares[io.rank].stop - shares[io.rank].start, reduction)
    waits = []
    for rank in io.others:
        waits.append(io.receive(rank, RESULT, codes[places[rank]]))
        waits.append(io.send(rank, RESULT, own))
    yield waits


def _shared(
    io: Channel, data: Tensor, codes: Tensor, shares: list[slice], places: list[slice], reduction: Reduction
) -> Algorithm:
    """Bring the encoded result to `codes` through shared memory: parts for others, then the own slice's result."""
    region = yield from io.allocate(codes.numel())
    for rank in io.others:
        _encode(data[shares[rank]], region.tensor[places[rank]])
        io.publish(rank, PARTS, region)
    own = codes[places[io.rank]]
    fetches = {rank: io.fetch(rank, PARTS, region.nbytes) for rank in io.others}
    nothing = torch.empty(0, dtype=torch.uint8)
    ends = [io.receive(rank, RESULT, nothing) for rank in io.others]
    mine = _encode(data[shares[io.rank]], torch.empty_like(own))
    yield list(fetches.values())
    regions = {rank: io.view(rank, fetch) for rank, fetch in fetches.items()}
    parts = [mine if rank == io.rank else regions[rank][places[io.rank]] for rank in range(io.size)]
    _sum(own, parts, shares[io.rank].stop - shares[io.rank].start, reduction)
    region.tensor[places[io.rank]].copy_(own)
    for rank in io.others:
        io.send(rank, RESULT, nothing)
    yield ends
    for rank, theirs in regions.items():
        codes[places[rank]].copy_(theirs[places[rank]])
        io.give_back(rank, fetches[rank])


def _sum(out: Tensor, parts: Sequence[Tensor], numel: int, reduction: Reduction) -> None:
    """Write the code of the sum of encoded parts, in their order, or of its average, to `out`."""
    total, one = torch.empty((2, min(numel, CHUNK_ELEMENTS)))
    for piece, place in _pieces(numel):
        here = total[: piece.stop - piece.start]
        decode(parts[0][place], here)
        for part in parts[1:]:
            decode(part[place], one[: len(here)])
            accumulate(here, one[: len(here)], Reduction.SUM)
        finish(here, here, reduction, len(parts))
        encode(here, out[place])


def _encode(source: Tensor, out: Tensor) -> Tensor:
    for piece, place in _pieces(source.numel()):
        encode(source[piece], out[place])
    return out


def _decode(source: Tensor, out: Tensor) -> None:
    for piece, place in _pieces(out.numel()):
        decode(source[place], out[piece])


def _pieces(numel: int) -> Iterator[tuple[slice, slice]]:
    """Yield elements, and the bytes of their code: codes of a slice are those of its pieces, one behind the other.

    A piece holds whole blocks, so it has the code it would have within the slice; sums of pieces stay in the cache.
    """
    for start in range(0, numel, CHUNK_ELEMENTS):
        stop = min(start + CHUNK_ELEMENTS, numel)
        yield slice(start, stop), slice(encoded_bytes(start), encoded_bytes(stop))
