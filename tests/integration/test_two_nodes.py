"""Two nodes of one job on this machine, through one etcd cluster of three: what each may lose while the job goes on."""

import asyncio
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from etcd_cluster import EtcdCluster
from launched_node import Job, Node, job

from elastic_run.runtime.edge import store_access
from elastic_run.runtime.protocol.config import StoreConfig
from elastic_run.runtime.protocol.ids import JobId
from elastic_run.runtime.protocol.records import EventKind, JobRecords, JobState, decode_job, namespace

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parent.parent / "scripts" / "steady_steps.py"
OUTAGE_S = 20.0
STEPS_TO_THE_END = 5


@pytest.fixture(scope="module")
def cluster() -> Iterator[EtcdCluster]:
    directory = Path(tempfile.mkdtemp(dir="/tmp"))
    with EtcdCluster(directory=directory) as running:
        yield running
    shutil.rmtree(directory)


@pytest.fixture
def directory() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(dir="/tmp"))
    yield path
    shutil.rmtree(path)


def records(cluster: EtcdCluster, job_id: str) -> JobRecords:
    async def read() -> JobRecords:
        store = store_access.open_store(StoreConfig(endpoints=cluster.endpoints), namespace(JobId(job_id)))
        try:
            items = (await store.list("")).items
        finally:
            await store.close()
        return decode_job(JobId(job_id), ((item.key, item.value) for item in items))

    return asyncio.run(read())


def leading(cluster: EtcdCluster, running: Job, job_id: str, *, not_candidate: str = "") -> tuple[str, Node]:
    """The candidate that leads and its node, waited for."""

    def found() -> str | None:
        leader = records(cluster, job_id).leader
        return None if leader is None or leader.candidate == not_candidate else leader.candidate

    candidate = running.wait("leader", found)
    name = candidate.rpartition("-")[0]
    return candidate, next(node for node in reversed(running.nodes) if node.name == name)


def world(size: int) -> Callable[[object], bool]:
    return lambda step: getattr(step, "world_size") == size  # noqa: B009


def members_of(nodes: tuple[Node, ...]) -> dict[str, tuple[int, ...]]:
    return {node.name: node.workers for node in nodes}


def test_a_job_of_two_nodes_outlives_agents_controllers_and_the_store(cluster: EtcdCluster, directory: Path) -> None:
    flags = ("--nnodes=1:2", "--rdzv-id=outlives", "--max-restarts=0", "--last-call=30")
    with job(directory=directory, endpoints=cluster.endpoints, script=SCRIPT, flags=flags) as running:
        a, b = running.start("a"), running.start("b")
        running.wait_for_step("step of both", world(2), after_s=0.0)

        b = lose_and_return(running, b)
        workers = members_of((a, b))
        candidate, led = leading(cluster, running, "outlives")
        controller = led.controller
        assert controller is not None
        os.kill(controller, signal.SIGKILL)
        leading(cluster, running, "outlives", not_candidate="")  # the key of the dead one stands until its lease ends
        running.wait("new leader", lambda: _elections(cluster) > 1 or None)
        running.wait_for_step("step under the new leader", world(2), after_s=time.monotonic())
        assert members_of((a, b)) == workers

        outage_s = time.monotonic()
        for member in range(cluster.size):
            cluster.pause(member)
        running.wait_for_step("step after a long outage", world(2), after_s=outage_s + OUTAGE_S)
        for member in range(cluster.size):
            cluster.resume(member)
        assert members_of((a, b)) == workers
        assert longest_pause_s(running, outage_s) < OUTAGE_S / 2

        b = lose_and_return(running, b)
        silence_is_ended_by_the_lease(running, b)

        running.end_after(STEPS_TO_THE_END)
        assert (a.wait(), b.wait()) == (0, 0), running.outputs()
        assert_losses_agree(running)
    found = records(cluster, "outlives")
    assert found.result is not None and found.result.state is JobState.SUCCEEDED
    assert (found.nodes, found.leader) == ((), None)
    assert_silence_ended(found)
    assert list((directory / "run").iterdir()) == []
