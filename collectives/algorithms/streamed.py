"""All members on one host, with compiled kernels: chunk by chunk through a little shared memory that stays in cache.

Members meet by message (each shows its region), then stage, reduce and take chunks as control words in shared memory
allow (stream.c). The engine looks at its connections between slices of that, so a lost peer or a pushed view interrupts
it as it does every operation. Where one member has no kernels, all see it when they meet, and go another way.
Invariants (tests/integration/test_streamed.py): 1. the bits are those of the other algorithms; 2. interrupted, what was
overwritten is put back; 3. streams of a group run in the order of its operations, one at a time.
Not here: the pipeline itself (stream.c); when it is taken (selection.py).
"""

import struct
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from elastic_run.collectives import native
from elastic_run.collectives.algorithms import pairwise, shared
from elastic_run.collectives.arena import Region
from elastic_run.collectives.channel import Channel
from elastic_run.collectives.errors import CollectiveAborted
from elastic_run.collectives.exact import Step
from elastic_run.collectives.messages import Fetch
from elastic_run.collectives.operation import Algorithm
from elastic_run.collectives.pending import Pending
from elastic_run.collectives.reduction import Reduction

MET = 2  # slot; the other algorithms, when this one cannot be taken, begin at 0
SLOTS = 4
"""Chunks a member may be ahead. Fewer: members wait for each other; more: less stays in the caches."""
CHUNK_BYTES_MIN, CHUNK_BYTES_MAX = 64 << 10, 256 << 10
SHARE_BYTES_MIN = 16 << 10
"""With many members chunks are larger, so that a member's share of one is worth the counting."""
SLICE_NS, ALONE_NS = 1_000_000, 20_000_000
"""How long a stream goes on before the engine has a turn, if nothing happens on a connection: while other groups
stream, and while none does. Lower: more turns per operation; higher: other streams, or timers, wait longer."""
ALIGN_BYTES = 64
CONTROL_BYTES = 128  # as in stream.c
DONE, PAUSED, STALE = range(3)  # as in stream.c


def all_reduce(io: Channel, data: Tensor, reduction: Reduction) -> Algorithm:
    """Reduce `data` (one-dimensional, contiguous, of a type that the kernels know) over all members, in place."""
    nbytes = data.numel() * data.element_size()
    room = yield from meet(io, nbytes, MET)
    if room.able:
        divisor = io.size if reduction is Reduction.AVG else 1
        yield from room.reduce(data, data, _in_turn(io.size), divisor)
        return
    room.leave()
    if nbytes <= io.options.arena_bytes // 4:
        yield from shared.all_reduce(io, data, reduction)
    else:
        yield from pairwise.all_reduce(io, data, reduction)


def meet(io: Channel, nbytes: int, slot: int, said: Tensor | None = None) -> Generator[Sequence[Pending], None, "Room"]:
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
        io.publish(rank, slot, region, counted=False)
    fetches = {rank: io.fetch(rank, slot, size, counted=False) for rank in io.others}
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
        flow = Flow(io, kernels, stream)
        yield [io.turn_to_stream(flow.unfinished)]
        try:
            yield from flow.run()
            for rank, fetch in self.fetches.items():
                io.give_back(rank, fetch)
        except BaseException:
            kernels.restore(stream)
            raise

    def _generation(self, rank: int) -> int:
        if rank == self.io.rank:
            return self.region.generation
        region = self.fetches[rank].region
        assert region is not None
        return region.generation


class Flow:
    """A stream under way."""

    def __init__(self, io: Channel, kernels: ModuleType, stream: object) -> None:
        self._io = io
        self._kernels = kernels
        self._stream = stream
        self._told = dict.fromkeys(io.others, (0, 0))  # bytes, nanoseconds

    def run(self) -> Algorithm:
        while True:
            state = self._kernels.advance(self._stream, *self._io.watched(SLICE_NS, ALONE_NS))
            self._tell()
            if state == DONE:
                return
            if state == STALE:
                raise CollectiveAborted(
                    "shared memory was taken back while it was read: this worker stood still", self._io.me
                )
            yield [self._io.next_turn(self._kernels.progress(self._stream, self._io.rank)[4])]

    def unfinished(self, rank: int) -> bool:
        """Say whether something of that member is still to come."""
        return not self._kernels.progress(self._stream, rank)[3]

    def _tell(self) -> None:
        """Say to the telemetry what went to and fro, and for whom this member slept."""
        if not self._io.recorded:
            return
        for rank, told in self._told.items():
            staged, taken, waited_ns, _, _ = self._kernels.progress(self._stream, rank)
            moved = (staged + taken) // self._io.size
            self._io.note_flow(rank, moved - told[0], waited_ns - told[1])
            self._told[rank] = moved, waited_ns


@lru_cache(maxsize=64)
def _in_turn(size: int) -> bytes:
    """Return the steps that add the parts in the order of their ranks."""
    return packed((Step(0, 0, 1), *(Step(0, ~0, part) for part in range(2, size))))


@lru_cache(maxsize=64)
def packed(steps: tuple[Step, ...], ranks: tuple[int, ...] = ()) -> bytes:
    """Return steps as the kernels read them; `ranks`: whose part each is, where it is not the rank's of its number."""
    halves = (tuple(ranks[half] if ranks and half >= 0 else half for half in (step.left, step.right)) for step in steps)
    return b"".join(struct.pack("=3i", step.out, *pair) for step, pair in zip(steps, halves, strict=True))
