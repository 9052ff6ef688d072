"""Small messages: everybody sends its value to everybody, and reduces all of them in rank order. One step.

Two members do so with large ones as well: no byte more is sent than in two phases, and as nothing is overwritten before
all is there, nothing has to be saved.
All members reduce the same values in the same order, so results are bit-equal on all.
"""

import torch
from torch import Tensor

from elastic_run.collectives.algorithms.arithmetic import reduce_parts
from elastic_run.collectives.channel import Channel
from elastic_run.collectives.operation import Algorithm
from elastic_run.collectives.reduction import Reduction


def all_reduce(io: Channel, data: Tensor, reduction: Reduction) -> Algorithm:
    """Reduce `data` (one-dimensional, any length) over all members, in place."""
    sends = [io.send(rank, 0, data) for rank in io.others]
    parts = [data if rank == io.rank else io.scratch(data.numel(), data.dtype) for rank in range(io.size)]
    yield [*sends, *(io.receive(rank, 0, parts[rank]) for rank in io.others)]
    reduce_parts(data, parts, reduction)


def barrier(io: Channel) -> Algorithm:
    """End when every member has begun."""
    nothing = torch.empty(0, dtype=torch.uint8)
    for rank in io.others:
        io.send(rank, 0, nothing)
    yield [io.receive(rank, 0, nothing) for rank in io.others]
