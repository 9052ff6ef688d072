"""Fails when a pure deciding module is covered by less than PERCENT_MIN of its lines and branches.

    python -m tools.core_coverage [DATA_FILE]

Reads what `coverage run` left (branch measurement is switched on in pyproject.toml) and prints a table. Modules that
decide can be driven through every case without a process or a clock, so there is no excuse for a case nobody tried.
"""

import contextlib
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import coverage

PERCENT_MIN = 95.0
ROOT = Path(__file__).resolve().parent.parent
MODULES = (
    "controller/admission.py",
    "controller/assignment.py",
    "controller/blame.py",
    "controller/change.py",
    "controller/core.py",
    "controller/journal.py",
    "controller/node.py",
    "controller/quorum.py",
    "controller/report.py",
    "controller/roster.py",
    "controller/standing.py",
    "controller/suspicion.py",
    "agent/core.py",
    "agent/environment.py",
    "agent/failure.py",
    "runtime/affinity.py",
    "runtime/flag_values.py",
    "runtime/protocol/codec.py",
    "runtime/protocol/config.py",
    "runtime/protocol/decision.py",
    "runtime/protocol/errors.py",
    "runtime/protocol/ids.py",
    "runtime/protocol/messages.py",
    "runtime/protocol/records.py",
    "runtime/protocol/view.py",
    "runtime/protocol/wire.py",
    "runtime/rendezvous.py",
    "runtime/step_gate.py",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Covered:
    module: str
    percent: float
    missing: str
    """Lines and branches nobody took; empty when there are none."""

    @property
    def enough(self) -> bool:
        return self.percent >= PERCENT_MIN


def measure(data_file: str) -> list[Covered]:
    """Return one entry per module. Raises coverage.CoverageException when there are no data."""
    run = coverage.Coverage(data_file=data_file)
    run.load()
    found = {os.path.realpath(path): path for path in run.get_data().measured_files()}
    with tempfile.TemporaryDirectory() as folder:
        report = os.path.join(folder, "coverage.json")
        with contextlib.redirect_stdout(sys.stderr):
            run.json_report(morfs=list(found.values()), outfile=report)
        files = json.loads(Path(report).read_text())["files"]
    by_path = {os.path.realpath(path): entry for path, entry in files.items()}
    return [_covered(module, by_path.get(str(ROOT / module))) for module in MODULES]


def _covered(module: str, entry: dict[str, object] | None) -> Covered:
    if not isinstance(entry, dict):
        return Covered(module=module, percent=0.0, missing="never imported")
    summary, lines, branches = entry["summary"], entry["missing_lines"], entry.get("missing_branches", [])
    if not (isinstance(summary, dict) and isinstance(lines, list) and isinstance(branches, list)):
        raise TypeError(f"{module}: not a report of coverage")
    gaps = [str(line) for line in lines] + [f"{a}->{'exit' if b < 0 else b}" for a, b in branches]
    return Covered(module=module, percent=float(summary["percent_covered"]), missing=" ".join(gaps))


def main(arguments: list[str]) -> int:
    try:
        entries = measure(arguments[0] if arguments else str(ROOT / ".coverage"))
    except coverage.CoverageException as error:
        print(f"core_coverage: {error}; run `coverage run -m pytest tests/unit tests/property` first", file=sys.stderr)
        return 1
    for entry in entries:
        mark = " " if entry.enough else "!"
        print(f"{mark} {entry.module:<32} {entry.percent:6.1f} %  {entry.missing[:100]}".rstrip())
    low = [entry.module for entry in entries if not entry.enough]
    if low:
        print(f"below {PERCENT_MIN:g} %: {', '.join(low)}", file=sys.stderr)
    return 1 if low else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
