"""The process below a laboratory: `relay.py CONTROL_FD OWNER_FD` makes the hosts and carries every frame between them.

It is process 1 of a PID namespace that holds all processes of the laboratory, so the kernel ends them with it. It ends
when its control socket closes, its owner dies (OWNER_FD: a pidfd), or its own parent dies: no death is missed.

Invariants (tests/integration/test_network_lab.py):
1. After kill -9 of the owner no process, device or namespace of the laboratory remains.
2. A change is in force before it is acknowledged.
3. Memory is bounded: all directions together hold at most IN_FLIGHT_BYTES_MAX.
Not here: what happens to a frame (direction.py), the caller's side (lab.py).
"""

import json
import os
import random
import select
import signal
import socket
import sys
import time
from typing import Any

from elastic_run.chaos.network import kernel
from elastic_run.chaos.network.direction import Direction, Shape
from elastic_run.chaos.network.hosts import Host, hardware_of, make_hosts

REQUEST_BYTES_MAX = 65_536
IN_FLIGHT_BYTES_MAX = 268_435_456
FRAME_BYTES_MAX = 2048
FRAMES_PER_TURN = 64
"""Frames read from one host before the others get their turn."""
_MULTICAST = 0x01
_OWN_SPACES = kernel.CLONE_NEWNET | kernel.CLONE_NEWNS | kernel.CLONE_NEWUTS | kernel.CLONE_NEWIPC | kernel.CLONE_NEWPID


def main(argv: list[str]) -> int:
    """Run a laboratory until its owner is done with it."""
    control, owner_fd = _lowered(int(argv[1]), int(argv[2]))
    request = json.loads(control.recv(REQUEST_BYTES_MAX))
    try:
        kernel.unshare(_OWN_SPACES)
    except OSError as error:
        return _refuse(control, f"this user may not create namespaces ({error.strerror})")
    child = os.fork()
    if child:  # holds no descriptor that the owner waits on; lives to hand the end of process 1 on
        control.close()
        os.close(owner_fd)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 0xFF
    kernel.die_with_parent(signal.SIGKILL)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # orphans of the hosts' processes become ours: reap them unseen
    return _serve(control, owner_fd, request)


def _lowered(control_fd: int, owner_fd: int) -> tuple[socket.socket, int]:
    """Move the descriptors to the lowest free numbers: select takes none above 1023, and the owner may have many."""
    lowered = socket.socket(fileno=os.dup(control_fd)), os.dup(owner_fd)
    os.close(control_fd)
    os.close(owner_fd)
    return lowered


def _serve(control: socket.socket, owner_fd: int, request: dict[str, Any]) -> int:
    try:
        kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
        kernel.mount("proc", "/proc", "proc", kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC)
        shared_fds = kernel.open_namespaces("ipc", "pid")
        hosts = make_hosts(tuple(request["hosts"]))
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        return _refuse(control, f"this system does not let hosts be made ({error.strerror}{where})")
    lent_fds = [*shared_fds, *(fd for host in hosts for fd in host.namespace_fds)]
    socket.send_fds(control, [b'{"ready": true}'], lent_fds)
    for lent_fd in lent_fds:
        os.close(lent_fd)
    Relay(hosts, control=control, owner_fd=owner_fd, seed=request["seed"]).run()
    return 0


def _refuse(control: socket.socket, reason: str) -> int:
    control.send(json.dumps({"unavailable": reason}).encode())
    return 0


class Relay:
    """Carries frames until the owner closes the control socket or dies."""

    def __init__(self, hosts: tuple[Host, ...], *, control: socket.socket, owner_fd: int, seed: int) -> None:
        count = len(hosts)
        self._control, self._owner_fd = control, owner_fd
        self._indexes = {host.name: index for index, host in enumerate(hosts)}
        self._taps = [host.tap_fd for host in hosts]
        self._by_tap = {host.tap_fd: index for index, host in enumerate(hosts)}
        self._by_hardware = {hardware_of(index): index for index in range(count)}
        share = IN_FLIGHT_BYTES_MAX // max(1, count * (count - 1))
        self._lines = {
            (source.name, to.name): Direction(
                chance=random.Random(f"{seed} {source.name} {to.name}"), in_flight_bytes_max=share
            )
            for source in hosts
            for to in hosts
            if source is not to
        }
        self._from = [
            {self._indexes[to]: line for (source, to), line in self._lines.items() if source == host.name}
            for host in hosts
        ]
        self._waiting: dict[Direction, int] = {}

    def run(self) -> None:
        """Carry frames and answer requests."""
        watched = [self._owner_fd, self._control.fileno(), *self._taps]
        while True:
            wake_s = self._deliver(time.monotonic())
            # select, not epoll: its time-out is finer than a millisecond
            timeout_s = None if wake_s is None else max(0.0, wake_s - time.monotonic())
            ready, _, _ = select.select(watched, [], [], timeout_s)
            for descriptor in ready:
                if descriptor == self._owner_fd:
                    return
                if descriptor == self._control.fileno():
                    if not self._answer():
                        return
                else:
                    self._carry(descriptor)

    def _carry(self, tap_fd: int) -> None:
        source = self._by_tap[tap_fd]
        lines = self._from[source]
        for _ in range(FRAMES_PER_TURN):
            try:
                frame = os.read(tap_fd, FRAME_BYTES_MAX)
            except BlockingIOError:
                return
            now_s = time.monotonic()
            to = self._by_hardware.get(frame[:6])
            if to is not None and to != source:
                self._offer(lines[to], to, frame, now_s)
            elif frame[0] & _MULTICAST:
                for other, line in lines.items():
                    self._offer(line, other, frame, now_s)

    def _offer(self, line: Direction, to: int, frame: bytes, now_s: float) -> None:
        if line.offer(frame, now_s):
            self._write(line, to, frame)
        elif line not in self._waiting and line.next_due_s() is not None:
            self._waiting[line] = to

    def _deliver(self, now_s: float) -> float | None:
        """Hand over the frames that are due; return when the next one is."""
        wake_s: float | None = None
        for line, to in list(self._waiting.items()):
            for frame in line.arrived(now_s):
                self._write(line, to, frame)
            due_s = line.next_due_s()
            if due_s is None:
                del self._waiting[line]
            elif wake_s is None or due_s < wake_s:
                wake_s = due_s
        return wake_s

    def _write(self, line: Direction, to: int, frame: bytes) -> None:
        try:
            os.write(self._taps[to], frame)
        except OSError:  # the device is full, or was taken down by a process of its host
            line.counters.dropped_by_device += 1
            return
        line.counters.delivered_frames += 1
        line.counters.delivered_bytes += len(frame)

    def _answer(self) -> bool:
        """Serve one request; False when there will be no more."""
        try:
            message = self._control.recv(REQUEST_BYTES_MAX)
        except ConnectionError:
            return False
        if not message:
            return False
        request: dict[str, Any] = json.loads(message)
        line = self._lines[request["source"], request["to"]]
        if "shape" in request:
            line.reshape(Shape(**request["shape"]), time.monotonic())
        try:
            self._control.send(json.dumps(line.counters.as_numbers()).encode())
        except ConnectionError:  # the owner left without waiting for it
            return False
        return True


if __name__ == "__main__":
    sys.exit(main(sys.argv))
