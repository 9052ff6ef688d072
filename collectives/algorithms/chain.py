"""Large broadcast without shared memory: member after member, chunk by chunk, beginning at the root.

The root sends each byte once, whatever the number of members; a member passes a chunk on while the next one arrives.
"""

from torch import Tensor

from elastic_run.collectives.algorithms.chunks import AHEAD, Chunks, Saved
from elastic_run.collectives.channel import Channel
from elastic_run.collectives.operation import Algorithm
from elastic_run.collectives.pending import Pending


def broadcast(io: Channel, data: Tensor, root: int) -> Algorithm:
    """Copy the root's `data` to every member; an interruption leaves the others' as they were."""
    places = Chunks([slice(0, data.numel())], data.element_size())[0]
    previous, following = (io.rank - 1) % io.size, (io.rank + 1) % io.size
    sends: list[Pending] = []
    if io.rank == root:
        yield [io.send(following, number, data[place]) for number, place in enumerate(places)]
        return
    saved = Saved(data, io.scratch(data.numel(), data.dtype))
    try:
        arrivals = [io.receive(previous, number, saved.save(place)) for number, place in enumerate(places[:AHEAD])]
        for number, place in enumerate(places):
            yield [arrivals[number]]
            if following != root:
                sends.append(io.send(following, number, data[place]))
            if number + AHEAD < len(places):
                arrivals.append(io.receive(previous, number + AHEAD, saved.save(places[number + AHEAD])))
        yield sends
    except BaseException:
        saved.restore()
        raise
