"""Step time of `examples/train_gpt.py` under elastic-run and under torchrun, with 2 and with 4 workers.

The script times its own steps on rank 0: data loading, forward, backward with the all-reduce, optimizer. A run's value
is the median over its steps without the first few, in which pages, caches and sockets warm up.
"""

import typing
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.harness import Benchmark, BenchmarkError, Case, Context
from benchmarks.systems import ELASTIC_RUN, ROOT, TORCHRUN, command, finish, started

WORKER_COUNTS = (2, 4)
# One module of the standard library is text enough for these steps, and read at once: start-up is not measured here.
TEXT = Path(str(typing.__file__))
SCRIPT = ROOT / "examples" / "train_gpt.py"
STEPS = 60
STEPS_QUICK = 12
WARM_UP_STEPS = 4
WARM_UP_STEPS_OF_WARM_UP_RUN = 2


def step_time(workers: int, system: str, context: Context) -> Mapping[str, float]:
    """The median step time of one run, in seconds."""
    steps = steps_of(context.quick)
    if context.warm_up:
        steps = WARM_UP_STEPS + WARM_UP_STEPS_OF_WARM_UP_RUN
    times = context.directory / "times"
    arguments = [f"--text={TEXT}", f"--steps={steps}", f"--log-every={steps}"]
    arguments += [f"--step-times={times}", f"--out={context.directory}"]
    argv = command(system, script=SCRIPT, arguments=arguments, workers=workers)
    with started(argv, context.directory) as program:
        finish(program)
    seconds = [float(line) for line in times.read_text().split()][WARM_UP_STEPS:]
    if len(seconds) != steps - WARM_UP_STEPS:
        raise BenchmarkError(f"{system} timed {len(seconds)} steps after warm-up, not {steps - WARM_UP_STEPS}")
    return {metric_of(workers): median(seconds)}


def metric_of(workers: int) -> str:
    return f"step_time_{workers}_workers_s"


def steps_of(quick: bool) -> int:
    return STEPS_QUICK if quick else STEPS


def conditions(quick: bool) -> dict[str, Any]:
    return {
        "script": "examples/train_gpt.py",
        "workers": list(WORKER_COUNTS),
        "steps_per_run": steps_of(quick),
        "steps_discarded_per_run": WARM_UP_STEPS,
        "omp_num_threads": 1,
    }


BENCHMARK = Benchmark(
    name="step_overhead",
    summary="step time of examples/train_gpt.py: elastic-run / torchrun, 2 and 4 workers",
    cases=tuple(
        Case(
            name=f"{workers} workers",
            systems=(TORCHRUN, ELASTIC_RUN),
            units={metric_of(workers): "s"},
            run=partial(step_time, workers),
        )
        for workers in WORKER_COUNTS
    ),
    rounds=10,
    rounds_quick=2,
    warm_up_quick=False,
    conditions=conditions,
)
