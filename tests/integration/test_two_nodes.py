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
from launched_node import Job, Node, Step, job

from elastic_run.runtime.edge import store_access
from elastic_run.runtime.protocol.config import StoreConfig
from elastic_run.runtime.protocol.ids import JobId
from elastic_run.runtime.protocol.records import EventKind, JobRecords, JobState, decode_job, namespace

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parent.parent / "scripts" / "steady_steps.py"
OUTAGE_S = 20.0
STEPS_TO_THE_END = 5
SAVE_EVERY = 5  # as in the script


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


def records(running: Job) -> JobRecords:
    """What etcd holds of the job now."""

    async def read() -> JobRecords:
        store = store_access.open_store(StoreConfig(endpoints=running.endpoints), namespace(JobId(running.job_id)))
        try:
            items = (await store.list("")).items
        finally:
            await store.close()
        return decode_job(JobId(running.job_id), ((item.key, item.value) for item in items))

    return asyncio.run(read())


def seen(running: Job, kind: EventKind) -> int:
    return sum(event.kind is kind for event in records(running).events)


def of_world(size: int) -> Callable[[Step], bool]:
    return lambda step: step.world_size == size


def lose_and_return(running: Job, lost: Node) -> Node:
    """kill -9 the agent of a node: the other goes on alone. Start it again: it is back in."""
    killed_s = time.monotonic()
    lost.kill_agent()
    assert lost.wait() == 1
    alone = running.wait_for_step("step of the survivor", of_world(1), after_s=killed_s)
    back = running.start(lost.name)
    running.wait_for_step("step of both again", of_world(2), after_s=alone.at_s)
    return back


def workers_of(*nodes: Node) -> list[tuple[int, ...]]:
    return [node.workers for node in nodes]


def leading(running: Job, nodes: tuple[Node, ...]) -> Node:
    leader = running.wait("leader", lambda: records(running).leader)
    return next(node for node in nodes if leader.candidate.startswith(f"{node.name}-"))


def kill_leader(running: Job, nodes: tuple[Node, ...]) -> None:
    """kill -9 the leading controller: no worker is restarted, and steps go on."""
    controller = leading(running, nodes).controller
    assert controller is not None
    workers, elections = workers_of(*nodes), seen(running, EventKind.LEADER_ELECTED)
    os.kill(controller, signal.SIGKILL)
    running.wait("next leader", lambda: seen(running, EventKind.LEADER_ELECTED) > elections or None)
    running.wait_for_step("step under the next leader", of_world(2), after_s=time.monotonic())
    assert workers_of(*nodes) == workers


def stop_etcd(running: Job, cluster: EtcdCluster, nodes: tuple[Node, ...]) -> None:
    """SIGSTOP all of etcd for a while: no worker is restarted, and steps go on meanwhile."""
    workers, stopped_s = workers_of(*nodes), time.monotonic()
    for member in range(cluster.size):
        cluster.pause(member)
    try:
        running.wait_for_step("step late in the outage", of_world(2), after_s=stopped_s + OUTAGE_S)
    finally:
        for member in range(cluster.size):
            cluster.resume(member)
    during = [step.step for step in running.steps if stopped_s < step.at_s]
    assert during == list(range(during[0], during[0] + len(during)))  # none was done twice: nobody restarted
    assert workers_of(*nodes) == workers


def silence(running: Job, node: Node) -> None:
    """SIGSTOP an agent and its workers: only the lease tells, and ends it; let go, the node comes back."""
    stopped_s, lost = time.monotonic(), seen(running, EventKind.NODE_LOST)
    node.signal_all(signal.SIGSTOP)
    alone = running.wait_for_step("step without the silent node", of_world(1), after_s=stopped_s)
    assert seen(running, EventKind.NODE_LOST) > lost
    event = [event for event in records(running).events if event.kind is EventKind.NODE_LOST][-1]
    assert (event.node, "its lease is gone" in event.message) == (node.name, True), event
    print(f"the silent node: {event.message}; next step {alone.at_s - stopped_s:.1f} s after its last word")
    node.signal_all(signal.SIGCONT)
    running.wait_for_step("step with the node that was silent", of_world(2), after_s=alone.at_s)


def assert_history(running: Job) -> None:
    """Every restart went on from a snapshot, and a step done twice gave the same loss."""
    losses: dict[int, float] = {}
    newest = 0
    for step in running.steps:
        assert newest - SAVE_EVERY < step.step <= newest + 1, (newest, step)
        newest = max(newest, step.step)
        assert step.loss == pytest.approx(losses.setdefault(step.step, step.loss), rel=1e-3), step


def test_a_job_of_two_nodes_outlives_agents_controllers_and_the_store(cluster: EtcdCluster, directory: Path) -> None:
    flags = ("--nnodes=1:2", "--max-restarts=0", "--last-call=30")
    with job(directory=directory, cluster=cluster, job_id="outlives", script=SCRIPT, flags=flags) as running:
        a, b = running.start("a"), running.start("b")
        running.wait_for_step("step of both", of_world(2), after_s=0.0)
        b = lose_and_return(running, b)
        kill_leader(running, (a, b))
        stop_etcd(running, cluster, (a, b))
        silence(running, b)  # losses are seen to again
        running.end_after(STEPS_TO_THE_END)
        assert (a.wait(), b.wait()) == (0, 0), running.outputs()
        found = records(running)
        assert found.result is not None and found.result.state is JobState.SUCCEEDED
        assert (found.nodes, found.leader) == ((), None)
        assert_history(running)
        assert list(running.run_root.iterdir()) == []


def test_a_worker_whose_agent_is_frozen_does_nothing_beside_the_view_that_replaced_it(
    cluster: EtcdCluster, directory: Path
) -> None:
    flags = ("--nnodes=1:2", "--max-restarts=0", "--last-call=1")
    with job(directory=directory, cluster=cluster, job_id="frozen", script=SCRIPT, flags=flags) as running:
        a = running.start("a")
        running.wait_for_step("step of a alone", of_world(1), after_s=0.0)
        agent, (worker,) = a.agent, a.workers
        assert agent is not None
        os.kill(agent, signal.SIGSTOP)
        frozen_s = time.monotonic()
        b = running.start("b")
        first = running.wait_for_step("step of the next view", lambda step: step.pid != worker, after_s=frozen_s)
        running.wait_for_step("more of them", lambda step: step.step >= first.step + 10, after_s=first.at_s)
        assert [step for step in running.steps if step.pid == worker and step.at_s > first.at_s] == []
        os.kill(agent, signal.SIGCONT)
        running.wait_for_step("step of both", of_world(2), after_s=first.at_s)
        running.end_after(STEPS_TO_THE_END)
        assert (a.wait(), b.wait()) == (0, 0), running.outputs()
        assert [step for step in running.steps if step.pid == worker and step.at_s > first.at_s] == []


def test_a_survivor_below_the_minimum_holds_until_the_node_returns(cluster: EtcdCluster, directory: Path) -> None:
    flags = ("--nnodes=2", "--max-restarts=0")
    with job(directory=directory, cluster=cluster, job_id="fixed", script=SCRIPT, flags=flags) as running:
        nodes = (running.start("a"), running.start("b"))
        running.wait_for_step("step of both", of_world(2), after_s=0.0)
        survivor = leading(running, nodes)
        lost = next(node for node in nodes if node is not survivor)
        lost.kill_agent()
        assert lost.wait() == 1
        running.wait("proposal to hold", lambda: _held(running) or None)
        running.wait("end of the survivor's worker", lambda: not survivor.workers or None)
        done = running.steps[-1]
        back = running.start(lost.name)
        running.wait_for_step("step of both again", of_world(2), after_s=done.at_s)
        running.end_after(STEPS_TO_THE_END)
        assert (survivor.wait(), back.wait()) == (0, 0), running.outputs()
        assert {step.world_size for step in running.steps} == {2}
        assert_history(running)


def _held(running: Job) -> bool:
    last = records(running).views[-1]
    return len(last.members) == 1 and "1 of at least 2" in last.reason


def test_a_worker_that_keeps_failing_fails_the_job_on_both_nodes(cluster: EtcdCluster, directory: Path) -> None:
    flags = ("--nnodes=2", "--max-restarts=1")
    arguments = ("--fail-at=7",)
    with job(
        directory=directory, cluster=cluster, job_id="fails", script=SCRIPT, flags=flags, script_arguments=arguments
    ) as running:
        nodes = (running.start("a"), running.start("b"))
        assert [node.wait() for node in nodes] == [1, 1], running.outputs()
        found = records(running)
        assert [view.restart_count for view in found.views] == [0, 1]
        assert found.result is not None and found.result.state is JobState.FAILED
        assert "rank 1 on node" in found.result.message and "asked to fail at step 7" in found.result.message
        for node in nodes:
            assert found.result.message in node.output(), node.output()
        assert len({step.pid for step in running.steps}) == 2
