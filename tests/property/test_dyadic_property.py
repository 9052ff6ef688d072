"""The tree's result, bit for bit, is the recursive definition's: for every placement and every order of arrival."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from elastic_run.collectives.dyadic import Block, BlockAccumulator, blocks_of, combine_order, leaves
from elastic_run.collectives.partition import slices
from elastic_run.collectives.reduction import Reduction, accumulator_dtype, combine, finish

WORLD_MAX = 16
NUMEL = 83  # vector body and scalar tail of torch's kernels, cut anywhere
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
KINDS = [
    *[(dtype, reduction) for dtype in FLOATS for reduction in (Reduction.SUM, Reduction.AVG, Reduction.PRODUCT)],
    *[(dtype, reduction) for dtype in FLOATS for reduction in (Reduction.MIN, Reduction.MAX)],
    (torch.complex64, Reduction.AVG),
    (torch.int32, Reduction.PRODUCT),
    (torch.uint16, Reduction.SUM),
    (torch.bool, Reduction.SUM),
    (torch.float8_e5m2, Reduction.AVG),
]


def values(seed: int, world: int, dtype: torch.dtype) -> list[Tensor]:
    """One tensor per rank: magnitudes far apart, so that another order of summation would show."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randint(-6, 7, (world, NUMEL), generator=generator)
    if not (dtype.is_floating_point or dtype.is_complex):
        return list((spread + 6).to(dtype))
    width = 2 * NUMEL if dtype.is_complex else NUMEL
    numbers = torch.randn(world, width, generator=generator, dtype=torch.float64)
    numbers[:, :NUMEL] *= 2.0**spread
    numbers[:, ::11] *= 0.0  # zeros of both signs
    numbers[:, 5] = torch.inf
    numbers[0, 7] = torch.nan
    return list((torch.view_as_complex(numbers.view(world, NUMEL, 2)) if dtype.is_complex else numbers).to(dtype))


def brute_force(leaves_: list[Tensor], start: int, size: int, reduction: Reduction) -> Tensor | None:
    """The definition: a node is the reduction of its halves; a half without ranks does not count."""
    if size == 1:
        return leaves_[start].to(accumulator_dtype(leaves_[start].dtype, reduction)) if start < len(leaves_) else None
    left = brute_force(leaves_, start, size // 2, reduction)
    right = brute_force(leaves_, start + size // 2, size // 2, reduction)
    if left is None or right is None:
        return left
    combine(out := torch.empty_like(left), left, right, reduction)
    return out


def bits(tensor: Tensor) -> Tensor:
    """Bit pattern, all NaNs alike."""
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    if real.is_floating_point():
        real = torch.where(real.isnan(), torch.nan, real.to(torch.float64))  # exact, keeps the sign of zero
    return real.contiguous().view(torch.uint8)


def hosted(placement: list[int]) -> dict[int, list[int]]:
    """Worker -> logical ranks."""
    return {worker: [r for r, w in enumerate(placement) if w == worker] for worker in sorted(set(placement))}


def through_workers(
    leaves_: list[Tensor], placement: list[int], reduction: Reduction, shuffle: random.Random
) -> Tensor:
    """Do what the workers do: sum the hosted blocks, send slices to owners, sum there as they arrive."""
    world, dtype = len(leaves_), leaves_[0].dtype
    partials: dict[Block, Tensor] = {}
    for ranks in hosted(placement).values():
        worker = BlockAccumulator(world, dtype, reduction)
        for rank in shuffle.sample(ranks, len(ranks)):
            scratch = leaves_[rank].clone()
            worker.add(rank, scratch)
            scratch.zero_()
        assert tuple(worker.blocks()) == blocks_of(ranks, world)
        partials |= worker.blocks()
    out = torch.empty_like(leaves_[0])
    for start, stop in slices(NUMEL, len(set(placement))):
        owner = BlockAccumulator(world, dtype, reduction)
        for block in shuffle.sample(sorted(partials), len(partials)):
            owner.add_block(block, partials[block][start:stop], may_overwrite=shuffle.random() < 0.5)
        finish(out[start:stop], owner.root(), reduction, world)
    return out


@settings(max_examples=100, deadline=None)
@given(
    data=st.data(),
    world=st.integers(1, WORLD_MAX),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**32),
    workers=st.integers(1, WORLD_MAX),
    shuffle=st.randoms(use_true_random=False),
)
def test_the_result_is_the_same_bits_for_every_placement(
    data: st.DataObject,
    world: int,
    kind: tuple[torch.dtype, Reduction],
    seed: int,
    workers: int,
    shuffle: random.Random,
) -> None:
    dtype, reduction = kind
    leaves_ = values(seed, world, dtype)
    exact = brute_force(leaves_, 0, 1 << (world - 1).bit_length(), reduction)
    assert exact is not None
    finish(expected := torch.empty_like(leaves_[0]), exact, reduction, world)
    placement = data.draw(st.lists(st.integers(0, workers - 1), min_size=world, max_size=world))
    assert torch.equal(bits(through_workers(leaves_, placement, reduction, shuffle)), bits(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("world", range(1, WORLD_MAX + 1))
def test_every_number_of_workers_gives_the_same_bits(dtype: torch.dtype, world: int) -> None:
    leaves_, shuffle = values(world, world, dtype), random.Random(world)
    results = []
    for workers in range(1, world + 1):
        contiguous = [rank * workers // world for rank in range(world)]
        dealt_out = [rank % workers for rank in range(world)]
        results += [through_workers(leaves_, p, Reduction.SUM, shuffle) for p in (contiguous, dealt_out)]
    assert all(torch.equal(bits(result), bits(results[0])) for result in results)


@given(world=st.integers(1, 200), data=st.data())
def test_blocks_are_the_fewest_and_merges_rebuild_the_tree(world: int, data: st.DataObject) -> None:
    workers = data.draw(st.integers(1, 8))
    placement = data.draw(st.lists(st.integers(0, workers - 1), min_size=world, max_size=world))
    everything: list[Block] = []
    for ranks in hosted(placement).values():
        blocks = blocks_of(ranks, world)
        everything += blocks
        assert [r for b in blocks for r in range(b.start, b.start + leaves(b, world))] == ranks
        parents = [Block(b.start & ~b.size, 2 * b.size) for b in blocks if leaves(b, world) < world]
        assert all(not set(range(p.start, p.start + leaves(p, world))) <= set(ranks) for p in parents)
    held = set(everything)
    for merge in combine_order(everything, world):
        assert merge.left.start < merge.right.start and leaves(merge.out, world) == leaves(merge.left, world) + leaves(
            merge.right, world
        )
        held -= {merge.left, merge.right}
        held.add(merge.out)
    assert held == {Block(0, 1 << (world - 1).bit_length())}


@given(exponent=st.integers(0, 4), share=st.integers(0, 4))
def test_shares_of_a_power_of_two_travel_as_one_partial(exponent: int, share: int) -> None:
    size = 1 << min(share, exponent)
    world = 1 << exponent
    assert all(len(blocks_of(range(start, start + size), world)) == 1 for start in range(0, world, size))
