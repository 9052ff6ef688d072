"""Members without shared memory, with compiled kernels: pairwise, as byte streams that need no frames.

As pairwise.py, every member owns a share, gets it from all, reduces it and sends it to all; but the pieces are small
enough to stay in cache from the kernel's copy to the sum, and C drives them (pipes.c). Members meet by message: each
says on which pipe its bytes will come, or that it cannot; then all see it, and go another way.
Invariants (tests/integration/test_piped.py): 1. the bits are those of pairwise.py; 2. interrupted, what was overwritten
is put back, and no byte under way is read by a later operation.
Not here: the pipes (pipes.py); when this is taken (selection.py).
"""

from collections.abc import Generator, Sequence
from types import ModuleType

import torch
from torch import Tensor

from elastic_run.collectives import native
from elastic_run.collectives.algorithms import exchange, pairwise, ring
from elastic_run.collectives.algorithms.flows import DONE, Flow, in_turn, run
from elastic_run.collectives.channel import Channel
from elastic_run.collectives.errors import CollectiveAborted
from elastic_run.collectives.operation import Algorithm
from elastic_run.collectives.pending import Pending
from elastic_run.collectives.pipes import PipeIn, PipeOut
from elastic_run.collectives.recording import Moved
from elastic_run.collectives.reduction import Reduction, accumulator_dtype
from elastic_run.collectives.selection import Method, choose_all_reduce

MEET = 0  # slot
CANNOT, UNSURE = 0, -1  # said in place of a pipe's number
PIECE_BYTES = 64 << 10
"""Lower: more system calls; higher: less stays in cache."""
WINDOW = 2
"""Pieces that a result may be late. Lower: members wait for each other; higher: less stays in cache."""
BROKEN = 2  # as in pipes.c
EXPLANATION_S = 0.05
"""When a pipe breaks, for somebody to say why. Longer: the operation ends later; shorter: the wrong one is blamed."""
_OTHERWISE = {Method.EXCHANGE: exchange.all_reduce, Method.RING: ring.all_reduce, Method.PAIRWISE: pairwise.all_reduce}


def all_reduce(io: Channel, data: Tensor, reduction: Reduction) -> Algorithm:
    """Reduce `data` (one-dimensional, contiguous, of a type that the kernels know) over all members, in place."""
    divisor = io.size if reduction is Reduction.AVG else 1
    if (yield from reduced(io, data, data, in_turn(io.size), divisor)):
        return
    io.other_slots()
    widened = accumulator_dtype(data.dtype, reduction) is not data.dtype
    method = choose_all_reduce(
        data.numel() * data.element_size(), io.layout, io.options, widened=widened, streamable=False
    )
    yield from _OTHERWISE.get(method, pairwise.all_reduce)(io, data, reduction)


def reduced(
    io: Channel, source: Tensor, target: Tensor, steps: bytes, divisor: int
) -> Generator[Sequence[Pending], None, bool]:
    """Reduce everybody's `source`, along the steps, into `target`; False: somebody cannot, and nothing was done.

    As `streamed.Room.reduce`.
    """
    io.queue_to_stream()
    kernels = native.kernels
    with _Lines(io) as lines:
        numbers = yield from lines.meet()
        if kernels is None or not numbers:
            io.leave_queue()
            lines.whole = True
            return False
        yield [io.turn_to_stream(lambda _rank: True), *lines.opening(numbers)]
        broken = lines.take(numbers)
        if broken is not None:
            yield from _torn(io, broken, lines.outs[broken].failure or "its pipe was closed")
        flow = PipeFlow(io, kernels, lines.outs, lines.ins)
        flow.begin(source, target, steps, divisor)
        io.stream_on(flow.unfinished)
        try:
            yield from run(io, flow)
            if flow.broken is not None:
                yield from _torn(io, flow.broken, "its pipe broke")
        except BaseException:
            flow.restore()
            raise
        lines.whole = True
    return True


def _torn(io: Channel, rank: int, reason: str) -> Algorithm:
    """Blame a member, unless somebody knows better."""
    yield [io.moment(rank, EXPLANATION_S)]
    raise CollectiveAborted(reason, io.members[rank])


class _Lines:
    """The pipes of one operation: given back at its end, or closed when something may be under way on them."""

    def __init__(self, io: Channel) -> None:
        self.outs: dict[int, PipeOut] = {}
        self.ins: dict[int, PipeIn] = {}
        self.whole = False
        self._io = io
        self._awaited: list[Pending] = []
        self._arriving: dict[int, tuple[int, Pending]] = {}

    def __enter__(self) -> "_Lines":
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self.outs.values():
            pipe.users -= 1
            if self._give_up in pipe.on_failure:
                pipe.on_failure.remove(self._give_up)
            if not self.whole:
                pipe.close()
        for arrived in self.ins.values():
            arrived.users -= 1
            if arrived.ended or not self.whole:
                arrived.close()
        for rank, (number, pending) in self._arriving.items():
            self._io.pipes_of(rank).forget(number, pending)

    def meet(self) -> Generator[Sequence[Pending], None, dict[int, int]]:
        """Tell everybody on which pipe this member's bytes come; return the same of the others; nothing if one cannot.

        Where somebody does not know the way yet, it is known after that, and all say it again.
        """
        io = self._io
        for last in (False, True):
            said = dict.fromkeys(io.others, CANNOT) if native.kernels is None else self._dial(last)
            heard = torch.empty(io.size, dtype=torch.int64)
            for rank in io.others:
                io.send(rank, MEET, torch.tensor([said[rank]]))
            yield [io.receive(rank, MEET, heard[rank : rank + 1]) for rank in io.others]
            numbers = {rank: int(heard[rank]) for rank in io.others}
            if UNSURE not in (*said.values(), *numbers.values()):
                break
            io.other_slots()
        return numbers if CANNOT not in (*said.values(), *numbers.values()) else {}

    def _dial(self, last: bool) -> dict[int, int]:
        """Return what to say to each: a number, or why there is none."""
        io = self._io
        far = [io.far(rank) for rank in io.others]
        if any(far):
            return dict.fromkeys(io.others, CANNOT)
        if None in far and not last:
            return dict.fromkeys(io.others, UNSURE)
        for rank in io.others:
            pipe = self.outs.get(rank) or io.pipe_to(rank)
            if pipe is None:
                return dict.fromkeys(io.others, CANNOT)
            self.outs[rank] = pipe
        return {rank: pipe.number for rank, pipe in self.outs.items()}

    def opening(self, numbers: dict[int, int]) -> list[Pending]:
        """Return what is done when all pipes are there, or one is known not to come."""
        pipes_of = self._io.pipes_of
        self._arriving = {rank: (number, pipes_of(rank).arrival(number)) for rank, number in numbers.items()}
        self._awaited = [pending for _, pending in self._arriving.values()]
        self._awaited += [pipe.opening() for pipe in self.outs.values()]
        for pipe in self.outs.values():
            pipe.on_failure.append(self._give_up)
        if any(pipe.failure is not None for pipe in self.outs.values()):  # while the members met
            self._give_up()
        return self._awaited

    def take(self, numbers: dict[int, int]) -> int | None:
        """Take the pipes from all others; else return whose pipe is the reason why it cannot be done."""
        broken = next((rank for rank in numbers if self.outs[rank].failure is not None), None)
        if broken is not None:
            return broken  # one that has not arrived may still be on its way
        for rank, number in numbers.items():
            found = self._io.pipes_of(rank).find(number)
            if found is None:
                return rank
            found.users += 1
            self.ins[rank] = found
        return None

    def _give_up(self) -> None:
        for pending in self._awaited:
            pending.finish()


class PipeFlow(Flow):
    """A pump through pipes to and from all others."""

    def __init__(self, io: Channel, kernels: ModuleType, outs: dict[int, PipeOut], ins: dict[int, PipeIn]) -> None:
        super().__init__(io)
        self._kernels = kernels
        self._outs = outs
        self._ins = ins
        self._pump: object = None
        self.broken: int | None = None
        """The member whose pipe broke."""

    def begin(self, source: Tensor, target: Tensor, steps: bytes, divisor: int) -> None:
        io = self.io
        nbytes = source.numel() * source.element_size()
        undo = io.scratch(nbytes, torch.uint8) if source.data_ptr() == target.data_ptr() else None
        arrived = io.scratch(io.size * (WINDOW + 1) * PIECE_BYTES, torch.uint8)
        self._pump = self._kernels.pump(
            io.rank,
            tuple((-1, -1) if rank == io.rank else self._fds(rank) for rank in range(io.size)),
            source.data_ptr(),
            target.data_ptr(),
            0 if undo is None else undo.data_ptr(),
            nbytes,
            native.TYPES[source.dtype],
            PIECE_BYTES,
            WINDOW,
            arrived.data_ptr(),
            arrived.numel(),
            steps,
            float(divisor),
        )

    def advance(self, fd: int, limit_ns: int) -> int:
        for rank in self.io.others:
            out_over, in_over = self._progress(rank)[4:]
            # A descriptor that was closed may be another file's by now.
            if (self._outs[rank].fd is None and not out_over) or (self._ins[rank].fd is None and not in_over):
                self.broken = rank
                return DONE
        state, rank = self._kernels.pump_advance(self._pump, fd, limit_ns)
        self.awaited = rank
        if state == BROKEN:
            self.broken = rank
            return DONE
        return int(state)

    def unfinished(self, rank: int) -> bool:
        """A goodbye may overtake what is still on the pipe: only the pipe's own end tells that it is not all there."""
        return False

    def moved(self, rank: int) -> Moved:
        sent, received, send_blocked_ns, receive_blocked_ns, _, _ = self._progress(rank)
        return Moved(sent, received, send_blocked_ns, receive_blocked_ns)

    def restore(self) -> None:
        self._kernels.pump_restore(self._pump)

    def _progress(self, rank: int) -> tuple[int, int, int, int, int, int]:
        progress: tuple[int, int, int, int, int, int] = self._kernels.pump_progress(self._pump, rank)
        return progress

    def _fds(self, rank: int) -> tuple[int, int]:
        out, arrived = self._outs[rank].fd, self._ins[rank].fd
        assert out is not None, "looked at just now"
        assert arrived is not None, "looked at just now"
        return arrived, out
