"""All-reduce along the fixed tree over logical ranks: bit-equal results for every placement of the ranks on members.

Each member owns a slice of the elements. It gets its slice of every block's partial, merges them in the tree's order
(exact.py), rounds once, and gives the result to all: as in the plain all-reduces, with partials in place of values.
When every member brings one partial, the bytes moved are theirs too; but 16-bit floats travel as float32 where a block
has several ranks: rounding them between would make the placement show.
Invariants (tests/integration/test_tree_exact.py):
1. The partials are never written; an output that is one of them is written last, or restored.
2. What members hold is known to all before anything is merged: a rank missing or brought twice is a mismatch.
Not here: the order of the merges (exact.py, dyadic.py); the choice of the transport (selection.py).
"""

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from elastic_run.collectives import exact
from elastic_run.collectives.algorithms.arithmetic import PIECE_BYTES
from elastic_run.collectives.algorithms.flows import packed
from elastic_run.collectives.algorithms.piped import reduced
from elastic_run.collectives.algorithms.streamed import Room, meet
from elastic_run.collectives.channel import Channel
from elastic_run.collectives.dyadic import Block
from elastic_run.collectives.errors import CollectiveMismatch
from elastic_run.collectives.exact import Exact, Placement, Schedule
from elastic_run.collectives.messages import Fetch
from elastic_run.collectives.native import streamable
from elastic_run.collectives.operation import Algorithm
from elastic_run.collectives.partition import slices
from elastic_run.collectives.pending import Pending
from elastic_run.collectives.reduction import Reduction, accumulator_dtype, combine, finish
from elastic_run.collectives.selection import (
    PIPE_MEMBERS_MAX,
    SHARED_ONCE_READ_BYTES_MAX,
    STREAM_BYTES_MIN,
    Method,
)

PLACEMENT, STAGED, REDUCED, FIRST = 0, 0, 1, 0  # slots; passes of messages count from FIRST
"""Each way begins at slot 0, as every operation does, so that members who mean different ones see it; `other_slots` lie
between what members tell each other and the way they then go."""
ALIGN_BYTES = 64
THROUGH_MEMORY = (Method.SHARED, Method.SHARED_ONCE)
PASS_BYTES = 16 << 20
"""Of partials that an owner receives before it merges them. Higher: more cold memory; lower: more messages."""


def all_reduce(io: Channel, work: Exact) -> Algorithm:
    """Reduce everybody's partials into everybody's output."""
    placement = work.placement
    if _may_stream(work):
        io.queue_to_stream()  # before anything is waited for
    if work.one_host and placement is None and io.size > 1:
        # Memory can say itself what is in it. All choose alike, by what the partials of any placement stay below.
        wide = accumulator_dtype(work.output.dtype, work.reduction)
        method = work.choose(work.output.numel() * wide.itemsize * work.world)
        if method in (Method.EXCHANGE, *THROUGH_MEMORY):
            yield from _here(io, work, method)
            return
    if placement is None:
        placement = yield from _tell(io, work)
        io.other_slots()
    method = work.choose(max(work.nbytes(blocks) for blocks in placement))
    if method is Method.EXCHANGE or io.size == 1:
        io.leave_queue()
        yield from _exchange(io, work, placement)
    elif method in THROUGH_MEMORY:
        if _may_stream(work) and _even(work, placement):
            room = yield from meet(io, work.output.nbytes)
            if room.able:
                yield from _stream(room, work, placement)
                return
            room.leave()
            io.other_slots()
        io.leave_queue()
        yield from _shared(io, work, placement, whole=method is Method.SHARED_ONCE)
    else:
        if io.size <= PIPE_MEMBERS_MAX and _may_stream(work) and _even(work, placement):
            plan = exact.schedule(placement, work.world)
            source, out, divisor = _flowing(work)
            if (yield from reduced(io, source, out, packed(plan.steps, plan.bringers), divisor)):
                _land(work, out)
                return
            io.other_slots()
        io.leave_queue()
        yield from _messages(io, work, placement)


def merge(out: Tensor, parts: Sequence[Tensor], plan: Schedule, work: Exact, *, in_place: bool = False) -> None:
    """Write the tree's result of all blocks' parts, ascending, to `out`, piece by piece.

    `out` overlaps none of them, or (`in_place`) is one of them and overlaps no other.
    """
    wide = accumulator_dtype(out.dtype, work.reduction)
    step = PIECE_BYTES // out.element_size()
    direct = wide is out.dtype and not in_place
    scratch = [torch.empty(min(step, out.numel()), dtype=wide) for _ in range(plan.buffers - direct)]
    for start in range(0, out.numel(), step):
        piece = slice(start, min(start + step, out.numel()))
        target = out[piece]
        buffers = [target] * direct + [buffer[: target.numel()] for buffer in scratch]
        for into, left, right in plan.steps:
            one = parts[left][piece] if left >= 0 else buffers[~left]
            other = parts[right][piece] if right >= 0 else buffers[~right]
            combine(buffers[into], one, other, work.reduction)
        finish(target, buffers[0] if plan.steps else parts[0][piece], work.reduction, work.world)


def _tell(io: Channel, work: Exact) -> Generator[Sequence[Pending], None, Placement]:
    """Exchange who brings which blocks. Raises CollectiveMismatch unless that is every logical rank once."""
    said = exact.to_bytes(tuple(work.partials), work.world)
    heard = torch.empty((io.size, work.world), dtype=torch.uint8)
    for rank in io.others:
        io.send(rank, PLACEMENT, said)
    yield [io.receive(rank, PLACEMENT, heard[rank]) for rank in io.others]
    heard[io.rank] = said
    return _agreed(io, work, heard)


def _agreed(io: Channel, work: Exact, said: Iterable[Tensor]) -> Placement:
    placement = tuple(exact.from_bytes(row) for row in said)
    problem = exact.disagreement(placement, work.world, io.members)
    if problem is not None:
        raise CollectiveMismatch(problem)
    return placement


# Small: everybody gets everything -------------------------------------------------------------------------------------


def _exchange(io: Channel, work: Exact, placement: Placement) -> Algorithm:
    """Send all partials to all; everybody merges everything. One step."""
    plan = exact.schedule(placement, work.world)
    packed = [torch.empty(_extent(work, blocks) if io.size > 1 else 0, dtype=torch.uint8) for blocks in placement]
    parts: dict[Block, Tensor] = dict(work.partials)
    for rank in io.others:
        parts.update(_views(packed[rank], work, placement[rank]))
    if io.size > 1:
        for block, place in _views(packed[io.rank], work, placement[io.rank]).items():
            place.copy_(work.partials[block])
    for rank in io.others:
        io.send(rank, STAGED, packed[io.rank])
    yield [io.receive(rank, STAGED, packed[rank]) for rank in io.others]
    out = _aside(work)
    merge(out, [parts[block] for block in plan.blocks], plan, work)
    _land(work, out)


# One host: shared memory ----------------------------------------------------------------------------------------------


def _here(io: Channel, work: Exact, method: Method) -> Algorithm:
    """Without knowing the placement: as a stream where all turn out to bring one partial of the output's type."""
    if not _may_stream(work):
        yield from _shared(io, work, None, whole=method is not Method.SHARED)
        return
    said = exact.to_bytes(tuple(work.partials), work.world)
    room = yield from meet(io, work.output.nbytes, said)
    placement = _agreed(io, work, room.said(len(said)))
    if _even(work, placement) and room.able:
        yield from _stream(room, work, placement)
    else:
        room.leave()
        io.other_slots()
        method = work.choose(max(map(work.nbytes, placement)))
        yield from _shared(io, work, placement, whole=method is not Method.SHARED)


def _may_stream(work: Exact) -> bool:
    """Say whether a stream is worth to meet for; the same on all members."""
    return work.output.nbytes >= STREAM_BYTES_MIN and streamable(work.output.dtype, work.reduction)


def _even(work: Exact, placement: Placement) -> bool:
    """Say whether everybody brings one partial of the output's type."""
    return all(len(blocks) == 1 and work.carry(blocks[0]) is work.output.dtype for blocks in placement)


def _stream(room: Room, work: Exact, placement: Placement) -> Algorithm:
    plan = exact.schedule(placement, work.world)
    source, out, divisor = _flowing(work)
    yield from room.reduce(source, out, packed(plan.steps, plan.bringers), divisor)
    _land(work, out)


def _flowing(work: Exact) -> tuple[Tensor, Tensor, int]:
    """Return the one partial, where its reduction goes, and what it is divided by."""
    (partial,) = work.partials.values()
    out = work.output if partial.data_ptr() == work.output.data_ptr() else _aside(work)
    return partial, out, work.world if work.reduction is Reduction.AVG else 1


def _shared(io: Channel, work: Exact, placement: Placement | None, *, whole: bool) -> Algorithm:
    """Stage all partials, and what they are; merge where all lies.

    `whole`: everything is staged, so that everybody can merge everything: one step less, for little or for two members.
    Else the own slice of a partial is staged nowhere: nobody else wants it.
    """
    blocks = tuple(work.partials)
    shares = _shares(work, io.size)
    header = -(-work.world // ALIGN_BYTES) * ALIGN_BYTES
    nbytes = header + max(_extent(work, blocks), _result_stop(work, blocks, shares[io.rank]))
    region = yield from io.allocate(nbytes)
    region.tensor[: work.world].copy_(exact.to_bytes(blocks, work.world))
    staged = _views(region.tensor[header:], work, blocks)
    for block, place in staged.items():
        for share in [slice(None)] if whole else [shares[rank] for rank in io.others]:
            place[share].copy_(work.partials[block][share])
    for rank in io.others:
        io.publish(rank, STAGED, region)
    fetches = {rank: io.fetch(rank, STAGED) for rank in io.others}
    yield list(fetches.values())
    memories = {rank: io.view(rank, fetch) for rank, fetch in fetches.items()} | {io.rank: region.tensor}
    if placement is None:
        placement = _agreed(io, work, [memories[rank][: work.world] for rank in range(io.size)])
    here = _Here(
        shares=shares,
        placement=placement,
        plan=exact.schedule(placement, work.world),
        memories={rank: memory[header:] for rank, memory in memories.items()},
        staged=staged,
        fetches=fetches,
    )
    small = max(map(work.nbytes, placement)) * io.size <= SHARED_ONCE_READ_BYTES_MAX
    if whole and (max(map(len, placement)) == 1 or small):
        _merge_whole(io, work, here)
    else:
        yield from _merge_slices(io, work, here)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Here:
    """What lies in the members' shared memory."""

    shares: list[slice]
    placement: Placement
    plan: Schedule
    memories: dict[int, Tensor]
    """Per rank, from the first partial on; uint8."""
    staged: dict[Block, Tensor]
    fetches: dict[int, Fetch]

    def parts(self, work: Exact, share: slice) -> list[Tensor]:
        """Return that share of all blocks' partials, ascending; this member's where they were given."""
        found = dict(work.partials)
        for other in self.fetches:
            found.update(_views(self.memories[other], work, self.placement[other]))
        return [found[block][share] for block in self.plan.blocks]

    def result(self, work: Exact, rank: int) -> Tensor:
        """Return where the result of a member's share lies: in the place of that share of its first partial."""
        stop = _result_stop(work, self.placement[rank], self.shares[rank])
        nbytes = _length(self.shares[rank]) * work.output.element_size()
        return self.memories[rank][stop - nbytes : stop].view(work.output.dtype)


def _merge_whole(io: Channel, work: Exact, here: _Here) -> None:
    """Merge everything; a partial that is the output is restored when some memory was taken back meanwhile."""
    twin = _twin(work)
    out = work.output if twin is not None else _aside(work)
    try:
        merge(out, here.parts(work, slice(None)), here.plan, work, in_place=twin is not None)
        for rank, fetch in here.fetches.items():
            io.give_back(rank, fetch)
    except Exception:
        if twin is not None:
            out.copy_(here.staged[twin])
        raise
    _land(work, out)


def _merge_slices(io: Channel, work: Exact, here: _Here) -> Algorithm:
    """Merge the own slice, read the others' results. The own slice of the output is written last."""
    nothing = torch.empty(0, dtype=torch.uint8)
    own = here.shares[io.rank]
    result = here.result(work, io.rank)
    merge(result, here.parts(work, own), here.plan, work)
    for rank in io.others:
        io.send(rank, REDUCED, nothing)
    yield [io.receive(rank, REDUCED, nothing) for rank in io.others]
    twin = _twin(work)
    out = work.output if twin is not None else _aside(work)
    others = [here.shares[rank] for rank in io.others]
    try:
        for rank, share in zip(io.others, others, strict=True):
            out[share].copy_(here.result(work, rank))
            io.give_back(rank, here.fetches[rank])
    except Exception:
        if twin is not None:
            for share in others:
                out[share].copy_(here.staged[twin][share])
        raise
    out[own].copy_(result)
    _land(work, out)


def _result_stop(work: Exact, blocks: Sequence[Block], share: slice) -> int:
    start = share.start * work.carry(blocks[0]).itemsize if blocks else 0
    return start + _length(share) * work.output.element_size()


# Messages -------------------------------------------------------------------------------------------------------------


def _messages(io: Channel, work: Exact, placement: Placement) -> Algorithm:
    """Pass by pass: send each owner its slice of the partials, merge, send the result. The next pass is under way."""
    out = _aside(work)
    passes = _Passes(io, work, placement, out)
    arriving: list[Pending] = passes.start(0)
    for number in range(passes.count):
        pendings = arriving
        if number + 1 < passes.count:
            arriving = passes.start(number + 1)
        yield pendings
        passes.end(number)
    yield passes.waits
    _land(work, out)


class _Passes:
    """Where the messages of each pass go. Two passes are under way at once, in two sets of memory.

    In its pass a partial has the slot of its number among its member's blocks, the result has the last slot.
    """

    def __init__(self, io: Channel, work: Exact, placement: Placement, out: Tensor) -> None:
        self._io, self._work, self._placement, self._out = io, work, placement, out
        self._plan = plan = exact.schedule(placement, work.world)
        self._slots = 1 + max(len(blocks) for blocks in placement)
        align = ALIGN_BYTES // out.element_size()
        nbytes = out.numel() * sum(work.carry(block).itemsize for block in plan.blocks)
        bounds = slices(out.numel(), max(1, -(-nbytes // (PASS_BYTES * io.size))), align)
        self.count = len(bounds)
        self._shares = [
            [slice(start + first, start + last) for first, last in slices(stop - start, io.size, align)]
            for start, stop in bounds
        ]
        longest = max(_length(shares[io.rank]) for shares in self._shares)
        self._memory = [
            {
                block: torch.empty(longest, dtype=work.carry(block))
                for block, rank in zip(plan.blocks, plan.bringers, strict=True)
                if rank != io.rank
            }
            for _ in range(min(2, self.count))
        ]
        self.waits: list[Pending] = []
        """What the operation's end needs."""

    def start(self, number: int) -> list[Pending]:
        """Begin all of a pass but the sending of its result. Returns what merging it needs."""
        io, shares, first = self._io, self._shares[number], FIRST + number * self._slots
        memory = self._parts(number)
        arriving: list[Pending] = []
        for rank in io.others:
            arriving += [
                io.receive(rank, first + slot, memory[block]) for slot, block in enumerate(self._placement[rank])
            ]
            self.waits.append(io.receive(rank, first + self._slots - 1, self._out[shares[rank]]))
            for slot, partial in enumerate(self._work.partials.values()):
                self.waits.append(io.send(rank, first + slot, partial[shares[rank]]))
        return arriving

    def end(self, number: int) -> None:
        """Merge what has arrived and send the result."""
        reduced = self._out[self._shares[number][self._io.rank]]
        parts = self._parts(number)
        merge(reduced, [parts[block] for block in self._plan.blocks], self._plan, self._work)
        slot = FIRST + (number + 1) * self._slots - 1
        self.waits += [self._io.send(rank, slot, reduced) for rank in self._io.others]

    def _parts(self, number: int) -> dict[Block, Tensor]:
        own = self._shares[number][self._io.rank]
        received = {block: memory[: _length(own)] for block, memory in self._memory[number % 2].items()}
        return received | {block: partial[own] for block, partial in self._work.partials.items()}


# Memory ---------------------------------------------------------------------------------------------------------------


def _shares(work: Exact, members: int) -> list[slice]:
    align = ALIGN_BYTES // work.output.element_size()
    return [slice(*bounds) for bounds in slices(work.output.numel(), members, align)]


def _length(share: slice) -> int:
    return int(share.stop - share.start)


def _offsets(work: Exact, blocks: Sequence[Block]) -> list[int]:
    """Return where in a member's memory each of its partials begins, and where the last one ends; aligned."""
    offsets = [0]
    for block in blocks:
        nbytes = work.output.numel() * work.carry(block).itemsize
        offsets.append(offsets[-1] + -(-nbytes // ALIGN_BYTES) * ALIGN_BYTES)
    return offsets


def _extent(work: Exact, blocks: Sequence[Block]) -> int:
    return _offsets(work, blocks)[-1]


def _views(memory: Tensor, work: Exact, blocks: Sequence[Block]) -> dict[Block, Tensor]:
    """Return each of a member's partials in its memory (uint8)."""
    views = {}
    for block, start in zip(blocks, _offsets(work, blocks), strict=False):
        carried = work.carry(block)
        views[block] = memory[start : start + work.output.numel() * carried.itemsize].view(carried)
    return views


def _twin(work: Exact) -> Block | None:
    """Return the one partial that is the output itself, when no other overlaps it."""
    overlapping = [block for block, partial in work.partials.items() if _overlap(partial, work.output)]
    if len(overlapping) != 1:
        return None
    block = overlapping[0]
    partial = work.partials[block]
    same = partial.data_ptr() == work.output.data_ptr() and partial.dtype is work.output.dtype
    return block if same else None


def _aside(work: Exact) -> Tensor:
    """Return the output, or memory for it while a partial lies there."""
    if any(_overlap(partial, work.output) for partial in work.partials.values()):
        return torch.empty_like(work.output)
    return work.output


def _land(work: Exact, out: Tensor) -> None:
    if out is not work.output:
        work.output.copy_(out)


def _overlap(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() < other.data_ptr() + other.nbytes and other.data_ptr() < one.data_ptr() + one.nbytes
