"""Every algorithm against one plain reduction, on several group sizes, types, lengths and layouts of hosts."""

import contextlib
import itertools
import zlib
from collections.abc import Callable

import pytest
import torch
from mesh_workers import WAIT_S, Crew, Site, run

from elastic_run.collectives.algorithms import chunks, staged
from elastic_run.collectives.errors import CollectiveAborted
from elastic_run.collectives.group import Group
from elastic_run.collectives.memory import bytes_of
from elastic_run.collectives.options import MeshOptions
from elastic_run.collectives.reduction import Reduction, accumulate, accumulator_dtype, finish
from elastic_run.collectives.selection import Method

TCP = MeshOptions(shared_memory=False)
LENGTHS = (0, 1, 5, 20_003, 300_003)
TYPES = (torch.float32, torch.bfloat16, torch.int64, torch.uint8)
LARGE = 4_000_037
BY_MESSAGES = (Method.EXCHANGE, Method.PAIRWISE, Method.RING)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many pieces of a quarter of the size: they are cut alike, and still asked for before they are sent."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES_MIN", chunks.CHUNK_BYTES_MIN // 4)
    monkeypatch.setattr(chunks, "CHUNK_BYTES_MAX", chunks.CHUNK_BYTES_MAX // 4)
    monkeypatch.setattr(staged, "PIECE_BYTES", staged.PIECE_BYTES // 16)


def value_of(rank: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    """Small whole numbers: sums are exact in every order and type."""
    return (torch.arange(numel).remainder(7) + rank).to(dtype)


def random_of(rank: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(rank)).to(dtype)


def reduced(values: list[torch.Tensor], reduction: Reduction) -> torch.Tensor:
    total = values[0].to(accumulator_dtype(values[0].dtype, reduction), copy=True)
    for value in values[1:]:
        accumulate(total, value, reduction)
    result = torch.empty_like(values[0])
    finish(result, total, reduction, len(values))
    return result


def check_all_reduce(group: Group, methods: tuple[Method, ...]) -> None:
    for numel, dtype in itertools.product(LENGTHS, TYPES):
        values = [value_of(rank, numel, dtype) for rank in range(group.size)]
        wanted = reduced(values, Reduction.SUM)
        for method in methods:
            tensor = values[group.rank].clone()
            group.all_reduce([tensor], method=method, sync=True).wait(WAIT_S)
            assert torch.equal(tensor, wanted), (method, numel, dtype)
    values = [value_of(rank, 75_001, torch.float32) for rank in range(group.size)]
    for reduction in (Reduction.AVG, Reduction.MIN, Reduction.PRODUCT):
        wanted = reduced(values, reduction)
        for method in methods:
            tensor = values[group.rank].clone()
            group.all_reduce([tensor], reduction, method=method, sync=True).wait(WAIT_S)
            assert torch.allclose(tensor, wanted), (method, reduction)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_all_reduce_by_messages_has_the_plain_result(size: int) -> None:
    run(size, lambda site: check_all_reduce(site.install(), BY_MESSAGES), TCP)


def test_16_bit_floats_are_rounded_once_in_every_algorithm() -> None:
    def program(site: Site) -> list[int]:
        group = site.install()
        return [check_rounding(group, method) for method in BY_MESSAGES]

    first, *others = run(4, program, TCP)
    assert all(other == first for other in others)


def check_rounding(group: Group, method: Method) -> int:
    """Return the checksum of a sum in bf16 that is as near to the true one as its last place allows."""
    tensor = random_of(group.rank, 100_003, torch.bfloat16)
    group.all_reduce([tensor], method=method).wait(WAIT_S)
    exact = torch.stack([random_of(rank, 100_003, torch.bfloat16).double() for rank in range(group.size)]).sum(0)
    # Half a unit in the last of 8 bits, and what the order of a few additions in 24 bits may shift.
    assert bool(((tensor.double() - exact).abs() <= exact.abs() * 2.0**-8 + 2.0**-18).all()), method
    return zlib.crc32(bytes_of(tensor))


HOSTS = {
    "two by two": (0, 0, 1, 1),
    "dealt": (0, 1, 0, 1),
    "uneven": (0, 0, 0, 1),
    "three hosts": (0, 1, 1, 2, 2),
    "one host": (0, 0, 0),
    "no two together": (0, 1, 2),
}


@pytest.mark.parametrize("hosts", HOSTS.values(), ids=HOSTS.keys())
def test_members_on_several_hosts_have_the_plain_result(hosts: tuple[int, ...]) -> None:
    def program(site: Site) -> int:
        group = site.install()
        assert group.layout.hosts == hosts
        check_all_reduce(group, (Method.HIERARCHICAL,))
        check_others(group)
        return check_rounding(group, Method.HIERARCHICAL)

    assert len(set(on_hosts(hosts, program))) == 1


def on_hosts(hosts: tuple[int, ...], program: Callable[[Site], object]) -> list[object]:
    """Run a program on workers that believe to be on these hosts: messages within one go through shared memory."""
    with Crew(len(hosts), program, [MeshOptions(host_key=f"made up host {host}") for host in hosts]) as crew:
        return crew.results()


def check_others(group: Group) -> None:
    for numel, dtype in itertools.product((0, 3, 20_011, 350_003), (torch.float32, torch.bfloat16)):
        values = [value_of(rank, numel, dtype) for rank in range(group.size)]
        mine = values[group.rank]
        for root in {0, group.size - 1}:
            tensor = mine.clone()
            group.broadcast([tensor], root, sync=True).wait(WAIT_S)
            assert torch.equal(tensor, values[root])
            tensor = mine.clone()
            group.reduce([tensor], root, sync=True).wait(WAIT_S)
            assert torch.equal(tensor, reduced(values, Reduction.SUM) if group.rank == root else mine)
        gathered = torch.empty(group.size * numel, dtype=dtype)
        group.all_gather(gathered, mine, sync=True).wait(WAIT_S)
        assert torch.equal(gathered, torch.cat(values))
        row = torch.empty(numel, dtype=dtype)
        group.reduce_scatter(row, gathered, sync=True).wait(WAIT_S)
        assert torch.equal(row, reduced([mine] * group.size, Reduction.SUM))


@pytest.mark.parametrize("options", [TCP, MeshOptions()], ids=["tcp", "shared memory"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_other_operations_have_the_plain_result(size: int, options: MeshOptions) -> None:
    run(size, lambda site: check_others(site.install()), options)


def test_a_row_of_the_input_may_be_the_output_of_reduce_scatter() -> None:
    def program(site: Site) -> bool:
        group = site.install()
        data = value_of(site.rank, 4 * 50_000, torch.float32)
        rows = data.view(4, -1)
        group.reduce_scatter(rows[site.rank], data).wait(WAIT_S)
        wanted = reduced([value_of(rank, 4 * 50_000, torch.float32) for rank in range(4)], Reduction.SUM)
        return torch.equal(rows[site.rank], wanted.view(4, -1)[site.rank])

    assert all(run(4, program, TCP))
    assert all(run(4, program))


@pytest.mark.parametrize("method", [Method.PAIRWISE, Method.RING, Method.HIERARCHICAL])
def test_a_member_lost_in_between_leaves_the_input_as_it_was(method: Method) -> None:
    """The last member dies while the others have most of the result in place."""

    def program(site: Site) -> object:
        group = site.install()
        tensor = random_of(site.rank, LARGE, torch.float32)
        before = tensor.clone()
        group.barrier().wait(WAIT_S)
        if site.rank == 3:
            site.tell("ready")
            site.hear()
        operation = group.all_reduce([tensor], method=method)
        if site.rank < 3:
            site.tell("started")
        try:
            operation.wait(WAIT_S)
        except CollectiveAborted as error:
            site.tell((error.culprit, torch.equal(tensor, before)))
        site.hear()  # who leaves now would be somebody else to blame
        return None

    hosts = (0, 0, 1, 1) if method is Method.HIERARCHICAL else (0, 1, 2, 3)
    with Crew(4, program, [MeshOptions(host_key=f"made up host {host}") for host in hosts]) as crew:
        assert crew.hear(3) == "ready"
        for rank in range(3):
            assert crew.hear(rank) == "started"
        crew.signal(3)
        assert [crew.hear(rank) for rank in range(3)] == [("w3", True)] * 3


@pytest.mark.parametrize("method", [Method.PAIRWISE, Method.RING])
def test_an_operation_ended_half_way_restores_what_it_had_overwritten(method: Method) -> None:
    """Everybody is interrupted at whatever point it has reached; whoever did not finish has its input back."""

    def program(site: Site) -> object:
        group = site.install()
        tensor = random_of(site.rank, LARGE, torch.float32)
        before = tensor.clone()
        outcomes = []
        for number in range(2, 10):
            tensor.copy_(before)
            operation = group.all_reduce([tensor], method=method)
            small = torch.ones(1)
            other = site.mesh.group("other", None)
            with contextlib.suppress(CollectiveAborted):  # somebody may be in the next view already
                other.all_reduce([small]).wait(WAIT_S)
            site.mesh.interrupt("a newer view is coming")
            try:
                operation.wait(WAIT_S)
                outcomes.append("finished")
            except CollectiveAborted:
                outcomes.append("whole" if torch.equal(tensor, before) else "torn")
            group = site.install(number)
        tensor.copy_(value_of(site.rank, LARGE, torch.float32))
        group.all_reduce([tensor], method=method).wait(WAIT_S)
        wanted = reduced([value_of(rank, LARGE, torch.float32) for rank in range(group.size)], Reduction.SUM)
        assert torch.equal(tensor, wanted)
        return outcomes

    outcomes = [outcome for member in run(3, program, TCP) for outcome in member]
    assert "torn" not in outcomes
    assert "whole" in outcomes
