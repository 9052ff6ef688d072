"""torch's own DDP, FSDP2 and DTensor over backend "elastic", against the same run over gloo."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch_ranks import run_ranks

pytestmark = pytest.mark.slow


def run_both(program: str, size: int, directory: Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    results = {}
    for backend in ("gloo", "elastic"):
        results[backend] = run_ranks(program, size=size, backend=backend, directory=directory / backend)
        for result in results[backend]:
            assert "error" not in result, result["error"]
    return list(zip(results["elastic"], results["gloo"], strict=True))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_data_parallel_trains_as_over_gloo(size: int, tmp_path: Path) -> None:
    pairs = run_both("torch_training:data_parallel", size, tmp_path)
    for ours, theirs in pairs:
        for name in ("plain", "allreduce hook", "fp16 hook"):
            near = 0.01 if name == "fp16 hook" else 1e-5
            torch.testing.assert_close(ours[f"{name} losses"], theirs[f"{name} losses"], rtol=near, atol=near)
            torch.testing.assert_close(ours[f"{name} weights"], theirs[f"{name} weights"], rtol=near, atol=near)
            for key, weight in ours[f"{name} weights"].items():
                if "running" not in key:  # buffers of batch norm are each rank's own until the next forward
                    assert torch.equal(weight, pairs[0][0][f"{name} weights"][key]), key
        torch.testing.assert_close(ours["sparse"], theirs["sparse"])
        assert all(map(torch.equal, ours["whole numbers"], theirs["whole numbers"]))


def test_callbacks_that_wait_for_collectives_train_alike_on_all_ranks(tmp_path: Path) -> None:
    # Rank against rank: torch promises this hook for NCCL only, so gloo is no oracle for it.
    first, *others = run_ranks("torch_training:compressed", size=3, backend="elastic", directory=tmp_path)
    assert "error" not in first, first["error"]
    for other in others:
        for name, weight in first["weights"].items():
            if "running" not in name:
                assert torch.equal(weight, other["weights"][name]), name


@pytest.mark.parametrize("size", [2, 4])
def test_fully_sharded_trains_as_over_gloo(size: int, tmp_path: Path) -> None:
    for ours, theirs in run_both("torch_training:sharded", size, tmp_path):
        assert ours.keys() == theirs.keys()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [2, 3])
def test_distributed_tensors_are_those_of_gloo(size: int, tmp_path: Path) -> None:
    for ours, theirs in run_both("torch_training:tensors", size, tmp_path):
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert torch.equal(tensor, theirs[name]), name
