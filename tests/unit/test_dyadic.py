"""Examples of the tree over logical ranks, and what an accumulator refuses."""

import pytest
import torch

from elastic_run.collectives.dyadic import Block, BlockAccumulator, Merge, blocks_of, carry_dtype, combine_order, leaf
from elastic_run.collectives.reduction import Reduction


def test_an_even_share_is_one_block() -> None:
    assert blocks_of([4, 5, 6, 7], 16) == (Block(4, 4),)
    assert blocks_of(range(16), 16) == (Block(0, 16),)


def test_a_share_across_a_boundary_is_several_blocks() -> None:
    assert blocks_of([3, 4, 5, 6], 8) == (Block(3, 1), Block(4, 2), Block(6, 1))
    assert blocks_of([7, 0, 5], 8) == (Block(0, 1), Block(5, 1), Block(7, 1))
    assert blocks_of([], 8) == ()


def test_ranks_past_the_world_count_as_hosted() -> None:
    assert blocks_of([4, 5], 6) == (Block(4, 4),)
    assert blocks_of([0], 1) == (Block(0, 1),)
    assert leaf(6, 7) == Block(6, 2)


def test_merges_end_at_the_root_and_skip_missing_halves() -> None:
    blocks = [leaf(rank, 5) for rank in range(5)]
    assert combine_order(blocks, 5) == [
        Merge(Block(0, 2), Block(0, 1), Block(1, 1)),
        Merge(Block(2, 2), Block(2, 1), Block(3, 1)),
        Merge(Block(0, 4), Block(0, 2), Block(2, 2)),
        Merge(Block(0, 8), Block(0, 4), Block(4, 4)),
    ]
    assert combine_order([Block(0, 8)], 5) == []


@pytest.mark.parametrize(
    "blocks",
    [
        [Block(0, 2)],  # 2 and 3 missing
        [Block(2, 2)],  # 0 and 1 missing
        [Block(0, 2), Block(0, 4)],  # 0 twice
        [Block(0, 2), Block(1, 1), Block(2, 2)],  # 1 twice
        [Block(0, 2), Block(2, 1), Block(3, 3)],  # 3 is no power of two
        [Block(0, 1), Block(1, 2), Block(3, 1)],  # starts off its grid
        [Block(0, 4), Block(4, 4)],  # outside
        [Block(0, 8)],  # the root is called (0, 4)
        [],
    ],
)
def test_blocks_that_do_not_tile_the_world_are_refused(blocks: list[Block]) -> None:
    with pytest.raises(ValueError, match="4"):
        combine_order(blocks, 4)


@pytest.mark.parametrize("ranks", [[-1], [4], [1, 1]])
def test_bad_ranks_are_refused(ranks: list[int]) -> None:
    with pytest.raises(ValueError, match="logical rank"):
        blocks_of(ranks, 4)


def test_single_ranks_travel_in_their_own_type() -> None:
    assert carry_dtype(Block(3, 1), 8, torch.bfloat16, Reduction.SUM) is torch.bfloat16
    assert carry_dtype(Block(6, 2), 7, torch.bfloat16, Reduction.SUM) is torch.bfloat16
    assert carry_dtype(Block(6, 2), 8, torch.bfloat16, Reduction.SUM) is torch.float32
    assert carry_dtype(Block(6, 2), 8, torch.bfloat16, Reduction.MAX) is torch.bfloat16


def test_added_tensors_may_change_at_once() -> None:
    accumulator = BlockAccumulator(4, torch.float32)
    gradient = torch.tensor([1.0, 2.0])
    for rank in range(3):
        accumulator.add(rank, gradient)
        gradient += 1
    assert {block: partial.tolist() for block, partial in accumulator.blocks().items()} == {
        Block(0, 2): [3.0, 5.0],
        Block(2, 1): [3.0, 4.0],
    }


def test_blocks_given_without_leave_are_not_written() -> None:
    accumulator = BlockAccumulator(4, torch.float32)
    left, right = torch.ones(3), torch.ones(3)
    accumulator.add_block(Block(0, 2), left)
    accumulator.add_block(Block(2, 2), right)
    assert accumulator.root().tolist() == [2.0] * 3
    assert left.tolist() == right.tolist() == [1.0] * 3


def test_a_lent_block_is_the_sum_s_place() -> None:
    accumulator = BlockAccumulator(4, torch.float32)
    received = torch.ones(3)
    accumulator.add_block(Block(2, 2), received, may_overwrite=True)
    accumulator.add_block(Block(0, 2), torch.ones(3))
    assert accumulator.root().data_ptr() == received.data_ptr()


def test_a_second_round_needs_no_new_buffers() -> None:
    accumulator = BlockAccumulator(8, torch.bfloat16)
    places = []
    for _ in range(3):
        for rank in range(7):
            accumulator.add(rank, torch.ones(4, dtype=torch.bfloat16))
        places.append({partial.data_ptr() for partial in accumulator.blocks().values()})
        accumulator.clear()
    assert places[1] <= places[0] | places[2] and len(set().union(*places)) <= 4


def test_what_does_not_fit_is_refused() -> None:
    accumulator = BlockAccumulator(4, torch.bfloat16)
    accumulator.add(1, torch.ones(3, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="added before"):
        accumulator.add(1, torch.ones(3, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="outside"):
        accumulator.add(4, torch.ones(3, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="4 elements"):
        accumulator.add(2, torch.ones(4, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"not torch\.bfloat16"):
        accumulator.add(2, torch.ones(3))
    with pytest.raises(ValueError, match=r"not torch\.float32"):
        accumulator.add_block(Block(2, 2), torch.ones(3, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="only those of"):
        accumulator.root()
    with pytest.raises(ValueError, match="no tree"):
        BlockAccumulator(0, torch.float32)
