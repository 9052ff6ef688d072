"""What a tree-exact all-reduce works on: who brings which blocks of the logical world, and in which order they merge.

Each member brings one partial per block of the logical ranks it hosts; all members together bring every rank once.
Which placement of ranks on members that is changes the traffic, never a bit of the result.
Invariants (tests/property/test_exact_property.py):
1. A schedule makes of any blocks that hold every rank once the bits that `BlockAccumulator` makes of them.
2. What a member says of its blocks is read back as it was said, or refused.
Not here: the tree itself (dyadic.py); sending partials and results (algorithms/tree_exact.py).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from elastic_run.collectives.dyadic import Block, blocks_of, carry_dtype, combine_order
from elastic_run.collectives.flat import Flat
from elastic_run.collectives.memory import bytes_of
from elastic_run.collectives.reduction import Reduction, accumulator_dtype
from elastic_run.collectives.selection import Method

WORLD_MAX = 16384
"""Logical ranks. A member's block list, a byte for each, is one small message."""
SCHEDULES_KEPT = 64
"""Placements change with views, operations repeat: planning is paid once per placement."""

Placement = tuple[tuple[Block, ...], ...]
"""Per member, by rank: its blocks, ascending."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Exact:
    """One member's part in the operation. Tensors are one-dimensional, contiguous and of one length."""

    output: Tensor
    partials: dict[Block, Tensor]
    """Ascending; each in `carry_dtype`."""
    world: int
    reduction: Reduction
    placement: Placement | None
    """None: members tell each other first."""
    one_host: bool
    """Whether all members share memory."""
    choose: Callable[[int], Method]
    """Say how to move so many bytes per member."""

    def nbytes(self, blocks: Iterable[Block]) -> int:
        """Return the bytes of the partials of `blocks`."""
        return sum(self.output.numel() * self.carry(block).itemsize for block in blocks)

    def carry(self, block: Block) -> torch.dtype:
        return carry_dtype(block, self.world, self.output.dtype, self.reduction)


def checked_partials(
    output: Tensor, partials: Mapping[Block, Tensor], world: int, reduction: Reduction
) -> dict[Block, Tensor]:
    """Return a member's partials as `Exact` has them. Raises ValueError for what cannot be meant."""
    if not 1 <= world <= WORLD_MAX:
        raise ValueError(f"a world of {world} logical ranks is outside 1..{WORLD_MAX}")
    accumulator_dtype(output.dtype, reduction)
    blocks = tuple(sorted(partials))
    _check_blocks(blocks, world)
    flats = {}
    for block in blocks:
        partial, carried = partials[block], carry_dtype(block, world, output.dtype, reduction)
        if partial.dtype is not carried:
            raise ValueError(f"the partial of {block} is {partial.dtype}, not {carried}")
        if partial.numel() != output.numel():
            raise ValueError(f"the partial of {block} has {partial.numel()} elements, the output {output.numel()}")
        flats[block] = Flat([partial]).data
    return flats


def checked_placement(
    placement: Sequence[Sequence[Block]], members: Sequence[str], rank: int, own: Iterable[Block], world: int
) -> Placement:
    """Return a placement that the caller claims to know. Raises ValueError unless it is one, and agrees with `own`."""
    known = tuple(tuple(sorted(blocks)) for blocks in placement)
    if len(known) != len(members) or known[rank] != tuple(sorted(own)):
        raise ValueError(
            f"a placement of {len(known)} members where rank {rank} of {len(members)} brings {sorted(own)}"
        )
    problem = disagreement(known, world, members)
    if problem is not None:
        raise ValueError(problem)
    return known


# Telling each other ---------------------------------------------------------------------------------------------------


@lru_cache(maxsize=SCHEDULES_KEPT)
def to_bytes(blocks: tuple[Block, ...], world: int) -> Tensor:
    """Return a byte per logical rank: 0 where no block starts, else log2 of its size, plus one. Not to be written."""
    said = torch.zeros(world, dtype=torch.uint8)
    for block in blocks:
        said[block.start] = block.size.bit_length()
    return said


def from_bytes(said: Tensor) -> tuple[Block, ...]:
    """Return the blocks a member named, ascending. Whether they are any is for `disagreement` to say."""
    return _blocks_said(bytes(bytes_of(said)))


@lru_cache(maxsize=SCHEDULES_KEPT)
def _blocks_said(said: bytes) -> tuple[Block, ...]:
    return tuple(Block(start, 1 << (code - 1)) for start, code in enumerate(said) if code)


@lru_cache(maxsize=SCHEDULES_KEPT)
def _problem_rank(placement: Placement, world: int) -> tuple[int, tuple[int, ...]] | None:
    """Return the first logical rank that is not brought once, and who brings it; None: all are."""
    bringers: list[list[int]] = [[] for _ in range(world)]
    for member, blocks in enumerate(placement):
        for block in blocks:
            for rank in range(block.start, min(block.start + block.size, world)):
                bringers[rank].append(member)
    return next(((rank, tuple(who)) for rank, who in enumerate(bringers) if len(who) != 1), None)


def disagreement(placement: Placement, world: int, names: Sequence[str]) -> str | None:
    """Say what is wrong with a placement, naming the members; None: every rank is brought exactly once."""
    for name, blocks in zip(names, placement, strict=True):
        try:
            _check_blocks(blocks, world)
        except ValueError as error:
            return f"{name} brings what is no part of the tree: {error}"
    problem = _problem_rank(placement, world)
    if problem is None:
        return None
    rank, bringers = problem
    who = " and ".join(names[member] for member in bringers) or "nobody"
    return f"logical rank {rank} of {world} must be brought by one member, and is by {who}"


@lru_cache(maxsize=SCHEDULES_KEPT)
def _check_blocks(blocks: tuple[Block, ...], world: int) -> None:
    held = 0
    for start, size in blocks:
        if not held <= start < world or size < 1:
            raise ValueError(f"{Block(start, size)} overlaps another block, or is outside of {world} ranks")
        held = min(start + size, world)
        if blocks_of(range(start, held), world) != (Block(start, size),):
            raise ValueError(f"{Block(start, size)} is no block of a tree over {world} ranks, or goes by another name")


# Merging --------------------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """Merge two halves into buffer `out`. A half from 0 up is the part of that number, below it is buffer ~half."""

    out: int
    left: int
    right: int


class Schedule(NamedTuple):
    """How the parts of all blocks, ascending, become one, in buffer 0."""

    blocks: tuple[Block, ...]
    bringers: tuple[int, ...]
    """Rank of the member that brings each block."""
    steps: tuple[Step, ...]
    buffers: int


@lru_cache(maxsize=SCHEDULES_KEPT)
def schedule(placement: Placement, world: int) -> Schedule:
    """Return the merges of a placement without disagreement, with as few buffers as they need, about log2(world)."""
    brought = sorted((block, rank) for rank, blocks in enumerate(placement) for block in blocks)
    place = {block: number for number, (block, _) in enumerate(brought)}
    steps: list[Step] = []
    spare: list[int] = []
    buffers = 0
    for merge in combine_order([block for block, _ in brought], world):
        left, right = place.pop(merge.left), place.pop(merge.right)
        spare += [~half for half in (right, left) if half < 0]
        if not spare:
            spare.append(buffers)
            buffers += 1
        out = spare.pop()
        steps.append(Step(out, left, right))
        place[merge.out] = ~out
    last = steps[-1].out if steps else 0
    renamed = tuple(
        Step(_swap(out, last), _swap_half(left, last), _swap_half(right, last)) for out, left, right in steps
    )
    return Schedule(tuple(block for block, _ in brought), tuple(rank for _, rank in brought), renamed, max(1, buffers))


def _swap(buffer: int, last: int) -> int:
    """Let the last buffer be number 0."""
    return {last: 0, 0: last}.get(buffer, buffer)


def _swap_half(half: int, last: int) -> int:
    return half if half >= 0 else ~_swap(~half, last)
