"""Decides after each finished optimizer step whether the worker goes on or parks at its safe point.

The agent asks to stop after a step for a newer view; workers that finish the same steps stop at the same one.
Invariants (tests/unit/test_step_gate.py):
1. PARK only for a view newer than the worker's own, and not before the asked step.
2. A worker whose agent has been silent for AGENT_SILENCE_S waits: the node may have been left out of the job, and a
   worker of an older view must not go on beside the newer one.
3. A request that was answered (resumed, or given up) is not obeyed again; a different one is.
Not here: where the request is read and how the worker waits (interceptions/safe_point.py).
"""

import enum
from dataclasses import dataclass

from elastic_run.runtime.protocol.decision import Decision

AGENT_SILENCE_S = 2.0
"""A node is left out after 2 s without lease and 2.4 s of silence at the earliest; agents beat every 0.5 s."""
_NS_PER_S = 1_000_000_000


class Verdict(enum.StrEnum):
    CONTINUE = "continue"
    PARK = "park"


@dataclass(frozen=True, slots=True, kw_only=True)
class StopRequest:
    """Stop after `at_step` (0: no request) for `view`."""

    at_step: int
    view: int


def decide(*, step: int, view: int, request: StopRequest, answered: StopRequest | None) -> Decision[Verdict]:
    """Return what to do after `step` in `view`, and why."""
    if request.at_step == 0:
        return Decision(Verdict.CONTINUE, "no stop is requested")
    if request == answered:
        return Decision(Verdict.CONTINUE, f"the stop after step {request.at_step} was answered already")
    if request.view <= view:
        return Decision(Verdict.CONTINUE, f"the stop is for view {request.view}, this worker is in view {view}")
    if step < request.at_step:
        return Decision(Verdict.CONTINUE, f"step {step} is done, the stop is after step {request.at_step}")
    late = step - request.at_step
    return Decision(Verdict.PARK, f"step {step} is done, {late} past the stop requested for view {request.view}")


def agent_is_silent(*, now_ns: int, beat_ns: int) -> bool:
    """Say whether the agent's last sign of life is too old to go on (monotonic nanoseconds)."""
    return now_ns - beat_ns > AGENT_SILENCE_S * _NS_PER_S
