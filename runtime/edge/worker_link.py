"""The worker's end of the link to its agent: a plain blocking socket, used before the script and at safe points only.

SOCK_SEQPACKET: one message per packet, the agent's end seen at once. Not gRPC: the script forks (DataLoader workers),
and gRPC does not survive a fork. No thread; closed on exec; away from the low descriptor numbers that scripts rely on.
Invariants (tests/integration/test_worker_link.py):
1. Every wait has a bound; a lost, silent or foreign agent is a PeerError.
2. When the script closed our descriptor and reused its number, nothing is written to or read from it.
Not here: the form of messages (worker_wire.py); the agent's end (worker_server.py).
"""

import contextlib
import fcntl
import os
import socket
import struct
import time

from elastic_run.runtime.edge import worker_wire
from elastic_run.runtime.edge.worker_wire import PACKET_BYTES_MAX, AgentWord, Refused, Resume, Welcome
from elastic_run.runtime.protocol.errors import CodecError, PeerError, PeerRefused
from elastic_run.runtime.protocol.ids import PROTOCOL_VERSION

ANSWER_TIMEOUT_S = 30  # an agent on a machine that is busy starting workers; parent death ends the wait sooner
FD_MIN = 500  # below the usual limit of 1,024


class WorkerLink:
    """One connection to the agent."""

    def __init__(self, path: str) -> None:
        """Connect. Raises PeerError."""
        self._socket = _connect(path)
        self._identity = _identity(self._socket.fileno())

    def hello(self, *, worker: str, pid: int, protocol_version: int = PROTOCOL_VERSION) -> None:
        """Introduce this worker; `welcome` has the answer. Raises PeerError."""
        self._send(worker_wire.hello(protocol_version=protocol_version, worker=worker, pid=pid))

    def welcome(self, *, timeout_s: float = ANSWER_TIMEOUT_S) -> int:
        """Return the agent's view number. Raises PeerRefused with its reason, PeerError."""
        match self._receive(timeout_s):
            case Welcome(view):
                return view
            case Refused(reason):
                raise PeerRefused(reason)
            case None:
                raise PeerError(f"the agent did not answer within {timeout_s:g} s")
            case other:
                raise PeerError(f"the agent answered a greeting with {type(other).__name__}")

    def parked(self, *, view: int, step: int) -> None:
        """Say that this worker waits at its safe point. Raises PeerError."""
        self._send(worker_wire.parked(view=view, step=step))

    def running(self, *, view: int, step: int, unasked: bool) -> None:
        """Say that this worker goes on. Raises PeerError."""
        self._send(worker_wire.running(view=view, step=step, unasked=unasked))

    def wait_resume(self, *, view: int, timeout_s: float) -> bool:
        """Wait until the agent resumes what was parked for `view`; False after `timeout_s`. Raises PeerError."""
        deadline_s = time.monotonic() + timeout_s
        while (left_s := deadline_s - time.monotonic()) > 0:
            match self._receive(left_s):
                case Resume(resumed) if resumed >= view:
                    return True
                case Resume():  # the late answer to an earlier stop
                    continue
                case None:
                    return False
                case other:
                    raise PeerError(f"the agent said {type(other).__name__} to a parked worker")
        return False

    def close(self) -> None:
        """Close this process's end, unless the script has put something else in its place."""
        if self._is_ours():
            self._socket.close()
        else:
            self._socket.detach()

    def _send(self, packet: bytes) -> None:
        self._check()
        try:
            self._socket.settimeout(ANSWER_TIMEOUT_S)
            self._socket.send(packet, socket.MSG_NOSIGNAL)
        except OSError as error:
            raise PeerError(f"the agent cannot be reached: {error}") from None

    def _receive(self, timeout_s: float) -> AgentWord | None:
        """Return the next message, None when none came in time."""
        self._check()
        try:
            self._socket.settimeout(timeout_s)
            packet = self._socket.recv(PACKET_BYTES_MAX + 1)
        except TimeoutError:
            return None
        except OSError as error:
            raise PeerError(f"the agent cannot be reached: {error}") from None
        if not packet:
            raise PeerError("the agent closed the link")
        if len(packet) > PACKET_BYTES_MAX:
            raise PeerError(f"the agent sent a packet over {PACKET_BYTES_MAX} bytes")
        try:
            return worker_wire.parse(packet)
        except CodecError as error:
            raise PeerError(str(error)) from None

    def _check(self) -> None:
        if not self._is_ours():
            raise PeerError("the script closed the link to the agent")

    def _is_ours(self) -> bool:
        fd = self._socket.fileno()
        return fd >= 0 and _identity(fd) == self._identity


def _connect(path: str) -> socket.socket:
    link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        # A full backlog makes connect wait; Python's own time-out would make it fail at once instead.
        link.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", ANSWER_TIMEOUT_S, 0))
        link.connect(path)
    except OSError as error:
        link.close()
        raise PeerError(f"cannot connect to the agent at {path}: {error.strerror or error}") from None
    with contextlib.suppress(OSError):  # a low limit of open files: the low number must do
        high = fcntl.fcntl(link.fileno(), fcntl.F_DUPFD_CLOEXEC, FD_MIN)
        link.close()
        return socket.socket(fileno=high)
    return link


def _identity(fd: int) -> tuple[int, int] | None:
    try:
        status = os.fstat(fd)
    except OSError:
        return None
    return status.st_dev, status.st_ino
