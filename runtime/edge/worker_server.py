"""The agent's end of the links to its workers: a SOCK_SEQPACKET unix socket served by asyncio.

Invariants (tests/integration/test_worker_link.py):
1. Only processes of this user are served, at most CONNECTIONS_MAX, and only after a timely Hello that was admitted.
2. Garbage, oversized packets and broken order close that one link, each with its reason in an event.
3. After `close` neither the socket file nor a connection is left.
Not here: the worker's end (worker_link.py); which worker is awaited, and what its words lead to (the agent's core).
"""

import asyncio
import errno
import functools
import os
import socket
import stat
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from google.protobuf.message import DecodeError, Message

from elastic_run.runtime.edge.worker_wire import PACKET_BYTES_MAX
from elastic_run.runtime.protocol.errors import CodecError, PeerError, PeerRefused, UserError, VersionMismatch
from elastic_run.runtime.protocol.ids import PROTOCOL_VERSION, Incarnation, ViewNumber
from elastic_run.runtime.protocol.proto import worker_pb2

CONNECTIONS_MAX = 256
BACKLOG = 128
HELLO_TIMEOUT_S = 10.0
ACCEPT_PAUSE_S = 0.1  # out of descriptors: the waiting connection would be reported again and again
PATH_BYTES_MAX = 107
REASON_CHARS_MAX = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerHello:
    """A worker introduced itself."""

    worker: Incarnation
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerParked:
    """A worker waits at its safe point after `step`, asked to for `view`."""

    worker: Incarnation
    view: ViewNumber
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRunning:
    """A parked worker goes on; `unasked` when it waited in vain for Resume."""

    worker: Incarnation
    view: ViewNumber
    step: int
    unasked: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerGone:
    """The link of an admitted worker ended: it exited, or said what it must not."""

    worker: Incarnation
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRefused:
    """A connection was turned away before it was admitted."""

    pid: int
    reason: str


WorkerEvent = WorkerHello | WorkerParked | WorkerRunning | WorkerGone | WorkerRefused


class Admit(Protocol):
    def __call__(self, hello: WorkerHello) -> ViewNumber:
        """Return the view to welcome the worker with. Raises PeerRefused with the reason it is told."""


class WorkerServer:
    """Serves a node's workers from `start` until `close`. `on_event` is called in the event loop and must not block."""

    def __init__(
        self, path: str, admit: Admit, on_event: Callable[[WorkerEvent], None], hello_timeout_s: float = HELLO_TIMEOUT_S
    ) -> None:
        self._path = path
        self._admit = admit
        self._on_event = on_event
        self._hello_timeout_s = hello_timeout_s
        self._connections: set[asyncio.Task[None]] = set()
        self._links: dict[Incarnation, socket.socket] = {}

    async def start(self) -> None:
        """Listen. Raises UserError when the path cannot be used."""
        self._listener = _listen(self._path)
        self._accepting = asyncio.create_task(self._accept(), name="worker-server-accept")

    def resume(self, worker: Incarnation, view: ViewNumber) -> bool:
        """Let a worker that parked for `view` go on; False when it has no link (any more)."""
        link = self._links.get(worker)
        return link is not None and _say(link, worker_pb2.AgentMessage(resume=worker_pb2.Resume(view=view)))

    async def close(self) -> None:
        """End every link and remove the socket. No event follows."""
        self._on_event = _ignore
        tasks = [self._accepting, *self._connections]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._listener.close()
        _unlink(self._path)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                link, _ = await loop.sock_accept(self._listener)
            except OSError:
                await asyncio.sleep(ACCEPT_PAUSE_S)
                continue
            link.setblocking(False)
            if len(self._connections) >= CONNECTIONS_MAX:
                self._refuse(link, 0, f"the agent serves {CONNECTIONS_MAX} connections already")
                link.close()
                continue
            task = asyncio.create_task(self._serve(link), name="worker-link")
            self._connections.add(task)
            task.add_done_callback(functools.partial(self._end, link))

    def _end(self, link: socket.socket, task: asyncio.Task[None]) -> None:
        # Here and not in the task: one that is cancelled before it began runs none of its code.
        self._connections.discard(task)
        link.close()

    async def _serve(self, link: socket.socket) -> None:
        worker = await self._greet(link)
        if worker is None:
            return
        self._links[worker] = link
        try:
            reason = await self._listen_to(link, worker)
        finally:
            del self._links[worker]
        self._on_event(WorkerGone(worker=worker, reason=reason))

    async def _greet(self, link: socket.socket) -> Incarnation | None:
        """Return the admitted worker, None when it was refused."""
        pid = 0
        try:
            pid, uid = _peer(link)
            if uid != os.geteuid():
                raise PeerRefused(f"user {uid} may not talk to an agent of user {os.geteuid()}")
            async with asyncio.timeout(self._hello_timeout_s):
                message = await _receive(link)
            if message is None:
                raise PeerRefused("it left without a greeting")
            hello = _checked_hello(message, pid)
            if hello.worker in self._links:
                raise PeerRefused(f"worker {hello.worker} is connected already")
            view = self._admit(hello)
        except TimeoutError:
            refusal = f"no greeting came within {self._hello_timeout_s:g} s"
        except (PeerError, CodecError) as error:
            refusal = str(error)
        else:
            if _say(link, worker_pb2.AgentMessage(welcome=worker_pb2.Welcome(view=view))):
                self._on_event(hello)
                return hello.worker
            refusal = "it left while it was greeted"
        self._refuse(link, pid, refusal)
        return None

    def _refuse(self, link: socket.socket, pid: int, reason: str) -> None:
        reason = reason[:REASON_CHARS_MAX]
        _say(link, worker_pb2.AgentMessage(refused=worker_pb2.Refused(reason=reason)))
        self._on_event(WorkerRefused(pid=pid, reason=reason))

    async def _listen_to(self, link: socket.socket, worker: Incarnation) -> str:
        """Report what the worker says; return why it ended."""
        while True:
            try:
                message = await _receive(link)
            except (PeerError, CodecError) as error:
                return str(error)
            if message is None:
                return "it closed the link"
            match message.WhichOneof("body"):
                case "parked":
                    said = message.parked
                    self._on_event(WorkerParked(worker=worker, view=ViewNumber(said.view), step=said.step))
                case "running":
                    heard = message.running
                    self._on_event(
                        WorkerRunning(
                            worker=worker, view=ViewNumber(heard.view), step=heard.step, unasked=heard.unasked
                        )
                    )
                case other:
                    return f"it sent {other or 'an empty message'} where only parked or running may come"


def _checked_hello(message: worker_pb2.WorkerMessage, peer_pid: int) -> WorkerHello:
    if message.WhichOneof("body") != "hello":
        raise PeerRefused("its first packet is no greeting")
    hello = message.hello
    if hello.protocol_version != PROTOCOL_VERSION:
        raise VersionMismatch(
            f"this worker speaks protocol version {hello.protocol_version}, its agent speaks {PROTOCOL_VERSION}: "
            "both must run the same version of elastic-run"
        )
    # The kernel's word on the pid; 0 when the worker lives in a pid namespace the agent cannot see.
    return WorkerHello(worker=Incarnation(hello.worker), pid=peer_pid or hello.pid)


async def _receive(link: socket.socket) -> worker_pb2.WorkerMessage | None:
    """Return the next packet's message, None at the end. Raises CodecError, PeerError."""
    try:
        packet = await asyncio.get_running_loop().sock_recv(link, PACKET_BYTES_MAX + 1)
    except OSError as error:
        raise PeerError(f"its link broke: {error.strerror}") from None
    if not packet:
        return None
    if len(packet) > PACKET_BYTES_MAX:
        raise CodecError(f"it sent a packet over {PACKET_BYTES_MAX} bytes")
    message = worker_pb2.WorkerMessage()
    try:
        message.ParseFromString(packet)
    except DecodeError:
        raise CodecError(f"it sent {len(packet)} bytes that are no message") from None
    return message


def _say(link: socket.socket, message: Message) -> bool:
    """Send one packet without waiting; False when the worker is gone or does not read."""
    try:
        link.send(message.SerializeToString(), socket.MSG_NOSIGNAL)
    except OSError:
        return False
    return True


def _peer(link: socket.socket) -> tuple[int, int]:
    size = struct.calcsize("3i")
    pid, uid, _gid = struct.unpack("3i", link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return pid, uid


def _ignore(_event: WorkerEvent) -> None:
    return None


def _listen(path: str) -> socket.socket:
    if len(os.fsencode(path)) > PATH_BYTES_MAX:
        raise UserError(
            f"{path}: longer than the {PATH_BYTES_MAX} bytes of a unix socket: choose a shorter run directory"
        )
    folder = os.path.dirname(path)
    try:
        status = os.stat(folder)
        if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
            raise UserError(f"{folder}: must be yours alone for the agent's socket: chmod 700 {folder}")
        _remove_stale(path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            listener.bind(path)
            os.chmod(path, 0o600)
            listener.listen(BACKLOG)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise UserError(f"{path}: cannot listen here: {error.strerror}") from None
    listener.setblocking(False)
    return listener


def _remove_stale(path: str) -> None:
    """Remove the socket of an agent that died. Raises UserError when another one still answers."""
    if not os.path.lexists(path):
        return
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise UserError(f"{path}: exists and is no socket: remove it")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        probe.setblocking(False)
        if probe.connect_ex(path) != errno.ECONNREFUSED:  # refused: nobody listens
            raise UserError(f"{path}: another agent listens here: choose another run directory")
    os.unlink(path)


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        return
