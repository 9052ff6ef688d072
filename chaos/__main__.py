"""`python -m elastic_run.chaos`: a campaign of faults against real processes on this machine.

Exit codes: 0 every check held, 1 one did not, 2 a flag or this machine is not fit for it.
"""

import argparse
import asyncio
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from elastic_run.chaos.campaign import run_campaign
from elastic_run.chaos.report import fault_table, verdict_lines
from elastic_run.chaos.scenario import NODES_MAX, SECONDS_MAX, Scenario
from elastic_run.runtime.edge.log import set_up_logging
from elastic_run.runtime.protocol.errors import StoreError, UserError

EXIT_FAILED, EXIT_USAGE = 1, 2
SEEDS = 1_000_000
KEPT_PATH_BYTES_MAX = 48
"""Sockets below it must not have too long a path."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="elastic-chaos", description="Hurts a job by a schedule drawn from a seed.")
    parser.add_argument("--seconds", type=float, default=60.0, help="length of the phase with faults")
    parser.add_argument("--seed", type=int, help="draws the schedule; by chance if not given")
    parser.add_argument("--nodes", type=int, default=3, help="nodes of the job, one worker each")
    parser.add_argument("--keep", type=Path, help="directory for history and logs, kept; it must not exist yet")
    args = parser.parse_args()
    if not 0 < args.seconds <= SECONDS_MAX or not 1 <= args.nodes <= NODES_MAX:
        parser.error(f"take up to {SECONDS_MAX:g} seconds and 1 to {NODES_MAX} nodes")
    seed = int.from_bytes(os.urandom(4)) % SEEDS if args.seed is None else args.seed
    if seed < 0:
        parser.error("the seed is a number from 0 on")
    scenario = Scenario(seed=seed, seconds=args.seconds, nodes=args.nodes)
    set_up_logging("chaos", job=scenario.job_id)
    try:
        return _run(scenario, args.keep)
    except (UserError, StoreError) as error:
        print(f"elastic-chaos: {error}", file=sys.stderr)
        return EXIT_USAGE


def _run(scenario: Scenario, keep: Path | None) -> int:
    directory = _directory(keep)
    began_s = time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - began_s:6.1f} s  {line}", flush=True)

    say(f"again: {scenario.command}")
    history, verdicts = asyncio.run(run_campaign(scenario, directory, say))
    held = all(verdict.held for verdict in verdicts)
    print("", *fault_table(history.entries), "", *verdict_lines(verdicts), "", sep="\n")
    if keep is None and held:
        shutil.rmtree(directory)
    else:
        print(f"history and logs: {directory}")
    print(f"{'all checks held' if held else 'CHECKS FAILED'}; again: {scenario.command}")
    return 0 if held else EXIT_FAILED


def _directory(keep: Path | None) -> Path:
    if keep is None:
        return Path(tempfile.mkdtemp(prefix="chaos-", dir="/tmp"))
    path = keep.absolute()
    if len(os.fsencode(path)) > KEPT_PATH_BYTES_MAX:
        raise UserError(
            f"--keep={keep} is too long a path for sockets inside: take at most {KEPT_PATH_BYTES_MAX} bytes"
        )
    try:
        path.mkdir(mode=0o700)
    except OSError as error:
        raise UserError(
            f"--keep={keep}: cannot make it ({error.strerror}); give a directory that is not there yet"
        ) from None
    return path


if __name__ == "__main__":
    sys.exit(main())
