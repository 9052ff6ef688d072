"""All members on one host: each puts its value into its own shared memory, reduces its slice over all, reads the rest.

A member's region has the shape of its value. The other members' slices hold its contribution to them; its own slice
holds, later, the reduced result. So the region is also what an interrupted in-place operation is restored from: the own
slice of the value is overwritten last, when nothing can fail any more.
Source: the direct shared-memory scheme; per member one copy in, one reduction, one copy out.
"""

from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from elastic_run.collectives.algorithms.arithmetic import reduce_parts
from elastic_run.collectives.algorithms.chunks import shares_of
from elastic_run.collectives.channel import Channel
from elastic_run.collectives.messages import Fetch
from elastic_run.collectives.native import copy_through
from elastic_run.collectives.operation import Algorithm
from elastic_run.collectives.pending import Pending
from elastic_run.collectives.reduction import Reduction

STAGED, REDUCED = 0, 1  # slots


def all_reduce_once(io: Channel, data: Tensor, reduction: Reduction) -> Algorithm:
    """The same in one step, for fewer members or bytes: everybody reads everything and reduces it for itself."""
    mine, fetches = yield from stage(io, data, [slice(None)])
    yield list(fetches.values())
    theirs = {rank: io.view(rank, fetch).view(data.dtype) for rank, fetch in fetches.items()}
    try:
        reduce_parts(data, [data if rank == io.rank else theirs[rank] for rank in range(io.size)], reduction)
        for rank, fetch in fetches.items():
            io.give_back(rank, fetch)
    except Exception:
        data.copy_(mine)
        raise


def all_reduce(io: Channel, data: Tensor, reduction: Reduction) -> Algorithm:
    """Reduce `data` (one-dimensional, contiguous) over all members, in place."""
    region = yield from io.allocate(data.numel() * data.element_size())
    mine = region.tensor.view(data.dtype)
    shares = shares_of(data.numel(), data.element_size(), io.size)
    for rank in io.others:
        copy_through(mine[shares[rank]], data[shares[rank]])
        io.publish(rank, STAGED, region)
    fetches = {rank: io.fetch(rank, STAGED, region.nbytes) for rank in io.others}
    done = torch.empty(0, dtype=torch.uint8)
    ends = [io.receive(rank, REDUCED, done) for rank in io.others]
    yield list(fetches.values())
    theirs = {rank: io.view(rank, fetch).view(data.dtype) for rank, fetch in fetches.items()}
    own = shares[io.rank]
    parts = [(data if rank == io.rank else theirs[rank])[own] for rank in range(io.size)]
    reduce_parts(mine[own], parts, reduction)
    for rank in io.others:
        io.send(rank, REDUCED, done)
    yield ends
    try:
        for rank, fetch in fetches.items():
            copy_through(data[shares[rank]], theirs[rank][shares[rank]])
            io.give_back(rank, fetch)
    except Exception:
        for rank in io.others:
            data[shares[rank]].copy_(mine[shares[rank]])
        raise
    copy_through(data[own], mine[own])


def stage(
    io: Channel, data: Tensor, places: Sequence[slice]
) -> Generator[Sequence[Pending], None, tuple[Tensor, dict[int, Fetch]]]:
    """Show `places` of the data to everybody, and ask for everybody's: return what is shown, and the fetches by rank.

    What is shown lies in shared memory and has the data's shape.
    """
    region = yield from io.allocate(data.numel() * data.element_size())
    mine = region.tensor.view(data.dtype)
    for place in places:
        mine[place].copy_(data[place])
    for rank in io.others:
        io.publish(rank, STAGED, region)
    return mine, {rank: io.fetch(rank, STAGED, region.nbytes) for rank in io.others}
