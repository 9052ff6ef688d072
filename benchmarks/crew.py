"""A crew: the member processes of one measured collective system, alive through all rounds, told what to do by lines.

The members are forked from one process that has imported torch once. A member that has nothing to do is blocked in a
read. Members of the systems that use torch's groups meet through a TCPStore in this process.

Invariants: 1. every process of a crew ends with its `with` block; 2. every wait is bounded; 3. a member's failure is
raised here with what it said.
"""

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from benchmarks.channel import Channel, ChannelClosed
from benchmarks.harness import BenchmarkError
from benchmarks.systems import ROOT, Program, stop

MODULE = "benchmarks.scripts.crew_member"
ANSWER_TIMEOUT_S = 120.0
STORE_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """A member as its crew knows it: `index` is for life, ranks are given by the views it is in."""

    index: int
    pid: int
    channel: Channel


class Crew:
    """Members `0..n-1`. Every method raises BenchmarkError when a member fails, dies or does not answer in time."""

    def __init__(self, backend: str, program: Program, seats: Sequence[Seat], store_port: int) -> None:
        self.backend = backend
        self._program = program
        self._seats = tuple(seats)
        self._store_port = store_port
        self._secret = secrets.token_hex(32)
        self._introductions: dict[int, str] = {}
        self._view = 0

    def tell(self, index: int, do: str, **details: Any) -> None:
        """Sends one command; its answer, if it has one, is awaited elsewhere."""
        try:
            self._seats[index].channel.send({"do": do, **details})
        except ChannelClosed as error:
            raise self._failure(index, f"is gone ({error})") from error

    def answer(self, index: int) -> dict[str, Any]:
        """What the member says next."""
        try:
            said = self._seats[index].channel.receive(ANSWER_TIMEOUT_S)
        except (ChannelClosed, TimeoutError) as error:
            raise self._failure(index, f"gave no answer: {error}") from error
        if "failed" in said:
            raise self._failure(index, f"failed: {said['failed']}")
        return said

    def ask(self, indices: Sequence[int], do: str, **details: Any) -> list[dict[str, Any]]:
        """Sends the same command to several members and collects an answer of each."""
        for index in indices:
            self.tell(index, do, **details)
        return [self.answer(index) for index in indices]

    def start_together(self, indices: Sequence[int]) -> None:
        """Waits until all these members say that they are ready, then gives each the word to begin."""
        for index in indices:
            self.answer(index)
        for index in indices:
            self.tell(index, "begin")

    def introduce(self, index: int) -> str:
        """Lets a member open its listeners, where the system has such; what others need to reach it."""
        if index not in self._introductions:
            (said,) = self.ask([index], "introduce", secret=self._secret)
            self._introductions[index] = said["introduction"]
        return self._introductions[index]

    def next_view(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """A view of these members (introduced before) in this order, as each of them is to be told of it."""
        self._view += 1
        return self.last_view(indices)

    def last_view(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The view made last, as each of its members is told of it."""
        common = {
            "number": self._view,
            "introductions": [self._introductions[index] for index in indices],
            "store_port": self._store_port,
        }
        return [{**common, "rank": rank} for rank in range(len(indices))]

    def form(self, indices: Sequence[int]) -> None:
        """Makes these members, in this order, a group able to reduce."""
        for index in indices:
            self.introduce(index)
        for index, view in zip(indices, self.next_view(indices), strict=True):
            self.tell(index, "form", view=view)
        for index in indices:
            self.answer(index)

    def leave(self, index: int) -> None:
        """Takes a member out of all groups; it may be introduced again."""
        self.ask([index], "leave")
        self._introductions.pop(index, None)

    def kill(self, index: int) -> None:
        """SIGKILL, at once."""
        os.kill(self._seats[index].pid, signal.SIGKILL)
        self._introductions.pop(index, None)

    def _failure(self, index: int, what: str) -> BenchmarkError:
        """Names also what others said of their own failure: who waits in vain is seldom the one to blame."""
        others = [f"member {seat.index} failed: {said}" for seat in self._seats if (said := _last_words(seat))]
        return self._program.failure("; ".join([f"{self.backend}: member {index} {what}", *others]))


def _last_words(seat: Seat) -> str | None:
    with contextlib.suppress(ChannelClosed):
        said = seat.channel.poll()
        return said.get("failed") if said is not None else None
    return None


@contextlib.contextmanager
def assembled(
    backend: str,
    members: int,
    directory: Path,
    *,
    environment: Mapping[str, str] | None = None,
    python: str = sys.executable,
) -> Iterator[Crew]:
    """Starts the processes of a crew; their output goes to a file in `directory`."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        store_port = listener.getsockname()[1]
        store = _store_on(listener)
        pairs = [socket.socketpair() for _ in range(members)]
        theirs = [pair[1] for pair in pairs]
        argv = [python, "-m", MODULE, backend, *(str(end.fileno()) for end in theirs)]
        output = stack.enter_context((directory / "output").open("wb"))
        process = subprocess.Popen(
            argv,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
            pass_fds=[end.fileno() for end in theirs],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        stack.callback(stop, process)
        for end in theirs:
            end.close()
        channels = [stack.enter_context(contextlib.closing(Channel(pair[0]))) for pair in pairs]
        program = Program(argv=tuple(argv), directory=directory, process=process)
        yield Crew(backend, program, _seated(channels, program), store_port)
        del store


def _seated(channels: Sequence[Channel], program: Program) -> list[Seat]:
    try:
        hellos = [channel.receive(ANSWER_TIMEOUT_S) for channel in channels]
    except (ChannelClosed, TimeoutError) as error:
        raise program.failure(f"a member did not start: {error}") from error
    return [
        Seat(index=index, pid=hello["pid"], channel=channel)
        for index, (channel, hello) in enumerate(zip(channels, hellos, strict=True))
    ]


def _store_on(listener: socket.socket) -> Any:
    """The store members meet through. Kept alive by whoever holds what this returns."""
    # Only benchmarks with crews pay for this import.
    from torch._C._distributed_c10d import TCPStore

    return TCPStore(
        "127.0.0.1",
        listener.getsockname()[1],
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=STORE_TIMEOUT_S),
        master_listen_fd=listener.detach(),
    )
