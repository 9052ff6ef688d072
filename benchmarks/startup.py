"""From spawning a command to the first line of the script: 4 workers under a launcher, and one under our bootstrap.

For a launcher the last worker's first line counts. The script imports nothing before it notes the time, so torch's own
import is in neither number; what a launcher or the bootstrap imports is.
"""

import time
from collections.abc import Mapping
from typing import Any

from benchmarks.harness import Benchmark, Case, Context
from benchmarks.systems import BOOTSTRAP, ELASTIC_RUN, PYTHON, ROOT, TORCHRUN, command, finish, started, wait_for_files

WORKERS = 4
SCRIPT = ROOT / "benchmarks" / "scripts" / "first_line.py"
LAUNCH_METRIC = "launch_to_first_line_s"
BOOTSTRAP_METRIC = "process_to_first_line_s"


def launch_time(system: str, context: Context) -> Mapping[str, float]:
    """Seconds from spawning the launcher to the first line of its slowest worker."""
    return {LAUNCH_METRIC: first_line_s(system, context, workers=WORKERS)}


def bootstrap_time(system: str, context: Context) -> Mapping[str, float]:
    """Seconds from spawning one process to the first line of the script in it."""
    return {BOOTSTRAP_METRIC: first_line_s(system, context, workers=1)}


def first_line_s(system: str, context: Context, *, workers: int) -> float:
    directory = context.directory
    argv = command(system, script=SCRIPT, arguments=[str(directory)], workers=workers)
    spawned_ns = time.time_ns()
    with started(argv, directory) as program:
        finish(program)
        noted = wait_for_files(program, [f"rank-{rank}" for rank in range(workers)])
    return (max(map(int, noted)) - spawned_ns) / 1e9


def conditions(quick: bool) -> dict[str, Any]:
    return {"script": "benchmarks/scripts/first_line.py", "workers": WORKERS, "counted": "the slowest worker"}


BENCHMARK = Benchmark(
    name="startup",
    summary="spawn to the script's first line: elastic-run and torchrun with 4 workers; bootstrap and plain python",
    cases=(
        Case(
            name="launcher",
            systems=(TORCHRUN, ELASTIC_RUN),
            units={LAUNCH_METRIC: "s"},
            run=launch_time,
        ),
        Case(
            name="bootstrap",
            systems=(PYTHON, BOOTSTRAP),
            units={BOOTSTRAP_METRIC: "s"},
            run=bootstrap_time,
        ),
    ),
    rounds=15,
    rounds_quick=3,
    warm_up_quick=True,
    conditions=conditions,
)
