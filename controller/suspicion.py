"""Judges whether a node is alive, from all the evidence there is.

Invariants (tests/unit/test_suspicion.py, row by row):
1. A node that still talks to us is alive, whatever its lease says: one witness is never enough.
2. A broken stream alone makes a suspect, at once; with a second witness (lease gone, peers' workers failing, or it
   said goodbye) the node is dead.
3. A silent node (no break, no word) is dead with its lease; one that keeps its lease but obeys nothing, in the end.
Source: failure evidence of DESIGN section 4; Lifeguard's refutation by a returning node is the reconnect grace.
Not here: what follows from a verdict (core.py).
"""

import enum
from dataclasses import dataclass

from elastic_run.runtime.protocol.decision import Decision

SILENCE_S = 2.4
"""An agent says something every 0.5 s; four missed words and a margin. Just under the shortest possible lease."""
RECONNECT_GRACE_S = 0.5
"""A live agent whose stream broke is back with its first tries (0.05 s, 0.1 s); peers' failures wait that long."""
ADOPTION_GRACE_S = 5.0
"""After a change of leader every agent has to find the new one first: its longest back-off is 1 s."""
LEASE_UNSEEN_S = 5.0
"""A new node writes its lease when it is welcome, and the store tells us later still: until then none can be missed."""
ISOLATION_S = 60.0
"""A node that keeps its lease but can not be reached obeys no plan."""


class Condition(enum.StrEnum):
    ALIVE = "alive"
    SUSPECT = "suspect"
    DEAD = "dead"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What is known of one node. Ages in seconds before now."""

    said_goodbye: str
    """Why it left; empty while it has not."""
    lease_gone: bool
    """Missed long enough, when it was never seen."""
    heard_age_s: float | None
    """Since its last word on an open stream; None when no stream is open."""
    unheard_age_s: float
    """Since the stream broke (or since this leader took over, when it never had one)."""
    adopted: bool
    """The break is this leader's taking over, not the node's doing."""
    peers_failed: bool
    """Workers of other nodes of its view have failed."""


def grace_s(adopted: bool) -> float:
    """Return how long a node without a stream is given to open one before other evidence counts against it."""
    return ADOPTION_GRACE_S if adopted else RECONNECT_GRACE_S


def judge(evidence: Evidence) -> Decision[Condition]:
    """Return the node's condition and the sentence that says why."""
    e = evidence
    if e.said_goodbye:
        return Decision(Condition.DEAD, f"it said goodbye: {e.said_goodbye}")
    if e.heard_age_s is not None:
        return _judge_open(e, e.heard_age_s)
    lease = "its lease is gone" if e.lease_gone else "its lease stands"
    if e.adopted:
        story = f"not heard of for {e.unheard_age_s:.1f} s since this controller took the lead, {lease}"
        dead = e.lease_gone and e.unheard_age_s >= ADOPTION_GRACE_S
    else:
        story = f"stream broken for {e.unheard_age_s:.1f} s, {lease}"
        dead = e.lease_gone
    if e.peers_failed and e.unheard_age_s >= grace_s(e.adopted):
        return Decision(Condition.DEAD, f"{story}, and workers of its peers failed")
    if not dead and e.unheard_age_s >= ISOLATION_S:
        return Decision(Condition.DEAD, f"{story}: it can not be reached to obey a plan")
    return Decision(Condition.DEAD if dead else Condition.SUSPECT, story)


def _judge_open(e: Evidence, heard_age_s: float) -> Decision[Condition]:
    if heard_age_s <= SILENCE_S:
        return Decision(Condition.ALIVE, "it talks")
    if e.lease_gone:
        return Decision(Condition.DEAD, f"silent for {heard_age_s:.1f} s and its lease is gone")
    story = f"silent for {heard_age_s:.1f} s, its lease stands"
    if heard_age_s >= ISOLATION_S:
        return Decision(Condition.DEAD, f"{story}: it can not be reached to obey a plan")
    return Decision(Condition.SUSPECT, story)
