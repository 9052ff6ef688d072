"""Peers that die, hang, are cut off or come back in the middle of operations: survivors are told, and go on."""

import contextlib
import ctypes
import os
import signal
import socket
import time

import pytest
import torch
from mesh_workers import Crew, Site, until

from elastic_run.collectives.errors import CollectiveAborted, CollectiveTimeout
from elastic_run.collectives.options import MeshOptions

BIG = (64 << 20) // 4
TRANSPORTS = pytest.mark.parametrize(
    "options", [MeshOptions(), MeshOptions(shared_memory=False)], ids=["shared memory", "tcp"]
)


def reduce_until_aborted(site: Site) -> None:
    """Reduce 64 MB again and again; when it ends, report, and reduce once more in the view the test asks for."""
    group = site.install(1)
    original = torch.arange(BIG, dtype=torch.float32).remainder_(11).add_(site.rank)
    expected = torch.arange(BIG, dtype=torch.float32).remainder_(11).mul_(group.size).add_(sum(range(group.size)))
    tensor = original.clone()
    try:
        for count in range(10_000):
            tensor.copy_(original)
            group.all_reduce([tensor], sync=True).wait(60)
            assert torch.equal(tensor, expected)
            if count == 1:
                site.tell("busy")
    except CollectiveAborted as error:
        site.tell((error.culprit, torch.equal(tensor, original), time.monotonic()))
    number, ranks = site.hear()
    if site.rank not in ranks:
        return
    tensor = torch.full((1000,), float(site.rank))
    site.install(number, ranks).all_reduce([tensor]).wait(60)
    assert (tensor == sum(ranks)).all()


def abort_on_order(site: Site) -> None:
    """As above, with a second thread's worth of orders: the verdict comes from outside."""
    group = site.install(1)
    tensor = torch.full((BIG,), float(site.rank))
    group.all_reduce([tensor]).wait(60)
    tensor.fill_(site.rank)
    running = group.all_reduce([tensor])
    site.tell("running")
    site.mesh.abort(site.hear(), "it hangs")
    with pytest.raises(CollectiveAborted) as caught:
        running.wait(60)
    site.tell((caught.value.culprit, bool((tensor == site.rank).all())))
    assert site.hear() == "next"
    small = torch.ones(10)
    site.install(2, [0, 1]).all_reduce([small]).wait(60)
    assert (small == 2).all()
    site.hear()


def take_part_when_told(site: Site) -> object:
    """Take part in one reduction, then stand still until told; what comes then must be refused."""
    group = site.install(1)
    tensor = torch.full((BIG,), float(site.rank))
    group.all_reduce([tensor]).wait(60)
    site.tell("ready")
    site.hear()
    tensor.fill_(site.rank)
    with pytest.raises(CollectiveAborted) as caught:
        group.all_reduce([tensor]).wait(60)
    assert (tensor == site.rank).all()
    with pytest.raises(CollectiveAborted):
        group.barrier().wait(60)
    return caught.value.reason


def hung_among_two(site: Site) -> object:
    return take_part_when_told(site) if site.rank == 2 else abort_on_order(site)


@TRANSPORTS
def test_survivors_of_a_kill_are_told_whom_they_lost_and_go_on(options: MeshOptions) -> None:
    with Crew(4, reduce_until_aborted, options) as crew:
        assert [crew.hear(rank) for rank in range(4)] == ["busy"] * 4
        crew.signal(2, signal.SIGKILL)
        for rank in (0, 1, 3):
            culprit, unchanged, _ = crew.hear(rank)
            assert (culprit, unchanged) == ("w2", True)
        for rank in (0, 1, 3):
            crew.tell(rank, (2, [3, 0, 1]))
        for rank in (0, 1, 3):
            crew.result(rank)


@TRANSPORTS
def test_a_hung_peer_is_given_up_on_a_verdict_and_can_finish_nothing_later(options: MeshOptions) -> None:
    with Crew(3, hung_among_two, options) as crew:
        assert crew.hear(2) == "ready"
        crew.signal(2, signal.SIGSTOP)
        for rank in (0, 1):
            assert crew.hear(rank) == "running"
        for rank in (0, 1):
            crew.tell(rank, "w2")
        for rank in (0, 1):
            assert crew.hear(rank) == ("w2", True)
        for rank in (0, 1):
            crew.tell(rank, "next")
        crew.tell(2, "go on")
        crew.signal(2, signal.SIGCONT)
        assert crew.result(2)
        for rank in (0, 1):
            crew.tell(rank, "end")
            crew.result(rank)


def cut_one_connection(site: Site) -> None:
    """Rank 1 resets one of its connections to rank 0; both see it, rank 2 hears of it, all go on in the next view."""
    group = site.install(1)
    tensor = torch.ones(100_000)
    group.all_reduce([tensor]).wait(60)
    site.tell("ready")
    if site.rank == 1:
        site.mesh.engine.call(lambda: reset_one(site, site.hear()))
    try:
        while True:
            group.all_reduce([tensor.fill_(1)], sync=True).wait(60)
    except CollectiveAborted as error:
        culprit = error.culprit
    assert culprit in ("w0", "w1")
    assert (tensor == 1).all()
    site.tell("aborted")
    assert site.hear() == "next"
    site.install(2).all_reduce([tensor]).wait(60)
    assert (tensor == 3).all()


def reset_one(site: Site, inbound: bool) -> None:
    peer = site.mesh._peers["w0"]
    sock = peer._inbounds[0]._sock if inbound else peer._lanes[0].socket
    assert sock is not None
    if sock.family == socket.AF_UNIX:
        sock.shutdown(socket.SHUT_RDWR)
    else:
        ctypes.CDLL(None).connect(sock.fileno(), bytes(16), 16)  # to nowhere: the kernel resets


@TRANSPORTS
@pytest.mark.parametrize("inbound", [False, True], ids=["of what it sends", "of what it gets"])
def test_a_reset_connection_ends_the_view_and_not_more(options: MeshOptions, inbound: bool) -> None:
    with Crew(3, cut_one_connection, options) as crew:
        for rank in range(3):
            assert crew.hear(rank) == "ready"
        crew.tell(1, inbound)
        for rank in range(3):
            assert crew.hear(rank) == "aborted"
        for rank in range(3):
            crew.tell(rank, "next")
        crew.results()


def time_out_alone(site: Site) -> object:
    """Rank 2 is slow; the others' time runs out first, and it must hear that nobody waits any more."""
    group = site.install(1)
    group.barrier().wait(60)
    if site.rank == 2:
        site.hear()
        with pytest.raises(CollectiveAborted):
            group.all_reduce([torch.ones(100_000)]).wait(60)
        return None
    running = group.all_reduce([torch.ones(100_000)])
    site.tell("running")
    site.hear()
    with pytest.raises(CollectiveAborted) as caught:
        running.wait(0.5)
    site.tell("over")
    return isinstance(caught.value, CollectiveTimeout), caught.value.culprit


def test_a_slow_member_is_told_that_the_others_time_is_over() -> None:
    with Crew(3, time_out_alone) as crew:
        for word in ("running", "over"):
            for rank in (0, 1):
                assert crew.hear(rank) == word
            crew.tell(0, "go on")
            crew.tell(1, "go on")
        crew.tell(2, "go on")
        results = crew.results()
        assert (True, "w2") in results
        assert {culprit for _, culprit in results[:2]} == {"w2"}


def leave_after_the_last_barrier(site: Site) -> None:
    """Rank 0 waits for the slow rank 1 only, when rank 2 is gone already."""
    group = site.install(1)
    group.barrier().wait(60)
    tensor = torch.full((200_000,), float(site.rank))
    site.hear()
    group.all_reduce([tensor]).wait(60)
    assert (tensor == 3).all()
    group.barrier().wait(60)


@TRANSPORTS
def test_members_leave_one_after_the_other_and_nobody_loses_anything(options: MeshOptions) -> None:
    for _ in range(5):
        with Crew(3, leave_after_the_last_barrier, options) as crew:
            for rank in (2, 0, 1):
                crew.tell(rank, "go")
            crew.results()


def read_after_departure(site: Site) -> float:
    """A member that left has sent everything: who comes later still gets it."""
    group = site.install(1)
    group.barrier().wait(60)
    small, tensor = torch.zeros(3), torch.zeros(5000)
    if site.rank == 0:
        group.broadcast([small.fill_(7)], 0).wait(60)
        group.send(tensor.fill_(8), 1).wait(60)
        return 0.0
    until(lambda: site.mesh._peers["w0"].left is not None)
    group.broadcast([small], 0).wait(60)
    group.receive(tensor, None).wait(60)
    with pytest.raises(CollectiveAborted) as caught:
        group.barrier().wait(60)
    assert caught.value.culprit == "w0"
    return float(small.sum() + tensor[0])


@TRANSPORTS
def test_what_a_member_sent_before_it_left_is_still_received(options: MeshOptions) -> None:
    with Crew(2, read_after_departure, options) as crew:
        assert crew.results() == [0.0, 29.0]


def leave_a_child(site: Site) -> object:
    """Rank 1 forks a child that lives on when rank 1 is killed."""
    group = site.install(1)
    group.all_reduce([torch.ones(100_000)]).wait(60)
    if site.rank == 1:
        child = os.fork()
        if not child:
            site.hear()
            os._exit(0)
        site.tell(child)
        signal.pause()
    with pytest.raises(CollectiveAborted) as caught:
        group.barrier().wait(60)
    return caught.value.culprit


@TRANSPORTS
def test_a_child_that_outlives_its_worker_does_not_hide_the_death(options: MeshOptions) -> None:
    with Crew(2, leave_a_child, options) as crew:
        child = crew.hear(1)
        try:
            crew.signal(1)
            assert crew.result(0) == "w1"
            os.kill(child, 0)
        finally:
            os.kill(child, signal.SIGKILL)


def leave_in_the_middle(site: Site) -> object:
    group = site.install(1)
    group.barrier().wait(60)
    if site.rank == 2:
        return None
    running = group.all_reduce([torch.ones(BIG)])
    with pytest.raises(CollectiveAborted) as caught:
        running.wait(60)
    with contextlib.suppress(CollectiveAborted):
        group.barrier().wait(60)
        pytest.fail("a barrier without one of its members")
    return caught.value.culprit


def test_an_operation_that_needs_a_member_that_left_ends_naming_it() -> None:
    with Crew(3, leave_in_the_middle) as crew:
        assert crew.results() == ["w2", "w2", None]
