"""What goes to one other worker: small messages at once, large ones when it asks for them.

Not here: when a connection is there (connections.py); what comes (peer.py); sockets (outbound.py).
"""

import time

from elastic_run.collectives import wire
from elastic_run.collectives.arena import Region
from elastic_run.collectives.connections import Connections
from elastic_run.collectives.errors import CollectiveAborted, CollectiveError, CollectiveMismatch
from elastic_run.collectives.memory import copy
from elastic_run.collectives.messages import EAGER_BYTES_MAX, KEPT_OVERHEAD_BYTES, UNTAKEN_BYTES_MAX, Key, Send
from elastic_run.collectives.outbound import Item, round_trip_s
from elastic_run.collectives.wire import POINT_TO_POINT, Header, Kind, RegionRef

CONTROL_BATCH = 32
WIDE_ROUND_TRIP_S = 0.002  # within a rack one connection fills the path
WIDE_BYTES_MIN = 256 << 10
CHUNKS_PER_LANE = 4
CHUNK_BYTES_MIN = 64 << 10


class Sending(Connections):
    """Engine thread only."""

    def send(self, send: Send) -> None:
        """Begin a message of the present view. Raises CollectiveAborted when the peer is gone."""
        self._check_up()
        key, total = send.key, len(send.buffer)
        if total <= EAGER_BYTES_MAX and self._may_go_at_once(key, total):
            header = wire.pack(self._header(Kind.DATA, key, send.check, total, length=total))
            self._gated(Item([b"".join((header, send.buffer, wire.VALID))]))
            send.unsent = 0
            send.finish()
            return
        if key in self._grants:
            self._grants.discard(key)
            self._start_bulk(send)
            return
        self._ungranted[key] = send
        if key.slot & POINT_TO_POINT:
            self._gated(Item([wire.pack(self._header(Kind.OFFER, key, send.check, total))]))
        else:
            self.open()
            arrived = self.inbox.arrived.get(key)
            if arrived is not None:
                self._compare(key, arrived.check)

    def _compare(self, key: Key, check: int) -> None:
        """Members that only send large messages to each other wait for grants: what else came tells if they differ."""
        send = self._ungranted.get(key)
        if send is not None and send.check != check:
            self._fail_mismatch(key, "another operation, type or algorithm")

    def _fail_mismatch(self, key: Key, what: str) -> None:
        error = CollectiveMismatch(
            f"{self.worker} sent {what} where {self._mesh.worker} is at operation {key.sequence}"
            f" of group {key.group:#x}: all members must call the same operations, with equal sizes and types, in the"
            " same order"
        )
        self._fail_group(key.group, error)

    def _may_go_at_once(self, key: Key, total: int) -> bool:
        """Say whether the peer will keep a small message until it is received, and count it."""
        if not key.slot & POINT_TO_POINT or not total:
            return True
        if self._untaken_bytes + total + KEPT_OVERHEAD_BYTES > UNTAKEN_BYTES_MAX:
            return False
        self._untaken_bytes += total + KEPT_OVERHEAD_BYTES
        return True

    def publish(self, key: Key, check: int, region: Region) -> None:
        """Tell the peer of a region of this worker's shared memory; the peer releases it. Raises CollectiveAborted."""
        self._check_up()
        self._mesh.arena.hold(region, self.worker)
        self._introduce(region.segment)
        ref = wire.pack_region(RegionRef(region.segment, region.offset, region.generation, region.nbytes))
        frame = wire.pack(self._header(Kind.STAGED, key, check, region.nbytes, length=len(ref))) + ref
        self._gated(Item([frame], region=region))

    def cancel(self, send: Send) -> None:
        """Send no more of it; what is half out is finished as void."""
        self._ungranted.pop(send.key, None)
        if send in self._bulk:
            self._bulk.remove(send)
        for lane in self._lanes.values():
            lane.void(send)

    def send_blocked_ns(self) -> int:
        """Return for how long its sockets have taken nothing while there was something to send, added up."""
        now_ns = time.monotonic_ns()
        return sum(
            lane.blocked_ns + (now_ns - lane.blocked_since_ns if lane.blocked_since_ns else 0)
            for lane in self._lanes.values()
        )

    def _header(self, kind: Kind, key: Key, check: int, total: int, offset: int = 0, length: int = 0) -> Header:
        return Header(kind, self._mesh.view_number, key.group, key.sequence, key.slot, check, total, offset, length)

    def _start_bulk(self, send: Send) -> None:
        self._bulk.append(send)
        if self.local:
            self.stage_bulk()
        else:
            self._widen(len(send.buffer))
            for lane in self._lanes.values():
                lane.pump()

    def _widen(self, total: int) -> None:
        """Open more connections where one cannot fill the path: windows grow by the round trip, and shrink by loss."""
        first = self._lanes.get(0)
        lanes_max = self._mesh.options.lanes_max
        if len(self._lanes) >= lanes_max or total < WIDE_BYTES_MIN or first is None or first.socket is None:
            return
        if self.far:
            for lane in range(1, lanes_max):
                if lane not in self._lanes:
                    self._dial(lane)

    @property
    def far(self) -> bool | None:
        """Whether one connection cannot fill the path; None: nothing is known of it yet."""
        if self.endpoint is not None and self.endpoint.host == self._my_host:
            return False  # a long round trip within a host is a wait for the processor
        first = self._lanes.get(0)
        if first is None or first.socket is None or not first.ready:
            return None
        if self._round_trip_s is None or self._round_trip_s < WIDE_ROUND_TRIP_S:
            self._round_trip_s = round_trip_s(first.socket)
        return self._round_trip_s >= WIDE_ROUND_TRIP_S

    def _chunk_bytes(self, total: int) -> int:
        """Return how much one connection takes at a time: several turns each, so that a slow one holds up little."""
        if len(self._lanes) == 1:
            return self._mesh.options.chunk_bytes
        share = total // (len(self._lanes) * CHUNKS_PER_LANE)
        return min(self._mesh.options.chunk_bytes, max(CHUNK_BYTES_MIN, share))

    def stage_bulk(self) -> None:
        """Copy waiting messages into shared memory, as far as there is room; one piece when there is none.

        They were asked for, so the peer reads each piece at once, whatever operations here and there wait for.
        """
        while self._bulk and self.local:
            send = self._bulk[0]
            nbytes = min(len(send.buffer) - send.next_offset, self._mesh.options.stage_bytes)
            try:
                region = self._mesh.arena.allocate(nbytes, self.worker, beyond=True)
            except CollectiveError as error:  # the system has no memory: this message's group cannot go on
                self._fail_group(send.key.group, CollectiveAborted(str(error), self._mesh.worker))
                return
            if region is None:
                return
            offset = send.next_offset
            send.first_ns = send.first_ns or time.monotonic_ns()
            copy(region.bytes, send.buffer[offset : offset + nbytes])
            self._mesh.arena.hold(region, self.worker)
            self._introduce(region.segment)
            ref = wire.pack_region(RegionRef(region.segment, region.offset, region.generation, nbytes))
            header = self._header(Kind.STAGED, send.key, send.check, len(send.buffer), offset, len(ref))
            self._push(Item([wire.pack(header) + ref]))
            self._mesh.arena.release_owner(region)
            send.next_offset += nbytes
            self._chunk_sent(send, nbytes)
            if send.next_offset == len(send.buffer):
                self._bulk.popleft()

    def _fail_group(self, group: int, error: CollectiveError) -> None:
        view = self._mesh.view_number
        self._mesh.engine.soon(lambda: self._mesh.failed(view, group, error))

    def _chunk_sent(self, send: Send, nbytes: int) -> None:
        send.unsent -= nbytes
        if not send.unsent:
            send.finish()

    def next_item(self, lane: int) -> Item | None:
        control = self._control
        if control and lane == 0:
            item = control.popleft()
            if not item.descriptors:
                for _ in range(CONTROL_BATCH):
                    if not control or control[0].descriptors or control[0].on_sent is not None:
                        break
                    item.buffers.extend(control.popleft().buffers)
            return item
        if self._bulk and not self.local:
            send = self._bulk[0]
            offset = send.next_offset
            nbytes = min(len(send.buffer) - offset, self._chunk_bytes(len(send.buffer)))
            send.first_ns = send.first_ns or time.monotonic_ns()
            header = wire.pack(self._header(Kind.DATA, send.key, send.check, len(send.buffer), offset, nbytes))
            send.next_offset += nbytes
            if send.next_offset == len(send.buffer):
                self._bulk.popleft()
            chunk: list[bytes | memoryview] = [header, send.buffer[offset : offset + nbytes], wire.VALID]
            return Item(chunk, lambda: self._chunk_sent(send, nbytes), owner=send)
        return None
