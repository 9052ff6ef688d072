"""The end: after the last fault everything comes back, the job succeeds on all nodes, and nothing is left."""

from collections.abc import Sequence

from elastic_run.chaos.checkers.verdict import Verdict
from elastic_run.chaos.history import (
    CampaignBegan,
    Entry,
    Healed,
    HealingBegan,
    LeftBehind,
    NodeEnded,
    NodeStarted,
    ResultSeen,
)
from elastic_run.runtime.protocol.records import JobState


def everything_comes_back(history: Sequence[Entry]) -> Verdict:
    """After the last fault all nodes stand in one view and do a step in it."""
    began = next((entry.at_s for entry in history if isinstance(entry, HealingBegan)), None)
    healed = next((entry.at_s for entry in history if isinstance(entry, Healed)), None)
    problems = () if healed is not None else ("the nodes did not come together again",)
    took = f"{healed - began:.1f} s" if began is not None and healed is not None else "never"
    return Verdict(claim="after the last fault all nodes come back", problems=problems, checked=f"took {took}")


def the_job_succeeds_everywhere(history: Sequence[Entry]) -> Verdict:
    """The result is a success, told once, and the last life of every node ends with exit code 0."""
    nodes = next(entry.nodes for entry in history if isinstance(entry, CampaignBegan))
    results = [entry for entry in history if isinstance(entry, ResultSeen)]
    last: dict[str, int | None] = {}
    for entry in history:
        if isinstance(entry, NodeStarted):
            last[entry.node] = None
        elif isinstance(entry, NodeEnded):
            last[entry.node] = entry.code
    problems = [f"node {node} ended with {code}" for node, code in sorted(last.items()) if code != 0]
    if len(last) != nodes:
        problems.append(f"{len(last)} of {nodes} nodes were ever there")
    if [entry.state for entry in results] != [JobState.SUCCEEDED]:
        problems.append(f"results: {[(entry.state, entry.message) for entry in results]}")
    return Verdict(
        claim="the job ends well on every node", problems=tuple(problems), checked=f"{len(last)} nodes, exit codes"
    )


def nothing_is_left(history: Sequence[Entry]) -> Verdict:
    """No process, socket, file or leased key outlives the job."""
    left = [entry.what for entry in history if isinstance(entry, LeftBehind)]
    return Verdict(claim="nothing is left behind", problems=tuple(left), checked="processes, sockets, files, keys")
