"""Large messages round a ring in the order of the group: each share is reduced on one round and spread on another.

Every member sends to the next one only, (W-1)/W of the value in each phase: what fits when all members share one path.
Partial results travel in the accumulator's type, so that 16-bit floats are rounded once; that makes the first phase
twice as long for them, which is why selection.py takes pairwise there. A share is reduced beginning with the member
after its last owner: another order than pairwise has, but one order, so results are bit-equal on all members.
Source: Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations" (2009); chunked, so
that a chunk is reduced and passed on while the next arrives.
"""

from torch import Tensor

from elastic_run.collectives.algorithms import exchange
from elastic_run.collectives.algorithms.chunks import AHEAD, Chunks, Saved, shares_of
from elastic_run.collectives.channel import Channel
from elastic_run.collectives.operation import Algorithm
from elastic_run.collectives.pending import Pending
from elastic_run.collectives.reduction import Reduction, accumulator_dtype, combine, finish


def all_reduce(io: Channel, data: Tensor, reduction: Reduction) -> Algorithm:
    """Reduce `data` (one-dimensional, contiguous) over all members, in place."""
    if io.size == 1:
        yield from exchange.all_reduce(io, data, reduction)
        return
    saved = Saved(data, io.scratch(data.numel(), data.dtype))
    try:
        yield from _Round(io, data, reduction, saved).run()
    except BaseException:
        saved.restore()
        raise


class _Round:
    """One member's part: a list of receives in the order in which the previous member sends."""

    def __init__(self, io: Channel, data: Tensor, reduction: Reduction, saved: Saved) -> None:
        self._io = io
        self._data = data
        self._reduction = reduction
        self._saved = saved
        self._chunks = Chunks(shares_of(data.numel(), data.element_size(), io.size), data.element_size())
        self._reducing = (io.size - 1) * self._chunks.count
        """Receives of the first phase; as many follow in the second."""
        self._next = (io.rank + 1) % io.size
        self._previous = (io.rank - 1) % io.size
        self._wide = accumulator_dtype(data.dtype, reduction)
        self._widened = self._wide is not data.dtype
        # A share of partial results may be on their way: with room for fewer, all could wait for each other to ask.
        self._depth = min(AHEAD + self._chunks.count, self._reducing)
        self._partials = io.scratch(self._depth * self._chunks.longest, self._wide).view(self._depth, -1)
        self._values = io.scratch(AHEAD * self._chunks.longest, data.dtype).view(AHEAD, -1) if self._widened else None
        """Where members' own values arrive that have another type than partial results."""
        self._passed_on: list[Pending | None] = [None] * self._depth  # sends that still read from `_partials`
        self._sends: list[Pending] = []

    def run(self) -> Algorithm:
        count, total = self._chunks.count, 2 * self._reducing
        for chunk, place in enumerate(self._chunks[self._io.rank]):
            self._send(chunk, self._data[place])
        arrivals = [self._receive(number) for number in range(min(AHEAD, total))]
        for number in range(total):
            arrived = arrivals[number][1]
            yield [arrivals[number][0]]
            if number < self._reducing - count:
                self._pass_on(number, arrived)
            elif number < self._reducing:
                self._complete(number, arrived)
            elif number < total - count:
                self._send(number + count, arrived)
            coming = number + AHEAD
            if coming < total:
                reader = self._passed_on[coming % self._depth] if coming < self._reducing else None
                if reader is not None:
                    yield [reader]
                arrivals.append(self._receive(coming))
        yield self._sends

    def _place(self, number: int) -> slice:
        """Return what the receive of that number is about."""
        step, chunk = divmod(number, self._chunks.count)
        share: int = (self._io.rank - step - 1) % self._io.size
        place: slice = self._chunks[share][chunk]
        return place

    def _receive(self, number: int) -> tuple[Pending, Tensor]:
        place = self._place(number)
        if number >= self._reducing:
            # What comes back here went out from here first: nothing that is still to be sent is overwritten.
            target = self._saved.save(place)
        elif self._values is not None and number < self._chunks.count:
            target = self._values[number % AHEAD][: place.stop - place.start]
        else:
            target = self._partials[number % self._depth][: place.stop - place.start]
        return self._io.receive(self._previous, number, target), target

    def _pass_on(self, number: int, arrived: Tensor) -> None:
        mine = self._data[self._place(number)]
        partial = self._partials[number % self._depth][: len(mine)]
        combine(partial, arrived, mine, self._reduction)
        self._passed_on[number % self._depth] = self._send(number + self._chunks.count, partial)

    def _complete(self, number: int, arrived: Tensor) -> None:
        result = self._saved.save(self._place(number))
        total = self._partials[number % self._depth][: len(result)] if self._widened else result
        combine(total, arrived, result, self._reduction)
        finish(result, total, self._reduction, self._io.size)
        self._send(number + self._chunks.count, result)

    def _send(self, number: int, tensor: Tensor) -> Pending:
        send = self._io.send(self._next, number, tensor)
        self._sends.append(send)
        return send
