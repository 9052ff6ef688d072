"""Forked processes that each have a mesh: started, told things, killed and always reaped.

`run(size, program)` is the short form: it returns what `program(site)` returned on each worker, or raises what failed.
A program that talks with the test uses `site.tell` and `site.hear`, the test `crew.hear(rank)`, `crew.tell(rank, ...)`.
torch is imported once, here, before the fork.
"""

import contextlib
import gc
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from elastic_run.collectives.endpoint import DataView, Endpoint
from elastic_run.collectives.group import Group
from elastic_run.collectives.mesh import Mesh
from elastic_run.collectives.options import MeshOptions

SECRET = b"a secret of the mesh workers' job"
WAIT_S = 60.0
_CONTEXT = multiprocessing.get_context("fork")


class WorkerFailed(AssertionError):
    """A worker's program raised, or its process ended without an answer."""


@dataclass(slots=True)
class Site:
    """What a program has: its place in the crew."""

    rank: int
    mesh: Mesh
    endpoints: tuple[Endpoint, ...]
    pipe: Connection

    def view(self, number: int = 1, ranks: list[int] | None = None) -> DataView:
        chosen = range(len(self.endpoints)) if ranks is None else ranks
        return DataView(number=number, members=tuple(self.endpoints[rank] for rank in chosen))

    def install(self, number: int = 1, ranks: list[int] | None = None) -> Group:
        return self.mesh.install(self.view(number, ranks))

    def tell(self, value: object) -> None:
        self.pipe.send(("told", value))

    def hear(self, timeout_s: float = WAIT_S) -> Any:
        if not self.pipe.poll(timeout_s):
            raise TimeoutError(f"worker {self.rank} heard nothing for {timeout_s:g} s")
        return self.pipe.recv()


Program = Callable[[Site], Any]


class Crew:
    """`size` workers w0, w1, ... Use as a context: at its end every process is killed and reaped."""

    def __init__(self, size: int, program: Program, options: MeshOptions | Sequence[MeshOptions] | None = None) -> None:
        """`options`: of all, or of each."""
        self.processes: list[Any] = []
        self._pipes: list[Connection] = []
        try:
            for rank in range(size):
                ours, theirs = _CONTEXT.Pipe()
                process = _CONTEXT.Process(
                    target=_work,
                    args=(
                        rank,
                        program,
                        options[rank] if isinstance(options, Sequence) else options,
                        theirs,
                        self._pipes,
                    ),
                    daemon=True,
                )
                process.start()
                theirs.close()
                self.processes.append(process)
                self._pipes.append(ours)
            self.endpoints = tuple(Endpoint.from_text(self.hear(rank)) for rank in range(size))
            for rank in range(size):
                self.tell(rank, [endpoint.to_text() for endpoint in self.endpoints])
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def pid(self, rank: int) -> int:
        return int(self.processes[rank].pid)

    def tell(self, rank: int, value: object) -> None:
        self._pipes[rank].send(value)

    def hear(self, rank: int, timeout_s: float = WAIT_S) -> Any:
        """Return the next thing that a worker tells. Raises WorkerFailed."""
        kind, value = self._next(rank, timeout_s)
        if kind != "told":
            raise WorkerFailed(f"worker {rank} ended instead of telling something: {value}")
        return value

    def result(self, rank: int, timeout_s: float = WAIT_S) -> Any:
        """Return what a worker's program returned. Raises WorkerFailed."""
        kind, value = self._next(rank, timeout_s)
        if kind != "returned":
            raise WorkerFailed(f"worker {rank}: {value}")
        return value

    def results(self, timeout_s: float = WAIT_S) -> list[Any]:
        return [self.result(rank, timeout_s) for rank in range(len(self.processes))]

    def signal(self, rank: int, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid(rank), number)

    def close(self) -> None:
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join(WAIT_S)
            process.close()
        self.processes.clear()
        for pipe in self._pipes:
            pipe.close()

    def _next(self, rank: int, timeout_s: float) -> tuple[str, Any]:
        pipe = self._pipes[rank]
        if not pipe.poll(timeout_s):
            raise WorkerFailed(f"worker {rank} says nothing for {timeout_s:g} s")
        try:
            kind, value = pipe.recv()
        except (EOFError, ConnectionResetError):
            raise WorkerFailed(f"worker {rank} is gone") from None
        return str(kind), value


def run(size: int, program: Program, options: MeshOptions | None = None, timeout_s: float = WAIT_S) -> list[Any]:
    with Crew(size, program, options) as crew:
        return crew.results(timeout_s)


def until(condition: Callable[[], bool], timeout_s: float = WAIT_S) -> None:
    """Return when `condition` holds. Raises TimeoutError."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("what was waited for did not come true")
        time.sleep(0.005)


@contextlib.contextmanager
def meshes(size: int, options: MeshOptions | None = None) -> Iterator[list[Mesh]]:
    """Several meshes in this process: enough where nobody has to die."""
    made: list[Mesh] = []
    try:
        for rank in range(size):
            made.append(Mesh(f"w{rank}", SECRET, options=options or MeshOptions()))
        yield made
    finally:
        for mesh in made:
            mesh.close()


def _work(
    rank: int, program: Program, options: MeshOptions | None, pipe: Connection, inherited: list[Connection]
) -> None:
    # What the test's process had is not this one's to finalise: gRPC's objects crash a forked child that does.
    gc.freeze()
    for other in inherited:
        other.close()
    torch.set_num_threads(1)
    try:
        mesh = Mesh(f"w{rank}", SECRET, options=options or MeshOptions())
        try:
            pipe.send(("told", mesh.endpoint.to_text()))
            endpoints = tuple(Endpoint.from_text(text) for text in pipe.recv())
            answer = ("returned", program(Site(rank, mesh, endpoints, pipe)))
        finally:
            mesh.close()
    except BaseException:  # noqa: BLE001 - told to the test
        answer = ("raised", traceback.format_exc())
    with contextlib.suppress(OSError):
        pipe.send(answer)
