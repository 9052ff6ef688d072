"""The progress engine: who drives, what callbacks may do, how it ends."""

import os
import threading
import time

import pytest
import torch
from mesh_workers import SECRET, meshes, until

from elastic_run.collectives.endpoint import DataView
from elastic_run.collectives.engine import Engine, Gate
from elastic_run.collectives.errors import CollectiveAborted
from elastic_run.collectives.mesh import Mesh
from elastic_run.collectives.operation import Operation
from elastic_run.runtime.protocol.errors import InvariantViolated

WAIT_S = 60.0


@pytest.fixture
def engine() -> "Engine":
    return Engine(lambda error: None)


def both(one: Mesh, two: Mesh, number: int = 1) -> DataView:
    return DataView(number=number, members=(one.endpoint, two.endpoint))


def test_one_thread_drives_at_a_time(engine: Engine) -> None:
    inside: list[int] = []
    counted: list[int] = []

    def step() -> None:
        inside.append(1)
        assert len(inside) == 1
        os.sched_yield()
        inside.pop()
        counted.append(1)

    def many() -> None:
        for _ in range(200):
            engine.call(step)

    threads = [threading.Thread(target=many) for _ in range(6)]
    for thread in threads:
        thread.start()
    for _ in range(200):
        engine.post(step)
    for thread in threads:
        thread.join(WAIT_S)
    until(lambda: len(counted) == 7 * 200)
    engine.close(lambda: None)


def test_who_waits_is_not_held_up_by_who_waits_longer(engine: Engine) -> None:
    long, short = Gate(), Gate()
    first = threading.Thread(target=lambda: engine.wait(long, WAIT_S))
    first.start()
    second = threading.Thread(target=lambda: engine.wait(short, WAIT_S))
    second.start()
    engine.post(short.open)
    second.join(WAIT_S)
    assert not second.is_alive()
    assert first.is_alive()
    engine.post(long.open)
    first.join(WAIT_S)
    assert not first.is_alive()
    engine.close(lambda: None)


def test_a_wait_ends_with_its_time(engine: Engine) -> None:
    assert not engine.wait(Gate(), 0.01)
    engine.close(lambda: None)


def test_timers_run_in_order_and_not_when_cancelled(engine: Engine) -> None:
    ran: list[str] = []
    end = Gate()

    def set_timers() -> None:
        engine.after(0.02, lambda: ran.append("second"))
        engine.after(0.01, lambda: ran.append("first"))
        engine.cancel(engine.after(0.015, lambda: ran.append("never")))
        engine.after(0.03, end.open)

    engine.call(set_timers)
    assert engine.wait(end, WAIT_S)
    assert ran == ["first", "second"]
    engine.close(lambda: None)


def test_an_error_in_a_call_is_the_callers(engine: Engine) -> None:
    def fail() -> None:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        engine.call(fail)
    engine.close(lambda: None)


def test_a_closed_engine_keeps_nobody_waiting(engine: Engine) -> None:
    before = len(os.listdir("/proc/self/fd"))
    engine.close(lambda: None)
    engine.close(lambda: None)
    assert len(os.listdir("/proc/self/fd")) == before - 2
    ran: list[int] = []
    engine.call(lambda: ran.append(1))
    engine.post(lambda: ran.append(2))
    assert ran == [1, 2]
    assert not engine.wait(Gate(), WAIT_S)


def test_waiting_in_a_callback_is_refused() -> None:
    with meshes(2) as (one, two):
        groups = [mesh.install(both(one, two)) for mesh in (one, two)]
        caught: list[BaseException] = []

        def wait_inside(_: Operation) -> None:
            try:
                groups[0].barrier().wait(WAIT_S)
            except InvariantViolated as error:
                caught.append(error)

        first = groups[0].all_reduce([torch.ones(4)])
        first.add_done_callback(wait_inside)
        for operation in (first, groups[1].all_reduce([torch.ones(4)])):
            operation.wait(WAIT_S)
        until(lambda: bool(caught))


def test_a_callback_may_start_the_next_operation() -> None:
    with meshes(2) as (one, two):
        groups = [mesh.install(both(one, two)) for mesh in (one, two)]
        values = [torch.ones(4), torch.ones(4)]
        nexts: list[Operation] = []
        running = [groups[0].all_reduce([values[0]])]
        running[0].add_done_callback(lambda _: nexts.append(groups[0].all_reduce([values[0]])))
        groups[1].all_reduce([values[1]]).wait(WAIT_S)
        nexts.append(groups[1].all_reduce([values[1]]))
        until(lambda: len(nexts) == 2)
        for operation in nexts:
            operation.wait(WAIT_S)
        assert all((value == 4).all() for value in values)


def test_a_callback_is_called_once_whenever_it_comes() -> None:
    with meshes(2) as (one, two):
        groups = [mesh.install(both(one, two)) for mesh in (one, two)]
        called: list[str] = []
        running = [group.barrier() for group in groups]
        running[0].add_done_callback(lambda _: called.append("early"))
        for operation in running:
            operation.wait(WAIT_S)
        running[0].add_done_callback(lambda _: called.append("late"))
        until(lambda: len(called) == 2)
        assert sorted(called) == ["early", "late"]


def test_many_threads_may_wait_for_one_operation() -> None:
    with meshes(2) as (one, two):
        groups = [mesh.install(both(one, two)) for mesh in (one, two)]
        waited = groups[0].all_reduce([torch.ones(1000)])
        threads = [threading.Thread(target=waited.wait, args=(WAIT_S,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        groups[1].all_reduce([torch.ones(1000)]).wait(WAIT_S)
        for thread in threads:
            thread.join(WAIT_S)
        assert not any(thread.is_alive() for thread in threads)
        assert waited.error is None


def test_an_interrupt_within_a_turn_closes_the_mesh_as_a_whole() -> None:
    with meshes(2) as (one, two):
        groups = [mesh.install(both(one, two)) for mesh in (one, two)]
        for operation in [group.barrier() for group in groups]:
            operation.wait(WAIT_S)
        waiting = groups[1].barrier()

        def interrupt() -> None:
            raise KeyboardInterrupt

        def post_when_driven() -> None:  # signals reach the main thread only, in its own turns
            until(lambda: one.engine._foreign)
            one.engine.post(interrupt)

        poster = threading.Thread(target=post_when_driven)
        poster.start()
        with pytest.raises(KeyboardInterrupt):
            one.engine.wait(Gate(), WAIT_S)
        poster.join(WAIT_S)
        with pytest.raises(CollectiveAborted):
            groups[0].barrier().wait(WAIT_S)
        with pytest.raises(CollectiveAborted):
            waiting.wait(WAIT_S)
        with pytest.raises(CollectiveAborted):
            one.install(both(one, two, 2))


def test_a_mesh_may_be_closed_in_a_callback_and_again_outside() -> None:
    mesh = Mesh("alone", SECRET)
    group = mesh.install(DataView(number=1, members=(mesh.endpoint,)))
    closed = threading.Event()

    def close(_: Operation) -> None:
        mesh.close()
        closed.set()

    operation = group.barrier()
    operation.add_done_callback(close)
    assert closed.wait(WAIT_S)
    mesh.close()
    with pytest.raises(CollectiveAborted):
        group.barrier().wait(WAIT_S)
    until(lambda: not mesh.engine._thread.is_alive())


def test_closing_ends_what_runs_and_what_comes_after() -> None:
    with meshes(2) as (one, two):
        groups = [mesh.install(both(one, two)) for mesh in (one, two)]
        for operation in [group.barrier() for group in groups]:
            operation.wait(WAIT_S)
        running = groups[0].all_reduce([torch.ones(10)])
        closers = [threading.Thread(target=one.close) for _ in range(3)]
        for thread in closers:
            thread.start()
        with pytest.raises(CollectiveAborted):
            running.wait(WAIT_S)
        for thread in closers:
            thread.join(WAIT_S)
        with pytest.raises(CollectiveAborted):
            groups[0].all_reduce([torch.ones(10)], sync=True).wait(WAIT_S)
        with pytest.raises(CollectiveAborted):
            one.group("another")
        with pytest.raises(CollectiveAborted):
            one.install(both(one, two, 2))


def test_closing_waits_for_a_silent_peer_but_not_for_long() -> None:
    with meshes(2) as (one, two):
        groups = [mesh.install(both(one, two)) for mesh in (one, two)]
        for operation in [group.barrier() for group in groups]:
            operation.wait(WAIT_S)
        stand_still = Gate()
        two.engine.post(lambda: stand_still.event.wait(WAIT_S))
        one.close()
        assert not one.engine._thread.is_alive()
        stand_still.event.set()


def test_a_forked_child_may_not_reduce_and_harms_nobody() -> None:
    with meshes(2) as (one, two):
        groups = [mesh.install(both(one, two)) for mesh in (one, two)]
        for operation in [group.barrier() for group in groups]:
            operation.wait(WAIT_S)
        child = os.fork()
        if not child:
            verdict = 1
            try:
                groups[0].barrier().wait(5)
            except CollectiveAborted:
                verdict = 0
            finally:
                one.close()
                os._exit(verdict)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        for operation in [group.barrier() for group in groups]:
            operation.wait(WAIT_S)


def test_idle_connections_cost_no_processor_time() -> None:
    with meshes(3) as three:
        view = DataView(number=1, members=tuple(mesh.endpoint for mesh in three))
        for operation in [mesh.install(view).all_reduce([torch.ones(50_000)]) for mesh in three]:
            operation.wait(WAIT_S)
        time.sleep(0.1)  # what the burst left behind
        before_s, begin_s = time.process_time(), time.monotonic()
        threading.Event().wait(2.0)
        assert time.process_time() - before_s < 0.01 * (time.monotonic() - begin_s)
