"""Faults of etcd: a member killed and started again with its data, its leader paused, all of it paused."""

import signal

from elastic_run.chaos.etcd_members import EtcdMembers
from elastic_run.chaos.schedule import Action, TimedFault, Victim
from elastic_run.runtime.edge.store import Store


async def strike(members: EtcdMembers, fault: TimedFault, store: Store) -> tuple[int, ...]:
    """Hit members; return which."""
    chosen = await _chosen(members, fault, store)
    for index in chosen:
        if fault.action is Action.KILL:
            await members.kill_member(index)
        else:
            members.signal_member(index, signal.SIGSTOP)
    return chosen


def let_go(members: EtcdMembers, fault: TimedFault, hit: tuple[int, ...]) -> None:
    """Start killed members again, let stopped ones go on."""
    for index in hit:
        if fault.action is Action.KILL:
            members.start_member(index)
        else:
            members.signal_member(index, signal.SIGCONT)


async def _chosen(members: EtcdMembers, fault: TimedFault, store: Store) -> tuple[int, ...]:
    running = members.running
    if fault.victim is Victim.ETCD_ALL:
        return running
    if fault.victim is Victim.ETCD_LEADER:
        leader = await members.leader(store)
        return () if leader is None else (leader,)
    return (running[fault.lot % len(running)],) if running else ()
