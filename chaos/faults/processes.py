"""Faults of processes: SIGKILL, SIGTERM, SIGSTOP and SIGCONT to whoever the lot falls on among those that fit.

psutil compares start times before it signals, so a pid that was reused meanwhile is left alone.
"""

import contextlib
import signal
from dataclasses import dataclass

import psutil

from elastic_run.chaos.nodes import Nodes, children
from elastic_run.chaos.scenario import WORKLOAD
from elastic_run.chaos.schedule import Action, TimedFault, Victim

_SIGNALS = {Action.KILL: signal.SIGKILL, Action.TERM: signal.SIGTERM, Action.PAUSE: signal.SIGSTOP}


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """What a fault did. `paused` goes on when the fault ends."""

    node: str
    what: str
    paused: tuple[psutil.Process, ...] = ()


def strike(nodes: Nodes, fault: TimedFault, leading_node: str | None) -> Hit | None:
    """Signal the victim; None when nobody fits. `leading_node` is where the leading controller is."""
    found = _candidates(nodes, fault.victim, leading_node)
    if not found:
        return None
    node, process = found[fault.lot % len(found)]
    targets = [process]
    if fault.victim is Victim.NODE:
        targets += children(process, WORKLOAD.name)
    reached = [target for target in targets if _signalled(target, _SIGNALS[fault.action])]
    if not reached:
        return None
    what = f"{fault.victim} of {node} (pid {process.pid})"
    return Hit(node=node, what=what, paused=tuple(reached) if fault.action is Action.PAUSE else ())


def let_go(hit: Hit) -> None:
    """End a pause."""
    for process in hit.paused:
        _signalled(process, signal.SIGCONT)


def _candidates(nodes: Nodes, victim: Victim, leading_node: str | None) -> list[tuple[str, psutil.Process]]:
    match victim:
        case Victim.WORKER:
            return nodes.workers()
        case Victim.AGENT | Victim.NODE:
            return nodes.agents()
        case Victim.LAUNCHER:
            return nodes.launchers()
        case Victim.LEADER:
            return [(name, process) for name, process in nodes.controllers() if name == leading_node]
        case Victim.FOLLOWER:
            return [(name, process) for name, process in nodes.controllers() if name != leading_node]
        case _:
            return []


def _signalled(process: psutil.Process, number: int) -> bool:
    with contextlib.suppress(psutil.Error):
        process.send_signal(number)
        return True
    return False
