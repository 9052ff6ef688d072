"""All members on one host, with compiled kernels: chunk by chunk through a little shared memory that stays in cache.

Members meet by message (each shows its region), then stage, reduce and take chunks as control words in shared memory
allow (stream.c). The engine looks at its connections between slices of that, so a lost peer or a pushed view interrupts
it as it does every operation. Where one member has no kernels, all see it when they meet, and go another way.
Invariants (tests/integration/test_streamed.py): 1. the bits are those of the other algorithms; 2. interrupted, what was
overwritten is put back; 3. streams of a group run in the order of its operations, one at a time.
Not here: the pipeline itself (stream.c); when it is taken (selection.py).
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from elastic_run.collectives import native
from elastic_run.collectives.algorithms import pairwise, shared
from elastic_run.collectives.algorithms.flows import Flow, in_turn, run
from elastic_run.collectives.arena import Region
from elastic_run.collectives.channel import Channel
from elastic_run.collectives.errors import CollectiveAborted
from elastic_run.collectives.messages import Fetch
from elastic_run.collectives.operation import Algorithm
from elastic_run.collectives.pending import Pending
from elastic_run.collectives.recording import Moved
from elastic_run.collectives.reduction import Reduction

MET = 0  # slot: where every operation begins, so that members who mean different ones see it
SLOTS = 4
"""Chunks a member may be ahead. Fewer: members wait for each other; more: less stays in the caches."""
CHUNK_BYTES_MIN, CHUNK_BYTES_MAX = 64 << 10, 256 << 10
SHARE_BYTES_MIN = 16 << 10
"""With many members chunks are larger, so that a member's share of one is worth the counting."""
ALIGN_BYTES = 64
CONTROL_BYTES = 128  # as in stream.c
STALE = 2  # as in stream.c


def all_reduce(io: Channel, data: Tensor, reduction: Reduction) -> Algorithm:
    """Reduce `data` (one-dimensional, contiguous, of a type that the kernels know) over all members, in place."""
    nbytes = data.numel() * data.element_size()
    room = yield from meet(io, nbytes)
    if room.able:
        divisor = io.size if reduction is Reduction.AVG else 1
        yield from room.reduce(data, data, in_turn(io.size), divisor)
        return
    room.leave()
    io.other_slots()
    if nbytes <= io.options.arena_bytes // 4:
        yield from shared.all_reduce(io, data, reduction)
    else:
        yield from pairwise.all_reduce(io, data, reduction)


def meet(io: Channel, nbytes: int, said: Tensor | None = None) -> Generator[Sequence[Pending], None, "Room"]:
    """Show everybody a region for a stream of `nbytes`, with the bytes that are `said`; return once all are there."""
    header = -(-len(said) // ALIGN_BYTES) * ALIGN_BYTES if said is not None else 0
    chunk = min(CHUNK_BYTES_MAX, max(CHUNK_BYTES_MIN, nbytes // SLOTS))
    chunk = -(-max(chunk, SHARE_BYTES_MIN * io.size) // ALIGN_BYTES) * ALIGN_BYTES
    share = (chunk // io.size // ALIGN_BYTES + 2) * ALIGN_BYTES
    size = CONTROL_BYTES + header + SLOTS * (chunk + share)
    io.queue_to_stream()
    region = yield from io.allocate(size)
    if native.kernels is not None:
        native.kernels.prepare(region.tensor.data_ptr())
    else:
        region.tensor[:CONTROL_BYTES].zero_()
    if said is not None:
        region.tensor[CONTROL_BYTES : CONTROL_BYTES + len(said)].copy_(said)
    for rank in io.others:
        io.publish(rank, MET, region, counted=False)
    fetches = {rank: io.fetch(rank, MET, size, counted=False) for rank in io.others}
    yield list(fetches.values())
    memories = {rank: io.view(rank, fetch) for rank, fetch in fetches.items()} | {io.rank: region.tensor}
    return Room(io, region, fetches, memories, chunk, header)


@dataclass(frozen=True, slots=True, eq=False)
class Room:
    """Everybody's regions, this member's among them."""

    io: Channel
    region: Region
    fetches: dict[int, Fetch]
    memories: dict[int, Tensor]
    chunk: int
    header: int

    @property
    def able(self) -> bool:
        """Whether all have the kernels: everybody sees the same."""
        kernels = native.kernels
        return kernels is not None and all(kernels.able(memory.data_ptr()) for memory in self.memories.values())

    def said(self, nbytes: int) -> list[Tensor]:
        """Return what everybody said, by rank."""
        return [self.memories[rank][CONTROL_BYTES : CONTROL_BYTES + nbytes] for rank in range(self.io.size)]

    def leave(self) -> None:
        """Nothing is streamed."""
        self.io.leave_queue()
        for rank, fetch in self.fetches.items():
            self.io.give_back(rank, fetch)
        self.io.release(self.region)

    def reduce(self, source: Tensor, target: Tensor, steps: bytes, divisor: int) -> Algorithm:
        """Reduce everybody's `source`, along the steps, into `target`, which is the same memory or overlaps none of it.

        One-dimensional, contiguous, of one length and of one type that the kernels know.
        """
        io, kernels = self.io, native.kernels
        assert kernels is not None
        nbytes = source.numel() * source.element_size()
        undo = io.scratch(nbytes, torch.uint8) if source.data_ptr() == target.data_ptr() else None
        stream = kernels.stream(
            io.rank,
            tuple((self.memories[rank].data_ptr(), self._generation(rank)) for rank in range(io.size)),
            source.data_ptr(),
            target.data_ptr(),
            0 if undo is None else undo.data_ptr(),
            nbytes,
            native.TYPES[source.dtype],
            self.chunk,
            SLOTS,
            self.header,
            steps,
            float(divisor),
        )
        flow = MemoryFlow(kernels, stream, io)
        yield [io.turn_to_stream(flow.unfinished)]
        try:
            yield from run(io, flow)
            for rank, fetch in self.fetches.items():
                io.give_back(rank, fetch)
        except BaseException:
            flow.restore()
            raise

    def _generation(self, rank: int) -> int:
        if rank == self.io.rank:
            return self.region.generation
        region = self.fetches[rank].region
        assert region is not None
        return region.generation


class MemoryFlow(Flow):
    """A stream through everybody's regions."""

    def __init__(self, kernels: ModuleType, stream: object, io: Channel) -> None:
        super().__init__(io)
        self._kernels = kernels
        self._stream = stream

    def advance(self, fd: int, limit_ns: int) -> int:
        state: int = self._kernels.advance(self._stream, fd, limit_ns)
        if state == STALE:
            raise CollectiveAborted(
                "shared memory was taken back while it was read: this worker stood still", self.io.me
            )
        self.awaited = self._kernels.progress(self._stream, self.io.rank)[4]
        return state

    def unfinished(self, rank: int) -> bool:
        return not self._kernels.progress(self._stream, rank)[3]

    def moved(self, rank: int) -> Moved:
        staged, taken, waited_ns, _, _ = self._kernels.progress(self._stream, rank)
        nbytes = (staged + taken) // self.io.size
        return Moved(nbytes, nbytes, 0, waited_ns)

    def restore(self) -> None:
        self._kernels.restore(self._stream)
