"""This worker's place in the data plane: listeners, peers, views, groups.

`install` edits: connections between members that stay are kept, members that left are let go, a new one is dialled when
first needed, or before by `prepare`. Whatever was under way in the old view is interrupted; its groups are over.
Works without controller or agent: give every member the same secret and the same view (see docs/collectives.md).
Invariants: 1. views only grow (tests/integration/test_views.py); 2. `close` leaves no thread, descriptor or memory
(tests/integration/test_collectives_leaks.py).
Not here: operations (group.py); one peer (peer.py); who decides on views (the controller, or the caller).
"""

import contextlib
import errno
import os
import select
import socket
import struct
import threading
import zlib
from collections.abc import Sequence

from elastic_run.collectives import forking, native
from elastic_run.collectives.arena import Arena
from elastic_run.collectives.connections import Connections
from elastic_run.collectives.endpoint import DataView, Endpoint, this_host
from elastic_run.collectives.engine import Engine, Gate
from elastic_run.collectives.errors import CollectiveAborted, CollectiveError
from elastic_run.collectives.group import Group
from elastic_run.collectives.handshake import SECRET_BYTES_MIN, Hello
from elastic_run.collectives.inbound import Inbound, Sink
from elastic_run.collectives.listening import listen
from elastic_run.collectives.options import MeshOptions, this_process_options
from elastic_run.collectives.peer import Peer
from elastic_run.collectives.pending import Pending
from elastic_run.collectives.recording import Recorder, writer_of_this_process
from elastic_run.collectives.scratch import ScratchPool
from elastic_run.collectives.selection import PIPE_MEMBERS_MAX
from elastic_run.runtime.protocol.errors import PeerError, PeerRefused
from elastic_run.runtime.protocol.ids import check_name

WORLD = "world"
STRANGERS_MAX = 64  # connections that have not proved themselves
STRANGE_PEERS_MAX = 4096  # proved workers that are in no view we know
ABORTS_AHEAD_MAX = 4096  # groups given up by others before they were made here
ACCEPT_PAUSE_S = 0.1
LEAVE_TIMEOUT_S = 2.0  # for peers to read what was sent to them; longer: an exit waits longer for a peer that hangs
_NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Mesh:
    """Public methods are for any thread; the others run in the engine."""

    def __init__(self, worker: str, secret: bytes, *, options: MeshOptions | None = None) -> None:
        """Listen. Raises UserError for an unusable worker id, ValueError for a short secret, PeerError if it cannot."""
        if len(secret) < SECRET_BYTES_MIN:
            raise ValueError(
                f"a secret of {len(secret)} bytes protects nothing; at least {SECRET_BYTES_MIN} are needed"
            )
        self.worker = check_name(worker, what="worker")
        self.secret = secret
        self.options = options or this_process_options()
        mapped_bytes = self.options.peer_segments_bytes  # of what is beyond it, peers would have to drop us
        soft_bytes = min(self.options.arena_bytes, mapped_bytes)
        self.arena = Arena(soft_bytes, self._segment_retired, hard_limit_bytes=mapped_bytes)
        self.scratch = ScratchPool(self.options.scratch_bytes)
        self._host = self.options.host_key or this_host()
        self._view: DataView | None = None
        self._peers: dict[str, Peer] = {}
        self._groups: dict[int, Group] = {}
        self._dead_groups: dict[int, CollectiveError] = {}
        self._strangers: dict[Inbound, None] = {}  # oldest first
        self._memory_waiters: list[Pending] = []
        self.groups_streaming = 0
        """Groups of which an operation streams, or waits to. Engine thread."""
        self._closed: str | None = None
        self._leaving = False
        self._left = Gate()
        self._lock = threading.Lock()
        writer = writer_of_this_process(os.environ)
        self._tcp, self._unix, unix_name = listen(self.options)
        address, port = self._tcp.getsockname()[:2]
        self.endpoint = Endpoint(worker=worker, host=self._host, address=address, port=port, unix=unix_name)
        try:
            self.engine = Engine(self._engine_broken)
        except (OSError, RuntimeError) as error:
            self._tcp.close()
            self._unix.close()
            raise PeerError(f"cannot begin to listen: {error}") from None
        self.recorder = None if writer is None else Recorder(writer, self.engine)
        self.engine.call(self._start_listening)
        forking.watch(self)

    # For any thread --------------------------------------------------------------------------------------------------

    @property
    def view_number(self) -> int:
        return self._view.number if self._view is not None else 0

    def install(self, view: DataView) -> Group:
        """Enter a view; return the group of all its members. Operations of older views end with CollectiveAborted.

        Raises ValueError when the view is not newer than the present one or does not name this worker.
        """
        self.engine.call(lambda: self._install(view))
        return self.group(WORLD)

    def prepare(self, endpoints: Sequence[Endpoint]) -> None:
        """Dial workers that a coming view will bring, so that entering it costs no connecting."""
        self.engine.call(lambda: self._prepare(tuple(endpoints)))

    def prepared(self, workers: Sequence[str]) -> bool:
        """Say whether the connections to all of them are open, both ways."""
        ready: list[bool] = []
        self.engine.call(
            lambda: ready.extend(worker in self._peers and self._peers[worker].ready for worker in workers)
        )
        return all(ready)

    def abort(self, worker: str, reason: str) -> None:
        """Give a worker up, on somebody's verdict: whatever waits for it ends now, naming it."""
        self.engine.call(lambda: self._give_up_worker(worker, reason))

    def interrupt(self, reason: str) -> None:
        """End everything under way in this view without blaming anybody: a newer view is coming."""
        self.engine.call(lambda: self._break_all(CollectiveAborted(reason)))

    def group(self, name: str, ranks: Sequence[int] | None = None) -> Group:
        """Return the group `name` of the present view: the members at `ranks` of the view, in that order; None: all.

        Every member must ask for it with the same name and ranks. Raises ValueError, CollectiveAborted without a view.
        """
        made: list[Group] = []
        self.engine.call(lambda: made.append(self._group(name, ranks)))
        return made[0]

    def close(self, reason: str = "closed") -> None:
        """Leave: operations under way end, peers get what was sent to them and are told, nothing stays behind.

        Waits up to LEAVE_TIMEOUT_S for peers that do not listen. May be called twice, and in a callback: then it does
        not wait, and what was just sent may be lost.
        """
        with self._lock:
            if self._leaving:
                return
            self._leaving = True
        forking.ended(self)
        try:
            if not self.engine.driven_here and not self.engine.closed:
                self.engine.call(lambda: self._leave(reason))
                self.engine.wait(self._left, LEAVE_TIMEOUT_S)
        finally:
            self.engine.close(lambda: self._shut(reason))

    # Views -----------------------------------------------------------------------------------------------------------

    def _install(self, view: DataView) -> None:
        self._check_open()
        if view.number <= self.view_number:
            raise ValueError(f"view {view.number} is not newer than the installed view {self.view_number}")
        if self.worker not in view.workers:
            raise ValueError(f"view {view.number} does not name this worker, {self.worker}")
        self._break_all(CollectiveAborted(f"view {self.view_number} was replaced by view {view.number}"))
        self._groups.clear()
        self._dead_groups.clear()
        self._view = view  # before the farewells, which say which view they are of
        members = {member.worker: member for member in view.members}
        for worker in [worker for worker in self._peers if worker not in members]:
            self._peers.pop(worker).close(f"left out of view {view.number}")
        for member in view.members:
            if member.worker == self.worker:
                continue
            peer = self._peer(member.worker)
            if peer.endpoint not in (None, member):
                peer.close(f"its place changed in view {view.number}")
            peer.endpoint = member
            peer.in_view = True
            peer.reset()
            peer.revive()
            if peer.connected:
                peer.open()
                self._open_pipe(peer)
            peer.announce()
        for peer in self._peers.values():
            if peer.announced > view.number:
                self.peer_moved_on(peer, peer.announced)
        self.memory_freed()

    def _prepare(self, endpoints: tuple[Endpoint, ...]) -> None:
        self._check_open()
        for endpoint in endpoints:
            if endpoint.worker != self.worker:
                peer = self._peer(endpoint.worker)
                if not peer.in_view:
                    peer.endpoint = endpoint
                    peer.revive()
                peer.open()
                self._open_pipe(peer)

    def _open_pipe(self, peer: Peer) -> None:
        """Dial what the first large operation will need, where it goes through pipes: so it need not wait for that."""
        may_need = native.kernels is not None and len(self._peers) < PIPE_MEMBERS_MAX
        if may_need and peer.down is None and not peer.local and not peer.far:
            peer.open_pipe(_identity(WORLD))

    def _check_open(self) -> None:
        if self._closed is not None:
            raise CollectiveAborted(f"{self.worker} {self._closed}", self.worker)

    def _peer(self, worker: str) -> Peer:
        peer = self._peers.get(worker)
        if peer is None:
            peer = self._peers[worker] = Peer(self, worker, self._host)
        return peer

    def _group(self, name: str, ranks: Sequence[int] | None) -> Group:
        view = self._view
        if self._closed is not None or view is None:
            raise CollectiveAborted(self._closed or "no view is installed")
        chosen = tuple(range(len(view.members)) if ranks is None else ranks)
        if not chosen or len(set(chosen)) != len(chosen) or not all(0 <= rank < len(view.members) for rank in chosen):
            raise ValueError(f"ranks {list(chosen)[:16]} are no ranks of a view of {len(view.members)} members")
        workers = tuple(view.members[rank].worker for rank in chosen)
        if self.worker not in workers:
            raise ValueError(f"this worker, {self.worker}, is not in group {name!r}")
        identity = _identity(name)
        known = self._groups.get(identity)
        if known is not None:
            if known.name != name or known.members != workers:
                raise ValueError(f"group {name!r} is already {known.name!r} of other members; choose another name")
            return known
        peers = tuple(None if worker == self.worker else self._peers[worker] for worker in workers)
        group = Group(self, name, identity, workers, peers)
        self._groups[identity] = group
        if self.recorder is not None:
            self.recorder.name_group(identity, name)
        dead = self._dead_groups.get(identity)
        if dead is not None:
            group.end(dead)
            return group
        lost = next((peer for peer in peers if peer is not None and peer.down is not None), None)
        if lost is not None:
            self._end_group(group, lost.left or CollectiveAborted(lost.down or "lost", lost.worker), told_by=lost)
        ahead = next((peer for peer in peers if peer is not None and peer.announced > view.number), None)
        if ahead is not None:
            self._end_group(group, _moved_on(ahead), told_by=ahead)
        return group

    # Faults ----------------------------------------------------------------------------------------------------------

    def dead_group(self, group: int) -> bool:
        return group in self._dead_groups

    def peer_lost(self, peer: Connections) -> None:
        view = self._view
        if view is None or peer.worker not in view.workers:
            if not peer.connected and peer.endpoint is None:
                if self._peers.get(peer.worker) is peer:
                    del self._peers[peer.worker]
            else:
                peer.revive()  # it may be dialled again by the next `prepare` or view
            return
        error = CollectiveAborted(peer.down or "lost", peer.worker)
        for group in [group for group in self._groups.values() if peer.worker in group.members]:
            self._end_group(group, error, told_by=peer)

    def peer_left(self, peer: Connections) -> None:
        """It has closed on purpose: groups in which something waits for it are over, the others may not need it."""
        if not peer.in_view or peer.left is None:
            self.peer_lost(peer)
            return
        for group in [group for group in self._groups.values() if peer.worker in group.members]:
            if group.needs(peer):
                self._end_group(group, peer.left, told_by=peer)

    def peer_moved_on(self, peer: Connections, view: int) -> None:
        if view > self.view_number:
            error = _moved_on(peer)
            for group in [group for group in self._groups.values() if peer.worker in group.members]:
                self._end_group(group, error, told_by=peer)

    def peer_aborted(self, peer: Connections, view: int, group: int, culprit: str, reason: str) -> None:
        if view != self.view_number:
            return
        error = CollectiveAborted(reason, culprit if culprit in self._members() else None)
        known = self._groups.get(group)
        if known is not None:
            if peer.worker in known.members:
                self._end_group(known, error, told_by=peer)
        elif len(self._dead_groups) < ABORTS_AHEAD_MAX:
            self._dead_groups[group] = error

    def failed(self, view: int, group: int, error: CollectiveError) -> None:
        """A group of `view` cannot go on; that view may be over by now."""
        known = self._groups.get(group)
        if known is not None and view == self.view_number:
            self._end_group(known, error, told_by=None)

    def leave_group(self, group: Group, error: CollectiveError) -> None:
        """End a group here, telling nobody: this member is done with it."""
        if self._groups.get(group.identity) is group:
            self._dead_groups[group.identity] = error
            for peer in group.peers:
                if peer is not None:
                    peer.clear_group(group.identity)
        group.end(error)

    def give_up(self, group: Group, error: CollectiveError) -> None:
        """A member's own operation failed: the group is over for everybody."""
        if self._groups.get(group.identity) is group:  # not one of an older view
            self._end_group(group, error, told_by=None)
        else:
            group.end(error)

    def _give_up_worker(self, worker: str, reason: str) -> None:
        peer = self._peers.get(worker)
        if peer is not None:
            peer.drop(reason)

    def _end_group(self, group: Group, error: CollectiveError, told_by: Connections | None) -> None:
        if group.identity in self._dead_groups and group.error is not None:
            return
        self._dead_groups[group.identity] = error
        culprit = error.culprit if isinstance(error, CollectiveAborted) else None
        reason = error.reason if isinstance(error, CollectiveAborted) else str(error)
        group.end(error)
        for peer in group.peers:
            if peer is None:
                continue
            peer.clear_group(group.identity)
            if peer is not told_by and peer.down is None:
                peer.abort(group.identity, culprit or "", reason)

    def _break_all(self, error: CollectiveAborted) -> None:
        for group in list(self._groups.values()):
            self._dead_groups[group.identity] = error
            group.end(error)
            for peer in group.peers:
                if peer is not None:
                    peer.clear_group(group.identity)

    def _engine_broken(self, error: BaseException) -> None:
        """A turn was torn: nothing in here can be trusted to be whole, so everything is given up."""
        with contextlib.suppress(Exception):
            self._shut(f"interrupted by {type(error).__name__}")

    # Shared memory ---------------------------------------------------------------------------------------------------

    def when_memory_freed(self) -> Pending:
        pending = Pending(self.worker)
        self._memory_waiters.append(pending)
        return pending

    def memory_freed(self) -> None:
        waiters, self._memory_waiters = self._memory_waiters, []
        for pending in waiters:
            pending.finish()
        for peer in list(self._peers.values()):
            peer.stage_bulk()

    def operation_ended(self) -> None:
        """An operation that waits for memory may be its group's oldest now."""
        if self._memory_waiters:
            self.memory_freed()

    def _segment_retired(self, segment: int) -> None:
        for peer in self._peers.values():
            peer.forget_segment(segment)

    # Listening -------------------------------------------------------------------------------------------------------

    def _start_listening(self) -> None:
        for listener in (self._tcp, self._unix):
            self._listen_again(listener)

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(STRANGERS_MAX):
            try:
                sock, address = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _NO_ROOM:
                    self._stand_back(listener)
                    return
                continue  # the dialler is gone already
            sock.setblocking(False)
            if not self._may_dial(sock):
                sock.close()
                continue
            if len(self._strangers) >= STRANGERS_MAX:
                # The oldest goes: an honest one proves itself within moments, however many others just stand there.
                oldest = next(iter(self._strangers))
                del self._strangers[oldest]
                oldest.close()
            if sock.family != socket.AF_UNIX:
                self.options.tune(sock, address[0])
            self._strangers[Inbound(self.engine, self, sock)] = None

    def _stand_back(self, listener: socket.socket) -> None:
        """Accept nothing for a moment: epoll would call again and again for what the system cannot give now."""
        self.engine.unregister(listener.fileno())
        self.engine.after(ACCEPT_PAUSE_S, lambda: self._listen_again(listener))

    def _listen_again(self, listener: socket.socket) -> None:
        if listener.fileno() >= 0:
            self.engine.register(listener.fileno(), select.EPOLLIN, lambda _events: self._accept(listener))

    def _may_dial(self, sock: socket.socket) -> bool:
        if sock.family != socket.AF_UNIX:
            return True
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        return int(struct.unpack("3i", credentials)[1]) == os.getuid()

    def sink_of(self, inbound: Inbound, hello: Hello) -> Sink:
        peer = self._welcome(inbound, hello)
        peer.attach(inbound, hello.lane)
        return peer

    def take_pipe(self, inbound: Inbound, sock: socket.socket, hello: Hello) -> None:
        peer = self._welcome(inbound, hello)
        self.options.tune_pipe(sock, sock.getpeername()[0])
        peer.pipes.attach(sock)

    def _welcome(self, inbound: Inbound, hello: Hello) -> Peer:
        """Return who dialled. Raises PeerRefused."""
        self._strangers.pop(inbound, None)
        if hello.target != self.worker or hello.source == self.worker:
            raise PeerRefused(f"{hello.source} looks for {hello.target}; this is {self.worker}")
        if hello.source not in self._peers and len(self._peers) >= STRANGE_PEERS_MAX + len(self._members()):
            raise PeerRefused("too many workers that are in no view")
        return self._peer(hello.source)

    def greeting_failed(self, inbound: Inbound, reason: str) -> None:
        self._strangers.pop(inbound, None)

    def _members(self) -> tuple[str, ...]:
        return self._view.workers if self._view is not None else ()

    # The end ---------------------------------------------------------------------------------------------------------

    def _leave(self, reason: str) -> None:
        if self._closed is None:
            self._closed = reason
            self._break_all(CollectiveAborted(f"{self.worker} {reason}", self.worker))
            for peer in list(self._peers.values()):
                peer.leave(reason)
        self.peer_gone()

    def peer_gone(self) -> None:
        if all(peer.gone for peer in self._peers.values()):
            self._left.open()

    def _shut(self, reason: str) -> None:
        self._closed = self._closed or reason
        self._break_all(CollectiveAborted(f"{self.worker} {reason}", self.worker))
        self.arena.leave()
        for peer in list(self._peers.values()):
            peer.close(reason)
        self._peers.clear()
        self._groups.clear()
        for inbound in list(self._strangers):
            inbound.close()
        self._strangers.clear()
        for listener in (self._tcp, self._unix):
            if listener.fileno() >= 0:
                self.engine.unregister(listener.fileno())
                listener.close()
        self.arena.close()
        self.scratch.clear()

    def abandon(self) -> None:
        """In a forked child: let go of the descriptors, say nothing to anybody."""
        self._closed = "this process was forked from a worker"
        self.engine.abandon()
        for listener in (self._tcp, self._unix):
            listener.close()
        for inbound in self._strangers:
            inbound.abandon()
        for peer in self._peers.values():
            peer.abandon()
        self.arena.close()
        for group in self._groups.values():
            group.abandon(CollectiveAborted(self._closed))


def _moved_on(peer: Connections) -> CollectiveAborted:
    return CollectiveAborted(f"{peer.worker} is in view {peer.announced} already")


def _identity(group: str) -> int:
    return zlib.crc32(group.encode()) or 1
