"""Every claim a history is judged by."""

from collections.abc import Callable, Sequence

from elastic_run.chaos.checkers import ending, progress, views
from elastic_run.chaos.checkers.verdict import Verdict
from elastic_run.chaos.history import Entry

CHECKERS: tuple[Callable[[Sequence[Entry]], Verdict], ...] = (
    views.views_only_grow,
    views.current_view_only_grows,
    views.tokens_only_grow,
    views.no_event_is_lost,
    progress.steps_advance,
    progress.training_continues_from_snapshots,
    progress.one_writer_at_a_time,
    progress.control_plane_faults_change_no_view,
    progress.only_worker_faults_are_charged,
    ending.everything_comes_back,
    ending.the_job_succeeds_everywhere,
    ending.nothing_is_left,
)


def judge(history: Sequence[Entry]) -> list[Verdict]:
    """Return one verdict per claim. `history` begins with a CampaignBegan."""
    return [checker(history) for checker in CHECKERS]
