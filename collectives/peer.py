"""One other worker, and what comes from it: frames are matched with what waits for them.

Whatever of another view still arrives is dropped.
Invariants: 1. frames of another view change nothing (tests/integration/test_views.py); 2. what no honest worker sends
ends its connections, and nothing else (tests/integration/test_hostile_frames.py).
Not here: connections (connections.py); what is sent (sending.py); the messages themselves (messages.py).
"""

import os
import time
from collections.abc import Callable

from torch import Tensor

from elastic_run.collectives import wire
from elastic_run.collectives.errors import CollectiveAborted
from elastic_run.collectives.memory import tensor_of
from elastic_run.collectives.messages import (
    EAGER_BYTES_MAX,
    UNTAKEN_BYTES_MAX,
    Arrived,
    Fetch,
    Key,
    Queue,
    Receive,
)
from elastic_run.collectives.outbound import Item
from elastic_run.collectives.peer_segments import PeerSegments
from elastic_run.collectives.sending import Sending
from elastic_run.collectives.wire import POINT_TO_POINT, FrameError, Header, Kind, RegionRef
from elastic_run.runtime.protocol.errors import PeerRefused

GRANTS_MAX = 1 << 16  # early grants kept; more means that the peer's operations are not ours
REPLIES_WAITING_MAX = 1 << 16  # frames that wait to be sent when a reply to a frame of no use is one too many


class Peer(Sending):
    """Engine thread only."""

    def intact(self, region: RegionRef) -> bool:
        """Say whether what was read from the region was still the sender's message."""
        return self._segments is not None and self._segments.check(region.segment, region.offset, region.generation)

    def receive(self, receive: Receive) -> None:
        """Wait for a message of the present view."""
        key, total = receive.key, len(receive.buffer)
        if key.slot & POINT_TO_POINT:
            queue = self.inbox.queue(key.group, key.slot, self.worker)
            queue.waiting.append(receive)
            self._match(queue)
            self.open()
            if receive.source is None and receive.on_match is None:
                self._check_up()
            return
        arrived = self.inbox.take(key)
        if arrived is None:
            self._check_up()
            self.inbox.posted[key] = receive
            if total > EAGER_BYTES_MAX:
                self._grant(key, total)
            else:
                self.open()
        elif self._agrees(receive, key, arrived.check, arrived.total):
            self._fill(receive, arrived)
        elif arrived.region is not None:
            self.release(arrived.region)

    def fetch(self, fetch: Fetch) -> None:
        arrived = self.inbox.take(fetch.key)
        if arrived is None:
            self._check_up()
            self.inbox.posted[fetch.key] = fetch
            self.open()
        elif self._agrees(fetch, fetch.key, arrived.check, arrived.total):
            if arrived.region is None:
                self._distrust("sent bytes where it was to show shared memory")
                return
            fetch.region = arrived.region
            fetch.finish()
        elif arrived.region is not None:
            self.release(arrived.region)

    def view_of(self, region: RegionRef) -> Tensor:
        """Return the region's bytes, read only. Raises CodecError when there is no such place."""
        if self._segments is None:
            raise FrameError(f"{self.worker} staged memory that it never announced")
        return self._segments.view(region.segment, region.offset, region.nbytes)

    def unpost(self, receive: "Receive | Fetch") -> None:
        """Wait for it no longer; the buffer is not touched again."""
        if self.inbox.posted.get(receive.key) is receive:
            del self.inbox.posted[receive.key]
        if isinstance(receive, Receive):
            if receive.key.slot & POINT_TO_POINT:
                queue = self.inbox.queues.get((receive.key.group, receive.key.slot))
                if queue is not None and receive in queue.waiting:
                    queue.waiting.remove(receive)
            for inbound in self._inbounds:
                inbound.forget(receive.buffer)

    def _grant(self, key: Key, total: int) -> None:
        self._gated(Item([wire.pack(self._header(Kind.GRANT, key, 0, total))]))

    def _agrees(self, waiting: "Receive | Fetch", key: Key, check: int, total: int) -> bool:
        size = len(waiting.buffer) if isinstance(waiting, Receive) else waiting.nbytes
        expected = total if size is None else size
        if check == waiting.check and total == expected:
            return True
        what = (
            "another operation, type or algorithm" if check != waiting.check else f"{total} bytes instead of {expected}"
        )
        self._fail_mismatch(key, what)
        return False

    def _fill(self, receive: Receive, arrived: Arrived) -> None:
        if arrived.data is None:
            self._distrust("showed shared memory where it was to send bytes")
            return
        receive.buffer[:] = arrived.data
        receive.missing = 0
        receive.finish()

    def _distrust(self, what: str) -> None:
        """Give up a peer that no honest worker would be; not now: somebody is in the middle of an operation."""
        self._mesh.engine.soon(lambda: self.drop(f"{self.worker} {what}"))

    def place(self, header: Header) -> memoryview | None:
        self.progress_ns = time.monotonic_ns()
        if self._stale(header):
            return None
        if header.total <= EAGER_BYTES_MAX and header.length != header.total:
            raise FrameError(f"{self.worker} sent a small message in pieces")
        key = Key(header.group, header.sequence, header.slot)
        posted = self.inbox.posted.get(key)
        if isinstance(posted, Receive):
            if not self._agrees(posted, key, header.check, header.total):
                return None
            posted.first_ns = posted.first_ns or self.progress_ns
            posted.claim(header.offset, header.length)
            return posted.buffer[header.offset : header.offset + header.length]
        if header.total > EAGER_BYTES_MAX:
            raise FrameError(f"{self.worker} sent a large message that nobody had asked for")
        return memoryview(bytearray(header.length))

    def placed(self, header: Header, target: memoryview, valid: bool) -> None:
        if not valid or self._stale(header):
            return
        key = Key(header.group, header.sequence, header.slot)
        posted = self.inbox.posted.get(key)
        if posted is None and header.slot & POINT_TO_POINT and header.total <= EAGER_BYTES_MAX:
            self._queue_up(key, Arrived(header.check, header.total, data=bytearray(target)))
            return
        if isinstance(posted, Receive):
            if target.obj is not posted.buffer.obj:  # it came before it was waited for
                if not self._agrees(posted, key, header.check, header.total):
                    return
                posted.claim(header.offset, header.length)
                posted.buffer[header.offset : header.offset + header.length] = target
            self._count(posted, header.length)
        elif posted is None:
            self._compare(key, header.check)
            self.inbox.keep(key, Arrived(header.check, header.total, data=bytearray(target)))
        elif self._agrees(posted, key, header.check, header.total):
            raise FrameError(f"{self.worker} sent bytes where it was to show shared memory")

    def _count(self, posted: Receive, nbytes: int) -> None:
        posted.missing -= nbytes
        if posted.missing < 0:
            raise FrameError(f"{self.worker} sent more of a message than it has")
        if not posted.missing:
            self.inbox.posted.pop(posted.key, None)
            posted.finish()

    def _stale(self, header: Header) -> bool:
        return (
            header.view != self._mesh.view_number
            or not self.in_view
            or self.down is not None
            or self._mesh.dead_group(header.group)
        )

    def frame(self, header: Header, payload: memoryview, descriptor: int | None) -> None:
        self.progress_ns = time.monotonic_ns()
        if header.kind is Kind.SEGMENT:
            self._on_segment(payload, descriptor)
        else:
            _FRAMES[header.kind](self, header, payload)

    def _on_segment(self, payload: memoryview, descriptor: int | None) -> None:
        assert descriptor is not None
        try:
            region = wire.unpack_region(payload)
        except FrameError:
            os.close(descriptor)
            raise
        if self._segments is None:
            self._segments = PeerSegments(self._mesh.options.peer_segments_bytes)
        self._segments.add(region.segment, descriptor, region.nbytes)

    def _on_grant(self, header: Header, _payload: memoryview) -> None:
        if self._stale(header):
            return
        key = Key(header.group, header.sequence, header.slot)
        send = self._ungranted.pop(key, None)
        if send is not None:
            self._start_bulk(send)
        elif len(self._grants) < GRANTS_MAX:
            self._grants.add(key)
        else:
            raise FrameError(f"{self.worker} granted {GRANTS_MAX} messages that nobody sends")

    def _on_offer(self, header: Header, _payload: memoryview) -> None:
        if self._stale(header):
            return
        if not header.slot & POINT_TO_POINT or not header.total:
            raise FrameError("only point-to-point messages with content are offered")
        self._queue_up(Key(header.group, header.sequence, header.slot), Arrived(header.check, header.total))

    def _on_staged(self, header: Header, payload: memoryview) -> None:
        region = wire.unpack_region(payload)
        if self._stale(header):
            if len(self._control) > REPLIES_WAITING_MAX:
                raise FrameError(f"{self.worker} sends frames of no use and does not read the replies")
            self.release(region)
            return
        self.view_of(region)  # a place that is none ends the connection here, not the operation that reads it
        key = Key(header.group, header.sequence, header.slot)
        posted = self.inbox.posted.get(key)
        if isinstance(posted, Receive):
            if not self._agrees(posted, key, header.check, header.total):
                self.release(region)
                return
            self._copy_staged(posted, header.offset, region)
        elif header.total != region.nbytes:
            raise FrameError(f"{self.worker} showed {region.nbytes} bytes of shared memory and said {header.total}")
        elif isinstance(posted, Fetch):
            del self.inbox.posted[key]
            if self._agrees(posted, key, header.check, header.total):
                posted.region = region
                posted.finish()
            else:
                self.release(region)
        else:
            self.inbox.keep(key, Arrived(header.check, header.total, region=region))

    def _copy_staged(self, posted: Receive, offset: int, region: RegionRef) -> None:
        if not 0 < region.nbytes <= len(posted.buffer) - offset:
            raise FrameError(f"{self.worker} staged bytes outside of a message")
        posted.claim(offset, region.nbytes)
        tensor_of(posted.buffer[offset : offset + region.nbytes]).copy_(self.view_of(region))
        if not self.intact(region):
            raise FrameError(f"{self.worker} took a staged message back while it was read")
        self.release(region)
        self._count(posted, region.nbytes)

    def _on_release(self, _header: Header, payload: memoryview) -> None:
        region = wire.unpack_region(payload)
        known = self._mesh.arena.find(region.generation)
        if known is not None:
            self._mesh.arena.release(known, self.worker)
        self._mesh.memory_freed()

    def _on_abort(self, header: Header, payload: memoryview) -> None:
        culprit, reason = wire.unpack_text(payload, 2)
        if header.view == self._mesh.view_number and self.in_view and self.down is None:
            view, group = header.view, header.group
            self._mesh.engine.soon(lambda: self._mesh.peer_aborted(self, view, group, culprit, reason))

    def _on_view(self, header: Header, _payload: memoryview) -> None:
        here = self._mesh.view_number
        if header.view <= here and (not self.in_view or (header.view == here and self.down is not None)):
            # It would wait for answers that never come: it was left out, or does not know that we gave it up.
            raise PeerRefused(f"{self.worker} is no partner of view {here} any more")
        self.announced = max(self.announced, header.view)
        if self.announced == here:
            self._pass_gate()
        elif self.announced > here:
            self._mesh.engine.soon(lambda: self._mesh.peer_moved_on(self, header.view))

    def _on_bye(self, header: Header, payload: memoryview) -> None:
        reason = wire.unpack_text(payload, 1)[0]
        if header.view > self._mesh.view_number:  # a newer view ended ours: nobody is to blame
            self._farewell = CollectiveAborted(f"{self.worker} is in view {header.view}: {reason}")
        else:
            self._farewell = CollectiveAborted(f"{self.worker} left: {reason}", self.worker)

    def _queue_up(self, key: Key, arrived: Arrived) -> None:
        queue = self.inbox.queue(key.group, key.slot, self.worker)
        if key.sequence < queue.next_sequence or key.sequence in queue.arrived:
            raise FrameError(f"{self.worker} sent a message twice")
        queue.arrived[key.sequence] = arrived
        self.inbox.kept_bytes += arrived.kept_bytes
        self._match(queue)
        self.inbox.check_room()

    def _match(self, queue: Queue) -> None:
        while queue.waiting and queue.next_sequence in queue.arrived:
            receive = queue.waiting.popleft()
            arrived = queue.arrived.pop(queue.next_sequence)
            key = Key(receive.key.group, queue.next_sequence, receive.key.slot)
            queue.next_sequence += 1
            self.inbox.kept_bytes -= arrived.kept_bytes
            if arrived.data:
                self._took(arrived.kept_bytes)
            for other in receive.on_match or ():
                if other is not queue and receive in other.waiting:
                    other.waiting.remove(receive)
            receive.source = receive.peer = self.worker
            receive.key = key
            if not self._agrees(receive, key, arrived.check, arrived.total):
                return
            if arrived.data is not None:
                self._fill(receive, arrived)
            else:
                self.inbox.posted[key] = receive
                self._grant(key, arrived.total)

    def _took(self, nbytes: int) -> None:
        """Tell the peer now and then how much of its small messages was received: it may send as much again."""
        self._taken_bytes += nbytes
        if self._taken_bytes >= UNTAKEN_BYTES_MAX // 4:
            header = Header(Kind.TAKEN, view=self._mesh.view_number, total=self._taken_bytes)
            self._taken_bytes = 0
            self._gated(Item([wire.pack(header)]))

    def _on_taken(self, header: Header, _payload: memoryview) -> None:
        if not self._stale(header):
            self._untaken_bytes = max(0, self._untaken_bytes - header.total)


_FRAMES: dict[Kind, Callable[[Peer, Header, memoryview], None]] = {
    Kind.GRANT: Peer._on_grant,
    Kind.OFFER: Peer._on_offer,
    Kind.STAGED: Peer._on_staged,
    Kind.RELEASE: Peer._on_release,
    Kind.ABORT: Peer._on_abort,
    Kind.VIEW: Peer._on_view,
    Kind.BYE: Peer._on_bye,
    Kind.TAKEN: Peer._on_taken,
}
