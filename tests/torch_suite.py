"""Program for torch_ranks: torch's own collective tests (DistributedTest._DistTestBase), run over another backend.

torch starts new processes for each test; here the ranks stay, and form a new group only after a failure. A test's
outcome is "passed", "skipped: why" (torch's own decorators) or "failed: why", the same way on each rank.
"""

import inspect
import os
import re
import signal
import sys
import tempfile
import time
import traceback
import types
import unittest
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch_ranks import Rank

import elastic_run.collectives.torch_backend  # noqa: F401 - registers the backend

# torch's test library wants this package for its base class only; it is not worth a dependency.
sys.modules.setdefault("expecttest", types.SimpleNamespace(TestCase=unittest.TestCase))  # type: ignore[arg-type]
os.environ.update({"WORLD_SIZE": os.environ.get("WORLD_SIZE", "3"), "BACKEND": os.environ.get("BACKEND", "elastic")})

from torch.testing._internal.common_distributed import TEST_SKIPS, DistTestCases  # noqa: E402

for feature in ("plugin", "ddp", "subgroup"):
    DistTestCases.backend_feature[feature].add("elastic")

from torch.testing._internal.distributed import distributed_test  # noqa: E402

TEST_LIMIT_S = 60
RESERVED = re.compile(
    "Test requires backend elastic|Only (gloo|Gloo) backend supports|Only Nccl & Gloo backend support|Only MPI supports"
    "|only supported on mpi, nccl and gloo|GLOO Batch Send Recv"
)
"""Reasons for which torch reserves a test for backends it knows; what other reasons it gives are respected."""
SKIP_TEXTS = {skip.exit_code: skip.message for skip in TEST_SKIPS.values()}


class TestElastic(distributed_test.TestDistBackend, distributed_test.DistributedTest._DistTestBase):  # type: ignore[misc]
    """The tests of torch, as a class of this backend."""

    __test__ = False  # pytest collects it nowhere: `run_suite` calls its methods


def every_name() -> list[str]:
    """Return all of torch's tests, in its order."""
    return [
        name
        for name, function in inspect.getmembers(distributed_test.DistributedTest._DistTestBase, callable)
        if name.startswith("test_")
    ]


def run_suite(rank: Rank) -> dict[str, Any]:
    """Run the tests named in the file `names` of the directory, one per line."""
    names = Path(rank.directory, "names").read_text().split()
    os.environ["TEMP_DIR"] = os.environ["TMPDIR"] = tempfile.tempdir = rank.directory
    for part in ("barrier", "test_dir", "init_dir"):
        Path(rank.directory, part).mkdir(exist_ok=True)
    results: dict[str, Any] = {}
    life = 0
    _form(rank, life)
    for number, name in enumerate(names):
        started_s = time.monotonic()
        distributed_test.Barrier.barrier_id = 1000 * (number + 1)
        results[name] = _outcome(name, rank.rank)
        print(f"{name} rank {rank.rank}: {results[name][:300]} ({time.monotonic() - started_s:.1f} s)", flush=True)
        Path(rank.directory, f"done-{number}.{rank.rank}").write_text(results[name].partition(":")[0])
        if "failed" in _outcomes(rank, number) or "monitored_barrier" in name:  # which some ranks leave out on purpose
            life += 1
            _end()
            _form(rank, life)
    _end()
    return results


def _form(rank: Rank, life: int) -> None:
    dist.init_process_group(
        rank.backend,
        init_method=f"file://{rank.directory}/store{life}",
        rank=rank.rank,
        world_size=rank.size,
        timeout=timedelta(seconds=distributed_test.default_pg_timeout),
    )


def _end() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _outcome(name: str, rank: int) -> str:
    function = getattr(TestElastic, name)
    if getattr(function, "__unittest_skip__", False) and not RESERVED.search(function.__unittest_skip_why__):
        return f"skipped: {function.__unittest_skip_why__}"
    if "_group" in name or "_monitored_barrier" in name:
        setattr(TestElastic, name, inspect.unwrap(function))  # without the wish for eight ranks: three do
    test = TestElastic(name)
    test.rank = rank
    test.file_name = os.path.join(os.environ["TEMP_DIR"], f"file-{name}")
    signal.signal(signal.SIGALRM, _too_late)
    signal.alarm(TEST_LIMIT_S)
    try:
        getattr(test, name)()
        if not dist.is_initialized():
            return "failed: left no process group"
    except unittest.SkipTest as skip:
        return f"skipped: {skip}"
    except SystemExit as leave:
        return f"skipped: {SKIP_TEXTS.get(leave.code, leave.code)}"
    except BaseException as error:  # noqa: BLE001 - told to the test
        traceback.print_exc()
        return f"failed: {type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
    return "passed"


def _outcomes(rank: Rank, number: int) -> Sequence[str]:
    outcomes = []
    deadline_s = time.monotonic() + 2 * TEST_LIMIT_S
    for other in range(rank.size):
        place = Path(rank.directory, f"done-{number}.{other}")
        while not place.exists() or not place.read_text():
            if time.monotonic() > deadline_s:
                return ["failed"]
            time.sleep(0.005)
        outcomes.append(place.read_text())
    return outcomes


def _too_late(*_: object) -> None:
    raise TimeoutError(f"more than {TEST_LIMIT_S} s")
