"""`make demo`: trains examples/train_gpt.py with 4 workers, kills one on the way with SIGKILL, and sums up.

The numbers of the summary are read from the script's own output and the clock, not from the runtime under show.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "examples" / "train_gpt.py"
VICTIM_RANK = "2"
RUN_SECONDS_MAX = 900.0
STEP_LINE = re.compile(r"step\s+(\d+)")


@dataclass(kw_only=True)
class Story:
    """What was seen of the run."""

    first_line_s: float | None = None
    killed_at_step: int | None = None
    killed_s: float = 0.0
    resumed_at_step: int | None = None
    recovered_s: float | None = None
    summary: dict[str, float] = field(default_factory=dict)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--kill-at", type=int, default=50, help="kill a worker once this step is printed")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--snapshot-every", type=int, default=20)
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "demo", help="where the loss curve goes")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="elastic-demo-") as scratch:
        command = [
            *(sys.executable, "-P", "-m", "elastic_run.runtime.cli"),
            *(f"--nproc-per-node={args.workers}", "--max-restarts=3", str(SCRIPT)),
            *(f"--steps={args.steps}", "--log-every=1", f"--snapshot-every={args.snapshot_every}"),
            *(f"--snapshot={scratch}/snapshot.pt", f"--out={args.out}"),
        ]
        print("demo: elastic-run", *command[4:], flush=True)
        started_s = time.monotonic()
        story = Story()
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
            try:
                code = follow(run, story, args.kill_at, started_s)
            finally:
                if run.poll() is None:
                    run.send_signal(signal.SIGTERM)
        elapsed_s = time.monotonic() - started_s
    return report(story, code, elapsed_s, args.out)


def follow(run: "subprocess.Popen[str]", story: Story, kill_at: int, started_s: float) -> int:
    """Pass the output on, kill one worker on the way, and take note of steps and times."""
    assert run.stdout is not None
    last_step = 0
    for line in run.stdout:
        now_s = time.monotonic()
        if now_s - started_s > RUN_SECONDS_MAX:
            raise SystemExit(f"demo: still not finished after {RUN_SECONDS_MAX:g} s")
        sys.stdout.write(line)
        sys.stdout.flush()
        if story.first_line_s is None:
            story.first_line_s = now_s - started_s
        if line.startswith("{"):
            story.summary = json.loads(line)
        match = STEP_LINE.match(line)
        if match is None:
            continue
        step = int(match.group(1))
        if story.killed_at_step is None and step >= kill_at:
            kill_worker(run.pid)
            story.killed_at_step, story.killed_s = step, time.monotonic()
        elif story.killed_at_step is not None and story.recovered_s is None and step <= last_step:
            story.resumed_at_step, story.recovered_s = step, now_s - story.killed_s
        last_step = max(last_step, step)
    return run.wait()


def kill_worker(launcher: int) -> None:
    for child in psutil.Process(launcher).children(recursive=True):
        if SCRIPT.name in " ".join(child.cmdline()) and child.environ().get("RANK") == VICTIM_RANK:
            print(f"demo: kill -9 {child.pid} (rank {VICTIM_RANK})", flush=True)
            os.kill(child.pid, signal.SIGKILL)
            return
    raise SystemExit("demo: the worker to kill was not found")


def report(story: Story, code: int, elapsed_s: float, out: Path) -> int:
    """Print the summary; return 0 when the job survived its loss."""
    print("\nSummary")
    if code != 0 or not story.summary or story.killed_at_step is None or story.recovered_s is None:
        print(f"  the job did not survive: exit code {code}")
        return 1
    s, lost = story.summary, story.killed_at_step - (story.resumed_at_step or 1) + 1
    print(f"  steps            {s['steps']:.0f}, with {s['world_size']:.0f} workers, in {elapsed_s:.1f} s")
    print(f"  tokens           {s['tokens']:.0f}")
    print(
        f"  loss             {s['loss_first']:.3f} at first, {s['loss_last']:.3f} at last, {s['val_loss']:.3f} held out"
    )
    print(
        f"  lost             rank {VICTIM_RANK} by SIGKILL after step {story.killed_at_step}; {lost} steps done again"
    )
    print(f"  recovery         {story.recovered_s:.1f} s from the kill to the next finished step")
    print(f"  start            {story.first_line_s:.1f} s to the script's first line")
    print(f"  loss curve       {out / 'loss.csv'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
