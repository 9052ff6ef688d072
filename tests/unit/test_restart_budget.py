"""How often a process that dies is started again."""

from elastic_run.runtime.restart_budget import FIRST_PAUSE_S, RESTARTS_MAX, WINDOW_S, RestartBudget


def test_pauses_double_and_end_after_the_last_allowed_restart() -> None:
    budget = RestartBudget()
    pauses = [budget.next_pause_s(float(now)) for now in range(RESTARTS_MAX + 1)]
    assert pauses == [*(FIRST_PAUSE_S * 2**i for i in range(RESTARTS_MAX)), None]


def test_a_process_that_lives_for_a_window_starts_afresh() -> None:
    budget = RestartBudget()
    for life in range(20):
        assert budget.next_pause_s(life * WINDOW_S) == FIRST_PAUSE_S
