"""Runs one function in several processes that form a torch process group, and brings back what each returned.

One process imports torch and forks the ranks, so a world costs one import. A program is a function in a module directly
under tests/: `program(Rank) -> dict[str, object]` of what `torch.save` can write without pickling code.
"""

import faulthandler
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

WORLD_LIMIT_S = float(os.environ.get("TORCH_RANKS_LIMIT_S", "240"))
HANG_LIMIT_S = WORLD_LIMIT_S * 0.9
KILL_GRACE_S = 10.0
OPERATION_LIMIT = timedelta(seconds=60)
_NEVER_DESTROYED: list[Any] = []


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    """What a program knows of its place."""

    rank: int
    size: int
    backend: str
    directory: str

    def init(self, name: str = "store", **options: Any) -> None:
        """Join the default group, over a file store."""
        import torch.distributed as dist

        dist.init_process_group(
            self.backend,
            init_method=f"file://{self.directory}/{name}",
            rank=self.rank,
            world_size=self.size,
            **{"timeout": OPERATION_LIMIT, **options},
        )
        if self.backend == "gloo":
            # gloo's destructor joins a thread that may wait for the interpreter, which the destructor holds.
            _NEVER_DESTROYED.append(dist.group.WORLD)

    def say(self, mark: str) -> None:
        """Let others see that this rank came to `mark`."""
        Path(self.directory, f"{mark}.{self.rank}").touch()

    def see(self, mark: str, rank: int) -> None:
        """Wait until `rank` said `mark`."""
        deadline = time.monotonic() + WORLD_LIMIT_S
        while not Path(self.directory, f"{mark}.{rank}").exists():
            if time.monotonic() > deadline:
                raise TimeoutError(f"rank {rank} never came to {mark}")
            time.sleep(0.005)


def run_ranks(
    program: str, *, size: int, backend: str, directory: Path, environment: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """Return what `module:function` returned on each rank; what a rank raised is under "error", as text.

    A rank that died instead has "exit": its wait status.
    """
    import torch

    directory.mkdir(parents=True, exist_ok=True)
    order = json.dumps({"program": program, "size": size, "backend": backend, "directory": str(directory)})
    parent = subprocess.Popen(
        [sys.executable, __file__, order],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), **(environment or {})},
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        output, _ = parent.communicate(timeout=WORLD_LIMIT_S + KILL_GRACE_S)
    except BaseException:
        os.killpg(parent.pid, signal.SIGKILL)
        parent.communicate()
        raise
    sys.stdout.write(output.decode(errors="replace"))
    assert parent.returncode == 0, output.decode(errors="replace")[-4000:]
    results = []
    for rank in range(size):
        file = directory / f"result.{rank}"
        if file.exists():
            results.append(torch.load(file, weights_only=True))
        else:
            results.append({"exit": int((directory / f"exit.{rank}").read_text())})
    return results


def _child(program: str, rank: Rank) -> None:
    import torch

    faulthandler.dump_traceback_later(HANG_LIMIT_S)  # says where it hangs, before it is killed for it
    module, _, function = program.partition(":")
    try:
        result = getattr(importlib.import_module(module), function)(rank)
    except BaseException as error:  # noqa: BLE001 - told to the test
        traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {error}"}
    place = Path(rank.directory, f"result.{rank.rank}")
    unfinished = Path(rank.directory, f"unfinished.{rank.rank}")
    torch.save(result, unfinished)
    unfinished.rename(place)


def _parent(order: dict[str, Any]) -> None:
    import torch.distributed

    torch.set_num_threads(1)
    program = order.pop("program")
    importlib.import_module(program.partition(":")[0])
    ranks = {}
    for number in range(order["size"]):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                _child(program, Rank(rank=number, **order))
                code = 0
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        ranks[pid] = number
    signal.signal(signal.SIGALRM, lambda *_: [os.kill(pid, signal.SIGKILL) for pid in ranks])
    signal.setitimer(signal.ITIMER_REAL, WORLD_LIMIT_S)
    while ranks:
        pid, status = os.wait()
        Path(order["directory"], f"exit.{ranks.pop(pid)}").write_text(str(status))


if __name__ == "__main__":
    _parent(json.loads(sys.argv[1]))
