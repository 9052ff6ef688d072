"""Training: steps go on, continue from snapshots, and faults of the control plane leave workers alone."""

import itertools
from collections.abc import Iterable, Sequence

from elastic_run.chaos.checkers.verdict import Verdict
from elastic_run.chaos.history import (
    CampaignBegan,
    Entry,
    FaultBegan,
    FaultEnded,
    Healed,
    HealingBegan,
    NodeEnded,
    NodeStarted,
    StepDone,
    ViewSeen,
)
from elastic_run.chaos.schedule import Action, Victim
from elastic_run.runtime.protocol.view import ViewStatus

RECOVERY_S = 20.0
"""From the last disturbance to the next step, on two shared processors: a lease runs out (2 s), a new leader waits for
agents (5 s), the workers import torch again (4 s); twice, when a node comes back meanwhile."""
CALM_S = 15.0
"""Without a disturbance for so long, no view change is under way on account of one."""
LOSS_TOLERANCE = 1e-3
"""Relative; other world sizes round otherwise."""

Span = tuple[float, float]
_CONTROL_PLANE = (Victim.LEADER, Victim.FOLLOWER, Victim.ETCD_MEMBER, Victim.ETCD_LEADER, Victim.ETCD_ALL)


def steps_advance(history: Sequence[Entry]) -> Verdict:
    """A step is done whenever nothing disturbed for RECOVERY_S while a node was up and the control plane ran.

    Time in which something training or deciding needs was paused or away does not count.
    """
    steps = [entry for entry in history if isinstance(entry, StepDone)]
    excused = merge([*_pauses(history), *_nobody_up(history)])
    moments = [e.at_s for e in history if isinstance(e, FaultBegan | FaultEnded | NodeStarted | NodeEnded)]
    calm = _calm(history, excused, moments)
    problems = [
        f"no step for {end - begin:.1f} s although nothing disturbed"
        for begin, end in _calm(history, excused, [*moments, *(step.at_s for step in steps)])
    ]
    if not steps:
        problems.append("not one step was done")
    return Verdict(
        claim="steps advance while a node is up and the control plane healthy",
        problems=tuple(problems),
        checked=f"{len(steps)} steps, {len(calm)} spans of {RECOVERY_S:g} s or more without a disturbance",
    )


def _calm(history: Sequence[Entry], excused: Sequence[Span], moments: Sequence[float]) -> list[Span]:
    """Spans of RECOVERY_S or more without any of these moments, from the first step to the last one asked for."""
    begin = next((e.at_s for e in history if isinstance(e, StepDone)), history[0].at_s)
    end = next((e.at_s for e in reversed(history) if isinstance(e, Healed | HealingBegan)), history[-1].at_s)
    edges = [begin, *moments, *(edge for span in excused for edge in span), end]
    inner = sorted(edge for edge in edges if begin <= edge <= end)
    return [
        span for span in itertools.pairwise(inner) if span[1] - span[0] >= RECOVERY_S and not overlap_s(span, excused)
    ]


def training_continues_from_snapshots(history: Sequence[Entry]) -> Verdict:
    """A restart repeats less than one snapshot's interval, and a step done again gives the same loss."""
    save_every = next(entry.save_every for entry in history if isinstance(entry, CampaignBegan))
    problems: list[str] = []
    losses: dict[int, float] = {}
    newest = repeated = 0
    for entry in history:
        if not isinstance(entry, StepDone):
            continue
        if not newest - save_every < entry.step <= newest + 1:
            problems.append(f"step {entry.step} (pid {entry.pid}) follows step {newest}")
        first = losses.setdefault(entry.step, entry.loss)
        if abs(entry.loss - first) > LOSS_TOLERANCE * abs(first):
            problems.append(f"step {entry.step} gave loss {first:.6g}, and {entry.loss:.6g} when it was done again")
        repeated += entry.step <= newest
        newest = max(newest, entry.step)
    return Verdict(
        claim="training continues from its snapshots, with the same losses",
        problems=tuple(problems),
        checked=f"{newest} steps, {repeated} done again",
    )


def one_writer_at_a_time(history: Sequence[Entry]) -> Verdict:
    """A rank 0 that was replaced does not finish another step."""
    problems: list[str] = []
    replaced: list[int] = []
    writer = 0
    for entry in history:
        if not isinstance(entry, StepDone) or entry.pid == writer:
            continue
        if entry.pid in replaced:
            problems.append(f"worker {entry.pid} did step {entry.step} after worker {writer} had taken over")
            continue
        if writer:
            replaced.append(writer)
        writer = entry.pid
    return Verdict(
        claim="a worker of an old view finishes no step", problems=tuple(problems), checked=f"{len(replaced)} restarts"
    )


def control_plane_faults_change_no_view(history: Sequence[Entry]) -> Verdict:
    """With all calm before, a fault of a controller or of the store leads to no view change."""
    proposals = [e.at_s for e in history if isinstance(e, ViewSeen) and e.status == ViewStatus.PROPOSED]
    others = _node_disturbances(history)
    problems = []
    looked_at = 0
    for fault in _faults(history):
        if fault.victim not in _CONTROL_PLANE or not fault.what:
            continue
        until_s = min((at_s for at_s in others if at_s > fault.at_s), default=float("inf"))
        noise = [at_s for at_s in (*others, *proposals) if fault.at_s - CALM_S <= at_s <= fault.at_s]
        if noise:
            continue
        looked_at += 1
        if proposals_after := [at_s for at_s in proposals if fault.at_s < at_s < min(until_s, fault.at_s + CALM_S)]:
            story = f"fault {fault.number} ({fault.action} of {fault.victim})"
            problems.append(f"a view was proposed {proposals_after[0] - fault.at_s:.1f} s after {story}")
    return Verdict(
        claim="faults of the control plane alone change no view",
        problems=tuple(problems),
        checked=f"{looked_at} faults that met a calm job",
    )


def only_worker_faults_are_charged(history: Sequence[Entry]) -> Verdict:
    """--max-restarts pays for workers that die by themselves, not for nodes that are lost."""
    charged = [entry.restart_count for entry in history if isinstance(entry, ViewSeen)]
    deaths = [f for f in _faults(history) if f.victim == Victim.WORKER and f.action != Action.PAUSE and f.what]
    problems = []
    if max(charged, default=0) > len(deaths):
        problems.append(f"{max(charged)} restarts are charged for {len(deaths)} workers that were ended")
    return Verdict(
        claim="lost nodes are not charged as worker failures",
        problems=tuple(problems),
        checked=f"{max(charged, default=0)} charged, {len(deaths)} workers ended",
    )


def merge(spans: Iterable[Span]) -> list[Span]:
    """Return the same time as spans that do not overlap."""
    merged: list[Span] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged


def overlap_s(span: Span, others: Iterable[Span]) -> float:
    """Return how much of a span lies within others that do not overlap each other."""
    return sum(max(0.0, min(span[1], end) - max(span[0], begin)) for begin, end in others)


def _faults(history: Sequence[Entry]) -> list[FaultBegan]:
    return [entry for entry in history if isinstance(entry, FaultBegan)]


def _node_disturbances(history: Sequence[Entry]) -> list[float]:
    """When something happened that may change a view."""
    of_nodes = [fault.number for fault in _faults(history) if fault.victim not in _CONTROL_PLANE]
    faults = [e.at_s for e in history if isinstance(e, FaultBegan | FaultEnded) and e.number in of_nodes]
    return faults + [e.at_s for e in history if isinstance(e, NodeStarted | NodeEnded)]


def _pauses(history: Sequence[Entry]) -> list[Span]:
    ends = {entry.number: entry.at_s for entry in history if isinstance(entry, FaultEnded)}
    return [
        (fault.at_s, ends.get(fault.number, float("inf")))
        for fault in _faults(history)
        if fault.action == Action.PAUSE or fault.victim == Victim.ETCD_MEMBER
    ]


def _nobody_up(history: Sequence[Entry]) -> list[Span]:
    spans: list[Span] = []
    up: list[str] = []
    since_s: float | None = None
    for entry in history:
        if isinstance(entry, NodeStarted):
            up.append(entry.node)
            if since_s is not None:
                spans.append((since_s, entry.at_s))
                since_s = None
        elif isinstance(entry, NodeEnded):
            up.remove(entry.node)
            since_s = entry.at_s if not up else None
    return spans
