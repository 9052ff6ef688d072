"""What a launcher costs while its 4 workers wait: CPU of everything but the workers, and the agent's memory.

Not workers: the launcher and all its descendants, less the processes that ran the script and what those spawned. Those
are agent, controller and etcd for elastic-run, and torchrun's one process. The agent is the workers' parent.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import psutil

from benchmarks.harness import Benchmark, BenchmarkError, Case, Context
from benchmarks.systems import ELASTIC_RUN, ROOT, TORCHRUN, command, descendants, started, wait_for_files

WORKERS = 4
SCRIPT = ROOT / "tests" / "scripts" / "wait_forever.py"
WINDOW_S = 60.0
WINDOW_QUICK_S = 20.0
# Start-up work (joining, first lease, first status) is not idling.
SETTLE_S = 2.0
MEGABYTE = 1e6


def idle_cost(system: str, context: Context) -> Mapping[str, float]:
    """CPU seconds per second of wall time, and resident memory, while nothing happens."""
    directory = context.directory
    argv = command(system, script=SCRIPT, arguments=[str(directory)], workers=WORKERS)
    with started(argv, directory) as program:
        launcher = psutil.Process(program.process.pid)
        noted = wait_for_files(program, [f"rank-{rank}" for rank in range(WORKERS)])
        workers = [psutil.Process(int(pid)) for pid in noted]
        time.sleep(SETTLE_S)
        overhead = overhead_of(launcher, workers)
        before_s, started_s = cpu_s(overhead), time.monotonic()
        time.sleep(window_s(context.quick))
        # Taken anew: a process born within the window counts whole, one that ended within it is an error.
        if program.process.poll() is not None:
            raise program.failure("ended while its workers waited")
        after = overhead_of(launcher, workers)
        if not set(overhead) <= set(after):
            raise program.failure("a process of the launcher ended while its workers waited")
        elapsed_s = time.monotonic() - started_s
        return {
            "idle_cpu_cores": (cpu_s(after) - before_s) / elapsed_s,
            "agent_rss_mb": resident_mb([agent_of(workers)]),
            "all_rss_mb": resident_mb(after),
        }


def overhead_of(launcher: psutil.Process, workers: Sequence[psutil.Process]) -> list[psutil.Process]:
    """The launcher and its descendants without the workers and theirs."""
    theirs = [*workers, *(child for worker in workers for child in worker.children(recursive=True))]
    return [member for member in [launcher, *descendants(launcher.pid)] if member not in theirs]


def agent_of(workers: Sequence[psutil.Process]) -> psutil.Process:
    """The one process that spawned all workers. Raises BenchmarkError when there is no such process."""
    parents = {worker.ppid() for worker in workers}
    if len(parents) != 1:
        raise BenchmarkError(f"the workers have {len(parents)} different parents, expected one agent")
    return psutil.Process(parents.pop())


def cpu_s(processes: Sequence[psutil.Process]) -> float:
    """User and system time so far, with that of short-lived children they have waited for."""
    times = [process.cpu_times() for process in processes]
    return sum(one.user + one.system + one.children_user + one.children_system for one in times)


def resident_mb(processes: Sequence[psutil.Process]) -> float:
    return sum(float(process.memory_info().rss) for process in processes) / MEGABYTE


def window_s(quick: bool) -> float:
    return WINDOW_QUICK_S if quick else WINDOW_S


def conditions(quick: bool) -> dict[str, Any]:
    return {"script": "tests/scripts/wait_forever.py", "workers": WORKERS, "window_s": window_s(quick)}


BENCHMARK = Benchmark(
    name="idle",
    summary="CPU of agent, controller, etcd and launcher while 4 workers wait; memory of the agent",
    cases=(
        Case(
            name="4 waiting workers",
            systems=(TORCHRUN, ELASTIC_RUN),
            units={"idle_cpu_cores": "cores", "agent_rss_mb": "MB", "all_rss_mb": "MB"},
            run=idle_cost,
        ),
    ),
    rounds=3,
    rounds_quick=1,
    warm_up_quick=False,
    conditions=conditions,
)
