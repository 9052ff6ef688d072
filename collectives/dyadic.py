"""The fixed binary tree over logical ranks: reductions whose bits do not depend on which worker hosts which rank.

A block is a node of the tree over 0..world-1: a power of two of consecutive ranks, starting at a multiple of its size.
Ranks from `world` on do not exist: a node without right child *is* its left child. A node that does so under several
names is always called by the largest. So the root is Block(0, size), size the power of two at or above `world`.
Each worker sums the blocks it hosts entirely, the owner of a slice sums the rest; both walk the same tree.
Invariants (tests/property/test_dyadic_property.py):
1. The root's bits are a function of the ranks' values alone: not of the placement, nor of the order of arrival
   (NaN payloads excepted: see reduction.py).
2. A tensor given to an accumulator is never written unless its giver said so.
Not here: the arithmetic (reduction.py), sending partials to a slice's owner (algorithms/).
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from elastic_run.collectives.reduction import Reduction, accumulator_dtype, combine


class Block(NamedTuple):
    """Logical ranks start..start+size-1, as far as they exist."""

    start: int
    size: int


class Merge(NamedTuple):
    """`out` is the reduction of its two halves."""

    out: Block
    left: Block
    right: Block


def blocks_of(ranks: Sequence[int], world: int) -> tuple[Block, ...]:
    """Return the fewest blocks that hold exactly `ranks`, ascending. Raises ValueError for a bad or repeated rank."""
    if len(set(ranks)) != len(ranks):
        raise ValueError(f"logical ranks {sorted(rank for rank, n in Counter(ranks).items() if n > 1)} are named twice")
    tops, _ = _pile((leaf(rank, world) for rank in sorted(ranks)), world)
    return tuple(tops)


def combine_order(blocks: Sequence[Block], world: int) -> list[Merge]:
    """Return the merges that make the root of `blocks`, halves before wholes.

    Raises ValueError unless the blocks, under their canonical names, hold every rank exactly once.
    """
    ascending, held = sorted(blocks), 0
    for block in ascending:
        _check(block, world)
        if block.start != held:
            raise ValueError(f"blocks {ascending} do not hold every rank below {world} once: see rank {held}")
        held = block.start + leaves(block, world)
    if held != world:
        raise ValueError(f"blocks {ascending} hold no rank from {held} on, of {world}")
    return _pile(ascending, world)[1]


def leaf(rank: int, world: int) -> Block:
    """Return the block of one rank. Raises ValueError when there is no such rank."""
    if not 0 <= rank < world:
        raise ValueError(f"logical rank {rank} is outside 0..{world - 1}")
    return _canonical(Block(rank, 1), world)


def leaves(block: Block, world: int) -> int:
    """Return how many ranks a block holds."""
    return min(block.start + block.size, world) - block.start


def carry_dtype(block: Block, world: int, dtype: torch.dtype, reduction: Reduction) -> torch.dtype:
    """Return the type in which a block's partial travels: the tensor's own for one rank, else the accumulator's."""
    return dtype if leaves(block, world) == 1 else accumulator_dtype(dtype, reduction)


class BlockAccumulator:
    """Reduces partials along the tree as they come, in any order; ascending ranks take log2(world) + 1 buffers."""

    def __init__(self, world: int, dtype: torch.dtype, reduction: Reduction = Reduction.SUM) -> None:
        if world < 1:
            raise ValueError(f"a world of {world} logical ranks has no tree")
        self._world = world
        self._dtype = dtype
        self._accumulator_dtype = accumulator_dtype(dtype, reduction)
        self._reduction = reduction
        self._numel: int | None = None
        self._held: dict[Block, _Held] = {}
        self._spare: list[Tensor] = []

    def add(self, rank: int, tensor: Tensor) -> None:
        """Take a logical rank's values; they are copied, so the tensor may change at once."""
        block, flat = leaf(rank, self._world), tensor.reshape(-1)
        self.add_block(block, flat)
        if block in self._held:  # it had nothing to merge with
            self._held[block] = _Held(self._buffer(flat, self._dtype).copy_(flat), ours=True)

    def add_block(self, block: Block, partial: Tensor, *, may_overwrite: bool = False) -> None:
        """Take a block's partial (in `carry_dtype`) without a copy: it must stay as it is until `clear`."""
        flat = partial.reshape(-1)
        self._check_partial(block, flat)
        held = _Held(flat, ours=may_overwrite)
        while (other := _sibling(block)) in self._held:
            waiting = self._held.pop(other)
            left, right = (held, waiting) if block < other else (waiting, held)
            held, block = self._merge(left, right), _parent(block, self._world)
        self._held[block] = held

    def blocks(self) -> dict[Block, Tensor]:
        """Return the partials held, ascending: 1-D, in `carry_dtype`, not to be written, good until the next call."""
        return {block: self._held[block].tensor for block in sorted(self._held)}

    def root(self) -> Tensor:
        """Return the reduction of all ranks, still to be finished. Raises ValueError while ranks are missing."""
        root = Block(0, 1 << (self._world - 1).bit_length())
        if root not in self._held:
            raise ValueError(f"of {self._world} logical ranks only those of {sorted(self._held)} are there")
        return self._held[root].tensor

    def clear(self) -> None:
        """Forget all values, keep the buffers for the next round."""
        self._spare += [held.tensor for held in self._held.values() if held.ours]
        self._held.clear()

    def _merge(self, left: "_Held", right: "_Held") -> "_Held":
        usable = [half.tensor for half in (left, right) if half.ours and half.tensor.dtype is self._accumulator_dtype]
        out = usable[0] if usable else self._buffer(left.tensor, self._accumulator_dtype)
        combine(out, left.tensor, right.tensor, self._reduction)
        self._spare += [half.tensor for half in (left, right) if half.ours and half.tensor is not out]
        return _Held(out, ours=True)

    def _buffer(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        for i, spare in enumerate(self._spare):
            if spare.dtype is dtype:
                return self._spare.pop(i)
        return torch.empty(like.numel(), dtype=dtype, device=like.device)

    def _check_partial(self, block: Block, partial: Tensor) -> None:
        _check(block, self._world)
        if any(_overlap(block, held) for held in self._held):
            raise ValueError(f"ranks of {block} were added before")
        expected = carry_dtype(block, self._world, self._dtype, self._reduction)
        if partial.dtype is not expected:
            raise ValueError(f"the partial of {block} is {partial.dtype}, not {expected}")
        if self._numel is None:
            self._numel = partial.numel()
        if partial.numel() != self._numel:
            raise ValueError(f"a partial of {partial.numel()} elements was added to an accumulator of {self._numel}")


class _Held(NamedTuple):
    tensor: Tensor
    ours: bool
    """We may write to it."""


def _pile(ascending: Iterable[Block], world: int) -> tuple[list[Block], list[Merge]]:
    """Merge neighbours as a binary counter carries. Returns what cannot merge further, and the merges made."""
    tops: list[Block] = []
    merges: list[Merge] = []
    for block in ascending:
        top = block
        while tops and tops[-1] == _sibling(top):
            merge = Merge(_parent(top, world), left=tops.pop(), right=top)
            merges.append(merge)
            top = merge.out
        tops.append(top)
    return tops, merges


def _canonical(block: Block, world: int) -> Block:
    """Return the largest name of a node: as long as it is a left half whose right half does not exist."""
    start, size = block
    while start % (2 * size) == 0 and start + size >= world and size < world:
        size *= 2
    return Block(start, size)


def _parent(block: Block, world: int) -> Block:
    return _canonical(Block(block.start & ~block.size, 2 * block.size), world)


def _sibling(block: Block) -> Block:
    return Block(block.start ^ block.size, block.size)


def _overlap(one: Block, other: Block) -> bool:
    return one.start < other.start + other.size and other.start < one.start + one.size


def _check(block: Block, world: int) -> None:
    start, size = block
    if size < 1 or size & (size - 1) or start % size or not 0 <= start < world or size >= 2 * world:
        raise ValueError(f"{block} is no block of a tree over {world} ranks")
    if _canonical(block, world) != block:
        raise ValueError(f"{block} is called {_canonical(block, world)} in a tree over {world} ranks")
