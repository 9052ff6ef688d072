"""Deliberate bugs: each is found by the checkers within a bounded number of seeded worlds.

A simulation that finds nothing may be one that looks at nothing; these show that it looks.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from simulation.candidate import Candidate
from simulation.checkers import Violation
from simulation.swarm import Options, draw
from simulation.world import World

from elastic_run.agent.core import AgentCore, Aim
from elastic_run.controller.change import Change
from elastic_run.controller.core import ControllerCore
from elastic_run.controller.events import TermBegan
from elastic_run.controller.node import Node
from elastic_run.runtime.protocol.config import AgentConfig
from elastic_run.runtime.protocol.errors import InvariantViolated
from elastic_run.runtime.protocol.ids import ViewNumber
from elastic_run.runtime.protocol.messages import AgentPhase, Prepare
from elastic_run.runtime.protocol.view import View

SEEDS_MAX = 400


class WithoutFence(Candidate):
    """The leader's writes carry no token."""

    fenced = False


class SendsAtOnce(Candidate):
    """What follows a write does not wait until it is durable."""

    waits_for_persist = False


class LosesLeaseEvents(Candidate):
    """The watch does not tell of leases that end."""

    drops_lease_gone = True


class InstallsEarly(ControllerCore):
    """One acknowledgement is taken for all."""

    def _drive(self, change: Change) -> None:
        holders = [self.roster.holder(member) for member in change.view.members]
        if any(node is not None and node.prepared_view == change.view.number for node in holders):
            for node in holders:
                if node is not None:
                    node.prepared_view = change.view.number
        super()._drive(change)


class KeepsTheDead(ControllerCore):
    """A member that is dead stays in the view."""

    def _lose(self, node: Node, why: str) -> None:
        if self.view is None or not self.view.holds(node.node, node.incarnation) or "came back" in why:
            super()._lose(node, why)


class ReusesNumbers(ControllerCore):
    """A new leader counts on from the installed view, not from the highest proposed."""

    def __init__(self, began: TermBegan) -> None:
        super().__init__(began)
        self.highest = self.view.number if self.view is not None else ViewNumber(0)
        self.change = None

    def validate(self) -> None:
        pass


class ForgetsCharges(ControllerCore):
    """The restart budget begins anew with each leader."""

    def __init__(self, began: TermBegan) -> None:
        super().__init__(began)
        self.restarts_used = 0


class EndsEarly(ControllerCore):
    """One node that finished is taken for all."""

    def _all_finished(self, view: View) -> bool:
        return any(self._finished(member, view) for member in view.members)


class ForgetsToRepeat(ControllerCore):
    """An agent that comes back is not told what it missed."""

    def _tell_what_it_missed(self, connection: int, node: Node) -> None:
        pass


class StartsBesideTheOld(AgentCore):
    """A view is acknowledged and workers are started while the old ones run."""

    def _begin_stop(self, prepare: Prepare, *, running: bool) -> None:
        self.busy = False


class IgnoresTheFence(AgentCore):
    """A newer view without this node stops nothing."""

    def _fence(self, number: ViewNumber) -> None:
        pass


class ForgetsItPrepared(AgentCore):
    """With its controller a node loses what it acknowledged, and takes itself for running."""

    def _lost_controller(self, reason: str) -> None:
        super()._lost_controller(reason)
        if self.phase is AgentPhase.PREPARED:
            self.aim, self.phase = Aim.NOTHING, AgentPhase.RUNNING

    def validate(self) -> None:
        pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Bug:
    controller_core: Callable[[TermBegan], ControllerCore] = ControllerCore
    agent_core: Callable[[AgentConfig, float], AgentCore] = AgentCore
    candidate: type[Candidate] = Candidate
    options: Callable[[int], Options] = draw
    """Worlds in which it can show at all."""


def crowded_and_cut_off(seed: int) -> Options:
    """Spares take over from members that are cut off, and come back."""
    return dataclasses.replace(
        draw(seed),
        nodes=5,
        nodes_min=1,
        nodes_max=2,
        faults=("isolate",),
        fault_gap_s=2.0,
        safety_s=40.0,
        raises_at=None,
    )


def without_power(seed: int) -> Options:
    """Hosts vanish without a word."""
    return dataclasses.replace(draw(seed), faults=("lose_host",), fault_gap_s=4.0, raises_at=None)


BUGS = {
    "fencing off": Bug(candidate=WithoutFence),
    "messages before they are durable": Bug(candidate=SendsAtOnce),
    "lost watch event": Bug(candidate=LosesLeaseEvents, options=without_power),
    "install without all acknowledgements": Bug(controller_core=InstallsEarly),
    "dead node kept in a view": Bug(controller_core=KeepsTheDead),
    "view number reused": Bug(controller_core=ReusesNumbers),
    "restart budget forgotten": Bug(controller_core=ForgetsCharges),
    "success before all finished": Bug(controller_core=EndsEarly),
    "lost message not repeated": Bug(controller_core=ForgetsToRepeat),
    "workers started beside the old ones": Bug(agent_core=StartsBesideTheOld),
    "fence ignored by the agent": Bug(agent_core=IgnoresTheFence, options=crowded_and_cut_off),
    "phase forgotten with the controller": Bug(agent_core=ForgetsItPrepared),
}


def first_seed_that_shows(bug: Bug) -> tuple[int, str] | None:
    for seed in range(SEEDS_MAX):
        world = World(
            seed,
            bug.options(seed),
            controller_core=bug.controller_core,
            agent_core=bug.agent_core,
            candidate=bug.candidate,
        )
        try:
            world.live()
        except (Violation, InvariantViolated) as violation:
            return seed, str(violation)
    return None


@pytest.mark.parametrize("name", BUGS)
def test_a_deliberate_bug_is_found(name: str) -> None:
    found = first_seed_that_shows(BUGS[name])
    assert found is not None, f"{name}: not found in {SEEDS_MAX} worlds"
    print(f"{name}: seed {found[0]}: {found[1][:160]}")
