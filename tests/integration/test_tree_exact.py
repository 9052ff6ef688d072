"""The tree-exact all-reduce between real processes: the same bits for every placement, transport and form."""

import random
from collections.abc import Callable, Iterator, Sequence

import mesh_workers
import pytest
import torch
from mesh_workers import Crew, Site
from torch import Tensor

from elastic_run.collectives.algorithms import tree_exact
from elastic_run.collectives.channel import Channel
from elastic_run.collectives.dyadic import Block, BlockAccumulator, blocks_of, leaf
from elastic_run.collectives.errors import CollectiveAborted, CollectiveError, CollectiveMismatch
from elastic_run.collectives.messages import Fetch
from elastic_run.collectives.options import MIB, MeshOptions
from elastic_run.collectives.reduction import Reduction, finish

TRANSPORTS = {
    "shared memory": MeshOptions(),
    "tcp": MeshOptions(shared_memory=False),
    "too little shared memory": MeshOptions(arena_bytes=2 * MIB, stage_bytes=MIB // 8),
}
OPERATION_S = 60.0
KINDS = [
    (torch.float32, Reduction.SUM),
    (torch.bfloat16, Reduction.AVG),
    (torch.float16, Reduction.SUM),
    (torch.float64, Reduction.PRODUCT),
    (torch.bfloat16, Reduction.MAX),
    (torch.int32, Reduction.SUM),
    (torch.uint8, Reduction.BXOR),
    (torch.complex64, Reduction.AVG),
]


def rank_values(rank: int, numel: int, dtype: torch.dtype) -> Tensor:
    """Of one logical rank: magnitudes far apart, so that another order of summation shows."""
    generator = torch.Generator().manual_seed(1000 * numel + rank)
    spread = torch.randint(-6, 7, (numel,), generator=generator)
    if not (dtype.is_floating_point or dtype.is_complex):
        return (spread + 7).to(dtype)
    return (torch.randn(numel, generator=generator) * 2.0**spread).to(dtype)


def accumulated(
    ranks: Sequence[int], world: int, numel: int, dtype: torch.dtype, reduction: Reduction
) -> BlockAccumulator:
    accumulator = BlockAccumulator(world, dtype, reduction)
    for rank in ranks:
        accumulator.add(rank, rank_values(rank, numel, dtype))
    return accumulator


def expected(world: int, numel: int, dtype: torch.dtype, reduction: Reduction) -> Tensor:
    out = torch.empty(numel, dtype=dtype)
    finish(out, accumulated(range(world), world, numel, dtype, reduction).root(), reduction, world)
    return out


def same_bits(one: Tensor, other: Tensor) -> bool:
    # Copied, as a strided tensor of one element calls itself contiguous, and still has no view as bytes.
    one, other = one.clone(memory_format=torch.contiguous_format), other.clone(memory_format=torch.contiguous_format)
    return one.dtype is other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def placements(world: int, members: int, chance: random.Random) -> Iterator[list[list[int]]]:
    """Contiguous, dealt, random, uneven, and one that leaves the first member out: ranks by member."""
    ways: list[Callable[[int], int]] = [
        lambda rank: rank * members // world,
        lambda rank: rank % members,
        lambda _rank: chance.randrange(members),
        lambda rank: 0 if 3 * rank < 2 * world else members - 1,
        lambda rank: 1 + rank % (members - 1) if members > 1 else 0,
    ]
    for way in ways:
        hosts = [way(rank) for rank in range(world)]
        yield [[rank for rank in range(world) if hosts[rank] == member] for member in range(members)]


def every_world(site: Site) -> int:
    """V = 1..16 in every placement, with and without telling each other."""
    group, chance, count = site.install(), random.Random(5), 0
    for world in range(1, 17):
        dtype, reduction = KINDS[world % 2]
        numel = (83, 3000)[world % 3 == 0]
        right = expected(world, numel, dtype, reduction)
        for hosted in placements(world, group.size, chance):
            mine = accumulated(hosted[group.rank], world, numel, dtype, reduction).blocks()
            known = [blocks_of(ranks, world) for ranks in hosted] if chance.random() < 0.3 else None
            output = torch.empty(numel, dtype=dtype)
            group.all_reduce_exact(output, mine, world, reduction, placement=known, sync=True).wait(OPERATION_S)
            assert same_bits(output, right), (world, hosted)
            count += 1
    group.barrier().wait(OPERATION_S)
    return count


def random_operations(site: Site) -> int:
    """Any shape, type, world and placement; in place where a partial has the output's type; inputs stay as they are."""
    tree_exact.PASS_BYTES = 64 << 10  # many passes
    group, chance = site.install(), random.Random(group_seed(site))
    for _ in range(24):
        world = chance.randint(1, 16)
        dtype, reduction = chance.choice(KINDS)
        numel = chance.choice([0, 1, 7, 4099, 30_000, 100_003, 300_000])
        hosted = chance.choice(list(placements(world, group.size, chance)))
        merged, in_place, strided = chance.random() < 0.7, chance.random() < 0.5, chance.random() < 0.2
        known, asynchronous = chance.random() < 0.3, chance.random() < 0.5
        if merged:
            said = [blocks_of(ranks, world) for ranks in hosted]
            mine = accumulated(hosted[group.rank], world, numel, dtype, reduction).blocks()
        else:
            said = [tuple(leaf(rank, world) for rank in ranks) for ranks in hosted]
            mine = {leaf(rank, world): rank_values(rank, numel, dtype) for rank in hosted[group.rank]}
        output = torch.empty(2 * numel, dtype=dtype)[::2] if strided else torch.empty(numel, dtype=dtype)
        alike = [block for block in mine if mine[block].dtype is dtype]
        if in_place and alike:
            output = mine[alike[-1]]
        before = {block: partial.clone() for block, partial in mine.items()}
        placement = said if known else None
        operation = group.all_reduce_exact(output, mine, world, reduction, placement=placement, sync=not asynchronous)
        operation.wait(OPERATION_S)
        assert same_bits(output, expected(world, numel, dtype, reduction)), (world, numel, dtype, hosted)
        assert all(mine[block] is output or same_bits(mine[block], before[block]) for block in mine)
    group.barrier().wait(OPERATION_S)
    return 1


def group_seed(site: Site) -> int:
    """The same on all members."""
    return len(site.endpoints) + 10 * site.mesh.options.shared_memory + site.mesh.options.arena_bytes


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_placement_of_every_world_has_the_same_bits(size: int) -> None:
    assert mesh_workers.run(size, every_world) == [80] * size


def test_every_placement_of_every_world_has_the_same_bits_over_tcp() -> None:
    assert mesh_workers.run(3, every_world, TRANSPORTS["tcp"]) == [80] * 3


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_any_operation_has_the_oracles_bits_and_leaves_its_partials(size: int, transport: str) -> None:
    assert mesh_workers.run(size, random_operations, TRANSPORTS[transport]) == [1] * size


def several_at_once(site: Site) -> int:
    group, world, numel = site.install(), 8, 50_000
    mine = accumulated(range(group.rank, world, group.size), world, numel, torch.float32, Reduction.SUM).blocks()
    outputs = [torch.empty(numel) for _ in range(20)]
    operations = [group.all_reduce_exact(output, mine, world) for output in outputs]
    for operation in operations:
        operation.wait(OPERATION_S)
    right = expected(world, numel, torch.float32, Reduction.SUM)
    assert all(same_bits(output, right) for output in outputs)
    group.barrier().wait(OPERATION_S)
    return 1


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_several_operations_run_at_once(transport: str) -> None:
    assert mesh_workers.run(3, several_at_once, TRANSPORTS[transport]) == [1] * 3


def disagreeing(hosted: list[list[int]], numel: int) -> Callable[[Site], tuple[str, str]]:
    def program(site: Site) -> tuple[str, str]:
        group, world = site.install(), 4
        mine = accumulated(hosted[group.rank], world, numel, torch.float32, Reduction.SUM).blocks()
        before = {block: partial.clone() for block, partial in mine.items()}
        try:
            group.all_reduce_exact(torch.empty(numel), mine, world).wait(OPERATION_S)
        except CollectiveError as error:
            assert all(same_bits(mine[block], before[block]) for block in mine)
            site.tell("over")
            site.hear()
            return type(error).__name__, str(error)
        raise AssertionError("it found nothing wrong")

    return program


@pytest.mark.parametrize("transport", ["shared memory", "tcp"])
@pytest.mark.parametrize(("hosted", "names"), [([[0, 1], [1, 2, 3]], "w0 and w1"), ([[0, 1], [2]], "by nobody")])
def test_a_rank_missing_or_brought_twice_is_a_mismatch(hosted: list[list[int]], names: str, transport: str) -> None:
    with Crew(2, disagreeing(hosted, 5000), TRANSPORTS[transport]) as crew:
        for rank in range(2):
            crew.hear(rank)
        for rank in range(2):
            crew.tell(rank, "leave")
        results = crew.results()
    assert CollectiveMismatch.__name__ in [kind for kind, _ in results]
    assert all(names in text for _, text in results), results


def reduce_until_aborted(site: Site) -> tuple[str | None, int]:
    """In place and beside in turn, over and over; what is interrupted must have its partials, byte for byte."""
    group, numel = site.install(), 4 * MIB
    world = 2 * group.size
    blocks = blocks_of([2 * group.rank, 2 * group.rank + 1], world)
    assert len(blocks) == 1
    given = torch.randn(numel, generator=torch.Generator().manual_seed(group.rank))
    partial, beside = given.clone(), torch.empty(numel)
    right: Tensor | None = None
    for count in range(10_000):
        partial.copy_(given)
        output = partial if count % 2 else beside
        try:
            group.all_reduce_exact(output, {blocks[0]: partial}, world, sync=count % 3 == 0).wait(OPERATION_S)
        except CollectiveAborted as error:
            assert same_bits(partial, given)
            site.tell(("over", error.culprit))
            site.hear()
            return error.culprit, count
        right = output.clone() if right is None else right
        assert same_bits(output, right)
        if count == 2:
            site.tell("under way")
    raise AssertionError("nobody interrupted it")


@pytest.mark.parametrize("transport", ["shared memory", "tcp"])
def test_a_killed_member_is_named_and_partials_are_unchanged(transport: str) -> None:
    with Crew(3, reduce_until_aborted, TRANSPORTS[transport]) as crew:
        for rank in range(3):
            assert crew.hear(rank) == "under way"
        crew.signal(2)
        survivors = [crew.hear(rank) for rank in (0, 1)]
        for rank in (0, 1):
            crew.tell(rank, "leave")
            crew.result(rank)
    assert survivors == [("over", "w2")] * 2


def robbed_while_reading(calls: int) -> Callable[[Site], bool]:
    """The last member finds, at its `calls`-th region, that its owner had taken the memory back."""

    def program(site: Site) -> bool:
        group, numel = site.install(), 300_000
        given = rank_values(group.rank, numel, torch.float32)
        value, left = given.clone(), calls
        honest = Channel.give_back

        def give_back(io: Channel, rank: int, fetch: Fetch) -> None:
            nonlocal left
            left -= 1
            if not left:
                raise CollectiveAborted("shared memory was taken back while it was read", io.me)
            honest(io, rank, fetch)

        if group.rank == group.size - 1:
            Channel.give_back = give_back  # type: ignore[method-assign]
        try:
            group.all_reduce_exact(value, {leaf(group.rank, group.size): value}, group.size).wait(OPERATION_S)
            right = same_bits(value, expected(group.size, numel, torch.float32, Reduction.SUM))
        except CollectiveAborted:
            right = same_bits(value, given)
        site.tell(right)
        site.hear()
        return left == 0

    return program


@pytest.mark.parametrize(("size", "calls"), [(2, 1), (3, 1), (3, 2)])
def test_a_value_reduced_in_place_is_restored_when_memory_was_taken_back(size: int, calls: int) -> None:
    with Crew(size, robbed_while_reading(calls)) as crew:
        assert [crew.hear(rank) for rank in range(size)] == [True] * size
        for rank in range(size):
            crew.tell(rank, "leave")
        assert crew.results()[-1]


def test_arguments_that_cannot_be_meant_are_refused() -> None:
    with mesh_workers.meshes(1) as [mesh]:
        group = mesh.install(mesh_workers.DataView(number=1, members=(mesh.endpoint,)))
        whole, output = Block(0, 2), torch.empty(3)
        with pytest.raises(ValueError, match="elements"):
            group.all_reduce_exact(output, {whole: torch.zeros(4)}, 2)
        with pytest.raises(ValueError, match=r"torch\.bfloat16, not torch\.float32"):
            group.all_reduce_exact(output, {whole: torch.zeros(3, dtype=torch.bfloat16)}, 2)
        with pytest.raises(ValueError, match="world"):
            group.all_reduce_exact(output, {whole: torch.zeros(3)}, 0)
        with pytest.raises(ValueError, match="overlaps"):
            group.all_reduce_exact(output, {whole: torch.zeros(3), Block(1, 1): torch.zeros(3)}, 2)
        with pytest.raises(ValueError, match="placement of 1 members"):
            group.all_reduce_exact(output, {whole: torch.zeros(3)}, 2, placement=[[Block(0, 1), Block(1, 1)]])
        group.all_reduce_exact(output, {whole: torch.ones(3)}, 2, Reduction.AVG).wait(OPERATION_S)
        assert output.tolist() == [0.5] * 3
