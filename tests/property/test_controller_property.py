"""Any events in any order: the controller core keeps its invariants.

The harness asserts what is sent is durable; here: numbers grow, members live, installs were acknowledged. Events need
not make sense: an agent may claim any view and phase.
"""

import contextlib
from collections.abc import Callable

from builders import JOB_ID, ControllerHarness, LeaderDied, failure, state
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_run.controller.actions import Persist
from elastic_run.controller.suspicion import Condition
from elastic_run.runtime.protocol.ids import NodeId, ViewNumber
from elastic_run.runtime.protocol.messages import (
    AgentMessage,
    AgentPhase,
    Leaving,
    Prepared,
    WorkersFailed,
    WorkersFinished,
)
from elastic_run.runtime.protocol.records import decode_job
from elastic_run.runtime.protocol.view import Member, View, ViewStatus

Step = Callable[["WatchedHarness"], None]


class WatchedHarness(ControllerHarness):
    """Checks every view that is written."""

    def __init__(self, nodes: str, max_restarts: int) -> None:
        self.highest_written = 0
        self.charged = 0
        self.acknowledged: set[tuple[str, str, int]] = set()
        super().__init__(nodes, max_restarts, last_call_s=3.0, join_s=30.0)

    def join(self, node: str, life: str = "1", lease: bool = True, **changes: object) -> None:
        said = changes.get("state")
        if said is not None and getattr(said, "phase", None) is AgentPhase.PREPARED:
            self.acknowledged.add((node, life, getattr(said, "view", 0)))
        super().join(node, life, lease, **changes)

    def say(self, node: str, message: AgentMessage) -> None:
        if node not in self.connections:
            return
        if isinstance(message, Prepared):
            self.acknowledged.add((node, self.lives[node], message.view))
        super().say(node, message)

    def _persist(self, action: Persist) -> None:
        super()._persist(action)
        for put in action.puts:
            if isinstance(put.record, View):
                self._check(put.record)

    def _check(self, it: View) -> None:
        assert it.restart_count >= self.charged or it.status is ViewStatus.ABANDONED, "charges never shrink"
        if it.status is ViewStatus.PROPOSED:
            assert it.number > self.highest_written, "view numbers grow"
            self.highest_written, self.charged = it.number, it.restart_count
            assert 1 <= len(it.members) <= self.job.nodes_max
            assert all(self._lives(m) for m in it.members), "a node that is not alive was proposed"
        if it.status is ViewStatus.INSTALLED:
            assert self.job.nodes_min <= len(it.members) <= self.job.nodes_max
            missing = [m.node for m in it.members if (m.node, m.incarnation[1:], it.number) not in self.acknowledged]
            assert not missing, f"installed without the word of {missing}"

    def _lives(self, it: Member) -> bool:
        node = self.core.roster.holder(it)
        return node is not None and node.condition is Condition.ALIVE and node.connection is not None


NODES = st.sampled_from("abcd")
LIVES = st.sampled_from("12")
VIEWS = st.integers(0, 6)
STATES = st.builds(
    state,
    phase=st.sampled_from([phase.value for phase in AgentPhase]),
    view=VIEWS,
    step=st.integers(0, 100),
    rate_hz=st.sampled_from((0.0, 0.5, 20.0)),
)
FAILURES = st.builds(failure, rank=st.integers(0, 7), node=NODES, age_s=st.sampled_from((0.0, 0.2, 5.0)))


def ticks(seconds: float) -> Step:
    return lambda h: h.tick(seconds, step_s=max(0.1, seconds / 8))


def joins(node: str, life: str, said: object, port: int | None, lease: bool) -> Step:
    return lambda h: h.join(node, life, lease, state=said, master_port=port)


def fresh(node: str, life: str) -> Step:
    return lambda h: h.join(node, life)


def cuts(node: str) -> Step:
    return lambda h: h.cut(node) if node in h.connections else None


def leases(node: str, life: str, seen: bool) -> Step:
    return lambda h: h.lease(node, life) if seen else h.unlease(node, life)


def obeys(nodes: str) -> Step:
    """These nodes acknowledge whatever is being prepared, then say that they run."""

    def act(h: WatchedHarness) -> None:
        for node in nodes:
            change = h.core.change
            known = h.core.roster.get(NodeId(node))
            if change is not None and known is not None and change.view.holds(known.node, known.incarnation):
                h.say(node, Prepared(view=change.view.number, master_port=4000))
        view = h.core.view
        for it in view.members if view is not None else ():
            if (
                view is not None
                and h.core.roster.holder(it) is not None
                and it.node in nodes
                and it.node in h.connections
            ):
                h.beat(it.node, "running", view.number, 10, 2.0)

    return act


def fails(node: str, what: object, ahead: int) -> Step:
    def act(h: WatchedHarness) -> None:
        number = h.core.view.number if h.core.view else 0
        h.say(node, WorkersFailed(view=ViewNumber(max(0, number - ahead)), failures=(what,)))  # type: ignore[arg-type]

    return act


def says(node: str, message: AgentMessage) -> Step:
    return lambda h: h.say(node, message)


def beats(node: str, said: object) -> Step:
    return lambda h: h.beat(node, said.phase, said.view, said.step_max) if node in h.connections else None  # type: ignore[attr-defined]


def leader_dies(after: int, step: Step) -> Step:
    """The leader sees only so many more actions executed; the next one begins with what is durable."""

    def act(h: WatchedHarness) -> None:
        h.actions_left = after
        with contextlib.suppress(LeaderDied):
            step(h)
        h.take_over()

    return act


ORDINARY: st.SearchStrategy[Step] = st.one_of(
    st.builds(fresh, NODES, LIVES),
    st.builds(obeys, st.sampled_from(("abcd", "ab", "cd", "a"))),
    st.builds(obeys, st.just("abcd")),
    st.builds(joins, NODES, LIVES, STATES, st.none() | st.just(4000), st.booleans()),
    st.builds(cuts, NODES),
    st.builds(leases, NODES, LIVES, st.booleans()),
    st.builds(ticks, st.sampled_from((0.0, 0.4, 1.0, 6.0, 70.0))),
    st.builds(fails, NODES, FAILURES, st.integers(0, 1)),
    st.builds(says, NODES, st.builds(lambda v: WorkersFinished(view=ViewNumber(v)), VIEWS)),
    st.builds(says, NODES, st.builds(lambda v: Prepared(view=ViewNumber(v), master_port=1), VIEWS)),
    st.builds(says, NODES, st.just(Leaving(reason=""))),
    st.builds(beats, NODES, STATES),
)
STEPS = st.one_of(ORDINARY, ORDINARY, ORDINARY, ORDINARY, ORDINARY, st.builds(leader_dies, st.integers(0, 6), ORDINARY))


def begin(nodes: str, max_restarts: int, there: int) -> WatchedHarness:
    """A job whose first nodes joined, and run if that many are enough."""
    h = WatchedHarness(nodes, max_restarts)
    for node in "abcd"[:there]:
        h.join(node)
    ticks(4.0)(h)
    obeys("abcd")(h)
    return h


@settings(max_examples=100, deadline=None)
@given(
    nodes=st.sampled_from(("1", "2", "1:2", "1:4", "2:3", "3:4")),
    max_restarts=st.integers(0, 2),
    there=st.integers(0, 4),
    steps=st.lists(STEPS, min_size=15, max_size=60),
)
def test_any_events_in_any_order_keep_every_invariant(
    nodes: str, max_restarts: int, there: int, steps: list[Step]
) -> None:
    h = begin(nodes, max_restarts, there)
    for step in steps:
        step(h)
        if h.core.result is not None:
            break
    sequences = [entry.sequence for entry in decode_job(JOB_ID, h.stored.items()).events]
    assert sequences == list(range(1, len(sequences) + 1)), "the journal has a gap"
