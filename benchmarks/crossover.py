"""Which all-reduce by messages is fastest at which size: the measurement that collectives/selection.py cites.

Our algorithms over TCP on one host, beside gloo; 2 and 4 workers, fp32. Measured as `allreduce` is.
"""

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.allreduce import (
    MIB,
    TRANSPORT_VARIABLE,
    WARM_UP_BATCHES,
    WORKER_COUNTS,
    Size,
    members_of,
    metric_of,
    slowest_calls_s,
)
from benchmarks.crew import Crew, assembled
from benchmarks.harness import Benchmark, Case, Context
from benchmarks.systems import GLOO, MESSAGES_EXCHANGE, MESSAGES_PAIRWISE, MESSAGES_RING

DTYPE = "fp32"
SYSTEMS = (GLOO, MESSAGES_EXCHANGE, MESSAGES_PAIRWISE, MESSAGES_RING)
# From where one message each is surely best to where it surely is not.
SIZES = tuple(
    Size(name=name, nbytes=nbytes, batch=batch, batches=4, batches_quick=1, quick=quick)
    for name, nbytes, batch, quick in (
        ("4KB", 4 << 10, 32, False),
        ("16KB", 16 << 10, 32, True),
        ("64KB", 64 << 10, 16, True),
        ("256KB", 256 << 10, 8, True),
        ("1MB", MIB, 8, True),
        ("4MB", 4 * MIB, 2, False),
        ("16MB", 16 * MIB, 1, True),
        ("64MB", 64 * MIB, 1, False),
    )
)


def call_time(workers: int, size: Size, system: str, context: Context) -> Mapping[str, float]:
    """The median over the calls of one visit to a system, in milliseconds."""
    crew = context.kept.get(system, lambda: formed(system, context.directory))
    members = members_of(workers)
    batches = WARM_UP_BATCHES + (size.batches_quick if context.quick or context.warm_up else size.batches)
    shape = {"bytes": size.nbytes, "dtype": DTYPE, "batch": size.batch, "batches": batches, "workers": workers}
    for rank, member in enumerate(members):
        crew.tell(member, "measure", rank=rank, **shape)
    for _ in range(batches):
        crew.start_together(members)
    found = [crew.answer(member)["batches_s"] for member in members]
    return {metric_of(workers, DTYPE, size): 1e3 * median(slowest_calls_s(found))}


@contextlib.contextmanager
def formed(system: str, directory: Path) -> Iterator[Crew]:
    """The members of a system, one group of each measured number of workers, without shared memory."""
    with assembled(system, sum(WORKER_COUNTS), directory, environment={TRANSPORT_VARIABLE: "tcp"}) as crew:
        for workers in WORKER_COUNTS:
            crew.form(members_of(workers))
        yield crew


def conditions(quick: bool) -> dict[str, Any]:
    sizes = [size for size in SIZES if size.quick or not quick]
    return {
        "operation": "sum, one host, TCP",
        "workers": list(WORKER_COUNTS),
        "dtype": DTYPE,
        "bytes": {size.name: size.nbytes for size in sizes},
        "tensors_per_batch": {size.name: size.batch for size in sizes},
        "batches_discarded_per_run": WARM_UP_BATCHES,
        "counted": "slowest member of each call, median over the calls; of a batch's calls all but the first",
        "torch_threads": 1,
    }


BENCHMARK = Benchmark(
    name="crossover",
    summary="all-reduce by messages: exchange, pairwise and ring at each size, beside gloo",
    cases=tuple(
        Case(
            name=f"{workers} workers {size.name}",
            systems=SYSTEMS,
            units={metric_of(workers, DTYPE, size): "ms"},
            run=partial(call_time, workers, size),
            quick=size.quick,
        )
        for workers in WORKER_COUNTS
        for size in SIZES
    ),
    rounds=5,
    rounds_quick=2,
    warm_up_quick=False,
    conditions=conditions,
)
