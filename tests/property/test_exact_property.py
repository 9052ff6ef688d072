"""Schedules merge as the tree says, for every way to bring a world's blocks; what members say of them is read back."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from elastic_run.collectives import exact
from elastic_run.collectives.dyadic import Block, BlockAccumulator, blocks_of, carry_dtype, leaf, leaves
from elastic_run.collectives.reduction import Reduction, combine

WORLD_MAX = 40
NAMES = [f"w{member}" for member in range(6)]


@st.composite
def placements(draw: st.DrawFn) -> tuple[int, exact.Placement]:
    """A world, and what each of some members brings: its ranks merged as far as they can be, or not at all."""
    world, members = draw(st.integers(1, WORLD_MAX)), draw(st.integers(1, len(NAMES)))
    host = draw(st.lists(st.integers(0, members - 1), min_size=world, max_size=world))
    hosted = [[rank for rank in range(world) if host[rank] == member] for member in range(members)]
    if draw(st.booleans()):
        return world, tuple(blocks_of(ranks, world) for ranks in hosted)
    return world, tuple(tuple(leaf(rank, world) for rank in ranks) for ranks in hosted)


@given(placements(), st.sampled_from([torch.float32, torch.bfloat16]))
@settings(deadline=None)
def test_a_schedule_makes_the_accumulators_bits_in_few_buffers(
    placed: tuple[int, exact.Placement], dtype: torch.dtype
) -> None:
    world, placement = placed
    generator = torch.Generator().manual_seed(world)
    plan = exact.schedule(placement, world)
    parts: list[Tensor] = []
    accumulator = BlockAccumulator(world, dtype)
    for block in plan.blocks:
        values = torch.randn(9, generator=generator) * 2.0 ** torch.randint(-9, 9, (9,), generator=generator)
        parts.append(values.to(carry_dtype(block, world, dtype, Reduction.SUM)))
        accumulator.add_block(block, parts[-1])
    before = [part.clone() for part in parts]
    buffers = [torch.full((9,), torch.nan) for _ in range(plan.buffers)]
    for out, left, right in plan.steps:
        halves = [parts[half] if half >= 0 else buffers[~half] for half in (left, right)]
        combine(buffers[out], *halves, Reduction.SUM)
    assert torch.equal(buffers[0] if plan.steps else parts[0], accumulator.root())
    assert all(map(torch.equal, parts, before))
    assert plan.buffers <= world.bit_length()
    assert all(block in placement[rank] for block, rank in zip(plan.blocks, plan.bringers, strict=True))


@given(placements())
@settings(deadline=None)
def test_block_lists_are_read_back(placed: tuple[int, exact.Placement]) -> None:
    world, placement = placed
    assert tuple(exact.from_bytes(exact.to_bytes(blocks, world)) for blocks in placement) == placement
    assert exact.disagreement(placement, world, NAMES[: len(placement)]) is None


@given(placements(), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_a_rank_brought_twice_or_by_nobody_is_named_with_its_members(
    placed: tuple[int, exact.Placement], chance: random.Random
) -> None:
    world, placement = placed
    names = NAMES[: len(placement)]
    giver = chance.choice([member for member, blocks in enumerate(placement) if blocks])
    block = chance.choice(placement[giver])
    without = [tuple(b for b in blocks if b != block) for blocks in placement]
    missing = exact.disagreement(tuple(without), world, names)
    assert missing is not None
    assert f"logical rank {block.start} of" in missing
    assert "nobody" in missing
    if len(placement) > 1:
        other = chance.choice([member for member in range(len(placement)) if member != giver])
        doubled = [tuple(sorted({*blocks, block})) if m == other else blocks for m, blocks in enumerate(placement)]
        twice = exact.disagreement(tuple(doubled), world, names)
        assert twice is not None
        assert names[giver] in twice and names[other] in twice


@given(st.binary(min_size=1, max_size=24))
def test_whatever_a_member_says_is_a_placement_or_refused(said: bytes) -> None:
    blocks = exact.from_bytes(torch.tensor(list(said), dtype=torch.uint8))
    if exact.disagreement((blocks,), len(said), ["w0"]) is None:
        assert sum(leaves(block, len(said)) for block in exact.schedule((blocks,), len(said)).blocks) == len(said)


@pytest.mark.parametrize("block", [Block(1, 2), Block(0, 3), Block(0, 32), Block(-1, 1), Block(2, 0), Block(4, 1)])
def test_what_is_no_block_of_the_tree_is_refused_at_the_call(block: Block) -> None:
    with pytest.raises(ValueError, match="block"):
        exact.checked_partials(torch.zeros(3), {block: torch.zeros(3)}, 5, Reduction.SUM)
