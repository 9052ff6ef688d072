"""What the torch facade refuses before anything is sent."""

import pytest
import torch
import torch.distributed as dist

from elastic_run.collectives.reduction import Reduction
from elastic_run.collectives.torch_arguments import check_list, check_single, dense, elements_of, only, reduction_of


@pytest.mark.parametrize("reduction", list(Reduction))
def test_every_reduction_has_torchs_name(reduction: Reduction) -> None:
    kind = getattr(dist.ReduceOp, reduction.name)
    assert reduction_of(kind) is reduction
    assert reduction_of(dist.ReduceOp(kind)) is reduction


def test_a_scaled_sum_is_refused_with_what_to_do_instead() -> None:
    with pytest.raises(ValueError, match="scale the tensor"):
        reduction_of(dist._make_nccl_premul_sum(0.5))


def test_one_tensor_per_process() -> None:
    assert only([3]) == 3
    with pytest.raises(ValueError, match="not 2"):
        only([1, 2])


def test_sparse_tensors_are_refused_where_dense_ones_are_meant() -> None:
    with pytest.raises(ValueError, match="to_dense"):
        dense(torch.eye(2).to_sparse())


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([torch.zeros(2)], "2 tensors are expected"),
        ([torch.zeros(2), torch.zeros(3)], "one has 3"),
        ([torch.zeros(2), torch.zeros(2, dtype=torch.int32)], "torch.int32 .* torch.float32"),
        ([torch.zeros(2), torch.zeros(2, device="meta")], "on meta"),
    ],
)
def test_a_list_has_an_equal_tensor_per_rank(parts: list[torch.Tensor], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_list("all_gather", 2, parts, torch.zeros(2))


def test_a_whole_has_an_equal_piece_per_rank() -> None:
    check_single("all_gather", 3, torch.zeros(6), torch.zeros(2))
    with pytest.raises(ValueError, match="7 elements are not 3 times 2"):
        check_single("all_gather", 3, torch.zeros(7), torch.zeros(2))


def test_splits_are_rows() -> None:
    tensor = torch.zeros(6, 2, 5)
    assert elements_of("input", tensor, [], 3) == [20, 20, 20]
    assert elements_of("input", tensor, [1, 5, 0], 3) == [10, 50, 0]
    assert elements_of("input", torch.zeros(0, 4), [], 3) == [0, 0, 0]


@pytest.mark.parametrize("splits", [[6], [1, 2, 2], [7, 0, -1]])
def test_splits_must_add_up(splits: list[int]) -> None:
    with pytest.raises(ValueError, match="do not add up to 6 rows"):
        elements_of("input", torch.zeros(6, 2), splits, 3)


def test_rows_that_do_not_divide_need_splits() -> None:
    with pytest.raises(ValueError, match="7 rows of input do not divide by 3"):
        elements_of("input", torch.zeros(7), [], 3)
