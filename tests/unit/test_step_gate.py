"""The step gate as a table."""

import pytest

from elastic_run.runtime.step_gate import AGENT_SILENCE_S, StopRequest, Verdict, agent_is_silent, decide

NONE = StopRequest(at_step=0, view=0)
AT_10 = StopRequest(at_step=10, view=2)
GO, PARK = Verdict.CONTINUE, Verdict.PARK


@pytest.mark.parametrize(
    ("step", "view", "request_", "answered", "verdict", "reason"),
    [
        (1, 1, NONE, None, GO, "no stop is requested"),
        (1, 1, StopRequest(at_step=0, view=9), None, GO, "no stop is requested"),
        (9, 1, AT_10, None, GO, "step 9 is done, the stop is after step 10"),
        (10, 1, AT_10, None, PARK, "step 10 is done, 0 past the stop requested for view 2"),
        (14, 1, AT_10, None, PARK, "step 14 is done, 4 past the stop requested for view 2"),
        (10, 2, AT_10, None, GO, "the stop is for view 2, this worker is in view 2"),
        (10, 3, AT_10, None, GO, "the stop is for view 2, this worker is in view 3"),
        (11, 1, AT_10, AT_10, GO, "the stop after step 10 was answered already"),
        (11, 1, StopRequest(at_step=11, view=2), AT_10, PARK, "step 11 is done, 0 past the stop requested for view 2"),
        (11, 1, StopRequest(at_step=10, view=3), AT_10, PARK, "step 11 is done, 1 past the stop requested for view 3"),
    ],
)
def test_decision(
    step: int, view: int, request_: StopRequest, answered: StopRequest | None, verdict: Verdict, reason: str
) -> None:
    decision = decide(step=step, view=view, request=request_, answered=answered)
    assert (decision.value, decision.reason) == (verdict, reason)


@pytest.mark.parametrize(("age_s", "silent"), [(0.0, False), (AGENT_SILENCE_S, False), (AGENT_SILENCE_S + 0.001, True)])
def test_an_agent_is_silent_only_after_the_whole_time(age_s: float, silent: bool) -> None:
    now_ns = 10**12
    assert agent_is_silent(now_ns=now_ns, beat_ns=now_ns - round(age_s * 1e9)) is silent


def test_a_process_without_an_agent_of_its_own_never_waits() -> None:
    assert not agent_is_silent(now_ns=10**12, beat_ns=2**64 - 1)
