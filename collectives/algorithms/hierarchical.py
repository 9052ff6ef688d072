"""Several hosts with several members: reduced in each host's memory, then between hosts, then spread by memory.

The value is cut into as many slices as the fullest host has members. On each host one member owns a slice (its member
number s mod members), reduces it over the host, exchanges it with the owners on the other hosts (each of which reduces
one part), and leaves the result in its region for the others of its host. So every member of a host carries a share
of the traffic, and a byte leaves a host once per phase, however many members the host has.
Between hosts partial results travel in the accumulator's type: 16-bit floats are rounded once.
The region is what an interrupted operation is restored from, as in shared.py: the value is overwritten at the end.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from elastic_run.collectives.algorithms.arithmetic import combine_parts
from elastic_run.collectives.algorithms.chunks import shares_of
from elastic_run.collectives.channel import Channel
from elastic_run.collectives.messages import Fetch
from elastic_run.collectives.operation import Algorithm
from elastic_run.collectives.pending import Pending
from elastic_run.collectives.reduction import Reduction, accumulator_dtype, finish

STAGED, READY, BETWEEN = 0, 1, 2
"""Slots; from BETWEEN on, two for each slice: a part, and a result."""


class Hosts:
    """Who owns which slice where. The same on every member."""

    def __init__(self, hosts: tuple[int, ...]) -> None:
        """`hosts`: by rank, numbered from 0."""
        self.members = [[rank for rank, host in enumerate(hosts) if host == number] for number in range(max(hosts) + 1)]
        self.slices = max(len(members) for members in self.members)

    def owner(self, host: int, number: int) -> int:
        """Return the rank on `host` that owns slice `number`."""
        return self.members[host][number % len(self.members[host])]

    def owned_by(self, host: int, rank: int) -> list[int]:
        return [number for number in range(self.slices) if self.owner(host, number) == rank]


def all_reduce(io: Channel, data: Tensor, reduction: Reduction) -> Algorithm:
    """Reduce `data` (one-dimensional, contiguous) over all members, in place."""
    hosts = Hosts(io.layout.hosts)
    here = io.layout.hosts[io.rank]
    mates = [rank for rank in hosts.members[here] if rank != io.rank]
    shares = shares_of(data.numel(), data.element_size(), hosts.slices)
    owned = hosts.owned_by(here, io.rank)
    region = yield from io.allocate(data.numel() * data.element_size())
    mine = region.tensor.view(data.dtype)
    mine.copy_(data)
    for rank in mates:
        io.publish(rank, STAGED, region)
    fetches = {rank: io.fetch(rank, STAGED, region.nbytes) for rank in mates}
    nothing = torch.empty(0, dtype=torch.uint8)
    ready = [io.receive(rank, READY, nothing) for rank in mates]
    yield list(fetches.values())
    theirs = {rank: io.view(rank, fetch).view(data.dtype) for rank, fetch in fetches.items()}
    results = [io.scratch(shares[number].stop - shares[number].start, data.dtype) for number in owned]
    for number, result in zip(owned, results, strict=True):
        share = shares[number]
        partial = io.scratch(len(result), accumulator_dtype(data.dtype, reduction))
        values = [(mine if rank == io.rank else theirs[rank])[share] for rank in hosts.members[here]]
        combine_parts(partial, values, reduction)
        yield from _between(io, result, partial, number, hosts, reduction)
    # Only now: until here the region holds what the value is restored from, and what the mates reduce.
    for number, result in zip(owned, results, strict=True):
        mine[shares[number]].copy_(result)
    for rank in mates:
        io.send(rank, READY, nothing)
    yield list(ready)
    _spread(io, data, fetches, theirs, [(shares[n], hosts.owner(here, n)) for n in range(hosts.slices)], mine)
    for number, result in zip(owned, results, strict=True):
        data[shares[number]].copy_(result)


def _between(
    io: Channel, result: Tensor, partial: Tensor, number: int, hosts: Hosts, reduction: Reduction
) -> Algorithm:
    """Reduce a slice over its owners on all hosts: each reduces one part of it and sends that to the others."""
    here = io.layout.hosts[io.rank]
    others = {host: hosts.owner(host, number) for host in range(len(hosts.members)) if host != here}
    parts = shares_of(len(partial), result.element_size(), len(hosts.members))
    slot = BETWEEN + 2 * number
    own = parts[here]
    arriving = io.scratch(len(hosts.members) * (own.stop - own.start), partial.dtype).view(len(hosts.members), -1)
    waits: list[Pending] = []
    ends: list[Pending] = []
    for host, rank in others.items():
        waits.append(io.receive(rank, slot, arriving[host]))
        ends.append(io.receive(rank, slot + 1, result[parts[host]]))
        ends.append(io.send(rank, slot, partial[parts[host]]))
    yield waits
    total = io.scratch(own.stop - own.start, partial.dtype)
    values = [partial[own] if host == here else arriving[host] for host in range(len(hosts.members))]
    combine_parts(total, values, reduction)
    finish(result[own], total, reduction, io.size)
    for rank in others.values():
        ends.append(io.send(rank, slot + 1, result[own]))
    yield ends


def _spread(
    io: Channel,
    data: Tensor,
    fetches: Mapping[int, Fetch],
    theirs: Mapping[int, Tensor],
    owners: list[tuple[slice, int]],
    mine: Tensor,
) -> None:
    """Copy what the mates own into the data, or leave the data as it was."""
    try:
        for share, rank in owners:
            if rank != io.rank:
                data[share].copy_(theirs[rank][share])
        for rank, fetch in fetches.items():
            io.give_back(rank, fetch)
    except BaseException:
        for share, rank in owners:
            if rank != io.rank:
                data[share].copy_(mine[share])
        raise
