"""Parks the worker between two optimizer steps when its agent asks: a planned restart never cuts into a step or a
snapshot.

Changes: after a counted step the script may wait inside `optimizer.step()` until the agent resumes it, or ends the
process.
Does nothing without elastic-run: nobody calls it.
Invariants (tests/integration/test_safe_point.py):
1. A parked worker's file says PARKED and the step before the agent is told.
2. The wait for a view is bounded: after RESUME_TIMEOUT_S, or when the link breaks, the script goes on, and stderr says
   so. The wait for a silent agent ends with its next sign of life, or with the agent (parent-death signal).
Not here: whether to park (step_gate.py); counting steps (step_counter.py).
"""

import time

from elastic_run.runtime.edge.notice import notice
from elastic_run.runtime.edge.telemetry_layout import Phase
from elastic_run.runtime.edge.telemetry_writer import TelemetryWriter
from elastic_run.runtime.edge.worker_link import WorkerLink
from elastic_run.runtime.protocol.errors import PeerError
from elastic_run.runtime.step_gate import AGENT_SILENCE_S, StopRequest, Verdict, agent_is_silent, decide

AGENT_POLL_S = 0.05  # a word of shared memory has no event
RESUME_TIMEOUT_S = 60.0  # a view change takes seconds; an agent that forgot us must not stop the training for good


class SafePoint:
    """The worker's side of stops between steps."""

    def __init__(
        self, telemetry: TelemetryWriter, link: WorkerLink, *, view: int, resume_timeout_s: float = RESUME_TIMEOUT_S
    ) -> None:
        self._telemetry = telemetry
        self._link = link
        self._view = view
        self._resume_timeout_s = resume_timeout_s
        self._answered: StopRequest | None = None

    def after_step(self, step: int) -> None:
        """Return when the script may go on after `step`."""
        if agent_is_silent(now_ns=time.monotonic_ns(), beat_ns=self._telemetry.agent_beat_ns()):
            self._wait_for_agent(step)
        at_step, view = self._telemetry.stop_request()
        if at_step == 0:  # nearly always: no decision to be made
            return
        request = StopRequest(at_step=at_step, view=view)
        decision = decide(step=step, view=self._view, request=request, answered=self._answered)
        if decision.value is Verdict.PARK:
            self._park(step, request)

    def _wait_for_agent(self, step: int) -> None:
        """Wait until the agent gives a sign of life: a frozen one may have been left out, and can not send anything."""
        self._telemetry.park(step)
        notice(f"the agent of this node has been silent for {AGENT_SILENCE_S:g} s: waiting for it after step {step}")
        while agent_is_silent(now_ns=time.monotonic_ns(), beat_ns=self._telemetry.agent_beat_ns()):
            time.sleep(AGENT_POLL_S)
        self._telemetry.set_phase(Phase.RUNNING)

    def _park(self, step: int, request: StopRequest) -> None:
        self._telemetry.park(step)
        try:
            self._link.parked(view=request.view, step=step)
            resumed = self._link.wait_resume(view=request.view, timeout_s=self._resume_timeout_s)
            if not resumed:
                notice(f"parked after step {step}, not resumed within {self._resume_timeout_s:g} s: going on")
            self._link.running(view=request.view, step=step, unasked=not resumed)
        except PeerError as error:
            notice(f"parked after step {step}, but {error}: going on")
        finally:
            self._answered = request
            self._telemetry.set_phase(Phase.RUNNING)
