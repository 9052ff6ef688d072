"""Operations over real meshes: values, order, concurrency, and what is said when members disagree."""

import random
import threading
from collections.abc import Callable

import pytest
import torch
from mesh_workers import Crew, Site, meshes, run, until

from elastic_run.collectives.endpoint import DataView
from elastic_run.collectives.errors import CollectiveAborted, CollectiveMismatch, CollectiveTimeout
from elastic_run.collectives.group import Group
from elastic_run.collectives.mesh import Mesh
from elastic_run.collectives.operation import Operation
from elastic_run.collectives.options import MeshOptions
from elastic_run.collectives.reduction import Reduction
from elastic_run.collectives.selection import Method

TRANSPORTS = pytest.mark.parametrize(
    "options", [MeshOptions(), MeshOptions(shared_memory=False)], ids=["shared memory", "tcp"]
)
WAIT_S = 60.0


def together(members: list[Mesh]) -> list[Group]:
    view = DataView(number=1, members=tuple(mesh.endpoint for mesh in members))
    return [mesh.install(view) for mesh in members]


def settle(running: list[Operation]) -> None:
    for operation in running:
        operation.wait(WAIT_S)


def every_operation(site: Site) -> None:
    """Run each operation on small, large, empty and strided tensors, and check its value."""
    group = site.install(1)
    me, size = site.rank, group.size
    for numel in (0, 1, 1000, 70_000):
        base = torch.arange(numel, dtype=torch.float32).remainder_(17)
        for reduction, want in (
            (Reduction.SUM, base * size + sum(range(size))),
            (Reduction.MAX, base + size - 1),
            (Reduction.AVG, base + sum(range(size)) / size),
        ):
            tensor = base + me
            group.all_reduce([tensor], reduction).wait(WAIT_S)
            assert torch.equal(tensor, want)
        everything = torch.empty(size * numel)
        group.all_gather(everything, base + me).wait(WAIT_S)
        assert torch.equal(everything, torch.cat([base + rank for rank in range(size)]))
        row = torch.empty(numel)
        group.reduce_scatter(row, everything).wait(WAIT_S)
        assert torch.equal(row, (base + me) * size)
        group.broadcast([row], size - 1).wait(WAIT_S)
        assert torch.equal(row, (base + size - 1) * size)
        tensor = base + me
        group.reduce([tensor], 0).wait(WAIT_S)
        assert torch.equal(tensor, base * size + sum(range(size)) if me == 0 else base + me)
        swapped = torch.empty(size * numel)
        group.all_to_all(swapped, torch.cat([base + 10 * me + rank for rank in range(size)])).wait(WAIT_S)
        assert torch.equal(swapped, torch.cat([base + 10 * rank + me for rank in range(size)]))
        gathered = torch.empty(size * numel) if me == 1 else None
        group.gather(gathered, base + me, 1).wait(WAIT_S)
        assert gathered is None or torch.equal(gathered, everything)
        group.scatter(row, everything if me == 1 else None, 1).wait(WAIT_S)
        assert torch.equal(row, base + me)
    strided = torch.full((40, 50), float(me)).t()[::2]
    group.all_reduce([strided, torch.ones(3)]).wait(WAIT_S)
    assert (strided == sum(range(size))).all()


def many_at_once(site: Site) -> None:
    """More operations than may run at once, on two groups, each member taking turns between them in its own way."""
    world = site.install(1)
    groups = [world, site.mesh.group("backwards", list(range(world.size))[::-1])]
    order = [0] * 30 + [1] * 30
    random.Random(site.rank).shuffle(order)
    counts = [0, 0]
    started: list[tuple[int, int, torch.Tensor, Operation]] = []
    for which in order:
        numel = (5, 40_000, 1, 300_000)[counts[which] % 4]
        tensor = torch.full((numel,), float(site.rank + 10 * counts[which] + which))
        started.append((which, counts[which], tensor, groups[which].all_reduce([tensor])))
        counts[which] += 1
    for which, count, tensor, operation in started:
        operation.wait(WAIT_S)
        assert (tensor == sum(range(world.size)) + world.size * (10 * count + which)).all()


def from_several_threads(site: Site) -> None:
    """Each thread has its group, and one more group is used by all of them with messages to the next rank."""
    world = site.install(1)
    groups = [site.mesh.group(f"of thread {index}") for index in range(4)]
    failures: list[BaseException] = []

    def work(index: int) -> None:
        try:
            for count in range(25):
                tensor = torch.full((30_000 if count % 5 else 3,), float(site.rank))
                groups[index].all_reduce([tensor], sync=bool(count % 2)).wait(WAIT_S)
                assert (tensor == sum(range(world.size))).all()
                right, left = (site.rank + 1) % world.size, (site.rank - 1) % world.size
                sent = world.send(torch.full((20_000,), float(count)), right, tag=index)
                got = torch.empty(20_000)
                world.receive(got, left, tag=index).wait(WAIT_S)
                sent.wait(WAIT_S)
                assert (got == count).all()
        except BaseException as error:  # noqa: BLE001 - raised in the main thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    if failures:
        raise failures[0]
    assert not any(thread.is_alive() for thread in threads)


@TRANSPORTS
@pytest.mark.parametrize("program", [every_operation, many_at_once, from_several_threads])
def test_results_are_right_on_every_member(program: Callable[[Site], None], options: MeshOptions) -> None:
    run(3, program, options)


@TRANSPORTS
def test_messages_of_one_tag_keep_their_order_whatever_their_size(options: MeshOptions) -> None:
    with meshes(2, options) as members:
        one, two = together(members)
        sizes = [3, 100_000, 0, 9_000, 50_000, 1]
        sent = [one.send(torch.full((size,), float(index)), 1, tag=4) for index, size in enumerate(sizes)]
        got = [torch.empty(size) for size in sizes]
        settle([two.receive(tensor, 0 if index % 2 else None, tag=4) for index, tensor in enumerate(got)])
        settle(sent)
        assert all((tensor == index).all() for index, tensor in enumerate(got))


def test_whoever_sends_first_answers_a_receive_from_anyone() -> None:
    with meshes(3) as members:
        groups = together(members)
        first, second = torch.empty(4), torch.empty(4)
        waiting = [groups[0].receive(first, None), groups[0].receive(second, None)]
        groups[2].send(torch.full((4,), 2.0), 0).wait(WAIT_S)
        waiting[0].wait(WAIT_S)
        assert (waiting[0].source, first[0]) == (2, 2.0)
        groups[1].send(torch.full((4,), 1.0), 0).wait(WAIT_S)
        waiting[1].wait(WAIT_S)
        assert (waiting[1].source, second[0]) == (1, 1.0)


def test_a_receive_from_anyone_outlives_a_member_that_left() -> None:
    with meshes(3) as members:
        groups = together(members)
        settle([group.barrier() for group in groups])
        tensor = torch.empty(4)
        waiting = groups[0].receive(tensor, None)
        members[2].close()
        until(lambda: members[0]._peers["w2"].left is not None)
        groups[1].send(torch.ones(4), 0).wait(WAIT_S)
        waiting.wait(WAIT_S)
        assert waiting.source == 1
        waiting = groups[0].receive(tensor, None)
        members[1].close()
        with pytest.raises(CollectiveAborted):
            waiting.wait(WAIT_S)


@pytest.mark.parametrize("numel", [3, 100_000])
def test_members_that_disagree_are_told_what_about(numel: int) -> None:
    with meshes(2) as members:
        one, two = together(members)
        running = [one.all_reduce([torch.ones(numel)]), two.all_reduce([torch.ones(numel + 1)])]
        errors = []
        for operation in running:
            with pytest.raises((CollectiveMismatch, CollectiveAborted)) as caught:
                operation.wait(WAIT_S)
            errors.append(caught.value)
        assert any(isinstance(error, CollectiveMismatch) and "same order" in str(error) for error in errors)
        with pytest.raises((CollectiveMismatch, CollectiveAborted)):
            one.barrier().wait(WAIT_S)


def test_a_message_of_another_size_than_is_waited_for_is_a_mismatch() -> None:
    with meshes(2) as members:
        one, two = together(members)
        one.send(torch.ones(5), 1).wait(WAIT_S)
        with pytest.raises(CollectiveMismatch):
            two.receive(torch.empty(6), 0).wait(WAIT_S)


def test_time_runs_out_for_all_members_naming_who_was_waited_for() -> None:
    with meshes(3) as members:
        groups = together(members)
        tensors = [torch.ones(10), torch.ones(10)]
        running = [groups[0].all_reduce([tensors[0]], timeout_s=0.05), groups[1].all_reduce([tensors[1]])]
        with pytest.raises(CollectiveTimeout) as caught:
            running[0].wait(WAIT_S)
        assert caught.value.culprit in ("w1", "w2")
        with pytest.raises(CollectiveAborted):
            running[1].wait(WAIT_S)
        # The first may still find that everybody had sent to it.
        with pytest.raises(CollectiveAborted):
            settle([groups[2].all_reduce([torch.ones(10)]), groups[2].all_reduce([torch.ones(10)])])
        assert all((tensor == 1).all() for tensor in tensors)


def test_a_wait_that_times_out_ends_the_operation() -> None:
    with meshes(2) as members:
        groups = together(members)
        waiting = groups[0].barrier()
        with pytest.raises(CollectiveTimeout):
            waiting.wait(0.02)
        # The first may still find that everybody had come.
        with pytest.raises(CollectiveAborted):
            settle([groups[1].barrier(), groups[1].barrier()])


def test_other_groups_live_on_when_one_is_given_up() -> None:
    with meshes(2) as members:
        together(members)
        doomed, other = ([mesh.group(name) for mesh in members] for name in ("doomed", "other"))
        waiting = doomed[0].barrier()
        with pytest.raises(CollectiveTimeout):
            waiting.wait(0.02)
        settle([group.all_reduce([torch.ones(100_000)]) for group in other])


def test_a_large_value_may_be_exchanged_directly() -> None:
    with meshes(2) as members:
        tensors = [torch.full((100_000,), float(index)) for index in range(2)]
        settle(
            [
                group.all_reduce([tensor], method=Method.EXCHANGE)
                for group, tensor in zip(together(members), tensors, strict=True)
            ]
        )
        assert all((tensor == 1).all() for tensor in tensors)


def test_one_name_is_one_group() -> None:
    with meshes(3) as members:
        together(members)
        group = members[0].group("pair", [0, 1])
        assert members[0].group("pair", [0, 1]) is group
        with pytest.raises(ValueError, match="choose another name"):
            members[0].group("pair", [0, 2])
        with pytest.raises(ValueError, match="is not in group"):
            members[2].group("pair", [0, 1])


def killed_before_the_operation_is_known(site: Site) -> object:
    """An operation that nobody answered yet is interrupted like any other, and its input stays."""
    group = site.install(1)
    group.barrier().wait(WAIT_S)
    site.tell("ready")
    if site.rank == 1:
        site.hear()
    tensor = torch.full((3,), 5.0)
    with pytest.raises(CollectiveAborted) as caught:
        group.all_reduce([tensor]).wait(WAIT_S)
    assert (tensor == 5).all()
    return caught.value.culprit


def test_a_member_that_dies_before_it_began_is_named() -> None:
    with Crew(2, killed_before_the_operation_is_known) as crew:
        for rank in range(2):
            assert crew.hear(rank) == "ready"
        crew.signal(1)
        assert crew.result(0) == "w1"


def many_small_messages(site: Site) -> None:
    """Send far more than the other keeps, before it begins to receive: it must not matter, nor come out of order."""
    group = site.install(1)
    count, numel = 3000, 8192
    if group.rank == 0:
        running = [group.send(torch.full((numel,), float(number)), 1, tag=number % 2) for number in range(count)]
        group.barrier().wait(WAIT_S)
        settle(running)
    else:
        group.barrier().wait(WAIT_S)
        value = torch.empty(numel)
        for parity in (1, 0):
            for number in range(parity, count, 2):
                group.receive(value, 0, tag=parity).wait(WAIT_S)
                assert bool((value == number).all())


@TRANSPORTS
def test_more_small_messages_than_are_kept(options: MeshOptions) -> None:
    run(2, many_small_messages, options)


def test_shared_memory_is_refused_where_there_is_none() -> None:
    options = MeshOptions(shared_memory=False)
    with meshes(2, options) as members:
        for group in together(members):
            with pytest.raises(ValueError, match="on several hosts"):
                group.all_reduce([torch.ones(4)], method=Method.SHARED)
