"""The connections with one other worker, both ways: dialled, kept over views, lost, left; and what waits to be sent.

Nothing of a view is sent to a peer before the peer said that it has installed that view. Connections are opened when
first needed, by each side for what it sends, and outlive views. A peer that is lost stays down until the next view is
installed; one that says goodbye has left: what it sent before still counts, only operations that need more of it end.
Invariants (tests/integration/test_views.py): 1. a lost connection closes all connections of its generation, so both
sides agree that the link is gone; 2. it is dialled anew in the same view only while nothing of the view was exchanged.
Not here: messages (sending.py, peer.py); sockets (outbound.py, inbound.py).
"""

import os
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable
from typing import Protocol

from elastic_run.collectives import wire
from elastic_run.collectives.arena import Arena
from elastic_run.collectives.endpoint import Endpoint
from elastic_run.collectives.engine import Engine
from elastic_run.collectives.errors import CollectiveAborted, CollectiveError
from elastic_run.collectives.handshake import LANES_MAX, NONCE_BYTES, Hello
from elastic_run.collectives.inbound import Inbound
from elastic_run.collectives.messages import Inbox, Key, Send
from elastic_run.collectives.options import MeshOptions
from elastic_run.collectives.outbound import Item, Outbound
from elastic_run.collectives.peer_segments import PeerSegments
from elastic_run.collectives.pipes import PipeOut, Pipes
from elastic_run.collectives.wire import Header, Kind, RegionRef
from elastic_run.runtime.protocol.errors import PeerRefused

REDIALS_MAX = 1  # of connections lost in a view before anything of it was exchanged
LAST_WORDS_S = 0.05  # for what is still to be read of a peer that closed its end; longer: its loss is told later


class Surroundings(Protocol):
    """What a peer needs of the mesh."""

    engine: Engine
    worker: str
    secret: bytes
    options: MeshOptions
    arena: Arena

    @property
    def view_number(self) -> int: ...

    def dead_group(self, group: int) -> bool: ...

    def peer_lost(self, peer: "Connections") -> None: ...

    def peer_left(self, peer: "Connections") -> None: ...

    def peer_gone(self) -> None: ...

    def peer_moved_on(self, peer: "Connections", view: int) -> None: ...

    def peer_aborted(self, peer: "Connections", view: int, group: int, culprit: str, reason: str) -> None: ...

    def failed(self, view: int, group: int, error: CollectiveError) -> None: ...

    def memory_freed(self) -> None: ...


class Connections(ABC):
    """Engine thread only."""

    def __init__(self, mesh: Surroundings, worker: str, my_host: str) -> None:
        self._mesh = mesh
        self.worker = worker
        self._my_host = my_host
        self.endpoint: Endpoint | None = None
        self.inbox = Inbox()
        self.announced = 0
        """The view the peer has installed last."""
        self.in_view = False
        """Whether it is a member of the installed view. What others send changes nothing, and nothing of it is kept."""
        self.down: str | None = None
        """Why nothing is sent to it until the next view."""
        self.progress_ns = time.monotonic_ns()
        """When bytes last came from it."""
        self._lanes: dict[int, Outbound] = {}
        self._inbounds: list[Inbound] = []
        self._control: deque[Item] = deque()
        self._held: deque[Item] = deque()  # waits until the peer is in our view
        self._bulk: deque[Send] = deque()
        self._ungranted: dict[Key, Send] = {}
        self._untaken_bytes = 0  # of small point-to-point messages, as far as the peer has told
        self._taken_bytes = 0  # received from the peer and not told yet
        self._grants: set[Key] = set()
        self._segments: PeerSegments | None = None
        self._segments_sent: dict[int, Item] = {}
        self._farewell: CollectiveAborted | None = None  # what it said when it closed on purpose
        self.left: CollectiveAborted | None = None
        """It closed on purpose, and everything it had sent is here: what operations that need more of it end with."""
        self._fading: object | None = None  # a direction is closed, the last words of the other are waited for
        self._redials = 0
        self._bye: bytes | None = None  # this worker is leaving
        self._round_trip_s: float | None = None
        self.pipes = Pipes(mesh.engine, worker)

    @property
    def shares_memory(self) -> bool:
        """Whether members of one host share memory at all."""
        return self._mesh.options.shared_memory

    @property
    def local(self) -> bool:
        """Whether bulk goes through shared memory."""
        return self.shares_memory and self.endpoint is not None and self.endpoint.host == self._my_host

    # Opening ----------------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Dial, if not done yet."""
        if not self._lanes and self.endpoint is not None and self.down is None and self._fading is None:
            self._dial(0)

    def attach(self, inbound: Inbound, lane: int) -> None:
        """Take an authenticated connection of this peer. Raises PeerRefused when it has too many."""
        if lane and len(self._inbounds) >= LANES_MAX:
            raise PeerRefused(f"{self.worker} has {LANES_MAX} connections open already")
        if self._bye is not None:
            raise PeerRefused(f"{self._mesh.worker} is leaving")
        if lane == 0 and (self._inbounds or self._fading is not None):
            self._drop_connections("it connected anew, so it has given up this view's connections")
        if self.left is not None:
            self._drop_segments()  # those of its life before
        self._inbounds.append(inbound)
        self.open()

    def drop(self, reason: str) -> None:
        """Give the peer up until the next view."""
        self._drop_connections(reason, verdict=True)

    def abandon(self) -> None:
        """In a forked child: close the descriptors, touch nothing else."""
        self.down = self.down or "this process was forked from a worker"
        for lane in self._lanes.values():
            lane.abandon()
        for inbound in self._inbounds:
            inbound.abandon()
        self.pipes.abandon()

    def forget_segment(self, segment: int) -> None:
        """A segment of this worker is gone; the peer sees that by itself."""
        item = self._segments_sent.pop(segment, None)
        if item is not None and item.descriptors:  # not sent yet, and the descriptor is closed
            self._control = deque(other for other in self._control if other is not item)
            for lane in self._lanes.values():
                lane.withdraw(item)

    @property
    def connected(self) -> bool:
        return bool(self._inbounds)

    @property
    def ready(self) -> bool:
        """Whether both directions are open."""
        return bool(self._inbounds) and 0 in self._lanes and self._lanes[0].ready

    def revive(self) -> None:
        """A new view is installed: the peer may be spoken to again."""
        self.down = None
        self._redials = 0
        if self.left is not None:
            self.left = None
            self._drop_segments()

    def leave(self, reason: str) -> None:
        """Say goodbye when everything is out; `gone` when the peer has seen it."""
        self._bye = self._goodbye(reason)
        self._say_goodbye()

    @property
    def gone(self) -> bool:
        return not self._lanes

    def _goodbye(self, reason: str) -> bytes:
        text = wire.pack_text(reason)
        return wire.pack(Header(Kind.BYE, view=self._mesh.view_number, length=len(text))) + text

    def _say_goodbye(self) -> None:
        if self._bye is not None and not self._held:
            for lane in self._lanes.values():
                lane.finish(self._bye)

    def close(self, reason: str | None) -> None:
        """Leave the peer; with a reason it is told as politely as the sockets allow."""
        lane = self._lanes.get(0)
        if reason is not None and lane is not None and lane.ready:
            self._control.appendleft(Item([self._goodbye(reason)]))
            self._bulk.clear()
            lane.pump()
        self.down = reason or "closed"
        self._close_connections()
        self.reset()

    def reset(self) -> None:
        """Forget every message of the view that ended."""
        for region in self.inbox.regions():
            self.release(region)
        self.inbox.clear()
        self._forget_held()
        self._bulk.clear()
        self._ungranted.clear()
        self._grants.clear()
        self._untaken_bytes = self._taken_bytes = 0
        self.pipes.close_used()

    def clear_group(self, group: int) -> None:
        """Forget what came for a group that is over."""
        for region in self.inbox.regions(group):
            self.release(region)
        self.inbox.clear_group(group)

    def _forget_held(self) -> None:
        for item in self._held:
            if item.region is not None:
                self._mesh.arena.release(item.region, self.worker)
        self._held.clear()

    def _drop_segments(self) -> None:
        if self._segments is not None:
            self._segments.close()
            self._segments = None

    def _dial(self, lane: int) -> None:
        endpoint = self.endpoint
        assert endpoint is not None
        hello = Hello(source=self._mesh.worker, target=self.worker, lane=lane, nonce=os.urandom(NONCE_BYTES))
        dial = self._mesh.options.dialler(endpoint, local=self.local)
        self._lanes[lane] = Outbound(self._mesh.engine, self, dial, hello, self._mesh.secret)

    def pipe_to(self, group: int) -> PipeOut | None:
        """Return the pipe on which bytes of the group go to the peer, for one more user; None: there is none left."""
        self._check_up()
        endpoint = self.endpoint
        assert endpoint is not None
        mesh, dial = self._mesh, self._mesh.options.dialler(endpoint, local=False, pipe=True)
        return self.pipes.to(group, lambda: PipeOut(mesh.engine, dial, mesh.worker, self.worker, mesh.secret))

    def open_pipe(self, group: int) -> None:
        """Dial the group's pipe before it is needed, where there will be one."""
        pipe = self.pipe_to(group)
        if pipe is not None:
            pipe.users -= 1

    def _close_connections(self, *, keep_held: bool = False, keep_segments: bool = False) -> None:
        self._fading = None
        self._farewell = None
        for lane in self._lanes.values():
            lane.close()
        self._lanes.clear()
        for inbound in self._inbounds:
            inbound.close()
        self._inbounds.clear()
        if not keep_held:  # else operations have said which ones they will use
            self.pipes.close(keep_arrived=keep_segments)
        self._control.clear()
        self._segments_sent.clear()
        self.announced = 0
        if not keep_held:
            self._forget_held()
        held = Counter(item.region.generation for item in self._held if item.region is not None)
        self._mesh.arena.drop_peer(self.worker, keep=held)
        if not keep_segments:
            self._drop_segments()

    def _drop_connections(self, reason: str, *, verdict: bool = False) -> None:
        if self._farewell is not None and not verdict:
            self._depart(self._farewell)
        elif self._unused and not verdict:
            self._redial()
        else:
            self.down = self.down or reason
            self._close_connections()
            if verdict:
                self._mesh.peer_lost(self)
            else:
                self._tell(self._mesh.peer_lost)
            self._mesh.memory_freed()

    def _tell(self, what: "Callable[[Connections], None]") -> None:
        """Tell the mesh, after what the peer said before: it may have said who is to blame."""
        view = self._mesh.view_number
        self._mesh.engine.soon(lambda: what(self) if view == self._mesh.view_number else None)

    @property
    def _unused(self) -> bool:
        """Whether nothing of this view was exchanged yet, so that another connection is as good as the lost one."""
        untold = self.in_view and self.down is None and self.announced != self._mesh.view_number
        return untold and self._bye is None and self._redials < REDIALS_MAX

    def _redial(self) -> None:
        self._redials += 1
        self._close_connections(keep_held=True)
        self.open()
        for item in self._held:
            if item.region is not None:
                self._introduce(item.region.segment)

    def _depart(self, farewell: CollectiveAborted) -> None:
        """It has left. Operations may still read its memory, so that stays until the next view."""
        self.down, self.left = farewell.reason, farewell
        self._close_connections(keep_segments=True)
        self._tell(self._mesh.peer_left)
        self._mesh.memory_freed()

    def _check_up(self) -> None:
        if self.left is not None:
            raise CollectiveAborted(self.left.reason, self.left.culprit)
        if self.down is not None:
            raise CollectiveAborted(self.down, self.worker)

    def lane_ready(self, lane: int) -> None:
        if lane == 0:
            self.announce()
            self._pass_gate()

    def lane_lost(self, outbound: Outbound, reason: str) -> None:
        if self._lanes.get(outbound.lane) is not outbound:
            return
        del self._lanes[outbound.lane]
        if self._bye is not None:
            self._mesh.peer_gone()
            return
        # Its last words may be here unread, and may explain it.
        fading = self._fading = object()
        for inbound in list(self._inbounds):
            inbound.drain()
        if self._fading is fading and self._inbounds:
            self._mesh.engine.after(LAST_WORDS_S, lambda: self._faded(fading, reason))
        elif self._fading is fading:
            self._drop_connections(reason)

    def _faded(self, fading: object, reason: str) -> None:
        if self._fading is fading:
            self._drop_connections(reason)

    def inbound_lost(self, inbound: Inbound, reason: str) -> None:
        if inbound not in self._inbounds:
            return
        self._inbounds.remove(inbound)
        # Goodbye is said on every connection: each is read to its end.
        if self._bye is None and not (self._farewell is not None and self._inbounds):
            self._drop_connections(reason)

    # What is sent about connections, memory and groups ----------------------------------------------------------------

    def announce(self) -> None:
        """Say which view this worker is in, to its members."""
        if 0 in self._lanes and self.in_view:
            self._push(Item([wire.pack(Header(Kind.VIEW, view=self._mesh.view_number))]))

    def release(self, region: RegionRef) -> None:
        """Give a fetched region back. Checks nothing: `intact` does."""
        if not self._lanes:
            return  # nobody to tell: without connections its owner has given up our hold
        payload = wire.pack_region(region)
        item = Item([wire.pack(Header(Kind.RELEASE, view=self._mesh.view_number, length=len(payload))) + payload])
        self._control.append(item)
        self._mesh.engine.lazily(self._flush)  # it rides with the next operation's first message

    def _flush(self) -> None:
        lane = self._lanes.get(0)
        if lane is not None:
            lane.pump()

    def abort(self, group: int, culprit: str, reason: str) -> None:
        text = wire.pack_text(culprit, reason)
        header = Header(Kind.ABORT, view=self._mesh.view_number, group=group, length=len(text))
        # Without connections it is told when there are some: it must not wait for a member that has given up.
        self._gated(Item([wire.pack(header) + text]), dial=False)

    def _gated(self, item: Item, *, dial: bool = True) -> None:
        """Send now if the peer is in this view, else when it is."""
        if self.down is not None:
            return
        if dial:
            self.open()
        self._held.append(item)
        self._pass_gate()

    def _pass_gate(self) -> None:
        if self.announced == self._mesh.view_number:
            while self._held and self._lanes:
                self._push(self._held.popleft())
            self._say_goodbye()

    def _push(self, item: Item) -> None:
        if self.down is not None:
            return
        self._control.append(item)
        lane = self._lanes.get(0)
        if lane is not None:
            lane.pump()

    def _introduce(self, segment: int) -> None:
        if segment in self._segments_sent:
            return
        arena = self._mesh.arena
        payload = wire.pack_region(RegionRef(segment, 0, 0, arena.size_of(segment)))
        header = wire.pack(Header(Kind.SEGMENT, view=self._mesh.view_number, length=len(payload)))
        self.open()
        item = self._segments_sent[segment] = Item([header + payload], descriptors=(arena.fd_of(segment),))
        self._push(item)

    @abstractmethod
    def next_item(self, lane: int) -> Item | None:
        """Return what that connection sends next."""
