"""Controller and agents together, under any faults: once they end, the job runs with all it may have, and ends well.

The world is small and every step is chosen, so a failing story shrinks to a few lines.
"""

import signal
from collections.abc import Callable

from hypothesis import given, settings
from hypothesis import strategies as st
from small_world import SmallWorld

from elastic_run.runtime.protocol.messages import AgentPhase
from elastic_run.runtime.protocol.records import JobState

Step = Callable[[SmallWorld], None]
NODES = st.sampled_from("abc")


def step(name: str, *args: object, **options: object) -> Step:
    return lambda world: getattr(world, name)(*args, **options)


def busy(rounds: int) -> Step:
    """A while without faults, too short to settle everything."""
    return lambda world: world.settle(rounds)


def chatter(node: str, count: int) -> Step:
    def act(world: SmallWorld) -> None:
        for _ in range(count):
            world.down(node)
            world.local(node)
            world.up(node)

    return act


STEPS: st.SearchStrategy[Step] = st.one_of(
    st.builds(step, st.sampled_from(("up", "down", "local", "sync", "connect")), NODES),
    st.builds(chatter, NODES, st.integers(1, 4)),
    st.builds(step, st.sampled_from(("cut", "kill", "start", "connect")), NODES),
    st.builds(busy, st.integers(1, 3)),
    st.builds(step, st.just("tick"), st.sampled_from((0.1, 0.6, 3.0, 11.0))),
    st.builds(lambda node: step("worker_ends", node, well=False), NODES),
    st.builds(lambda node: step("worker_ends", node, well=True), NODES),
    st.builds(lambda node: step("signal", node, signal.SIGTERM), NODES),
    st.just(step("expire")),
    st.just(step("take_over")),
)


def runs(world: SmallWorld) -> bool:
    """Every node that may is in the installed view, and says so."""
    core = world.leader.core
    if core.view is None or core.change is not None:
        return False
    inside = [world.stations.get(member.node) for member in core.view.members]
    wanted = min(len(world.stations), core.job.nodes_max)
    states = [station.agent.core for station in inside if station is not None]
    return len(states) == wanted and all(
        agent.view == core.view.number and agent.phase in (AgentPhase.RUNNING, AgentPhase.FINISHED) for agent in states
    )


def ended(world: SmallWorld) -> bool:
    return world.leader.core.result is not None


def settled(world: SmallWorld) -> bool:
    return ended(world) or runs(world)


def story(world: SmallWorld) -> str:
    core = world.leader.core
    agents = {
        n: (s.agent.core.phase.value, s.agent.core.view, s.agent.core.aim.value) for n, s in world.stations.items()
    }
    return f"view {core.view}, change {core.change}, result {core.result}, {core.waiting_for}, agents {agents}"


@settings(max_examples=60, deadline=None)
@given(
    nodes=st.sampled_from(("1:2", "1:3", "2:3", "3")),
    max_restarts=st.integers(0, 2),
    steps=st.lists(STEPS, min_size=5, max_size=40),
)
def test_once_faults_end_the_job_runs_with_all_it_may_have_and_then_ends(
    nodes: str, max_restarts: int, steps: list[Step]
) -> None:
    world = SmallWorld(nodes, max_restarts)
    for node in "abc":
        world.start(node)
    world.settle(8, until=runs)
    assert runs(world), story(world)
    for act in steps:
        act(world)
    world.settle(3)  # who is leaving leaves
    for node in "abc":
        world.start(node)
    if world.leader.core.result is None:
        finishing = any(s.agent.core.phase is AgentPhase.FINISHED for s in world.stations.values())
        world.settle(200, until=settled)
        assert finishing or settled(world), story(world)
    for _ in range(3):
        for node in "abc":
            world.worker_ends(node, well=True)
        world.settle(12, until=ended)
    result = world.leader.core.result
    assert result is not None, story(world)
    failed = result.state is JobState.FAILED
    assert not failed or "restart" in result.message or "on hold" in result.message, story(world)
    world.settle(10, until=lambda w: not w.stations)
    assert not world.stations, f"agents outlive the job: {story(world)}"
