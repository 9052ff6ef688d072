"""`python -m benchmarks NAME [--quick] [--json FILE] [--systems A,B]`, and `--list`.

Exit codes: 0 done, 1 a measured system failed, 2 the command line asks for something that is not there.
"""

import argparse
import importlib.util
import json
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import report
from benchmarks.harness import Benchmark, BenchmarkError, measure
from benchmarks.machine import describe_machine
from benchmarks.registry import BENCHMARKS
from benchmarks.systems import MODULE_OF_SYSTEM

EXIT_FAILED = 1
EXIT_USAGE = 2


def main() -> int:
    args = parse_args()
    if args.list:
        for benchmark in BENCHMARKS:
            print(f"{benchmark.name:<16} {benchmark.summary}")
        return 0
    chosen = next((benchmark for benchmark in BENCHMARKS if benchmark.name == args.name), None)
    if chosen is None:
        names = ", ".join(benchmark.name for benchmark in BENCHMARKS)
        return _usage(f"name one of: {names}")
    reasons = {system: reason for system, why in chosen.absent.items() if (reason := why()) is not None}
    if args.systems:
        systems = tuple(args.systems.split(","))
        for system in systems:
            if system in reasons:
                return _usage(f"{system} cannot run here: {reasons[system]}")
        reasons = {}
    else:
        systems = tuple(system for system in chosen.systems if system not in reasons)
    problem = _problem_with(chosen, systems)
    if problem is not None:
        return _usage(problem)
    return _run(chosen, systems, left_out=reasons, quick=args.quick, json_file=args.json)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure, side by side, in one run.")
    parser.add_argument("name", nargs="?", help="the benchmark to run")
    parser.add_argument("--list", action="store_true", help="list the benchmarks and end")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions: ends within 60 s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the whole result to this file")
    parser.add_argument("--systems", metavar="A,B", help="measure only these, the first is the baseline")
    return parser.parse_args()


def _problem_with(benchmark: Benchmark, systems: tuple[str, ...]) -> str | None:
    for system in systems:
        if system not in benchmark.systems:
            return f"{benchmark.name} knows the systems {', '.join(benchmark.systems)}, not {system!r}"
        if system not in benchmark.absent and not _is_installed(MODULE_OF_SYSTEM[system]):
            others = ",".join(other for other in systems if _is_installed(MODULE_OF_SYSTEM[other]))
            return f"{system} is not installed (no module {MODULE_OF_SYSTEM[system]}); leave it out: --systems {others}"
    return None


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _run(
    benchmark: Benchmark,
    systems: tuple[str, ...],
    *,
    left_out: dict[str, str],
    quick: bool,
    json_file: Path | None,
) -> int:
    for system, reason in left_out.items():
        _say(f"{system} is left out: {reason}")
    started_s = time.monotonic()
    machine = describe_machine()
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        try:
            series = measure(benchmark, systems=systems, quick=quick, directory=Path(directory), say=_say)
        except BenchmarkError as error:
            print(f"benchmarks: {error}", file=sys.stderr)
            return EXIT_FAILED
    conditions = {
        **benchmark.conditions(quick),
        "quick": quick,
        "systems": list(systems),
        "left_out": left_out,
        "order": "A B B A",
        "warm_up_runs_discarded": int(benchmark.warm_up_quick or not quick),
        "wall_s": round(time.monotonic() - started_s, 1),
    }
    document = report.document(benchmark, series=series, machine=machine, conditions=conditions)
    print((benchmark.table or report.table)(document))
    if json_file is not None:
        json_file.write_text(json.dumps(document, indent=2) + "\n")
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _usage(problem: str) -> int:
    print(f"benchmarks: {problem}", file=sys.stderr)
    return EXIT_USAGE


if __name__ == "__main__":
    sys.exit(main())
