"""A network in a box: hosts (network namespaces) whose every direction can be slowed, limited, made lossy or cut.

    with Lab(("a", "b")) as lab:
        lab.set("a", "b", delay_s=0.05, loss=0.01)           # a to b only; b to a stays as it is
        server = lab.popen("b", ["iperf3", "-s", "-1"])
        lab.set("a", "b", blocked=True)                      # at run time; `heal` ends it

Invariants (tests/integration/test_network_lab.py):
1. Closing leaves no process, device, namespace or descriptor; nor does kill -9 of the process that opened it.
2. A change is in force when the call returns; fields not named keep their value.
3. Laboratories do not see each other, whatever their hosts are called.
Needs root (CAP_SYS_ADMIN, CAP_NET_ADMIN) and /dev/net/tun; otherwise opening raises LabUnavailable with the reason.
One process carries all frames: about 1 Gbit/s in all on one core, less while hosts compete for it. `counters` tells.
Not here: what happens to a frame (direction.py), the hosts (hosts.py), many scripts at once (fleet.py).
"""

import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypedDict, Unpack

from elastic_run.chaos.network.direction import Counters, Shape
from elastic_run.chaos.network.host_process import File, HostProcess, LabError, start
from elastic_run.chaos.network.hosts import HOSTS_MAX, address_of
from elastic_run.runtime.protocol.errors import UserError

OPEN_S = 60.0
REPLY_S = 30.0
CLOSE_S = 30.0
REPLY_BYTES_MAX = 65_536
_SHARED_SPACES = 2  # ipc, pid
_HOST_SPACES = 3  # net, uts, mnt
_HOST_NAME = re.compile(r"[a-z][a-z0-9-]{0,31}")


class LabUnavailable(LabError):
    """This system does not permit a laboratory; the message says what is missing."""


class ShapeChange(TypedDict, total=False):
    """What `Lab.set` may change: the fields of direction.Shape."""

    delay_s: float
    jitter_s: float
    loss: float
    rate_bits_per_s: float | None
    queue_bytes: int
    blocked: bool


class Lab:
    """Opens at construction; close it, or use it as a context. Safe to use from several threads."""

    def __init__(self, hosts: Sequence[str] = ("a", "b"), *, seed: int = 0) -> None:
        """Make the hosts. The same seed gives the same losses and jitter for the same frames.

        Raises:
            LabUnavailable: the system does not permit it.
            UserError: bad or too many host names.
        """
        self.hosts = tuple(hosts)
        self._refuse_bad_names()
        self._shapes = {(source, to): Shape() for source in self.hosts for to in self.hosts if source != to}
        self._processes: list[HostProcess] = []
        self._lock = threading.Lock()
        self._relay, self._control = _start_relay()
        self._namespace_fds: list[int] = []
        try:
            self._namespace_fds = self._await_hosts(seed)
        except BaseException:
            self.close()
            raise

    def address(self, host: str) -> str:
        """The IPv4 address of a host."""
        return address_of(self._index(host))

    def shape(self, source: str, to: str) -> Shape:
        """How the direction is set at present."""
        self._index(source), self._index(to)
        if source == to:
            raise UserError(f"a host's frames to itself do not cross the network: {source}")
        return self._shapes[source, to]

    def set(self, source: str, to: str, **change: Unpack[ShapeChange]) -> None:
        """Change one direction; fields not named keep their value.

        Raises:
            UserError: unknown host or a value out of range.
        """
        self._apply(source, to, replace(self.shape(source, to), **change))

    def set_all(self, **change: Unpack[ShapeChange]) -> None:
        """Change every direction, one after the other."""
        for source, to in self._shapes:
            self.set(source, to, **change)

    def heal(self) -> None:
        """Make every direction perfect again."""
        for source, to in self._shapes:
            self._apply(source, to, Shape())

    def counters(self, source: str, to: str) -> Counters:
        """What became of the frames of a direction so far."""
        self.shape(source, to)
        return Counters(**self._ask({"source": source, "to": to}))

    def popen(
        self,
        host: str,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
        stdin: File = subprocess.DEVNULL,
        stdout: File = None,
        stderr: File = None,
    ) -> HostProcess:
        """Start a program on a host; it runs when this returns, and dies with the laboratory.

        Raises:
            LabError: it could not be started.
        """
        index = self._index(host)
        if not self._namespace_fds:
            raise LabError("the laboratory is closed")
        own = _SHARED_SPACES + index * _HOST_SPACES
        namespace_fds = self._namespace_fds[:_SHARED_SPACES] + self._namespace_fds[own : own + _HOST_SPACES]
        process = start(
            command,
            host=host,
            namespace_fds=namespace_fds,
            env=env,
            cwd=cwd,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
        )
        self._processes = [known for known in self._processes if known.returncode is None] + [process]
        return process

    def close(self) -> None:
        """End every process of the laboratory and remove it; nothing happens the second time."""
        self._control.close()
        try:
            self._relay.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            self._relay.kill()  # process 1 dies with it, and everything else with that
            self._relay.wait()
        for process in self._processes:
            process.close()
        self._processes.clear()
        for namespace_fd in self._namespace_fds:
            os.close(namespace_fd)
        self._namespace_fds = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _refuse_bad_names(self) -> None:
        if not 1 <= len(self.hosts) <= HOSTS_MAX or len(set(self.hosts)) != len(self.hosts):
            raise UserError(f"a laboratory has 1 to {HOSTS_MAX} hosts with different names, not {list(self.hosts)}")
        for name in self.hosts:
            if not _HOST_NAME.fullmatch(name) or name == "localhost":
                raise UserError(f"{name!r} is no host name: lower-case letters, digits and '-', a letter first")

    def _apply(self, source: str, to: str, shape: Shape) -> None:
        self._ask({"source": source, "to": to, "shape": asdict(shape)})
        self._shapes[source, to] = shape

    def _index(self, host: str) -> int:
        if host not in self.hosts:
            raise UserError(f"no host {host!r}; there are {', '.join(self.hosts)}")
        return self.hosts.index(host)

    def _await_hosts(self, seed: int) -> list[int]:
        wanted = _SHARED_SPACES + _HOST_SPACES * len(self.hosts)
        self._control.settimeout(OPEN_S)
        try:
            self._control.send(json.dumps({"hosts": self.hosts, "seed": seed}).encode())
            reply, lent_fds, _, _ = socket.recv_fds(self._control, REPLY_BYTES_MAX, wanted)
        except OSError as error:
            raise LabError(f"the relay of the laboratory does not answer: {error}") from error
        for lent_fd in lent_fds:
            os.set_inheritable(lent_fd, False)
        answer: dict[str, Any] = json.loads(reply or b"{}")
        if "unavailable" in answer:
            raise LabUnavailable(f"no network laboratory here: {answer['unavailable']}")
        if len(lent_fds) != wanted:
            for lent_fd in lent_fds:
                os.close(lent_fd)
            raise LabError("the relay of the laboratory ended at its start; its standard error says why")
        self._control.settimeout(REPLY_S)
        return lent_fds

    def _ask(self, request: dict[str, object]) -> dict[str, int]:
        with self._lock:
            try:
                self._control.send(json.dumps(request).encode())
                reply = self._control.recv(REPLY_BYTES_MAX)
            except OSError as error:
                raise LabError(f"the relay of the laboratory does not answer: {error}") from error
        if not reply:
            raise LabError("the relay of the laboratory has ended")
        answer: dict[str, int] = json.loads(reply)
        return answer


def _start_relay() -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start the relay, watching this process: it ends with it even when a fork of ours keeps the socket open."""
    control, far_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    owner_fd = os.pidfd_open(os.getpid())
    try:
        relay = subprocess.Popen(
            [
                *(sys.executable, "-I", "-m", "elastic_run.chaos.network.relay"),
                *(str(far_end.fileno()), str(owner_fd)),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=(far_end.fileno(), owner_fd),
            start_new_session=True,
        )
    except OSError as error:
        control.close()
        raise LabError(f"{sys.executable}: {error.strerror}") from error
    finally:
        far_end.close()
        os.close(owner_fd)
    return relay, control
