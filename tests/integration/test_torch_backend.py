"""Backend "elastic" of torch.distributed, in real processes, against gloo: every operation, bit for bit."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_operations
from torch import Tensor
from torch_ranks import run_ranks

SIZES = (1, 2, 3, 4)
CASES = torch_operations.names()
LIMIT_S = 120.0


@pytest.fixture(scope="module", params=SIZES)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What every case gave on every rank, over gloo and over elastic."""
    return {
        backend: run_ranks(
            "torch_operations:all_operations",
            size=request.param,
            backend=backend,
            directory=tmp_path_factory.mktemp(f"{backend}{request.param}"),
        )
        for backend in ("gloo", "elastic")
    }


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_an_operation_gives_what_gloo_gives(both: dict[str, list[dict[str, Any]]], case: str) -> None:
    for ours, theirs in zip(both["elastic"], both["gloo"], strict=True):
        assert "error" not in ours, ours["error"]
        assert_same(ours[case], theirs[case])


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["tcp", "auto"])
def test_results_do_not_depend_on_the_transport(transport: str, tmp_path: Path) -> None:
    ours = run_ranks(
        "torch_operations:all_operations",
        size=3,
        backend="elastic",
        directory=tmp_path,
        environment={"ELASTIC_COLLECTIVES_TRANSPORT": transport},
    )
    for result in ours:
        assert "error" not in result, result["error"]
        assert_same(result["all_reduce 1000003"], ours[0]["all_reduce 1000003"])


@pytest.mark.slow
def test_what_gloo_lacks_or_refuses(tmp_path: Path) -> None:
    for result in run_ranks("torch_refusals:refusals", size=2, backend="elastic", directory=tmp_path):
        assert "error" not in result, result["error"]
        assert result["average"].tolist() == [0.5, 1.5]
        assert result["transposed"].tolist() == [[2, 4], [2, 4]]
        assert [tensor.tolist() for tensor in result["batch"]] == [[1, 1, 1]] * 4
        for name in ("premul_sum", "complex product", "sparse", "two types", "list of another size", "self", "options"):
            assert result[name].startswith(("ValueError", "TypeError", "RuntimeError")), result[name]


@pytest.mark.slow
def test_groups_of_groups_and_splits(tmp_path: Path) -> None:
    results = run_ranks("torch_refusals:groups", size=4, backend="elastic", directory=tmp_path)
    for rank, result in enumerate(results):
        assert "error" not in result, result["error"]
        assert result["split"] == {0: 2, 2: 2, 1: 4, 3: 4}[rank]
        assert result["again"] == 6
        assert result["under gloo"] == (3 if rank % 2 == 0 else None)
        assert result["threads after"] == result["threads before"]
        assert result["descriptors after"] <= result["descriptors before"]


@pytest.mark.slow
def test_a_killed_rank_is_named_in_an_error_that_torch_users_catch(tmp_path: Path) -> None:
    results = run_ranks("torch_refusals:one_is_killed", size=3, backend="elastic", directory=tmp_path)
    assert results[1] == {"exit": signal.SIGKILL}
    for rank in (0, 2):
        result = results[rank]
        assert "error" not in result, result["error"]
        assert result["kinds"] == ["BackendAborted", "CollectiveAborted", "DistBackendError", "RuntimeError"]
        assert result["culprit"] == "rank1"
        assert result["input"].tolist() == [float(rank)] * 100
        assert "rank1" in result["in backward"]


@pytest.mark.slow
def test_an_abort_ends_what_others_wait_for_and_names_who_aborted(tmp_path: Path) -> None:
    results = run_ranks("torch_refusals:one_aborts", size=3, backend="elastic", directory=tmp_path)
    for rank, result in enumerate(results):
        assert "error" not in result, result["error"]
        assert result["total"] == 3
        if rank != 1:
            assert result["kind"] == "BackendAborted"
            assert result["culprit"] == "rank1"


@pytest.mark.slow
def test_an_operation_ends_at_the_groups_time_limit(tmp_path: Path) -> None:
    results = run_ranks("torch_refusals:one_is_late", size=2, backend="elastic", directory=tmp_path)
    assert "error" not in results[0], results[0]["error"]
    assert results[0]["kind"] == "BackendTimeout"
    assert results[0]["monitored"].startswith("BackendTimeout: ")
    assert "Rank 1 failed to pass monitoredBarrier in 300 ms" in results[0]["monitored"]


@pytest.mark.slow
def test_a_start_without_all_ranks_names_who_did_not_come(tmp_path: Path) -> None:
    results = run_ranks("torch_refusals:one_does_not_come", size=3, backend="elastic", directory=tmp_path)
    for result in results[:2]:
        assert result["text"].startswith("BackendTimeout"), result
        assert "1 of 3 ranks did not come" in result["text"]
        assert result["text"].endswith("(culprit: rank2)")
        assert result["threads after"] == result["threads before"]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["import", "installed"])
def test_a_script_under_torchrun_only_names_the_backend(how: str, tmp_path: Path) -> None:
    script = Path(__file__).parent.parent / "scripts" / "ddp_elastic.py"
    environment = dict(os.environ)
    arguments = []
    if how == "import":
        arguments = ["elastic_run.collectives.torch_backend"]
    else:
        # What installing the package leaves behind, as far as torch looks.
        about = tmp_path / "elastic_entry-1.dist-info"
        about.mkdir()
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: elastic-entry\nVersion: 1\n")
        (about / "entry_points.txt").write_text(
            "[torch.backends]\nelastic = elastic_run.collectives.torch_autoload:register\n"
        )
        environment["PYTHONPATH"] = str(tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stderr.decode()[-4000:]
    assert done.stdout.decode().count("weights agree over elastic") == 2


def assert_same(ours: Any, theirs: Any) -> None:
    assert type(ours) is type(theirs), (ours, theirs)
    if isinstance(ours, Tensor):
        assert ours.dtype is theirs.dtype
        assert ours.shape == theirs.shape
        assert torch.equal(ours, theirs)
    elif isinstance(ours, list):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other)
    else:
        assert ours == theirs
