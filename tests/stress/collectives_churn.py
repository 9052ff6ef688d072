"""Membership that never rests: workers are killed, hung, cut off and added at random while all of them reduce.

A parent plays the controller: it starts workers, does harm several times a second, and installs views. Every worker
runs all-reduces of several sizes on several groups from several threads, some of them asynchronous; the value of every
completed operation is checked on every member, every interrupted one must have left its input as it was. In the end
memory, descriptors, threads and mappings must be those of a mesh to which nothing happened.
Run: python -m stress.collectives_churn --seconds 60 --seed 1 [--tcp] (in tests/)
Not here: single faults, one at a time (integration/test_collectives_faults.py).
"""

import argparse
import collections
import contextlib
import ctypes
import gc
import json
import multiprocessing
import multiprocessing.connection
import os
import random
import signal
import socket
import statistics
import threading
import time
import traceback
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import torch

from elastic_run.collectives.endpoint import DataView, Endpoint
from elastic_run.collectives.errors import CollectiveAborted, CollectiveTimeout
from elastic_run.collectives.group import Group
from elastic_run.collectives.mesh import Mesh
from elastic_run.collectives.operation import Operation
from elastic_run.collectives.options import MeshOptions
from elastic_run.runtime.protocol.errors import ElasticError

SECRET = b"a secret of the churning workers"
MEMBERS_MIN, MEMBERS_MAX = 2, 5
GROUP_NAMES = ("world", "reversed", "parity-0", "parity-1")
NUMELS = (7, 3_000, 100, 60_000, 1, 400_000, 20_000, 1_500_000)
IN_FLIGHT = 4
HUNG_S = 45.0  # nothing takes so long on a busy machine
LAST_ROUNDS = 5
_CONTEXT = multiprocessing.get_context("fork")


# The worker ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Chapter:
    """One view as a worker lives it."""

    number: int
    members: tuple[str, ...]
    groups: list[Group]


@dataclass(slots=True)
class Counts:
    completed: int = 0
    aborted: int = 0
    wrong: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Started:
    sequence: int
    tensor: torch.Tensor
    operation: Operation
    start_s: float = field(default_factory=time.monotonic)
    end_s: float = 0.0

    def note_end(self, _: Operation) -> None:
        self.end_s = time.monotonic()


class Worker:
    """Reduces in three threads; obeys the parent in the main one."""

    def __init__(self, name: str, pipe: Connection, tcp: bool, seed: int) -> None:
        self.before = footprint()
        self.pipe = pipe
        self.name = name
        self.random = random.Random(seed)
        self.mesh = Mesh(name, SECRET, options=MeshOptions(shared_memory=not tcp, arena_bytes=256 << 20))
        self.counts = Counts()
        self.chapter: Chapter | None = None
        self.turned = threading.Condition()
        self.over = False
        self.last_number = 1 << 62  # the view in which every thread does LAST_ROUNDS and ends
        self.lock = threading.Lock()
        self.told_of = 0  # the last view whose interruption the parent heard of
        self.threads = [threading.Thread(target=self.reduce, args=(index,)) for index in range(3)]

    def tell(self, *message: object) -> None:
        with self.lock:
            self.pipe.send(message)

    def obey(self) -> None:
        self.tell("endpoint", self.mesh.endpoint.to_text())
        for thread in self.threads:
            thread.start()
        while True:
            order, *arguments = self.pipe.recv()
            if order == "end":
                break
            getattr(self, "do_" + order)(*arguments)
        with self.turned:
            self.over = True
            self.turned.notify_all()
        for thread in self.threads:
            thread.join(HUNG_S)
        if any(thread.is_alive() for thread in self.threads):
            self.counts.wrong.append("a thread hangs")
        open_report = self.settled()
        self.mesh.close()
        self.mesh = None  # type: ignore[assignment]
        self.chapter = None
        gc.collect()
        after = footprint()
        if after != self.before:
            self.counts.wrong.append(f"left behind: {after} instead of {self.before}")
        if open_report is not None:
            self.counts.wrong.append(open_report)
        self.tell("ended", self.counts.completed, self.counts.aborted, self.counts.wrong)

    def do_prepare(self, endpoints: list[str]) -> None:
        self.mesh.prepare([Endpoint.from_text(text) for text in endpoints])

    def do_install(self, number: int, endpoints: list[str], last: bool) -> None:
        members = tuple(Endpoint.from_text(text) for text in endpoints)
        try:
            world = self.mesh.install(DataView(number=number, members=members))
        except ValueError as error:
            self.counts.wrong.append(f"install: {error}")
            return
        groups = [world, self.mesh.group("reversed", list(range(len(members)))[::-1])]
        parity = [rank for rank in range(len(members)) if rank % 2 == world.rank % 2]
        groups.append(self.mesh.group(f"parity-{world.rank % 2}", parity))
        with self.turned:
            if last:
                self.last_number = number
            self.chapter = Chapter(number, world.members, groups)
            self.turned.notify_all()
        self.tell("installed", number)

    def do_abort(self, worker: str) -> None:
        self.mesh.abort(worker, "the test says that it hangs")

    def do_cut(self) -> None:
        """Break one connection, as a network would: a reset, or an end in both directions."""
        self.mesh.engine.call(self._cut)

    def _cut(self) -> None:
        peers = self.mesh._peers.values()
        ends = [lane.socket for peer in peers for lane in peer._lanes.values()]
        ends += [inbound._sock for peer in peers for inbound in peer._inbounds]
        ends += [pipe._outbound.socket for peer in peers for pipe in peer.pipes._out.values()]
        ends += [pipe._sock for peer in peers for pipe in peer.pipes._in]
        sockets = [sock for sock in ends if sock is not None]
        if sockets:
            sock = self.random.choice(sockets)
            with contextlib.suppress(OSError):
                if sock.family == socket.AF_UNIX:
                    sock.shutdown(socket.SHUT_RDWR)
                else:  # connecting to nowhere resets
                    ctypes.CDLL(None).connect(sock.fileno(), bytes(16), 16)

    # Reducing

    def reduce(self, index: int) -> None:
        try:
            done = 0
            while (chapter := self.next_chapter(done)) is not None:
                done = chapter.number
                self.live(chapter, chapter.groups[index], asynchronous=index == 0)
        except BaseException:  # noqa: BLE001 - told to the parent
            self.counts.wrong.append(traceback.format_exc())

    def next_chapter(self, after: int) -> Chapter | None:
        with self.turned:
            self.turned.wait_for(lambda: self.over or (self.chapter is not None and self.chapter.number > after))
            return self.chapter if self.chapter is not None and self.chapter.number > after else None

    def live(self, chapter: Chapter, group: Group, *, asynchronous: bool) -> None:
        """Reduce until the view ends."""
        sequence = 0
        running: collections.deque[Started] = collections.deque()
        rounds = LAST_ROUNDS if chapter.number == self.last_number else 1 << 62
        while sequence < rounds or running:
            if self.over and group.size == 1:
                return  # nobody else will end it
            if sequence < rounds:
                tensor = value(chapter.number, sequence, group.rank)
                started = Started(sequence, tensor, group.all_reduce([tensor], sync=not asynchronous))
                started.operation.add_done_callback(started.note_end)
                running.append(started)
                sequence += 1
            full = sequence >= rounds or len(running) >= (IN_FLIGHT if asynchronous else 1)
            if full and not self.check(chapter, group, running.popleft()):
                for started in running:
                    self.check(chapter, group, started)
                return

    def check(self, chapter: Chapter, group: Group, started: "Started") -> bool:
        sequence, tensor = started.sequence, started.tensor
        where = f"{self.name}: view {chapter.number} {group.name} {group.members} operation {sequence}"
        try:
            started.operation.wait(HUNG_S)
        except CollectiveTimeout as error:
            self.counts.wrong.append(f"{where} hung: {error}")
        except CollectiveAborted as error:
            self.counts.aborted += 1
            if not torch.equal(tensor, value(chapter.number, sequence, group.rank)):
                self.counts.wrong.append(f"{where} was aborted, and its input changed")
            if chapter.number == self.last_number:
                self.counts.wrong.append(f"{where} was aborted for no reason: {error}")
            with self.turned:
                first, self.told_of = self.told_of < chapter.number, max(self.told_of, chapter.number)
            if first:
                self.tell("aborted", chapter.number, started.start_s, started.end_s or time.monotonic())
            return False
        except ElasticError as error:
            self.counts.wrong.append(f"{where} failed: {error!r}")
        else:
            expected = value(chapter.number, sequence, 0)
            for rank in range(1, group.size):
                expected += value(chapter.number, sequence, rank)
            if torch.equal(tensor, expected):
                self.counts.completed += 1
                return True
            self.counts.wrong.append(f"{where} has a wrong value")
        return False

    def settled(self) -> str | None:
        """Return what is still in use although nothing runs; a worker that was left out may have any."""
        deadline = time.monotonic() + 5
        held_bytes = [1]

        def look() -> None:
            self.mesh.arena.validate()
            held_bytes[0] = self.mesh.arena.used_bytes

        if self.chapter is None or self.chapter.number != self.last_number:
            return None
        while held_bytes[0] and time.monotonic() < deadline:
            self.mesh.engine.call(look)
            time.sleep(0.01)
        sockets = footprint()["sockets"] - self.before["sockets"]
        each_way = 1 + (0 if self.mesh.options.shared_memory else len(GROUP_NAMES))  # a pipe for each group
        expected = 2 + 2 * each_way * (len(self.chapter.members) - 1)
        if held_bytes[0] or sockets > expected:
            return f"in use while idle: {held_bytes[0]} bytes of shared memory, {sockets} sockets, at most {expected}"
        return None


def value(view: int, sequence: int, rank: int) -> torch.Tensor:
    """Whole numbers so small that their sums are exact."""
    numel = NUMELS[(sequence * 5 + view) % len(NUMELS)]
    return torch.arange(numel, dtype=torch.float32).remainder_(13).add_((view * 31 + sequence * 7 + rank * 3) % 97)


def footprint() -> dict[str, int]:
    """Count what this process has of what a mesh uses."""
    links = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
    with open("/proc/self/maps", encoding="utf-8") as file:
        maps = file.readlines()
    return {
        "descriptors": len([link for link in links if not link.startswith("/proc/")]),
        "sockets": sum(link.startswith("socket:") for link in links),
        "mappings": sum("memfd:elastic" in line for line in maps),
        "threads": threading.active_count(),
        "named memory": sum("/dev/shm/" in text for text in [*maps, *links]),
    }


def _work(name: str, pipe: Connection, inherited: list[Connection], tcp: bool, seed: int) -> None:
    for other in inherited:
        other.close()
    torch.set_num_threads(1)
    try:
        Worker(name, pipe, tcp, seed).obey()
    except BaseException:  # noqa: BLE001 - told to the parent
        with contextlib.suppress(OSError):
            pipe.send(("ended", 0, 0, [traceback.format_exc()]))


# The parent ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Report:
    """What a campaign saw."""

    views: int = 0
    kills: int = 0
    hangs: int = 0
    cuts: int = 0
    joins: int = 0
    completed: int = 0
    aborted: int = 0
    abort_ms: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Kind of harm -> median and longest time from the harm, or the verdict, to the end of a survivor's operation."""
    wrong: list[str] = field(default_factory=list)

    def text(self) -> str:
        return json.dumps({name: getattr(self, name) for name in self.__slots__}, indent=1)


@dataclass(slots=True)
class Child:
    name: str
    process: Any
    pipe: Connection
    endpoint: str = ""
    installed: int = 0
    stood_still: bool = False


class Campaign:
    """Does harm, and installs views, until the time is over."""

    def __init__(self, seed: int, *, tcp: bool) -> None:
        self.random = random.Random(seed)
        self.tcp = tcp
        self.report = Report()
        self.children: dict[str, Child] = {}
        self.stopped: list[Child] = []
        self.number = 0
        self.born = 0
        self.harmed: dict[int, tuple[str, float]] = {}  # view -> how and when it was harmed
        self.ragged: set[int] = set()  # views that were harmed before everybody was in them
        self.aborts_ms: dict[str, list[float]] = {"kill": [], "hang": [], "cut": []}

    def run(self, seconds: float) -> Report:
        try:
            for _ in range(3):
                self.join()
            self.install()
            end = time.monotonic() + seconds
            while time.monotonic() < end and not self.report.wrong:
                self.listen(self.random.uniform(0.02, 0.3))
                self.step()
            self.finish()
        finally:
            for child in [*self.children.values(), *self.stopped]:
                child.process.kill()
                child.process.join(HUNG_S)
                child.pipe.close()
        for kind, times_ms in self.aborts_ms.items():
            if times_ms:
                self.report.abort_ms[kind] = (round(statistics.median(times_ms), 1), round(max(times_ms), 1))
        return self.report

    def step(self) -> None:
        kinds = ["view"]
        if len(self.children) > MEMBERS_MIN:
            kinds += ["kill", "kill", "hang", "cut", "cut"]
        if len(self.children) < MEMBERS_MAX:
            kinds += ["join", "join"]
        kind = self.random.choice(kinds)
        victim = self.children[self.random.choice(sorted(self.children))]
        if kind == "join":
            self.join()
        elif kind == "cut":
            self.report.cuts += 1
            self.harmed[self.number] = (kind, time.monotonic())
            self.send(victim, "cut")
        elif kind == "kill":
            self.report.kills += 1
            self.harmed[self.number] = (kind, time.monotonic())
            victim.process.kill()
            self.bury(victim)
        elif kind == "hang":
            self.report.hangs += 1
            os.kill(victim.process.pid, signal.SIGSTOP)
            victim.stood_still = True
            self.stopped.append(self.children.pop(victim.name))
            self.listen(self.random.uniform(0.0, 0.1))
            self.harmed[self.number] = (kind, time.monotonic())
            for child in list(self.children.values()):
                self.send(child, "abort", victim.name)
        if self.random.random() < 0.7:
            self.listen(self.random.uniform(0.0, 0.15))
        self.install()
        if len(self.stopped) > 1 or (self.stopped and self.random.random() < 0.3):
            self.wake(self.stopped.pop(0))

    def join(self) -> None:
        name = f"w{self.born}"
        self.born += 1
        self.report.joins += 1
        ours, theirs = _CONTEXT.Pipe()
        inherited = [child.pipe for child in [*self.children.values(), *self.stopped]]
        process = _CONTEXT.Process(
            target=_work, args=(name, theirs, [*inherited, ours], self.tcp, self.random.getrandbits(32)), daemon=True
        )
        process.start()
        theirs.close()
        child = self.children[name] = Child(name, process, ours)
        self.until(lambda: bool(child.endpoint), f"{name} starts")
        if self.random.random() < 0.8:
            endpoints = [other.endpoint for other in self.children.values()]
            for other in list(self.children.values()):
                self.send(other, "prepare", endpoints if other is child else [child.endpoint])

    def install(self, *, last: bool = False) -> None:
        self.number += 1
        self.report.views += 1
        members = list(self.children.values())
        self.random.shuffle(members)
        endpoints = [child.endpoint for child in members]
        number = self.number
        for child in members:
            self.send(child, "install", number, endpoints, last)
            if self.random.random() < 0.2:
                self.listen(self.random.uniform(0.0, 0.03))
        if last or self.random.random() < 0.8:
            self.until(lambda: all(child.installed >= number for child in members), f"view {number} is installed")
        else:
            self.ragged.add(number)

    def wake(self, child: Child) -> None:
        """Let a worker go on that was left out meanwhile: it must find out, and end."""
        os.kill(child.process.pid, signal.SIGCONT)
        self.children[child.name] = child
        self.end([child])

    def finish(self) -> None:
        for child in self.stopped[:]:
            self.stopped.remove(child)
            self.wake(child)
        self.install(last=True)
        self.end(list(self.children.values()))

    def end(self, children: list[Child]) -> None:
        for child in children:
            self.send(child, "end")
        self.until(lambda: all(child.name not in self.children for child in children), "workers end")

    def send(self, child: Child, *order: object) -> None:
        with contextlib.suppress(OSError):
            child.pipe.send(order)

    def bury(self, child: Child) -> None:
        child.process.join(HUNG_S)
        child.pipe.close()
        self.children.pop(child.name, None)

    def until(self, condition: Any, what: str) -> None:
        deadline = time.monotonic() + 2 * HUNG_S
        while not condition() and not self.report.wrong:
            if time.monotonic() > deadline:
                self.report.wrong.append(f"hung until {what}")
            self.listen(0.05)

    def listen(self, seconds: float) -> None:
        """Hear the workers for so long."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            by_pipe = {child.pipe: child for child in self.children.values()}
            for pipe in multiprocessing.connection.wait(list(by_pipe), left):
                child = by_pipe[pipe]  # type: ignore[index]
                try:
                    kind, *what = child.pipe.recv()
                except (EOFError, OSError):
                    self.report.wrong.append(f"{child.name} died: {child.process.exitcode}")
                    self.children.pop(child.name)
                    continue
                self.heard(child, kind, what)

    def heard(self, child: Child, kind: str, what: list[Any]) -> None:
        if kind == "endpoint":
            child.endpoint = what[0]
        elif kind == "installed":
            child.installed = max(child.installed, what[0])
        elif kind == "aborted":
            if what[0] in self.harmed and what[0] not in self.ragged and not child.stood_still:
                kind, harmed_s = self.harmed[what[0]]
                self.aborts_ms[kind].append(1000 * (what[2] - max(what[1], harmed_s)))
        elif kind == "ended":
            self.report.completed += what[0]
            self.report.aborted += what[1]
            self.report.wrong += what[2]
            self.bury(child)


def campaign(seconds: float, seed: int, *, tcp: bool = False) -> Report:
    return Campaign(seed, tcp=tcp).run(seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tcp", action="store_true", help="no shared memory, as between hosts")
    options = parser.parse_args()
    report = campaign(options.seconds, options.seed, tcp=options.tcp)
    print(report.text())
    return 1 if report.wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
