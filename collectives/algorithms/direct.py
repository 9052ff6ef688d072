"""Operations in which every pair of members exchanges its message directly: one step, each byte sent once.

Point-to-point messages as well.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from elastic_run.collectives.algorithms.arithmetic import reduce_parts
from elastic_run.collectives.channel import Channel
from elastic_run.collectives.operation import Algorithm
from elastic_run.collectives.pending import Pending
from elastic_run.collectives.reduction import Reduction


def broadcast(io: Channel, data: Tensor, root: int) -> Algorithm:
    """Send the root's `data` to every member; others receive aside, so that an interruption leaves theirs whole."""
    if io.rank == root:
        yield [io.send(rank, 0, data) for rank in io.others]
        return
    received = torch.empty_like(data)
    yield [io.receive(root, 0, received)]
    data.copy_(received)


def reduce(io: Channel, data: Tensor, root: int, reduction: Reduction) -> Algorithm:
    """Reduce everybody's `data` into the root's."""
    if io.rank != root:
        yield [io.send(root, 0, data)]
        return
    received = torch.empty((io.size, data.numel()), dtype=data.dtype)
    yield [io.receive(rank, 0, received[rank]) for rank in io.others]
    result = torch.empty_like(data)
    reduce_parts(result, [data if rank == io.rank else received[rank] for rank in range(io.size)], reduction)
    data.copy_(result)


def all_gather(io: Channel, output: Tensor, data: Tensor) -> Algorithm:
    """Put every member's `data` into `output`, by rank."""
    places = output.view(io.size, -1)
    waits: list[Pending] = []
    for rank in io.others:
        waits.append(io.receive(rank, 0, places[rank]))
        waits.append(io.send(rank, 0, data))
    yield waits
    places[io.rank].copy_(data)


def reduce_scatter(io: Channel, output: Tensor, data: Tensor, reduction: Reduction) -> Algorithm:
    """Reduce this member's row of everybody's `data` into `output`."""
    rows = data.view(io.size, -1)
    received = torch.empty_like(rows)
    waits: list[Pending] = []
    for rank in io.others:
        waits.append(io.receive(rank, 0, received[rank]))
        waits.append(io.send(rank, 0, rows[rank]))
    yield waits
    result = torch.empty_like(output)
    parts = [rows[rank] if rank == io.rank else received[rank] for rank in range(io.size)]
    reduce_parts(result, parts, reduction)
    output.copy_(result)


def all_to_all(io: Channel, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> Algorithm:
    """Send `inputs[rank]` to each rank and receive `outputs[rank]` from it."""
    waits: list[Pending] = []
    for rank in io.others:
        waits.append(io.receive(rank, 0, outputs[rank]))
        waits.append(io.send(rank, 0, inputs[rank]))
    yield waits
    outputs[io.rank].copy_(inputs[io.rank])


def gather(io: Channel, output: Tensor | None, data: Tensor, root: int) -> Algorithm:
    """Put every member's `data` into the root's `output`, by rank."""
    if io.rank != root:
        yield [io.send(root, 0, data)]
        return
    assert output is not None
    places = output.view(io.size, -1)
    yield [io.receive(rank, 0, places[rank]) for rank in io.others]
    places[io.rank].copy_(data)


def scatter(io: Channel, output: Tensor, data: Tensor | None, root: int) -> Algorithm:
    """Give each member its row of the root's `data`."""
    if io.rank != root:
        yield [io.receive(root, 0, output)]
        return
    assert data is not None
    rows = data.view(io.size, -1)
    yield [io.send(rank, 0, rows[rank]) for rank in io.others]
    output.copy_(rows[io.rank])


def send(io: Channel, data: Tensor, to: int) -> Algorithm:
    yield [io.send(to, 0, data)]


def receive(io: Channel, data: Tensor, source: int | None) -> Algorithm:
    """Receive from `source`; None: from whoever sends first."""
    waiting = io.receive_any(data) if source is None else io.receive(source, 0, data)
    yield [waiting]
    io.tell_source(waiting)
