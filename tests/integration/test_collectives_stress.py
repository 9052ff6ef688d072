"""Workers are killed, hung, cut off and added at random while all reduce: no wrong value, no hang, no leak.

The long form of the same campaign: tests/stress/collectives_churn.py.
"""

import pytest
from stress.collectives_churn import campaign


@pytest.mark.parametrize("tcp", [False, True], ids=["shared memory", "tcp"])
def test_operations_are_right_or_aborted_while_membership_churns(tcp: bool) -> None:
    report = campaign(6, seed=20, tcp=tcp)
    assert not report.wrong, report.text()
    assert report.completed
    assert report.views > report.joins
