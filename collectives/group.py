"""An ordered set of members of one view, and the operations they do together.

Every member calls the same operations in the same order; operations of one group run up to ACTIVE_MAX at once, those of
different groups independently. A group ends with its view, or when a member is lost: from then on every operation
raises why.
Not here: what an operation does (algorithms/); which algorithm is taken (selection.py).
"""

import threading
import zlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from elastic_run.collectives import exact, flat, native, quantised, selection
from elastic_run.collectives.algorithms import table as algorithms
from elastic_run.collectives.channel import Channel
from elastic_run.collectives.dyadic import Block
from elastic_run.collectives.errors import CollectiveError
from elastic_run.collectives.operation import Algorithm, Operation
from elastic_run.collectives.pending import Pending
from elastic_run.collectives.reduction import Reduction, accumulator_dtype
from elastic_run.collectives.selection import Method
from elastic_run.collectives.signature import Signature, sign, sign_message, sign_uneven

if TYPE_CHECKING:
    from elastic_run.collectives.connections import Connections
    from elastic_run.collectives.mesh import Mesh
    from elastic_run.collectives.peer import Peer

ACTIVE_MAX = 8
"""Operations of one group under way at once. More: more temporary memory; fewer: small ones wait for large ones."""
TAG_MAX = (1 << 31) - 1


class Group:
    """Methods return an `Operation` at once, or raise ValueError for arguments that cannot be meant.

    Results land in the given tensors. `timeout_s`: the operation ends with CollectiveTimeout after it. `sync`: the
    caller waits at once, so no other thread is woken for it.
    """

    def __init__(
        self, mesh: "Mesh", name: str, identity: int, members: tuple[str, ...], peers: "tuple[Peer | None, ...]"
    ) -> None:
        self.mesh = mesh
        self.name = name
        self.identity = identity
        self.members = members
        """Worker ids; a member's rank is its position."""
        self.rank = members.index(mesh.worker)
        self.size = len(members)
        self.order = zlib.crc32("|".join(members).encode())
        """Part of what members compare: a group is the same only when its ranks are."""
        self.peers = peers
        self.error: CollectiveError | None = None
        """Why the group is over; None while it works."""
        self.layout = selection.layout_of(mesh.worker, peers)
        self._lock = threading.Lock()
        self._sequence = 0
        self._sent: dict[tuple[int, int], int] = {}
        self._active: set[Operation] = set()
        self._queued: deque[Operation] = deque()
        self._limited: dict[
            Operation, None
        ] = {}  # of those under way, without messages from one member to one; in order
        self.streams: deque[Pending] = deque()
        """Turns of those that stream, in the order of the operations: the first one has it. Engine thread."""

    # Operations ------------------------------------------------------------------------------------------------------

    def all_reduce(
        self,
        tensors: Sequence[Tensor],
        reduction: Reduction = Reduction.SUM,
        *,
        method: Method | None = None,
        timeout_s: float | None = None,
        sync: bool = False,
    ) -> Operation:
        """Reduce each tensor over all members, in place. The result is bit-equal on all of them."""
        packed = flat.Flat(tensors)
        data = packed.data
        wide = accumulator_dtype(data.dtype, reduction)
        if method is None:
            nbytes = data.numel() * data.element_size()
            method = selection.choose_all_reduce(
                nbytes,
                self.layout,
                self.mesh.options,
                widened=wide is not data.dtype,
                streamable=native.streamable(data.dtype, reduction),
            )
        elif method in selection.COMPILED and not (self.size > 1 and native.streamable(data.dtype, reduction)):
            raise ValueError(f"{method} takes no {reduction} of {data.dtype} among {self.size}: name another method")
        elif method in selection.ONE_HOST and not self.layout.one_host:
            raise ValueError(
                f"{method} goes through shared memory, and the members of {self.name!r} are on several hosts"
            )
        elif method in selection.COMPILED and not data.numel():
            method = Method.EXCHANGE
        algorithm = algorithms.ALL_REDUCE[method]
        signature = sign("all_reduce", data, reduction=reduction, method=method)
        return self._start(signature, lambda io: _then(algorithm(io, data, reduction), packed.unpack), timeout_s, sync)

    def all_reduce_exact(
        self,
        output: Tensor,
        partials: Mapping[Block, Tensor],
        world: int,
        reduction: Reduction = Reduction.SUM,
        *,
        placement: Sequence[Sequence[Block]] | None = None,
        timeout_s: float | None = None,
        sync: bool = False,
    ) -> Operation:
        """Reduce `world` logical ranks along their fixed tree: bit-equal for every placement on any number of members.

        `partials`: this member's, one per block it hosts, as `BlockAccumulator.blocks()` has them; none for no ranks.
        `output` may be one of them. `placement`: every member's blocks, where all know them: saves telling each other.
        """
        result = flat.Flat([output], read=False)
        work = exact.Exact(
            output=result.data,
            partials=exact.checked_partials(result.data, partials, world, reduction),
            world=world,
            reduction=reduction,
            placement=exact.checked_placement(placement, self.members, self.rank, partials, world)
            if placement is not None
            else None,
            one_host=self.layout.one_host,
            choose=self._choose,
        )
        signature = sign("all_reduce_exact", result.data, world, work.placement, reduction=reduction)
        return self._start(
            signature,
            lambda io: _then(algorithms.all_reduce_exact(io, work), result.unpack),
            timeout_s,
            sync,
        )

    def all_reduce_q8(
        self,
        tensors: Sequence[Tensor],
        reduction: Reduction = Reduction.SUM,
        *,
        timeout_s: float | None = None,
        sync: bool = False,
    ) -> Operation:
        """Sum or average floats in 8-bit blocks, in place: bit-equal everywhere, off by `quantised.error_bound`."""
        packed = flat.Flat(tensors)
        data = packed.data
        quantised.check(data.dtype, reduction)
        method = self._choose(quantised.encoded_bytes(data.numel()))
        return self._start(
            sign("all_reduce_q8", data, reduction=reduction, method=method),
            lambda io: _then(algorithms.all_reduce_q8(io, data, reduction, method), packed.unpack),
            timeout_s,
            sync,
        )

    def reduce(
        self,
        tensors: Sequence[Tensor],
        root: int,
        reduction: Reduction = Reduction.SUM,
        *,
        timeout_s: float | None = None,
        sync: bool = False,
    ) -> Operation:
        """Reduce each tensor into the root's; the others' stay as they are."""
        self._check_rank(root)
        packed = flat.Flat(tensors)
        data = packed.data
        accumulator_dtype(data.dtype, reduction)
        return self._start(
            sign("reduce", data, reduction=reduction, root=root),
            lambda io: _then(algorithms.reduce(io, data, root, reduction), packed.unpack),
            timeout_s,
            sync,
        )

    def broadcast(
        self, tensors: Sequence[Tensor], root: int, *, timeout_s: float | None = None, sync: bool = False
    ) -> Operation:
        """Copy the root's tensors to every member."""
        self._check_rank(root)
        packed = flat.Flat(tensors, read=self.rank == root)
        data = packed.data
        unpack = packed.unpack if self.rank != root else _nothing
        return self._start(
            sign("broadcast", data, root=root),
            lambda io: _then(algorithms.broadcast(io, data, root), unpack),
            timeout_s,
            sync,
        )

    def all_gather(
        self, output: Tensor, input: Tensor, *, timeout_s: float | None = None, sync: bool = False
    ) -> Operation:
        """Put every member's `input` into `output` (size x input elements), by rank."""
        data, result = flat.Flat([input]).data, flat.Flat([output], read=False)
        _expect(output.numel() == self.size * input.numel(), "output", self.size * input.numel(), output)
        _expect_type(output, input)
        return self._start(
            sign("all_gather", data),
            lambda io: _then(algorithms.all_gather(io, result.data, data), result.unpack),
            timeout_s,
            sync,
        )

    def reduce_scatter(
        self,
        output: Tensor,
        input: Tensor,
        reduction: Reduction = Reduction.SUM,
        *,
        timeout_s: float | None = None,
        sync: bool = False,
    ) -> Operation:
        """Reduce everybody's `input` (size x output elements); each member gets its row in `output`."""
        data, result = flat.Flat([input]).data, flat.Flat([output], read=False)
        accumulator_dtype(data.dtype, reduction)
        _expect(input.numel() == self.size * output.numel(), "input", self.size * output.numel(), input)
        _expect_type(output, input)
        return self._start(
            sign("reduce_scatter", data, reduction=reduction),
            lambda io: _then(algorithms.reduce_scatter(io, result.data, data, reduction), result.unpack),
            timeout_s,
            sync,
        )

    def all_to_all(
        self,
        output: Tensor,
        input: Tensor,
        output_counts: Sequence[int] | None = None,
        input_counts: Sequence[int] | None = None,
        *,
        timeout_s: float | None = None,
        sync: bool = False,
    ) -> Operation:
        """Send each rank its part of `input` and receive its part of `output`; counts are elements per rank."""
        data, result = flat.Flat([input]).data, flat.Flat([output], read=False)
        _expect_type(output, input)
        inputs = self._parts(data, input_counts, "input_counts")
        outputs = self._parts(result.data, output_counts, "output_counts")
        if inputs[self.rank].numel() != outputs[self.rank].numel():
            raise ValueError("what this member sends to itself and receives from itself differs in size")
        return self._start(
            sign_uneven("all_to_all", data),
            lambda io: _then(algorithms.all_to_all(io, outputs, inputs), result.unpack),
            timeout_s,
            sync,
        )

    def gather(
        self, output: Tensor | None, input: Tensor, root: int, *, timeout_s: float | None = None, sync: bool = False
    ) -> Operation:
        """Put every member's `input` into the root's `output` (size x input elements), by rank."""
        self._check_rank(root)
        data = flat.Flat([input]).data
        if self.rank == root:
            if output is None:
                raise ValueError("the root of a gather needs an output")
            _expect(output.numel() == self.size * input.numel(), "output", self.size * input.numel(), output)
            _expect_type(output, input)
        result = flat.Flat([output], read=False) if output is not None and self.rank == root else None
        return self._start(
            sign("gather", data, root=root),
            lambda io: _then(
                algorithms.gather(io, result.data if result else None, data, root),
                result.unpack if result else _nothing,
            ),
            timeout_s,
            sync,
        )

    def scatter(
        self, output: Tensor, input: Tensor | None, root: int, *, timeout_s: float | None = None, sync: bool = False
    ) -> Operation:
        """Give each member its row of the root's `input` (size x output elements)."""
        self._check_rank(root)
        result = flat.Flat([output], read=False)
        data = None
        if self.rank == root:
            if input is None:
                raise ValueError("the root of a scatter needs an input")
            _expect(input.numel() == self.size * output.numel(), "input", self.size * output.numel(), input)
            _expect_type(output, input)
            data = flat.Flat([input]).data
        return self._start(
            sign("scatter", result.data, root=root),
            lambda io: _then(algorithms.scatter(io, result.data, data, root), result.unpack),
            timeout_s,
            sync,
        )

    def barrier(self, *, timeout_s: float | None = None, sync: bool = False) -> Operation:
        """End when every member has called it."""
        return self._start(sign_uneven("barrier"), algorithms.barrier, timeout_s, sync)

    def send(
        self, tensor: Tensor, to: int, tag: int = 0, *, timeout_s: float | None = None, sync: bool = False
    ) -> Operation:
        """Send to one member; matched in order by its receives of the same tag."""
        self._check_other(to, tag)
        data = flat.Flat([tensor]).data
        with self._lock:
            sequence = self._sent.get((to, tag), 0)
            self._sent[to, tag] = sequence + 1
        signature = sign_message("send", data, to)
        return self._start_point_to_point(
            signature, sequence, tag, lambda io: algorithms.send(io, data, to), timeout_s, sync
        )

    def receive(
        self, tensor: Tensor, source: int | None, tag: int = 0, *, timeout_s: float | None = None, sync: bool = False
    ) -> Operation:
        """Receive from one member, or (None) from whoever sends first: `Operation.source` tells who it was."""
        if source is not None:
            self._check_other(source, tag)
        result = flat.Flat([tensor], read=False)
        return self._start_point_to_point(
            sign_message("receive", result.data, source),
            0,
            tag,
            lambda io: _then(algorithms.receive(io, result.data, source), result.unpack),
            timeout_s,
            sync,
        )

    # Running ---------------------------------------------------------------------------------------------------------

    def peer(self, rank: int) -> "Peer":
        peer = self.peers[rank]
        assert peer is not None, "a member sends nothing to itself"
        return peer

    def end(self, error: CollectiveError) -> None:
        """Every operation under way ends with `error`, and every later one too. Engine thread."""
        if self.error is None:
            self.error = error
        self._queued.clear()
        for operation in list(self._active):
            operation.interrupt(error)

    def is_oldest(self, channel: Channel) -> bool:
        """Say whether no operation under way is older; never of a message from one member to one."""
        oldest = next(iter(self._limited), None)
        return oldest is not None and oldest.runs_on(channel)

    def needs(self, peer: "Connections") -> bool:
        """Say whether an operation under way waits for something that only `peer` can do."""
        return any(operation.needs(peer) for operation in self._active)

    def abandon(self, error: CollectiveError) -> None:
        """In a forked child: no operation of this group will ever run, and a lock may be held by nobody."""
        self.error = error
        self._lock = threading.Lock()

    def _start(
        self,
        signature: Signature,
        algorithm: Callable[[Channel], Algorithm],
        timeout_s: float | None,
        sync: bool,
    ) -> Operation:
        with self._lock:
            sequence = self._sequence
            self._sequence = sequence + 1
            channel = Channel(self, sequence, signature)
            operation = Operation(signature.name, self.mesh.engine, channel, algorithm(channel), timeout_s)
            # Under the lock: members must agree on the order, so it must be the order in which numbers were given.
            self._hand_over(operation, limited=True)
        self.mesh.engine.nudge(wake=not sync)
        return operation

    def _start_point_to_point(
        self,
        signature: Signature,
        sequence: int,
        tag: int,
        algorithm: Callable[[Channel], Algorithm],
        timeout_s: float | None,
        sync: bool,
    ) -> Operation:
        channel = Channel(self, sequence, signature, tag=tag)
        operation = Operation(signature.name, self.mesh.engine, channel, algorithm(channel), timeout_s)
        channel.operation = operation
        self._hand_over(operation, limited=False)
        self.mesh.engine.nudge(wake=not sync)
        return operation

    def _hand_over(self, operation: Operation, *, limited: bool) -> None:
        operation.on_end = self._ended_limited if limited else self._ended
        self.mesh.engine.enqueue(lambda: self._admit(operation, limited))

    def _admit(self, operation: Operation, limited: bool) -> None:
        """Begin an operation, or let it wait for its turn. Engine thread."""
        self.mesh.engine.busy += 1
        self._active.add(operation)
        if self.error is not None:
            operation.interrupt(self.error)
        elif limited and (self._queued or len(self._limited) >= ACTIVE_MAX):
            self._queued.append(operation)
        else:
            self._begin(operation, limited)

    def _begin(self, operation: Operation, limited: bool) -> None:
        if limited:
            self._limited[operation] = None
        operation.begun = True
        operation.start()

    def _ended(self, operation: Operation) -> None:
        self.mesh.engine.busy -= 1
        self._active.discard(operation)

    def _ended_limited(self, operation: Operation) -> None:
        self._ended(operation)
        if operation.begun:
            del self._limited[operation]
            self.mesh.operation_ended()
            if self._queued:
                self.mesh.engine.soon(self._begin_next)

    def _begin_next(self) -> None:
        while self._queued and len(self._limited) < ACTIVE_MAX:
            operation = self._queued.popleft()
            if not operation.finished:
                self._begin(operation, True)

    # Arguments -------------------------------------------------------------------------------------------------------

    def _choose(self, nbytes: int) -> Method:
        return selection.choose(nbytes, self.layout, self.mesh.options)

    def _check_rank(self, rank: int) -> None:
        if not 0 <= rank < self.size:
            raise ValueError(f"rank {rank} is not in a group of {self.size}")

    def _check_other(self, rank: int, tag: int) -> None:
        self._check_rank(rank)
        if rank == self.rank:
            raise ValueError("a member cannot send to itself")
        if not 0 <= tag <= TAG_MAX:
            raise ValueError(f"tag {tag} is outside 0..{TAG_MAX}")

    def _parts(self, data: Tensor, counts: Sequence[int] | None, what: str) -> list[Tensor]:
        if counts is None or not len(counts):
            if data.numel() % self.size:
                raise ValueError(f"{data.numel()} elements cannot be shared among {self.size} members; give {what}")
            counts = [data.numel() // self.size] * self.size
        if len(counts) != self.size or sum(counts) != data.numel() or min(counts) < 0:
            raise ValueError(f"{what} must name {self.size} counts that add up to {data.numel()}")
        return list(torch.split(data, list(counts)))


def _then(algorithm: Algorithm, unpack: Callable[[], None]) -> Algorithm:
    yield from algorithm
    unpack()


def _nothing() -> None:
    return


def _expect(right: bool, what: str, elements: int, tensor: Tensor) -> None:
    if not right:
        raise ValueError(f"{what} must have {elements} elements, not {tensor.numel()}")


def _expect_type(output: Tensor, input: Tensor) -> None:
    if output.dtype != input.dtype:
        raise ValueError(f"output is {output.dtype}, input {input.dtype}")
