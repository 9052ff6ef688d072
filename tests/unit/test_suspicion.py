"""The table by which a node is judged."""

import pytest

from elastic_run.controller import suspicion
from elastic_run.controller.suspicion import (
    ADOPTION_GRACE_S,
    ISOLATION_S,
    RECONNECT_GRACE_S,
    SILENCE_S,
    Condition,
    Evidence,
)

ALIVE, SUSPECT, DEAD = Condition.ALIVE, Condition.SUSPECT, Condition.DEAD
E = 0.001


def evidence(
    *,
    heard: float | None = None,
    broken: float = 0.0,
    lease: bool = True,
    adopted: bool = False,
    peers: bool = False,
    goodbye: str = "",
) -> Evidence:
    return Evidence(
        said_goodbye=goodbye,
        lease_gone=not lease,
        heard_age_s=heard,
        unheard_age_s=broken,
        adopted=adopted,
        peers_failed=peers,
    )


TABLE = [
    # an open stream: who talks is alive, whatever else is said
    ("talks", evidence(heard=0.0), ALIVE),
    ("talks without a lease", evidence(heard=SILENCE_S, lease=False), ALIVE),
    ("talks while its peers fail", evidence(heard=0.1, peers=True), ALIVE),
    ("talks, no lease, peers fail", evidence(heard=0.1, lease=False, peers=True), ALIVE),
    # silence
    ("silent, lease held", evidence(heard=SILENCE_S + E), SUSPECT),
    ("silent while peers fail", evidence(heard=SILENCE_S + E, peers=True), SUSPECT),
    ("silent, lease gone", evidence(heard=SILENCE_S + E, lease=False), DEAD),
    ("silent for long, lease held", evidence(heard=ISOLATION_S - E), SUSPECT),
    ("silent for too long, lease held", evidence(heard=ISOLATION_S), DEAD),
    # a broken stream
    ("just broken", evidence(broken=0.0), SUSPECT),
    ("just broken, lease gone", evidence(broken=0.0, lease=False), DEAD),
    ("just broken, peers fail", evidence(broken=RECONNECT_GRACE_S - E, peers=True), SUSPECT),
    ("broken, peers fail", evidence(broken=RECONNECT_GRACE_S, peers=True), DEAD),
    ("broken for long", evidence(broken=ISOLATION_S - E), SUSPECT),
    ("broken for too long", evidence(broken=ISOLATION_S), DEAD),
    # taken over from an earlier leader, not found its way yet
    ("adopted", evidence(adopted=True), SUSPECT),
    ("adopted, lease gone", evidence(adopted=True, broken=ADOPTION_GRACE_S - E, lease=False), SUSPECT),
    ("adopted, peers fail", evidence(adopted=True, broken=ADOPTION_GRACE_S - E, peers=True), SUSPECT),
    ("adopted for long, lease gone", evidence(adopted=True, broken=ADOPTION_GRACE_S, lease=False), DEAD),
    ("adopted for long, peers fail", evidence(adopted=True, broken=ADOPTION_GRACE_S, peers=True), DEAD),
    ("adopted for long", evidence(adopted=True, broken=ISOLATION_S - E), SUSPECT),
    ("adopted for too long", evidence(adopted=True, broken=ISOLATION_S), DEAD),
    # goodbye beats everything
    ("goodbye", evidence(heard=0.0, goodbye="SIGTERM"), DEAD),
    ("goodbye, then broken", evidence(broken=0.0, goodbye="SIGTERM"), DEAD),
]


@pytest.mark.parametrize(("found", "condition"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_the_evidence_gives_this_condition_and_a_reason(found: Evidence, condition: Condition) -> None:
    decision = suspicion.judge(found)
    assert decision.value is condition
    assert decision.reason


def test_no_single_witness_evicts_a_node() -> None:
    """A goodbye is the node's own word, and time without end is not evidence but a bound."""
    for single in (
        evidence(heard=0.1, lease=False),
        evidence(heard=0.1, peers=True),
        evidence(heard=ISOLATION_S - E),
        evidence(broken=ISOLATION_S - E),
    ):
        assert suspicion.judge(single).value is not DEAD


def test_reasons_carry_their_numbers() -> None:
    assert suspicion.judge(evidence(heard=3.14, lease=False)).reason == "silent for 3.1 s and its lease is gone"
    assert suspicion.judge(evidence(broken=0.75, peers=True)).reason == (
        "stream broken for 0.8 s, its lease stands, and workers of its peers failed"
    )
    assert "since this controller took the lead" in suspicion.judge(evidence(adopted=True, broken=1.0)).reason
