"""How each measured system is started, watched and ended.

Invariants: 1. what still descends from a started program, in any session, ends with its `with` block; 2. every wait
is bounded; 3. a failure shows the end of the failed program's own output.
"""

import contextlib
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.harness import BenchmarkError

ROOT = Path(__file__).resolve().parent.parent
RUN_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 15.0
POLL_S = 0.02
OUTPUT_TAIL_LINES = 15

TORCHRUN = "torchrun"
ELASTIC_RUN = "elastic-run"
PYTHON = "python"
BOOTSTRAP = "bootstrap"
GLOO = "gloo"
ELASTIC = "elastic"
ELASTIC_TCP = "elastic-tcp"
ELASTIC_MESH = "elastic-mesh"
ELASTIC_RING = "elastic-ring"
ELASTIC_EXACT = "elastic-exact"
MESSAGES_EXCHANGE = "messages-exchange"
MESSAGES_PAIRWISE = "messages-pairwise"
MESSAGES_RING = "messages-ring"
PCCL = "pccl"
MODULE_OF_SYSTEM = {
    TORCHRUN: "torch.distributed.run",
    ELASTIC_RUN: "elastic_run.runtime.cli",
    PYTHON: "runpy",
    BOOTSTRAP: "elastic_run.runtime.bootstrap",
    GLOO: "torch.distributed",
    ELASTIC: "elastic_run.collectives.torch_backend",
    ELASTIC_TCP: "elastic_run.collectives.torch_backend",
    ELASTIC_MESH: "elastic_run.collectives.mesh",
    ELASTIC_RING: "elastic_run.collectives.mesh",
    ELASTIC_EXACT: "elastic_run.collectives.mesh",
    MESSAGES_EXCHANGE: "elastic_run.collectives.mesh",
    MESSAGES_PAIRWISE: "elastic_run.collectives.mesh",
    MESSAGES_RING: "elastic_run.collectives.mesh",
    PCCL: "pccl",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A running command line and the directory that holds its output."""

    argv: tuple[str, ...]
    directory: Path
    process: subprocess.Popen[bytes]

    def failure(self, what: str) -> BenchmarkError:
        """An error that says what happened, to which command line, and what it printed last."""
        lines = (self.directory / "output").read_text(errors="replace").splitlines()[-OUTPUT_TAIL_LINES:]
        return BenchmarkError("\n    ".join([f"{what}:", f"$ {shlex.join(self.argv)}", *lines]))


def command(system: str, *, script: Path, arguments: Sequence[str], workers: int = 1) -> list[str]:
    """The command line that runs `script` under `system`; PYTHON and BOOTSTRAP have one worker and no launcher."""
    if system == PYTHON:
        return [sys.executable, str(script), *arguments]
    module = ["-m", MODULE_OF_SYSTEM[system]]
    if system == BOOTSTRAP:
        return [sys.executable, *module, str(script), *arguments]
    return [sys.executable, *module, "--standalone", f"--nproc-per-node={workers}", str(script), *arguments]


@contextlib.contextmanager
def started(argv: Sequence[str], directory: Path) -> Iterator[Program]:
    """Runs `argv` in `directory` with its output in a file there, and ends it on leaving."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (directory / "output").open("wb") as output:
        process = subprocess.Popen(
            argv, cwd=directory, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        yield Program(argv=tuple(argv), directory=directory, process=process)
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends `process` politely, then it and whatever is left of its descendants by force."""
    family = descendants(process.pid)
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
    if process.poll() is None:
        family += descendants(process.pid)
        process.kill()
    process.wait()
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(family, timeout=STOP_TIMEOUT_S)


def descendants(pid: int) -> list[psutil.Process]:
    """Every process below `pid`, whatever its session; empty when it is gone."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def finish(program: Program) -> None:
    """Waits for a run to end well. Raises BenchmarkError when it fails or does not end."""
    try:
        code = program.process.wait(RUN_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise program.failure(f"no end after {RUN_TIMEOUT_S:.0f} s") from None
    if code != 0:
        raise program.failure(f"exit code {code}")


def wait_for_files(program: Program, names: Sequence[str]) -> list[str]:
    """The contents of the files `names` in the program's directory once all are there. Raises BenchmarkError."""
    files = [program.directory / name for name in names]
    deadline_s = time.monotonic() + RUN_TIMEOUT_S
    while not all(file.exists() for file in files):
        if program.process.poll() is not None:
            raise program.failure(f"ended with code {program.process.returncode} too early")
        if time.monotonic() > deadline_s:
            raise program.failure(f"not ready after {RUN_TIMEOUT_S:.0f} s")
        time.sleep(POLL_S)
    return [file.read_text() for file in files]
