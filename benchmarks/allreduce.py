"""All-reduce (sum) on one host: ours against gloo, and PCCL where it is installed; 2 and 4 workers, fp32 and bf16.

Every system has its own living members; one system works at a time, the others are blocked in a read. A call's time is
that of its slowest member; a run's value is the median over its calls. Small tensors are reduced in batches of calls
that run back to back, of which the first, in which members wait for each other's start, is not counted.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import allreduce_table
from benchmarks.crew import Crew, assembled
from benchmarks.harness import Benchmark, Case, Context, Target
from benchmarks.systems import ELASTIC, ELASTIC_EXACT, ELASTIC_RING, ELASTIC_TCP, GLOO, PCCL

WORKER_COUNTS = (2, 4)
DTYPES = ("fp32", "bf16")
# PCCL ends the process when asked to sum bf16.
SYSTEMS = {
    "fp32": (GLOO, ELASTIC, ELASTIC_TCP, ELASTIC_RING, ELASTIC_EXACT, PCCL),
    "bf16": (GLOO, ELASTIC, ELASTIC_TCP, ELASTIC_RING, ELASTIC_EXACT),
}
# Tensors are new in every visit and the caches are full of another system's.
WARM_UP_BATCHES = 1
TRANSPORT_VARIABLE = "ELASTIC_COLLECTIVES_TRANSPORT"
PCCL_PYTHON_VARIABLE = "BENCHMARK_PCCL_PYTHON"
PCCL_WHEEL = (
    "PyPI's wheel pypccl 1.0.0 wants Python 3.12 or later and loads only with glibc 2.38, the C++ library of GCC 13"
    " and CUDA's libcuda.so.1"
)
PROBE_TIMEOUT_S = 60.0
SPEED_UP_AT_LEAST = {
    2: {"1MB": 1.4, "16MB": 1.6, "64MB": 1.6, "256MB": 1.6},
    4: {"1MB": 1.4, "16MB": 2.5, "64MB": 2.5, "256MB": 2.5},
}
TCP_SPEED_UP_AT_LEAST = {2: 1.0, 4: 1.1}
EXACT_SLOW_DOWN_AT_MOST = 1.3
LATENCY_AT_MOST = 1.3
MIB = 1 << 20
LARGE_BYTES = 16 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A tensor's size, and how often it is reduced in a run: `batches` of `batch` tensors each."""

    name: str
    nbytes: int
    batch: int
    batches: int
    batches_quick: int
    quick: bool


# A batch of tensors stays within 8 MiB for each worker, so that calls on small ones are not measured on cold memory.
SIZES = (
    Size(name="4KB", nbytes=4 << 10, batch=64, batches=4, batches_quick=1, quick=True),
    Size(name="64KB", nbytes=64 << 10, batch=32, batches=3, batches_quick=1, quick=False),
    Size(name="1MB", nbytes=MIB, batch=8, batches=4, batches_quick=2, quick=True),
    Size(name="16MB", nbytes=16 * MIB, batch=1, batches=6, batches_quick=3, quick=True),
    Size(name="64MB", nbytes=64 * MIB, batch=1, batches=4, batches_quick=2, quick=False),
    Size(name="256MB", nbytes=256 * MIB, batch=1, batches=3, batches_quick=2, quick=False),
)


def call_time(workers: int, dtype: str, size: Size, system: str, context: Context) -> Mapping[str, float]:
    """The median over the calls of one visit to a system, in milliseconds."""
    crew = context.kept.get(system, lambda: formed(system, context.directory))
    members = members_of(workers)
    counted = 1 if context.warm_up else size.batches_quick if context.quick else size.batches
    for rank, member in enumerate(members):
        crew.tell(
            member,
            "measure",
            bytes=size.nbytes,
            dtype=dtype,
            batch=size.batch,
            batches=WARM_UP_BATCHES + counted,
            rank=rank,
            workers=workers,
        )
    for _ in range(WARM_UP_BATCHES + counted):
        crew.start_together(members)
    found = [crew.answer(member)["batches_s"] for member in members]
    return {metric_of(workers, dtype, size): 1e3 * median(slowest_calls_s(found))}


def slowest_calls_s(found: Sequence[Sequence[Sequence[float]]]) -> list[float]:
    """From times by member, batch and call: those of the counted calls, each of its slowest member."""
    slowest = []
    for batch in range(WARM_UP_BATCHES, len(found[0])):
        calls = [max(times) for times in zip(*(member[batch] for member in found), strict=True)]
        slowest += calls[1:] if len(calls) > 1 else calls
    return slowest


@contextlib.contextmanager
def formed(system: str, directory: Path) -> Iterator[Crew]:
    """The members of a system, one group of each measured number of workers."""
    transport = {TRANSPORT_VARIABLE: "tcp"} if system == ELASTIC_TCP else {}
    python = pccl_python() if system == PCCL else sys.executable
    with assembled(system, sum(WORKER_COUNTS), directory, environment=transport, python=python) as crew:
        for workers in WORKER_COUNTS:
            crew.form(members_of(workers))
        yield crew


def members_of(workers: int) -> range:
    """The members of a crew that make up its group of so many workers."""
    first = sum(WORKER_COUNTS[: WORKER_COUNTS.index(workers)])
    return range(first, first + workers)


def metric_of(workers: int, dtype: str, size: Size) -> str:
    return f"{workers}_workers_{dtype}_{size.name}_ms"


def pccl_python() -> str:
    """The interpreter that has PCCL: its wheels are for other versions of Python than the one this may run on."""
    return os.environ.get(PCCL_PYTHON_VARIABLE, sys.executable)


def pccl_is_absent() -> str | None:
    """Why PCCL cannot be measured; None when it can."""
    python = pccl_python()
    try:
        probe = subprocess.run(
            [python, "-c", "import pccl, torch"], capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{PCCL_PYTHON_VARIABLE} does not name a Python that starts: {error}"
    if probe.returncode == 0:
        return None
    last = (probe.stderr.strip().splitlines() or ["no message"])[-1]
    wheel = f"{PCCL_WHEEL}; a Python that has it and torch can be named in {PCCL_PYTHON_VARIABLE}"
    return f"this Python cannot import it ({last}): {wheel}"


def targets() -> tuple[Target, ...]:
    """What is promised: speed-ups are gloo's time over ours; the small size bounds ours over gloo's."""
    found = []
    for workers in WORKER_COUNTS:
        for dtype in DTYPES:
            for size in SIZES:
                metric = metric_of(workers, dtype, size)
                if size.name in SPEED_UP_AT_LEAST[workers]:
                    bound = SPEED_UP_AT_LEAST[workers][size.name]
                    found.append(Target(metric=metric, over=GLOO, under=ELASTIC, at_least=bound))
                if size.nbytes >= LARGE_BYTES:
                    tcp = TCP_SPEED_UP_AT_LEAST[workers]
                    found.append(Target(metric=metric, over=GLOO, under=ELASTIC_TCP, at_least=tcp))
                    exact = EXACT_SLOW_DOWN_AT_MOST
                    found.append(Target(metric=metric, over=ELASTIC_EXACT, under=ELASTIC_RING, at_most=exact))
                if size.name == "4KB":
                    found.append(Target(metric=metric, over=ELASTIC, under=GLOO, at_most=LATENCY_AT_MOST))
    return tuple(found)


def conditions(quick: bool) -> dict[str, Any]:
    sizes = [size for size in SIZES if size.quick or not quick]
    return {
        "operation": "sum, one host",
        "workers": list(WORKER_COUNTS),
        "dtypes": list(DTYPES),
        "bytes": {size.name: size.nbytes for size in sizes},
        "tensors_per_batch": {size.name: size.batch for size in sizes},
        "batches_per_run": {size.name: size.batches_quick if quick else size.batches for size in sizes},
        "batches_discarded_per_run": WARM_UP_BATCHES,
        "counted": "slowest member of each call, median over the calls; of a batch's calls all but the first",
        "logical_ranks_of_tree_exact": "one for each worker",
        "gloo_interface": "lo",
        "torch_threads": 1,
        "omp_num_threads": 1,
    }


BENCHMARK = Benchmark(
    name="allreduce",
    summary="all-reduce on one host: ours (shared memory, TCP, ring, tree-exact) against gloo and PCCL",
    cases=tuple(
        Case(
            name=f"{workers} workers {dtype} {size.name}",
            systems=SYSTEMS[dtype],
            units={metric_of(workers, dtype, size): "ms"},
            run=partial(call_time, workers, dtype, size),
            quick=size.quick,
        )
        for workers in WORKER_COUNTS
        for dtype in DTYPES
        for size in SIZES
    ),
    rounds=5,
    rounds_quick=1,
    warm_up_quick=False,
    conditions=conditions,
    targets=targets(),
    absent={PCCL: pccl_is_absent},
    table=allreduce_table.table,
    budget_s=2400.0,
)
