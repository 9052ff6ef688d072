"""What an algorithm may do: send, receive, share memory, within one operation of one group.

Slots number the messages between two members within the operation; both sides compute them alike.
Engine thread only. Not here: the algorithms (algorithms/); matching and sockets (messages.py, peer.py).
"""

import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING

import torch

from elastic_run.collectives.arena import Region
from elastic_run.collectives.errors import CollectiveAborted, CollectiveError
from elastic_run.collectives.memory import bytes_of
from elastic_run.collectives.messages import Fetch, Key, Receive, Send
from elastic_run.collectives.pending import Countdown, Pending
from elastic_run.collectives.pipes import PipeOut, Pipes
from elastic_run.collectives.recording import Moved
from elastic_run.collectives.signature import Signature
from elastic_run.collectives.wire import POINT_TO_POINT
from elastic_run.runtime.protocol.errors import CodecError

if TYPE_CHECKING:
    from elastic_run.collectives.connections import Connections
    from elastic_run.collectives.group import Group
    from elastic_run.collectives.operation import Operation
    from elastic_run.collectives.options import MeshOptions
    from elastic_run.collectives.peer import Peer
    from elastic_run.collectives.recording import Record
    from elastic_run.collectives.selection import Layout


OTHER_SLOTS = 1 << 20


class Channel:
    """One operation's way out."""

    def __init__(self, group: "Group", sequence: int, signature: Signature, *, tag: int | None = None) -> None:
        """With a tag: one point-to-point message."""
        self._group = group
        self._sequence = sequence
        self._signature = signature
        self._check = signature.check ^ group.order
        self._record: Record | None = None
        self._enter_ns = time.monotonic_ns() if group.mesh.recorder is not None else 0
        self._base = 0 if tag is None else POINT_TO_POINT | tag
        self._first_slot = 0
        self.operation: Operation | None = None
        self.rank = group.rank
        self.size = group.size
        self.me = group.mesh.worker
        self.members = group.members
        self._sends: list[tuple[Peer, Send]] = []
        self._receives: list[tuple[Peer, Receive | Fetch]] = []
        self._regions: list[Region] = []
        self._blocks: list[torch.Tensor] = []
        self._turn: Pending | None = None
        self._unfinished: Callable[[int], bool] | None = None
        self.awaited: str | None = None
        """The member that a stream waited for last."""

    @property
    def others(self) -> list[int]:
        """Ranks of the other members, beginning after this one: not everybody starts with the same."""
        return [(self.rank + step) % self.size for step in range(1, self.size)]

    @property
    def layout(self) -> "Layout":
        return self._group.layout

    @property
    def options(self) -> "MeshOptions":
        return self._group.mesh.options

    # Messages --------------------------------------------------------------------------------------------------------

    def send(self, rank: int, slot: int, tensor: torch.Tensor) -> Send:
        """Begin to send a contiguous tensor; it must not change before the pending is done."""
        peer = self._group.peer(rank)
        send = Send(peer.worker, self._key(slot), self._check, bytes_of(tensor), tensor)
        peer.send(send)
        if not send.done:
            self._sends.append((peer, send))
        if self._record is not None:
            self._record.sends(peer, send)
        return send

    def receive(self, rank: int, slot: int, tensor: torch.Tensor) -> Receive:
        """Begin to receive into a contiguous tensor of exactly the sent size."""
        peer = self._group.peer(rank)
        receive = Receive(peer.worker, self._key(slot), self._check, bytes_of(tensor))
        self._await(peer, receive)
        peer.receive(receive)
        return receive

    def receive_any(self, tensor: torch.Tensor) -> Receive:
        """Begin to receive a point-to-point message from whoever sends first."""
        receive = Receive(self.me, self._key(0), self._check, bytes_of(tensor))
        peers = [peer for peer in self._group.peers if peer is not None]
        receive.on_match = deque(peer.inbox.queue(self._group.identity, self._base, peer.worker) for peer in peers)
        for peer in peers:
            self._await(peer, receive)
            if receive.source is None:
                peer.receive(receive)
        gone = [peer.left for peer in peers if peer.left is not None]
        if receive.source is None and len(gone) == len(peers):
            raise CollectiveAborted(gone[0].reason, gone[0].culprit)
        return receive

    def tell_source(self, receive: Receive) -> None:
        """Note who answered."""
        if self.operation is not None and receive.source is not None:
            self.operation.source = self._group.members.index(receive.source)

    def scratch(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """Return temporary memory, one-dimensional, the operation's until its end, with whatever is in it."""
        nbytes = numel * dtype.itemsize
        block = self._group.mesh.scratch.take(nbytes)
        self._blocks.append(block)
        return block[:nbytes].view(dtype)

    # Shared memory ---------------------------------------------------------------------------------------------------

    def allocate(self, nbytes: int) -> Generator[Sequence[Pending], None, Region]:
        """Return shared memory of this worker, the operation's until its end, once there is some.

        Groups may run their operations in different orders on different members, so two operations could each hold
        memory here and wait for the other's there. Hence the oldest operation of a group never waits behind others: in
        every group the one that is oldest everywhere gets on. It waits only while members read what older ones left.
        Raises CollectiveError when such operations together come to the hard limit.
        """
        mesh = self._group.mesh
        while True:
            beyond = self._group.is_oldest(self)
            region = mesh.arena.allocate(nbytes, self._group.identity, beyond=beyond)
            if region is not None:
                self._regions.append(region)
                return region
            yield [mesh.when_memory_freed()]

    def release(self, region: Region) -> None:
        """Give a published region up early: its memory is free when those it was shown to have given it back."""
        self._regions.remove(region)
        self._group.mesh.arena.release_owner(region)

    def publish(self, rank: int, slot: int, region: Region, *, counted: bool = True) -> None:
        """Let a member of the same host read the region. `counted`: it holds as many bytes of the operation."""
        peer = self._group.peer(rank)
        peer.publish(self._key(slot), self._check, region)
        if self._record is not None:
            self._record.shows(peer, region.nbytes if counted else 0)

    def fetch(self, rank: int, slot: int, nbytes: int | None = None, *, counted: bool = True) -> Fetch:
        """Wait for a region that `rank` publishes; with `nbytes` one of another size is a mismatch."""
        peer = self._group.peer(rank)
        fetch = Fetch(peer.worker, self._key(slot), self._check, nbytes, counted=counted)
        self._await(peer, fetch)
        peer.fetch(fetch)
        return fetch

    def view(self, rank: int, fetch: Fetch) -> torch.Tensor:
        """Return the fetched bytes (uint8, read only), good until `give_back`. Raises CollectiveAborted."""
        assert fetch.region is not None
        try:
            return self._group.peer(rank).view_of(fetch.region)
        except CodecError as error:
            raise CollectiveAborted(str(error), fetch.peer) from None

    def give_back(self, rank: int, fetch: Fetch) -> None:
        """Release a fetched region. Raises CollectiveAborted when the owner had taken it back while it was read."""
        peer = self._group.peer(rank)
        region = fetch.region
        assert region is not None
        fetch.region = None
        if not peer.intact(region):
            raise CollectiveAborted("shared memory was taken back while it was read: this worker stood still", self.me)
        peer.release(region)

    # Streams ---------------------------------------------------------------------------------------------------------

    def queue_to_stream(self) -> None:
        """Take a place in the group's queue, if not done yet; in the order of its operations: before any wait."""
        if self._turn is not None:
            return
        turns = self._group.streams
        self._turn = Pending(self.me)
        turns.append(self._turn)
        if turns[0] is self._turn:
            self._turn.finish()
            self._group.mesh.groups_streaming += 1

    def turn_to_stream(self, unfinished: Callable[[int], bool]) -> Pending:
        """Return what is done once all older streams of the group have ended: two at once would wait for each other.

        While `unfinished(rank)`, the operation needs that member.
        """
        assert self._turn is not None
        self._unfinished = unfinished
        return self._turn

    def leave_queue(self) -> None:
        """The next one of the group may stream."""
        if self._turn is None:
            return
        turns = self._group.streams
        turns.remove(self._turn)
        self._unfinished = self._turn = None
        if turns:
            turns[0].finish()
        else:
            self._group.mesh.groups_streaming -= 1

    def stream_on(self, unfinished: Callable[[int], bool]) -> None:
        """It is known better now for how long which members are needed."""
        self._unfinished = unfinished

    def next_turn(self, rank: int) -> Pending:
        """Return what is done once the engine has looked at its connections; until then `rank` is waited for."""
        self.awaited = self.members[rank]
        pending = Pending(self.awaited)
        self._group.mesh.engine.soon(pending.finish)
        return pending

    def watched(self, among_others_ns: int, alone_ns: int) -> tuple[int, int]:
        """Return what is readable when something happens on a connection, and for how long not to look after that."""
        mesh = self._group.mesh
        return mesh.engine.fd, among_others_ns if mesh.groups_streaming > 1 else alone_ns

    def moment(self, rank: int, delay_s: float) -> Pending:
        """Return what is done after `delay_s`, in which something may be heard of `rank`."""
        pending = Pending(self.members[rank])
        self._group.mesh.engine.after(delay_s, pending.finish)
        return pending

    def pipe_to(self, rank: int) -> PipeOut | None:
        """Return the pipe to a member, for one more user, as `Connections.pipe_to`."""
        return self._group.peer(rank).pipe_to(self._group.identity)

    def pipes_of(self, rank: int) -> Pipes:
        return self._group.peer(rank).pipes

    def far(self, rank: int) -> bool | None:
        """Say whether several connections are better than one on the way to a member; None: it is not known yet."""
        return self._group.peer(rank).far

    def other_slots(self) -> None:
        """From now on slots are others than before: another algorithm takes over."""
        self._first_slot += OTHER_SLOTS

    @property
    def recorded(self) -> bool:
        return self._record is not None

    def note_flow(self, rank: int, moved: Moved) -> None:
        """So much more went to and came from a member in a stream."""
        if self._record is not None:
            self._record.flows(self._group.peer(rank), moved)

    # For the operation -----------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """The operation starts."""
        recorder = self._group.mesh.recorder
        if recorder is not None:
            tag = self._base & ~POINT_TO_POINT
            self._record = recorder.begin(self._signature, self._group, self._sequence, tag, self._enter_ns)

    def waiting(self, countdown: Countdown) -> None:
        """The operation has nothing to do until these are done."""
        if self._record is not None:
            self._record.waiting(countdown)

    def needs(self, peer: "Connections") -> bool:
        """Say whether something is waited for that only `peer` can do."""
        if any(to is peer and not send.done for to, send in self._sends):
            return True
        if self._unfinished is not None and self._unfinished(self.members.index(peer.worker)):
            return True
        waits = [receive for source, receive in self._receives if source is peer and not receive.done]
        return any(not isinstance(receive, Receive) or self._only_from(receive, peer) for receive in waits)

    def _only_from(self, receive: Receive, peer: "Connections") -> bool:
        if receive.on_match is None or receive.source is not None:
            return receive.peer == peer.worker
        return all(other is None or other.left is not None for other in self._group.peers)

    def cancel(self) -> None:
        """Nothing that is still under way touches a buffer of this operation any more."""
        for peer, send in self._sends:
            if not send.done:
                peer.cancel(send)
        for peer, receive in self._receives:
            if not receive.done:
                peer.unpost(receive)

    def give_up(self, error: CollectiveError) -> None:
        """End the group: a member that has lost one operation cannot take part in the next."""
        self._group.mesh.give_up(self._group, error)

    def let_go(self, error: BaseException | None) -> None:
        """The operation is over: return what shared memory it has or reads."""
        if self._record is not None:
            self._record.end(error)
            self._record = None
        self.leave_queue()
        for peer, receive in self._receives:
            if isinstance(receive, Fetch) and receive.region is not None:
                peer.release(receive.region)
                receive.region = None
        for region in self._regions:
            self._group.mesh.arena.release_owner(region)
        if self._regions:
            self._group.mesh.memory_freed()
        self._regions.clear()
        for block in self._blocks:
            self._group.mesh.scratch.give(block)
        self._blocks.clear()
        self._receives.clear()
        self._sends.clear()
        self.operation = None

    def _await(self, peer: "Peer", pending: Receive | Fetch) -> None:
        self._receives.append((peer, pending))
        if self._record is not None:
            self._record.awaits(peer, pending)

    def _key(self, slot: int) -> Key:
        return Key(self._group.identity, self._sequence, self._base | (self._first_slot + slot))
