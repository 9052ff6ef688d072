"""Large messages without shared memory: every member owns a share, gets it from all, reduces it, and sends it to all.

The bytes on the wire are those of a ring, (W-1)/W of the value each way and phase, but the order of the reduction is
that of the ranks, in the accumulator's type. Chunk by chunk: while one is reduced, the next are on their way.
Results are bit-equal on all members.
"""

from collections.abc import Callable

from torch import Tensor

from elastic_run.collectives.algorithms.arithmetic import reduce_parts
from elastic_run.collectives.algorithms.chunks import AHEAD, Chunks, Saved, shares_of
from elastic_run.collectives.channel import Channel
from elastic_run.collectives.operation import Algorithm
from elastic_run.collectives.pending import Pending
from elastic_run.collectives.reduction import Reduction

PART, RESULT, KINDS = 0, 1, 2
"""The slot of a chunk is KINDS * chunk + kind."""


def all_reduce(io: Channel, data: Tensor, reduction: Reduction) -> Algorithm:
    """Reduce `data` (one-dimensional, contiguous) over all members, in place."""
    shares = shares_of(data.numel(), data.element_size(), io.size)
    chunks = Chunks(shares, data.element_size())
    own = shares[io.rank]
    reduced = io.scratch(own.stop - own.start, data.dtype)
    saved = Saved(data, io.scratch(data.numel(), data.dtype))
    ends: list[Pending] = []

    def gather(chunk: int) -> None:
        # The owner can only have a result after it has this member's part: nothing that is still to be sent is
        # overwritten.
        for rank in io.others:
            ends.append(io.receive(rank, KINDS * chunk + RESULT, saved.save(chunks[rank][chunk])))

    def spread(chunk: int, result: Tensor) -> None:
        for rank in io.others:
            ends.append(io.send(rank, KINDS * chunk + RESULT, result))

    try:
        yield from reduce_shares(io, reduced, data, chunks, reduction, gather, spread)
        yield ends
    except BaseException:
        saved.restore()
        raise
    data[own].copy_(reduced)


def reduce_scatter(io: Channel, output: Tensor, data: Tensor, reduction: Reduction) -> Algorithm:
    """Reduce this member's row of everybody's `data` into `output`, which may be that row."""
    rows = output.numel()
    chunks = Chunks([slice(rank * rows, (rank + 1) * rows) for rank in range(io.size)], data.element_size())
    reduced = io.scratch(rows, data.dtype)
    yield from reduce_shares(io, reduced, data, chunks, reduction)
    output.copy_(reduced)


def reduce(io: Channel, data: Tensor, root: int, reduction: Reduction) -> Algorithm:
    """Reduce everybody's `data` into the root's: each member reduces its share and sends it there."""
    shares = shares_of(data.numel(), data.element_size(), io.size)
    chunks = Chunks(shares, data.element_size())
    own = shares[io.rank]
    result = io.scratch(data.numel() if io.rank == root else own.stop - own.start, data.dtype)
    mine = result[own] if io.rank == root else result
    ends: list[Pending] = []

    def collect(chunk: int) -> None:
        if io.rank == root:
            for rank in io.others:
                ends.append(io.receive(rank, KINDS * chunk + RESULT, result[chunks[rank][chunk]]))

    def deliver(chunk: int, reduced: Tensor) -> None:
        if io.rank != root:
            ends.append(io.send(root, KINDS * chunk + RESULT, reduced))

    yield from reduce_shares(io, mine, data, chunks, reduction, collect, deliver)
    yield ends
    if io.rank == root:
        data.copy_(result)


def reduce_shares(
    io: Channel,
    out: Tensor,
    data: Tensor,
    chunks: Chunks,
    reduction: Reduction,
    asked: Callable[[int], None] = lambda _chunk: None,
    reduced: Callable[[int, Tensor], None] = lambda _chunk, _result: None,
) -> Algorithm:
    """Reduce this member's share of everybody's `data` into `out`.

    `asked(chunk)` is called when a chunk has been asked for, `reduced(chunk, result)` when its result is there.
    """
    mine, first = chunks[io.rank], chunks.shares[io.rank].start
    depth = min(AHEAD, chunks.count)
    places = io.scratch(depth * io.size * chunks.longest, data.dtype).view(depth, io.size, chunks.longest)
    sends: list[Pending] = []
    parts: list[list[Tensor]] = []
    waits: list[list[Pending]] = []

    def ask(chunk: int) -> None:
        place = places[chunk % depth][:, : mine[chunk].stop - mine[chunk].start]
        parts.append([data[mine[chunk]] if rank == io.rank else place[rank] for rank in range(io.size)])
        waits.append([io.receive(rank, KINDS * chunk + PART, parts[chunk][rank]) for rank in io.others])
        for rank in io.others:
            sends.append(io.send(rank, KINDS * chunk + PART, data[chunks[rank][chunk]]))
        asked(chunk)

    for chunk in range(depth):
        ask(chunk)
    for chunk, part in enumerate(mine):
        yield waits[chunk]
        result = out[part.start - first : part.stop - first]
        reduce_parts(result, parts[chunk], reduction)
        reduced(chunk, result)
        if chunk + depth < chunks.count:
            ask(chunk + depth)
    yield sends
