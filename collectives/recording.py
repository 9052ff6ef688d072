"""Records what operations do, and how long each peer let them wait, into this process's telemetry file.

An operation has a record from its beginning; one that takes longer than SWEEP_S is brought up to date every SWEEP_S, so
a hang, and whom it waits for, can be read by others at any time, also after SIGKILL. Nothing is recorded, and nothing
spent, where there is no file: neither an agent's nor one named by ELASTIC_RUN_TELEMETRY.
Receive-blocked: from when the operation had nothing else to do until the peer's part was there.
Send-blocked: while parts for the peer were waited for, its sockets took nothing.
Invariants (tests/integration/test_recording.py): 1. every operation that began ends on record; 2. a hung one names who
is waited for.
Not here: the file (runtime/edge/operations_writer.py); what is worth waiting for (algorithms/).
"""

import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from elastic_run.collectives.errors import CollectiveAborted
from elastic_run.collectives.messages import Fetch, Receive, Send
from elastic_run.collectives.pending import Countdown, Pending
from elastic_run.collectives.selection import Method
from elastic_run.collectives.signature import Signature
from elastic_run.runtime.edge import operations_codes as codes
from elastic_run.runtime.edge.operations_codes import State
from elastic_run.runtime.edge.operations_layout import NOBODY
from elastic_run.runtime.edge.operations_source import OF_THIS_PROCESS

if TYPE_CHECKING:
    from elastic_run.collectives.engine import Engine
    from elastic_run.collectives.group import Group
    from elastic_run.collectives.peer import Peer
    from elastic_run.runtime.edge.operations_writer import OperationsWriter

SWEEP_S = 0.1
_SWEEP_NS = int(SWEEP_S * 1e9)
_WRITING = threading.Lock()  # several meshes of one process have one file

_KINDS = {kind.name.lower(): kind for kind in codes.Kind} | {
    "all_reduce_exact": codes.Kind.ALL_REDUCE,
    "all_reduce_q8": codes.Kind.ALL_REDUCE,
}
_ALGORITHMS = {
    "all_reduce_exact": codes.Algorithm.TREE_EXACT,
    "all_reduce_q8": codes.Algorithm.Q8,
    "barrier": codes.Algorithm.EXCHANGE,
}
_METHODS = {
    Method.EXCHANGE: codes.Algorithm.EXCHANGE,
    Method.SHARED_ONCE: codes.Algorithm.SHARED_ONCE,
    Method.SHARED: codes.Algorithm.SHARED,
    Method.STREAMED: codes.Algorithm.STREAMED,
    Method.PAIRWISE: codes.Algorithm.PAIRWISE,
    Method.PIPED: codes.Algorithm.PIPED,
    Method.RING: codes.Algorithm.RING,
    Method.HIERARCHICAL: codes.Algorithm.HIERARCHICAL,
}
Codes = tuple[codes.Kind, codes.Reduction, codes.Dtype, codes.Algorithm]
_REDUCTIONS = {reduction.name.lower(): reduction for reduction in codes.Reduction}


class Recorder:
    """The records of one mesh. Engine thread only."""

    def __init__(self, writer: "OperationsWriter", engine: "Engine") -> None:
        self.writer = writer
        self._engine = engine
        self._open: set[Record] = set()
        self._sweeping = False
        self._codes: dict[object, Codes] = {}

    def name_group(self, identity: int, name: str) -> None:
        with _WRITING:
            self.writer.group(identity, name)

    def begin(self, signature: Signature, group: "Group", sequence: int, tag: int, enter_ns: int) -> "Record":
        """Record that an operation of `group` was entered."""
        what = (signature.name, signature.dtype, signature.reduction, signature.method)
        known = self._codes.get(what)
        if known is None:
            known = self._codes[what] = _codes_of(signature)
        kind, reduction, dtype, algorithm = known
        partner = signature.partner
        with _WRITING:
            number = self.writer.begin(
                kind,
                group=group.identity,
                view=group.mesh.view_number,
                sequence=sequence,
                enter_ns=enter_ns,
                members=group.size,
                nbytes=signature.nbytes,
                reduction=reduction,
                dtype=dtype,
                algorithm=algorithm,
                partner=NOBODY if partner is None else self.writer.peer(group.members[partner]),
                tag=tag,
            )
        record = Record(self, number)
        self._open.add(record)
        if not self._sweeping:
            self._sweeping = True
            self._engine.after(SWEEP_S, self._sweep)
        return record

    def ended(self, record: "Record") -> None:
        self._open.discard(record)

    def _sweep(self) -> None:
        now_ns = time.monotonic_ns()
        for record in self._open:
            if now_ns - record.begin_ns >= _SWEEP_NS:
                record.update(now_ns)
        self._sweeping = bool(self._open)
        if self._sweeping:
            self._engine.after(SWEEP_S, self._sweep)


class Moved(NamedTuple):
    """What went to and came from one member, and for how long either had to wait."""

    sent_bytes: int = 0
    received_bytes: int = 0
    send_blocked_ns: int = 0
    receive_blocked_ns: int = 0

    def since(self, before: "Moved") -> "Moved":
        return Moved(*(now - then for now, then in zip(self, before, strict=True)))


class Traffic:
    """An operation's bytes and waits with one peer."""

    __slots__ = (
        "base_ns",
        "number",
        "peer",
        "progress_ns",
        "receive_blocked_ns",
        "received_bytes",
        "send_blocked_ns",
        "sent_bytes",
        "until_ns",
    )

    def __init__(self, peer: "Peer") -> None:
        self.peer = peer
        self.number = 0
        """Of its record in the file."""
        self.sent_bytes = 0
        self.received_bytes = 0
        self.send_blocked_ns = 0
        self.receive_blocked_ns = 0
        self.progress_ns = 0
        self.until_ns = 0
        """Up to when the wait under way was for this peer."""
        self.base_ns = 0
        """What its sockets had been blocked when that was looked at last."""

    def count_blocked(self) -> None:
        blocked_ns = self.peer.send_blocked_ns()
        self.send_blocked_ns += max(0, blocked_ns - self.base_ns)
        self.base_ns = blocked_ns


class Record:
    """What is noted of one operation until it ends. On the path of every message: little, and no call to spare."""

    def __init__(self, recorder: Recorder, number: int) -> None:
        self.begin_ns = self._since_ns = time.monotonic_ns()
        self._recorder = recorder
        self._number = number
        self._traffic: dict[str, Traffic] = {}
        self._open: dict[Pending, Traffic] = {}
        self._awaited: list[Pending] = []
        self._first_sent_ns = 0
        self._first_received_ns = 0
        self._progress_ns = 0
        self._partly = 0

    def sends(self, peer: "Peer", send: Send) -> None:
        if send.done:
            self.shows(peer, len(send.buffer))
        else:
            self.awaits(peer, send)

    def shows(self, peer: "Peer", nbytes: int) -> None:
        """Bytes were handed over at once: a small message, or shared memory."""
        traffic = self._traffic.get(peer.worker) or self._meet(peer)
        traffic.sent_bytes += nbytes
        traffic.progress_ns = now_ns = time.monotonic_ns()
        if not self._first_sent_ns:
            self._first_sent_ns = now_ns

    def flows(self, peer: "Peer", moved: Moved) -> None:
        """So much more went each way in a stream."""
        traffic = self._traffic.get(peer.worker) or self._meet(peer)
        traffic.sent_bytes += moved.sent_bytes
        traffic.received_bytes += moved.received_bytes
        traffic.send_blocked_ns += moved.send_blocked_ns
        traffic.receive_blocked_ns += moved.receive_blocked_ns
        if moved.sent_bytes or moved.received_bytes:
            traffic.progress_ns = now_ns = time.monotonic_ns()
            self._first_sent_ns = self._first_sent_ns or (now_ns if moved.sent_bytes else 0)
            self._first_received_ns = self._first_received_ns or (now_ns if moved.received_bytes else 0)

    def awaits(self, peer: "Peer", pending: Pending) -> None:
        """Something of this peer will be waited for; of several peers, any of which may do it, say it for each."""
        self._open[pending] = self._traffic.get(peer.worker) or self._meet(peer)

    def waiting(self, countdown: Countdown) -> None:
        """The operation has nothing to do until these are done."""
        if self._awaited:
            self._settle()
        self._awaited = countdown.pendings
        countdown.note = self._note
        for pending in countdown.pendings:
            if isinstance(pending, Send) and pending in self._open:
                traffic = self._open[pending]
                traffic.base_ns = traffic.peer.send_blocked_ns()
        self._since_ns = time.monotonic_ns()

    def update(self, now_ns: int) -> None:
        """Write down how far it is."""
        self._look(now_ns)
        with _WRITING:
            moved = self._write_traffic()
            self._recorder.writer.update(
                self._number,
                first_sent_ns=self._first_sent_ns,
                first_received_ns=self._first_received_ns,
                progress_ns=self._progress_ns,
                moved_bytes=moved,
            )

    def end(self, error: BaseException | None) -> None:
        """Write down how it ended."""
        now_ns = time.monotonic_ns()
        if self._open or error is not None:
            self._look(now_ns)
        else:
            self._settle()
            self._partly = 0
        state, culprit = State.DONE, None
        if error is not None:
            state = State.ABORTED if isinstance(error, CollectiveAborted) else State.FAILED
            culprit = error.culprit if isinstance(error, CollectiveAborted) else None
        writer = self._recorder.writer
        with _WRITING:
            moved = self._write_traffic()
            writer.finish(
                self._number,
                state,
                done_ns=now_ns,
                first_sent_ns=self._first_sent_ns,
                first_received_ns=self._first_received_ns,
                progress_ns=self._progress_ns,
                moved_bytes=moved,
                culprit=NOBODY if culprit is None else writer.peer(culprit),
            )
        self._open.clear()
        self._awaited = []
        self._recorder.ended(self)

    def _meet(self, peer: "Peer") -> Traffic:
        traffic = self._traffic[peer.worker] = Traffic(peer)
        return traffic

    def _note(self, pending: Pending) -> None:
        """One of the things waited for is done."""
        traffic = self._open.pop(pending, None)
        if traffic is not None:
            self._close(pending, traffic, time.monotonic_ns())

    def _close(self, pending: Pending, traffic: Traffic, now_ns: int) -> None:
        first_ns = pending.first_ns or now_ns
        if isinstance(pending, Send):
            traffic.sent_bytes += len(pending.buffer)
            traffic.count_blocked()
            if not self._first_sent_ns or first_ns < self._first_sent_ns:
                self._first_sent_ns = first_ns
        else:
            if pending.peer != traffic.peer.worker:  # from any source: it was another one
                traffic = self._traffic.get(pending.peer, traffic)
            traffic.received_bytes += _moved(pending)
            traffic.until_ns = now_ns
            if not self._first_received_ns or first_ns < self._first_received_ns:
                self._first_received_ns = first_ns
        traffic.progress_ns = now_ns

    def _settle(self) -> None:
        """Book the wait that is over."""
        since_ns = self._since_ns
        for traffic in self._traffic.values():
            if traffic.until_ns > since_ns:
                traffic.receive_blocked_ns += traffic.until_ns - since_ns
            traffic.until_ns = 0

    def _look(self, now_ns: int) -> None:
        """Book what happened up to now, also of messages that are on their way."""
        partly = 0
        for pending, traffic in list(self._open.items()):
            if pending.done:  # before anybody waited for it
                del self._open[pending]
                self._close(pending, traffic, pending.first_ns or now_ns)
            else:
                partly += _moved(pending)
        for pending in self._awaited:
            waited = self._traffic.get(pending.peer)
            if waited is None or pending.done:
                continue
            if isinstance(pending, Send):
                waited.count_blocked()
            else:
                waited.until_ns = now_ns
        self._settle()
        self._since_ns = now_ns
        if partly > self._partly:
            self._progress_ns = now_ns
        self._partly = partly

    def _write_traffic(self) -> int:
        """Write a record for each peer that had a part; return the bytes moved."""
        writer = self._recorder.writer
        moved = self._partly
        for worker, traffic in self._traffic.items():
            sent, received = traffic.sent_bytes, traffic.received_bytes
            moved += sent + received
            self._progress_ns = max(self._progress_ns, traffic.progress_ns)
            traffic.number = writer.transfer(
                self._number,
                writer.peer(worker),
                sent_bytes=sent,
                received_bytes=received,
                send_blocked_ns=traffic.send_blocked_ns,
                receive_blocked_ns=traffic.receive_blocked_ns,
                progress_ns=traffic.progress_ns,
                record=traffic.number,
            )
        return moved


def writer_of_this_process(environment: Mapping[str, str]) -> "OperationsWriter | None":
    """Return where meshes record; None: nowhere. Raises UserError when ELASTIC_RUN_TELEMETRY cannot be used."""
    return OF_THIS_PROCESS.writer(environment) if OF_THIS_PROCESS.wanted(environment) else None


def _moved(pending: Pending) -> int:
    """Return the bytes of a message that came or left so far."""
    if isinstance(pending, Receive):
        return len(pending.buffer) - pending.missing
    if isinstance(pending, Fetch):
        return pending.region.nbytes if pending.region is not None and pending.counted else 0
    return pending.next_offset if isinstance(pending, Send) else 0


def _codes_of(signature: Signature) -> Codes:
    name, method = signature.name, signature.method
    if name in _ALGORITHMS:
        algorithm = _ALGORITHMS[name]
    else:
        algorithm = codes.Algorithm.DIRECT if method is None else _METHODS[method]
    dtype = codes.Dtype.NONE
    if signature.dtype is not None:
        dtype = codes.dtype_code(str(signature.dtype).removeprefix("torch."))
    reduction = _REDUCTIONS.get(str(signature.reduction), codes.Reduction.NONE)
    return _KINDS.get(name, codes.Kind.OTHER), reduction, dtype, algorithm
