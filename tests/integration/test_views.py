"""Installing views: what is kept, what is interrupted, who is told, and what may not leak from one into the next."""

import os

import pytest
import torch
from mesh_workers import meshes, until

from elastic_run.collectives.endpoint import DataView
from elastic_run.collectives.errors import CollectiveAborted, CollectiveMismatch
from elastic_run.collectives.group import Group
from elastic_run.collectives.mesh import Mesh
from elastic_run.collectives.operation import Operation
from elastic_run.collectives.options import MeshOptions

TRANSPORTS = pytest.mark.parametrize(
    "options", [MeshOptions(), MeshOptions(shared_memory=False)], ids=["shared memory", "tcp"]
)
WAIT_S = 60.0


def view(number: int, *members: Mesh) -> DataView:
    return DataView(number=number, members=tuple(mesh.endpoint for mesh in members))


def install(number: int, *members: Mesh) -> list[Group]:
    return [mesh.install(view(number, *members)) for mesh in members]


def all_reduce(groups: list[Group], numel: int = 50_000) -> None:
    """Reduce ones on all members, and check the sum."""
    tensors = [torch.ones(numel) for _ in groups]
    for operation in [group.all_reduce([tensor]) for group, tensor in zip(groups, tensors, strict=True)]:
        operation.wait(WAIT_S)
    assert all((tensor == len(groups)).all() for tensor in tensors)


def sockets(mesh: Mesh, worker: str) -> set[int]:
    """Return which sockets there are to a peer: their numbers in the kernel."""
    found: set[int] = set()

    def look() -> None:
        peer = mesh._peers[worker]
        ends = [lane.socket for lane in peer._lanes.values()] + [inbound._sock for inbound in peer._inbounds]
        found.update(os.fstat(end.fileno()).st_ino for end in ends if end is not None)

    mesh.engine.call(look)
    return found


def cut(mesh: Mesh, worker: str) -> None:
    """Break what `mesh` sends on."""

    def shut() -> None:
        sock = mesh._peers[worker]._lanes[0].socket
        assert sock is not None
        sock.shutdown(2)

    mesh.engine.call(shut)


@TRANSPORTS
def test_connections_between_survivors_stay(options: MeshOptions) -> None:
    with meshes(4, options) as all_four:
        all_reduce(install(1, *all_four))
        survivors = [all_four[3], all_four[0], all_four[1]]
        pairs = [(a, b.worker) for a in survivors for b in survivors if a is not b]
        before = [sockets(*pair) for pair in pairs]
        all_reduce(install(2, *survivors))
        assert [sockets(*pair) for pair in pairs] == before
        assert all("w2" not in mesh._peers for mesh in survivors)


@TRANSPORTS
def test_a_prepared_joiner_is_not_dialled_again(options: MeshOptions) -> None:
    with meshes(3, options) as (old, other, new):
        all_reduce(install(1, old, other))
        for mesh in (old, other):
            mesh.prepare([new.endpoint])
        new.prepare([old.endpoint, other.endpoint])
        until(lambda: old.prepared(["w2"]) and other.prepared(["w2"]) and new.prepared(["w0", "w1"]))
        before = [sockets(old, "w2"), sockets(other, "w2"), sockets(new, "w0"), sockets(new, "w1")]
        all_reduce(install(2, old, new, other))
        assert [sockets(old, "w2"), sockets(other, "w2"), sockets(new, "w0"), sockets(new, "w1")] == before


def test_views_only_grow_and_name_this_worker() -> None:
    with meshes(2) as (one, two):
        install(5, one, two)
        for number in (4, 5):
            with pytest.raises(ValueError, match="not newer"):
                one.install(view(number, one, two))
        with pytest.raises(ValueError, match="does not name"):
            one.install(view(6, two))
        assert one.view_number == 5


@TRANSPORTS
def test_who_is_behind_is_told_and_catches_up(options: MeshOptions) -> None:
    with meshes(3, options) as (one, two, three):
        groups = install(1, one, two, three)
        all_reduce(groups)
        tensor = torch.full((100_000,), 7.0)
        behind = groups[2].all_reduce([tensor])
        ahead = [mesh.install(view(2, one, two, three)) for mesh in (one, two)]
        early = [torch.ones(100_000) for _ in ahead]
        running = [group.all_reduce([it]) for group, it in zip(ahead, early, strict=True)]
        with pytest.raises(CollectiveAborted) as caught:
            behind.wait(WAIT_S)
        assert caught.value.culprit is None
        assert (tensor == 7).all()
        last = three.install(view(2, one, two, three)).all_reduce([tensor.fill_(1)])
        for operation in [*running, last]:
            operation.wait(WAIT_S)
        assert all((it == 3).all() for it in [*early, tensor])


@TRANSPORTS
def test_a_worker_that_is_left_out_is_told_so(options: MeshOptions) -> None:
    with meshes(3, options) as (one, two, out):
        groups = install(1, one, two, out)
        all_reduce(groups)
        waiting = groups[2].all_reduce([torch.ones(10)])
        all_reduce(install(2, one, two))
        # The farewell, or the news that came just before it: both say which view ended this one.
        with pytest.raises(CollectiveAborted, match=r"left out of view 2|is in view 2 already") as caught:
            waiting.wait(WAIT_S)
        assert caught.value.culprit is None


@TRANSPORTS
def test_a_worker_that_was_left_out_and_dials_again_is_refused(options: MeshOptions) -> None:
    with meshes(3, options) as (one, two, out):
        install(1, one, two, out)
        all_reduce(install(2, one, two))
        with pytest.raises(CollectiveAborted):
            out.install(view(2, one, two, out)).barrier().wait(WAIT_S)
        all_reduce([one.group("again"), two.group("again")])


@TRANSPORTS
def test_a_connection_lost_before_the_view_used_it_is_dialled_again(options: MeshOptions) -> None:
    with meshes(2, options) as (one, two):
        all_reduce(install(1, one, two))
        ahead = one.install(view(2, one, two))
        tensor = torch.ones(100_000)
        running = ahead.all_reduce([tensor])
        before = sockets(one, "w1")
        cut(one, "w1")
        until(lambda: not sockets(one, "w1") & before)
        other = torch.ones(100_000)
        two.install(view(2, one, two)).all_reduce([other]).wait(WAIT_S)
        running.wait(WAIT_S)
        assert (tensor == 2).all()
        assert (other == 2).all()


def test_an_abort_of_the_old_view_does_not_touch_the_new_one() -> None:
    with meshes(2) as (one, two):
        install(1, one, two)
        groups = install(2, one, two)
        peer = one._peers["w1"]
        one.engine.call(lambda: one.peer_aborted(peer, 1, groups[0].identity, "w1", "an old story"))
        one.engine.call(lambda: one.failed(1, groups[0].identity, CollectiveAborted("an old story")))
        all_reduce(groups)


def test_giving_up_a_group_of_the_old_view_does_not_touch_the_new_one() -> None:
    with meshes(2) as (one, two):
        old = install(1, one, two)
        groups = install(2, one, two)
        one.engine.call(lambda: one.give_up(old[0], CollectiveAborted("an old story")))
        all_reduce(groups)
        with pytest.raises(CollectiveAborted):
            old[0].barrier().wait(WAIT_S)


def test_a_view_may_be_installed_in_the_callback_of_what_it_replaces() -> None:
    with meshes(2) as (one, two):
        groups = install(1, one, two)
        installed: list[Group] = []

        def move_on(_: Operation) -> None:
            one.engine.call(lambda: one._install(view(2, one, two)))
            installed.append(one.group("world"))

        waiting = groups[0].barrier()
        waiting.add_done_callback(move_on)
        groups[1].mesh.engine.call(lambda: two.give_up(groups[1], CollectiveAborted("enough", "w1")))
        with pytest.raises(CollectiveAborted):
            waiting.wait(WAIT_S)
        until(lambda: bool(installed))
        all_reduce([installed[0], two.install(view(2, one, two))])


def test_a_group_with_a_lost_member_is_over_when_it_is_made_and_the_others_hear_of_it() -> None:
    with meshes(3) as (one, two, three):
        all_reduce(install(1, one, two, three))
        one.abort("w2", "it hangs")
        waiting = two.group("later").all_reduce([torch.ones(10)])
        assert one.group("later").error is not None
        with pytest.raises(CollectiveAborted) as caught:
            waiting.wait(WAIT_S)
        assert caught.value.culprit == "w2"


def test_what_was_published_for_a_member_that_never_came_is_free_again() -> None:
    with meshes(2) as (one, two):
        groups = [one.install(view(1, one, two))]
        running = groups[0].all_reduce([torch.ones(100_000)])
        until(lambda: one.arena.used_bytes > 0)
        one.install(view(2, one, two))
        with pytest.raises(CollectiveAborted):
            running.wait(WAIT_S)
        assert one.arena.used_bytes == 0
        all_reduce([one.group("world"), two.install(view(2, one, two))])


def test_what_was_shown_and_not_looked_at_is_given_back_when_the_group_ends() -> None:
    with meshes(3) as (one, two, three):
        groups = install(1, one, two, three)
        all_reduce(groups)
        running = [group.all_reduce([torch.ones(100_000)]) for group in groups[:2]]
        until(lambda: len(three._peers["w0"].inbox.regions()) + len(three._peers["w1"].inbox.regions()) == 2)
        three.engine.call(lambda: three.give_up(groups[2], CollectiveAborted("enough", "w2")))
        for operation in running:
            with pytest.raises(CollectiveAborted):
                operation.wait(WAIT_S)
        until(lambda: one.arena.used_bytes == two.arena.used_bytes == 0)


def test_members_that_list_a_group_in_another_order_are_told() -> None:
    with meshes(2) as (one, two):
        install(1, one, two)
        running = [
            one.group("odd", [0, 1]).all_reduce([torch.ones(4)]),
            two.group("odd", [1, 0]).all_reduce([torch.ones(4)]),
        ]
        for operation in running:
            with pytest.raises((CollectiveMismatch, CollectiveAborted), match="same order"):
                operation.wait(WAIT_S)
