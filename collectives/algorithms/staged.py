"""Large operations other than all-reduce, all members on one host: staged once in shared memory, read by everybody.

Each byte is copied in once and out once per reader; by messages it would be copied in once for every reader.
A member waits for memory only while it holds none, or while those it waits for need none: no two wait for each other.
Not here: all-reduce (shared.py).
"""

import torch
from torch import Tensor

from elastic_run.collectives.algorithms.arithmetic import reduce_parts
from elastic_run.collectives.algorithms.chunks import Saved, shares_of
from elastic_run.collectives.algorithms.shared import REDUCED, stage
from elastic_run.collectives.channel import Channel
from elastic_run.collectives.messages import Fetch
from elastic_run.collectives.operation import Algorithm
from elastic_run.collectives.partition import slices
from elastic_run.collectives.pending import Pending
from elastic_run.collectives.reduction import Reduction

PIECE_BYTES = 4 << 20
"""Of a broadcast: one is read while the next is staged."""


def broadcast(io: Channel, data: Tensor, root: int) -> Algorithm:
    """Copy the root's `data` to every member, piece by piece; an interruption leaves the others' as they were.

    A piece's slot is its number.
    """
    pieces = -(-data.numel() * data.element_size() // PIECE_BYTES)
    places = [slice(*bounds) for bounds in slices(data.numel(), max(1, pieces))]
    if io.rank == root:
        for number, place in enumerate(places):
            region = yield from io.allocate(data[place].numel() * data.element_size())
            region.tensor.view(data.dtype).copy_(data[place])
            for rank in io.others:
                io.publish(rank, number, region)
            io.release(region)
        return
    fetches = [io.fetch(root, number, data[place].numel() * data.element_size()) for number, place in enumerate(places)]
    saved = Saved(data, io.scratch(data.numel(), data.dtype))
    try:
        for fetch, place in zip(fetches, places, strict=True):
            yield [fetch]
            saved.save(place).copy_(io.view(root, fetch).view(data.dtype))
            io.give_back(root, fetch)
    except BaseException:
        saved.restore()
        raise


def all_gather(io: Channel, output: Tensor, data: Tensor) -> Algorithm:
    """Put every member's `data` into `output`, by rank."""
    places = output.view(io.size, -1)
    _, fetches = yield from stage(io, data, [slice(None)])
    yield list(fetches.values())
    for rank, fetch in fetches.items():
        places[rank].copy_(io.view(rank, fetch).view(data.dtype))
        io.give_back(rank, fetch)
    places[io.rank].copy_(data)


def reduce_scatter(io: Channel, output: Tensor, data: Tensor, reduction: Reduction) -> Algorithm:
    """Reduce this member's row of everybody's `data` into `output`, which may be that row."""
    rows = output.numel()
    shares = [slice(rank * rows, (rank + 1) * rows) for rank in range(io.size)]
    _, fetches = yield from stage(io, data, [shares[rank] for rank in io.others])
    yield list(fetches.values())
    result = io.scratch(rows, data.dtype)
    reduce_parts(result, _parts(io, data, fetches, shares[io.rank]), reduction)
    for rank, fetch in fetches.items():
        io.give_back(rank, fetch)
    output.copy_(result)


def reduce(io: Channel, data: Tensor, root: int, reduction: Reduction) -> Algorithm:
    """Reduce everybody's `data` into the root's: each member reduces its share, the root reads them."""
    shares = shares_of(data.numel(), data.element_size(), io.size)
    own = shares[io.rank]
    mine, fetches = yield from stage(io, data, [shares[rank] for rank in io.others])
    nothing = torch.empty(0, dtype=torch.uint8)
    ends: list[Pending] = [io.receive(rank, REDUCED, nothing) for rank in io.others] if io.rank == root else []
    yield list(fetches.values())
    reduce_parts(mine[own], _parts(io, data, fetches, own), reduction)
    if io.rank == root:
        result = io.scratch(data.numel(), data.dtype)
        yield ends
        for rank, fetch in fetches.items():
            result[shares[rank]].copy_(io.view(rank, fetch).view(data.dtype)[shares[rank]])
        result[own].copy_(mine[own])
    for rank, fetch in fetches.items():
        io.give_back(rank, fetch)
    if io.rank == root:
        data.copy_(result)
    else:
        yield [io.send(root, REDUCED, nothing)]


def _parts(io: Channel, data: Tensor, fetches: dict[int, Fetch], place: slice) -> list[Tensor]:
    return [
        data[place] if rank == io.rank else io.view(rank, fetches[rank]).view(data.dtype)[place]
        for rank in range(io.size)
    ]
