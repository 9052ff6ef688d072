"""Every operation against gloo's, among five to eight members: random types, lengths, layouts of memory and of hosts.

What gloo gives is compared bit by bit on small whole numbers, whose sums are exact in every order and type, and within
the error of any order on numbers far apart; those have besides the bits of a plain sum in the order of the ranks.
"""

import itertools
import random
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from mesh_workers import WAIT_S, Crew, Site, WorkerFailed
from torch import Tensor

from elastic_run.collectives import native
from elastic_run.collectives.algorithms import piped, streamed
from elastic_run.collectives.dyadic import BlockAccumulator
from elastic_run.collectives.group import Group
from elastic_run.collectives.memory import bytes_of
from elastic_run.collectives.operation import Operation
from elastic_run.collectives.options import MeshOptions
from elastic_run.collectives.reduction import Reduction, accumulate, accumulator_dtype, finish
from elastic_run.collectives.selection import Method, choose_all_reduce

SIZES = (5, 6, 7, 8)
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.int32, torch.int64, torch.int8, torch.uint8)
OPERATORS = {
    Reduction.SUM: dist.ReduceOp.SUM,
    Reduction.AVG: dist.ReduceOp.SUM,  # gloo has no average: divided here
    Reduction.MIN: dist.ReduceOp.MIN,
    Reduction.MAX: dist.ReduceOp.MAX,
    Reduction.PRODUCT: dist.ReduceOp.PRODUCT,
}
WAYS = {
    "shared memory": (Method.STREAMED, Method.SHARED, Method.SHARED_ONCE, Method.PAIRWISE, Method.EXCHANGE),
    "tcp": (Method.PIPED, Method.PAIRWISE, Method.RING, Method.EXCHANGE),
    "several hosts": (Method.HIERARCHICAL, Method.PAIRWISE, Method.RING),
}
IN_ANY_ORDER = frozenset({Method.RING, Method.HIERARCHICAL})
"""Those add in another order than that of the ranks."""
AT_ONCE = 4
OTHERS = 24
SENTINEL = 77
TABLE = 1 << 21

_generator = torch.Generator().manual_seed(8)
# Made once, before the fork: a member's values are a slice, so all know everybody's at no cost.
WHOLE = torch.randint(-2, 3, (TABLE,), generator=_generator, dtype=torch.int8)
BITS = torch.randint(-(1 << 62), 1 << 62, (TABLE,), generator=_generator)
FAR_APART = torch.randn(TABLE, generator=_generator) * 2.0 ** torch.randint(-6, 7, (TABLE,), generator=_generator)


class Laid:
    """A value somewhere in memory: at an odd place, with holes, or transposed. Operations are given `tensor`."""

    def __init__(self, value: Tensor, chance: random.Random) -> None:
        numel = value.numel()
        columns = next((count for count in chance.sample((2, 3, 5, 7), 4) if numel and numel % count == 0), 1)
        rows, start = numel // columns, chance.randrange(70)
        shape, strides = chance.choice(
            [
                ((numel,), (1,)),
                ((numel,), (1,)),
                ((numel,), (3,)),
                ((rows, columns), (1, max(rows, 1))),
                ((rows, columns), (columns + 2, 1)),
            ]
        )
        self._memory = torch.full((start + 3 * numel + 2 * rows + 9,), SENTINEL).to(value.dtype)
        self.tensor = self._memory.as_strided(shape, strides, start)
        self.tensor.copy_(value.view(shape))
        self._outside = torch.ones(len(self._memory), dtype=torch.bool)
        self._outside.as_strided(shape, strides, start).fill_(False)

    def value(self) -> Tensor:
        """Return what is there now. What lies around it must be as it was."""
        around = self._memory[self._outside]
        assert torch.equal(around, torch.full_like(around, SENTINEL)), "written beside the tensor"
        return self.tensor.clone(memory_format=torch.contiguous_format).reshape(-1)


@dataclass(slots=True)
class Trials:
    """What one member draws, the same as the others or for itself, and what it has seen."""

    group: Group
    methods: Sequence[Method]
    shared: random.Random
    own: random.Random
    used: Counter[tuple[str, Method]] = field(default_factory=Counter)
    checksums: list[int] = field(default_factory=list)

    @property
    def rank(self) -> int:
        return self.group.rank

    @property
    def size(self) -> int:
        return self.group.size

    def laid(self, value: Tensor) -> Laid:
        return Laid(value, self.own)

    def room(self, numel: int, dtype: torch.dtype) -> Laid:
        return Laid(torch.zeros(numel, dtype=dtype), self.own)

    def values(self, table: Tensor, numel: int, dtype: torch.dtype) -> list[Tensor]:
        """Return every rank's."""
        starts = [self.shared.randrange(TABLE - numel) for _ in range(self.size)]
        return [table[start : start + numel].to(dtype) for start in starts]

    def wholes(self, numel: int, dtype: torch.dtype) -> list[Tensor]:
        return self.values(WHOLE, numel, dtype)

    def numel(self) -> int:
        """Return a length of what each of the others gets."""
        return self.shared.choice([0, 1, 3, 17, 1000, 8191, 8192, 8193, 20_011, 70_003])

    def dtype(self, *more: torch.dtype) -> torch.dtype:
        return self.shared.choice((*FLOATS, *INTEGERS, *more))

    def remember(self, tensor: Tensor) -> None:
        """Every member must have this one alike."""
        self.checksums.append(zlib.crc32(bytes_of(tensor)))


Begun = tuple[Operation, Callable[[], None]]
"""An operation under way, and what compares its result with gloo's."""


def lengths(size: int) -> list[int]:
    """Return bytes around the borders: of what is streamed at all, of chunks, pieces, and everybody's share of them."""
    borders = {
        0,
        64 << 10,
        128 << 10,
        256 << 10,
        512 << 10,
        streamed.SLOTS * streamed.CHUNK_BYTES_MAX,
        streamed.CHUNK_BYTES_MAX * 3,
        size * piped.PIECE_BYTES,
        size * piped.PIECE_BYTES * (piped.WINDOW + 1),
    }
    return sorted(borders)


def all_reduce(trials: Trials, nbytes: int, delta: int) -> Begun:
    """One operation on `nbytes` and `delta` elements, in one to four tensors."""
    shared, group = trials.shared, trials.group
    reduction = shared.choice([Reduction.SUM, Reduction.SUM, Reduction.SUM, Reduction.AVG, *OPERATORS])
    kind = shared.choice(["whole", "spread"])
    common = reduction in (Reduction.SUM, Reduction.AVG)
    choices = sorted(native.TYPES, key=str) if common and shared.random() < 0.8 else [*FLOATS, *INTEGERS]
    dtype = shared.choice([dtype for dtype in choices if reduction is not Reduction.AVG or dtype.is_floating_point])
    numel = nbytes // dtype.itemsize + delta if nbytes else 0
    whole = kind == "whole" or reduction is Reduction.PRODUCT
    table = WHOLE if whole else FAR_APART if dtype.is_floating_point else BITS
    values = trials.values(table, numel, dtype)
    cuts = sorted(shared.choices(range(numel + 1), k=shared.choice([0, 0, 0, 1, 3])))
    bounds = list(itertools.pairwise([0, *cuts, numel]))
    laid = [trials.laid(values[trials.rank][start:stop]) for start, stop in bounds]
    streamable = native.streamable(dtype, reduction)
    named = [way for way in trials.methods if streamable or way not in (Method.STREAMED, Method.PIPED)]
    method = shared.choice(named) if numel and shared.random() < 0.4 else None
    operation = group.all_reduce([one.tensor for one in laid], reduction, method=method, sync=trials.own.random() < 0.3)
    widened = accumulator_dtype(dtype, reduction) is not dtype
    taken = method or choose_all_reduce(
        numel * dtype.itemsize, group.layout, group.mesh.options, widened=widened, streamable=streamable
    )
    trials.used["named" if method else "chosen", taken] += 1
    judge = shared.randrange(trials.size)

    def check() -> None:
        story = (taken, dtype, numel, reduction, kind, len(laid))
        ours = torch.cat([one.value() for one in laid])
        trials.remember(ours)
        theirs = values[trials.rank].clone()
        dist.all_reduce(theirs, OPERATORS[reduction])
        if trials.rank != judge:
            return  # the bits are those that the judge has
        if taken not in IN_ANY_ORDER or not dtype.is_floating_point:
            assert same(ours, in_order(values, reduction)), story
        if reduction is Reduction.AVG:
            theirs = (theirs.to(accumulator_dtype(dtype, reduction)) / trials.size).to(dtype)
        if whole or not dtype.is_floating_point or reduction in (Reduction.MIN, Reduction.MAX):
            assert torch.equal(ours, theirs), story
        else:
            bound = sum(value.double().abs() for value in values) * trials.size * torch.finfo(dtype).eps
            assert bool(((ours.double() - theirs.double()).abs() <= bound).all()), story

    return operation, check


def in_order(values: Sequence[Tensor], reduction: Reduction) -> Tensor:
    total = values[0].to(accumulator_dtype(values[0].dtype, reduction), copy=True)
    for value in values[1:]:
        accumulate(total, value, reduction)
    result = torch.empty_like(values[0])
    finish(result, total, reduction, len(values))
    return result


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype is other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def all_reduce_exact(trials: Trials) -> Begun:
    """Logical ranks anywhere: what gloo is given is each member's sum of its own."""
    world, numel, dtype = trials.shared.choice([trials.size, 8, 11, 16]), trials.numel(), trials.shared.choice(FLOATS)
    places = [rank % trials.size for rank in range(world)]
    if trials.shared.random() < 0.5:
        places = [trials.shared.randrange(trials.size) for _ in range(world)]
    mine = BlockAccumulator(world, dtype, Reduction.SUM)
    theirs = torch.zeros(numel, dtype=dtype)
    for rank, place in enumerate(places):
        (value, *_) = trials.wholes(numel, dtype)
        if place == trials.rank:
            mine.add(rank, value.clone())
            theirs += value
    output = trials.room(numel, dtype)
    operation = trials.group.all_reduce_exact(output.tensor, mine.blocks(), world)

    def check() -> None:
        dist.all_reduce(theirs)
        assert torch.equal(output.value(), theirs), (world, places, numel, dtype)
        trials.remember(output.value())

    return operation, check


def broadcast(trials: Trials) -> Begun:
    dtype, root = trials.dtype(torch.bool), trials.shared.randrange(trials.size)
    values = trials.wholes(trials.numel(), dtype)
    cut = trials.shared.randrange(len(values[0]) + 1)
    laid = [trials.laid(part) for part in (values[trials.rank][:cut], values[trials.rank][cut:])]
    operation = trials.group.broadcast([one.tensor for one in laid], root)

    def check() -> None:
        theirs = values[trials.rank].clone()
        dist.broadcast(theirs, root)
        assert same(torch.cat([one.value() for one in laid]), theirs)

    return operation, check


def reduce(trials: Trials) -> Begun:
    dtype, root = trials.dtype(), trials.shared.randrange(trials.size)
    reduction = trials.shared.choice([Reduction.SUM, Reduction.MIN, Reduction.MAX, Reduction.PRODUCT])
    value = trials.wholes(trials.numel(), dtype)[trials.rank]
    laid = trials.laid(value)
    operation = trials.group.reduce([laid.tensor], root, reduction)

    def check() -> None:
        theirs = value.clone()
        dist.reduce(theirs, root, OPERATORS[reduction])
        assert torch.equal(laid.value(), theirs if trials.rank == root else value)

    return operation, check


def all_gather(trials: Trials) -> Begun:
    dtype, numel = trials.dtype(torch.bool), trials.numel()
    value = trials.wholes(numel, dtype)[trials.rank]
    laid, output = trials.laid(value), trials.room(trials.size * numel, dtype)
    operation = trials.group.all_gather(output.tensor, laid.tensor)

    def check() -> None:
        theirs = [torch.empty_like(value) for _ in range(trials.size)]
        dist.all_gather(theirs, value)
        assert same(output.value(), torch.cat(theirs))
        assert same(laid.value(), value)

    return operation, check


def reduce_scatter(trials: Trials) -> Begun:
    dtype, numel = trials.dtype(), trials.numel()
    reduction = trials.shared.choice([Reduction.SUM, Reduction.MIN, Reduction.MAX, Reduction.PRODUCT])
    value = trials.wholes(trials.size * numel, dtype)[trials.rank]
    laid, output = trials.laid(value), trials.room(numel, dtype)
    operation = trials.group.reduce_scatter(output.tensor, laid.tensor, reduction)

    def check() -> None:
        theirs = torch.empty(numel, dtype=dtype)
        dist.reduce_scatter(theirs, list(value.clone().view(trials.size, numel)), OPERATORS[reduction])
        assert torch.equal(output.value(), theirs), (dtype, numel, reduction)
        assert same(laid.value(), value)

    return operation, check


def all_to_all(trials: Trials) -> Begun:
    """Some send nothing to some."""
    dtype, most = trials.dtype(), trials.numel() + 1
    counts = [
        [trials.shared.choice([0, trials.shared.randrange(most)]) for _ in range(trials.size)]
        for _ in range(trials.size)
    ]
    sent, got = counts[trials.rank], [row[trials.rank] for row in counts]
    # As long a value for all: the draws must stay the same.
    value = trials.wholes(max(map(sum, counts)), dtype)[trials.rank][: sum(sent)]
    laid, output = trials.laid(value), trials.room(sum(got), dtype)
    operation = trials.group.all_to_all(output.tensor, laid.tensor, got, sent)

    def check() -> None:
        theirs = torch.empty(sum(got), dtype=dtype)
        dist.all_to_all_single(theirs, value.clone(), got, sent)
        assert same(output.value(), theirs)

    return operation, check


def gather(trials: Trials) -> Begun:
    dtype, numel, root = trials.dtype(), trials.numel(), trials.shared.randrange(trials.size)
    value = trials.wholes(numel, dtype)[trials.rank]
    output = trials.room(trials.size * numel, dtype) if trials.rank == root else None
    operation = trials.group.gather(output.tensor if output else None, trials.laid(value).tensor, root)

    def check() -> None:
        theirs = [torch.empty_like(value) for _ in range(trials.size)] if output else None
        dist.gather(value, theirs, root)
        assert output is None or same(output.value(), torch.cat(theirs or []))

    return operation, check


def scatter(trials: Trials) -> Begun:
    dtype, numel, root = trials.dtype(), trials.numel(), trials.shared.randrange(trials.size)
    value = trials.wholes(trials.size * numel, dtype)[trials.rank]
    output = trials.room(numel, dtype)
    operation = trials.group.scatter(output.tensor, trials.laid(value).tensor if trials.rank == root else None, root)

    def check() -> None:
        theirs = torch.empty(numel, dtype=dtype)
        dist.scatter(theirs, list(value.clone().view(trials.size, numel)) if trials.rank == root else None, root)
        assert same(output.value(), theirs)

    return operation, check


def send_to_a_neighbour(trials: Trials) -> Begun:
    dtype, step = trials.dtype(torch.bool), trials.shared.randrange(1, trials.size)
    value = trials.wholes(trials.numel(), dtype)[trials.rank]
    to, source = (trials.rank + step) % trials.size, (trials.rank - step) % trials.size
    output = trials.room(len(value), dtype)
    sending = trials.group.send(trials.laid(value).tensor, to, tag=step)
    operation = trials.group.receive(output.tensor, source, tag=step)

    def check() -> None:
        sending.wait(WAIT_S)
        theirs = torch.empty_like(value)
        pending = [dist.irecv(theirs, source, tag=step), dist.isend(value, to, tag=step)]
        for work in pending:
            assert work is not None
            work.wait()
        assert same(output.value(), theirs)

    return operation, check


REST: tuple[Callable[[Trials], Begun], ...] = (
    all_reduce_exact,
    broadcast,
    reduce,
    all_gather,
    reduce_scatter,
    all_to_all,
    gather,
    scatter,
    send_to_a_neighbour,
)


class Watched:
    """The kernels, counting the streams and pumps that are made."""

    def __init__(self, kernels: object, made: Counter[str]) -> None:
        self._kernels = kernels
        self._made = made

    def __getattr__(self, name: str) -> object:
        if name in ("stream", "pump"):
            self._made[name] += 1
        return getattr(self._kernels, name)


Seen = tuple[list[int], dict[str, int], dict[str, int]]
"""Checksums of what all must have alike; how often each method was taken; how many streams and pumps were made."""


def program_of(way: str, seed: int, store: Path) -> Callable[[Site], Seen]:
    """Return what each member does: all operations in one random order, a few at once."""

    def program(site: Site) -> Seen:
        size = len(site.endpoints)
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=site.rank, world_size=size, timeout=timedelta(seconds=WAIT_S)
        )
        made: Counter[str] = Counter()
        if native.kernels is not None:
            native.kernels = Watched(native.kernels, made)  # type: ignore[assignment]
        trials = Trials(
            site.install(), WAYS[way], random.Random(f"{way} {size} {seed}"), random.Random(f"{seed} {site.rank}")
        )
        planned: list[Callable[[Trials], Begun]] = [
            partial(all_reduce, nbytes=nbytes, delta=delta) for nbytes in lengths(size) for delta in (-1, 0, 1)
        ]
        planned += [REST[number % len(REST)] for number in range(OTHERS)]
        trials.shared.shuffle(planned)
        while planned:
            begun = [planned.pop()(trials) for _ in range(min(len(planned), trials.shared.randint(1, AT_ONCE)))]
            for operation, _ in trials.own.sample(begun, len(begun)):
                operation.wait(WAIT_S)
            for _, check in begun:
                check()
        trials.group.barrier().wait(WAIT_S)
        dist.barrier()
        return trials.checksums, {" ".join(key): count for key, count in trials.used.items()}, dict(made)

    return program


def hosts_of(way: str, size: int) -> list[MeshOptions]:
    if way == "several hosts":
        return [MeshOptions(host_key=f"made up host {rank % 3}") for rank in range(size)]
    return [MeshOptions(shared_memory=way == "shared memory")] * size


def seen_by_all(crew: Crew) -> list[Seen]:
    """Return what each member has seen. Raises AssertionError with what all say: one that fails takes others along."""
    seen, failures = [], []
    for rank in range(len(crew.processes)):
        try:
            seen.append(crew.result(rank))
        except WorkerFailed as failed:
            failures.append(str(failed))
    assert not failures, "\n".join(failures)
    return seen


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", [1])
def test_every_operation_gives_what_gloo_gives(way: str, size: int, seed: int, tmp_path: Path) -> None:
    with Crew(size, program_of(way, seed, tmp_path / "store"), hosts_of(way, size)) as crew:
        (checksums, used, made), *others = seen_by_all(crew)
    assert all(other[0] == checksums for other in others), "members have different results"
    assert sum(used.values()) == 3 * len(lengths(size))
    expected = {"shared memory": Method.STREAMED, "tcp": Method.PIPED, "several hosts": Method.HIERARCHICAL}[way]
    assert used[f"chosen {expected}"] >= 3, used
    if native.kernels is not None:
        assert all(other[2] == made for other in others)
        assert made.get("stream", 0) >= used.get("chosen streamed", 0) + used.get("named streamed", 0)
        assert made.get("pump", 0) >= used.get("chosen piped", 0) + used.get("named piped", 0)
