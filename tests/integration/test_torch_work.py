"""Futures and works of the torch facade, in one process."""

import threading
from collections.abc import Iterator

import pytest
import torch

from elastic_run.collectives.endpoint import DataView
from elastic_run.collectives.errors import (
    CollectiveAborted,
    CollectiveError,
    CollectiveMismatch,
    CollectiveTimeout,
)
from elastic_run.collectives.group import Group
from elastic_run.collectives.mesh import Mesh
from elastic_run.collectives.staging import Staging
from elastic_run.collectives.torch_errors import as_torch
from elastic_run.collectives.torch_futures import THREADS, FutureThreads, Promise
from elastic_run.collectives.torch_work import ElasticWork

LIMIT_S = 30.0


@pytest.fixture
def threads() -> Iterator[FutureThreads]:
    before = threading.active_count()
    threads = FutureThreads()
    yield threads
    threads.close()
    assert threading.active_count() == before


@pytest.fixture
def alone() -> Iterator[Group]:
    mesh = Mesh("rank0", b"x" * 32)
    try:
        yield mesh.install(DataView(number=1, members=(mesh.endpoint,)))
    finally:
        mesh.close()


def test_jobs_that_wait_for_each_other_all_run(threads: FutureThreads) -> None:
    everyone = threading.Barrier(THREADS)
    done = threading.Semaphore(0)

    def job() -> None:
        everyone.wait(LIMIT_S)
        done.release()

    for _ in range(3 * THREADS):
        threads.submit(job)
    assert all(done.acquire(timeout=LIMIT_S) for _ in range(3 * THREADS))


def test_what_was_submitted_is_done_before_close_returns(threads: FutureThreads) -> None:
    done: list[int] = []
    for number in range(100):
        threads.submit(lambda number=number: done.append(number))  # type: ignore[misc]
    threads.close()
    assert sorted(done) == list(range(100))
    threads.submit(lambda: done.append(100))
    assert done[-1] == 100


def test_a_promise_gives_its_value_to_who_waits_and_to_callbacks() -> None:
    promise = Promise()
    doubled = promise.future.then(lambda future: future.value()[0] * 2)
    promise.complete([torch.ones(2)])
    assert promise.future.wait()[0].tolist() == [1, 1]  # type: ignore[index]
    assert doubled.wait().tolist() == [2, 2]


def test_a_failed_promise_raises_the_errors_text() -> None:
    promise = Promise()
    promise.fail(as_torch(CollectiveAborted("its process ended", "rank3")))
    with pytest.raises(RuntimeError, match=r"its process ended \(culprit: rank3\)"):
        promise.future.wait()


@pytest.mark.parametrize(
    "error",
    [
        CollectiveAborted("gone", "rank1"),
        CollectiveTimeout("late", "rank1"),
        CollectiveMismatch("sum here, max there"),
        CollectiveError("broken"),
    ],
)
def test_every_error_is_both_ours_and_torchs(error: CollectiveError) -> None:
    translated = as_torch(error)
    assert isinstance(translated, type(error))
    assert isinstance(translated, torch.distributed.DistBackendError)
    assert translated.__cause__ is error
    assert as_torch(translated) is translated


def test_foreign_errors_stay_what_they_are() -> None:
    error = KeyError("x")
    assert as_torch(error) is error


def test_results_are_in_place_however_the_end_is_seen(alone: Group, threads: FutureThreads) -> None:
    for see in ("wait", "poll", "future"):
        target = torch.zeros(3)
        staging = Staging(always=True)
        work = ElasticWork([(alone.all_gather(staging.write(target), torch.ones(3)), staging)], [target], threads)
        if see == "wait":
            assert work.wait()
        elif see == "poll":
            tick = threading.Event()
            for _ in range(3000):
                if work.is_completed():
                    break
                tick.wait(0.01)
        else:
            work.get_future().wait()
        assert target.tolist() == [1, 1, 1]
        assert work.is_success()
        assert work.exception() is None
        assert work.result() == [target]


def test_a_failed_work_says_so_and_leaves_the_target_alone(alone: Group, threads: FutureThreads) -> None:
    alone.mesh.interrupt("the test says so")
    target = torch.zeros(3)
    staging = Staging(always=True)
    work = ElasticWork([(alone.all_gather(staging.write(target), torch.ones(3)), staging)], [target], threads)
    with pytest.raises(torch.distributed.DistBackendError, match="the test says so"):
        work.wait()
    assert work.is_completed()
    assert not work.is_success()
    assert isinstance(work.exception(), CollectiveAborted)
    with pytest.raises(RuntimeError, match="the test says so"):
        work.get_future().wait()
    assert target.tolist() == [0, 0, 0]


def test_a_work_of_no_operations_is_over(threads: FutureThreads) -> None:
    work = ElasticWork([], [], threads)
    assert work.wait()
    assert work.is_completed()
    assert work.get_future().wait() == []
    with pytest.raises(ValueError, match="source"):
        work.source_rank()
