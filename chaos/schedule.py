"""From a seed to a timed list of faults. Pure: the same arguments give the same list.

Invariants (tests/unit/test_chaos_schedule.py):
1. Times grow from 0 and stay, with the fault's length, within the campaign's seconds.
2. At most one fault of the store at a time: a majority of its members runs, but for a pause of all.
3. Controllers are killed or ended at most CONTROLLER_ENDS_MAX times within CONTROLLER_WINDOW_S: a launcher gives up one
   that dies more often.
4. Every kind of fault comes with the same chance, and no kind twice before each came once.
Not here: who exactly is hit (target.py), how (faults/).
"""

import enum
import random
from dataclasses import dataclass
from typing import NamedTuple


class Victim(enum.StrEnum):
    WORKER = "worker"
    AGENT = "agent"
    NODE = "node"  # agent and workers together, as a machine that stands still
    LAUNCHER = "launcher"
    LEADER = "leader"  # the leading controller
    FOLLOWER = "follower"  # another controller
    ETCD_MEMBER = "etcd member"
    ETCD_LEADER = "etcd leader"
    ETCD_ALL = "all of etcd"


class Action(enum.StrEnum):
    KILL = "kill -9"  # a store's member is started again when the fault ends; nodes come back by themselves
    TERM = "terminate"
    PAUSE = "pause"  # SIGSTOP, and SIGCONT when the fault ends


class Kind(NamedTuple):
    victim: Victim
    action: Action
    lasts_s_min: float
    lasts_s_max: float


KINDS = (
    Kind(Victim.WORKER, Action.KILL, 0.0, 0.0),
    Kind(Victim.WORKER, Action.TERM, 0.0, 0.0),
    Kind(Victim.WORKER, Action.PAUSE, 0.5, 4.0),
    Kind(Victim.AGENT, Action.KILL, 0.0, 0.0),
    Kind(Victim.AGENT, Action.TERM, 0.0, 0.0),
    Kind(Victim.AGENT, Action.PAUSE, 0.5, 8.0),  # both sides of the lease's end
    Kind(Victim.NODE, Action.PAUSE, 0.5, 8.0),
    Kind(Victim.LAUNCHER, Action.KILL, 0.0, 0.0),
    Kind(Victim.LEADER, Action.KILL, 0.0, 0.0),
    Kind(Victim.LEADER, Action.TERM, 0.0, 0.0),
    Kind(Victim.LEADER, Action.PAUSE, 0.5, 6.0),
    Kind(Victim.FOLLOWER, Action.KILL, 0.0, 0.0),
    Kind(Victim.ETCD_MEMBER, Action.KILL, 1.0, 5.0),
    Kind(Victim.ETCD_LEADER, Action.PAUSE, 1.0, 4.0),
    Kind(Victim.ETCD_ALL, Action.PAUSE, 2.0, 6.0),
)
BURST_MAX = 3
BURST_GAP_S = (0.5, 4.0)
"""Within a burst faults fall into the recovery from the one before."""
SHORT_REST_S, LONG_REST_S = (6.0, 10.0), (26.0, 30.0)
"""Between bursts, with even chances: all is well again, or so long that steps must have come (checkers/progress.py)."""
STORE_REST_S = 2.0
"""From one fault of the store to the next: its members need a second to be of one mind again."""
CONTROLLER_ENDS_MAX = 4
CONTROLLER_WINDOW_S = 60.0
FAULTS_MAX = 10_000
_OF_STORE = (Victim.ETCD_MEMBER, Victim.ETCD_LEADER, Victim.ETCD_ALL)
_OF_CONTROLLERS = (Victim.LEADER, Victim.FOLLOWER)


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedFault:
    """`at_s` counts from the campaign's begin; `lot` chooses among whoever fits then."""

    number: int
    at_s: float
    victim: Victim
    action: Action
    lasts_s: float
    lot: int


def make_schedule(seed: int, *, seconds: float) -> tuple[TimedFault, ...]:
    """Return the faults of a campaign."""
    chance = random.Random(seed)
    faults: list[TimedFault] = []
    deck: list[Kind] = []
    in_burst = chance.randint(1, BURST_MAX)
    at_s = chance.uniform(*BURST_GAP_S)
    while at_s < seconds and len(faults) < FAULTS_MAX:
        if not deck:
            deck = chance.sample(KINDS, len(KINDS))
        kind = next((k for k in deck if _may_come(k, at_s, faults)), None)
        if kind is None:  # what is left in the deck has to wait
            at_s += STORE_REST_S
            continue
        lasts_s = min(chance.uniform(kind.lasts_s_min, kind.lasts_s_max), max(0.0, seconds - at_s))
        deck.remove(kind)
        faults.append(
            TimedFault(
                number=len(faults) + 1,
                at_s=at_s,
                victim=kind.victim,
                action=kind.action,
                lasts_s=lasts_s,
                lot=chance.randrange(1 << 16),
            )
        )
        in_burst -= 1
        if in_burst:
            at_s += chance.uniform(*BURST_GAP_S)
        else:
            in_burst = chance.randint(1, BURST_MAX)
            at_s += chance.uniform(*chance.choice((SHORT_REST_S, LONG_REST_S)))
    return tuple(faults)


def _may_come(kind: Kind, at_s: float, faults: list[TimedFault]) -> bool:
    if kind.victim in _OF_STORE:
        return all(f.at_s + f.lasts_s + STORE_REST_S <= at_s for f in faults if f.victim in _OF_STORE)
    if kind.victim in _OF_CONTROLLERS and kind.action is not Action.PAUSE:
        recent = [f for f in faults if f.at_s > at_s - CONTROLLER_WINDOW_S]
        ends = [f for f in recent if f.victim in _OF_CONTROLLERS and f.action is not Action.PAUSE]
        return len(ends) < CONTROLLER_ENDS_MAX
    return True
