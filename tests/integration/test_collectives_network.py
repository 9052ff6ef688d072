"""Collectives over bad networks: the right value, or an abort at every member; never a hang.

Hosts are network namespaces; the relay between them delays, loses, limits and cuts for real.
"""

from pathlib import Path
from typing import Any

import pytest
from network_lab import lab_or_skip

from elastic_run.chaos.network.fleet import Ending, Fleet
from elastic_run.chaos.network.lab import Lab

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parent.parent / "scripts" / "lab_collectives.py"
COLLECT_TIMEOUT_S = 120.0


def run(lab: Lab, folder: Path, **asked: Any) -> list[Ending]:
    folder.mkdir()
    arguments = {"folder": str(folder), "timeout_s": 60.0, "numels": [1000, 500_000], **asked}
    with Fleet(lab, SCRIPT, arguments=arguments, env={"OMP_NUM_THREADS": "1"}) as fleet:
        return fleet.collect(COLLECT_TIMEOUT_S)


def errors(endings: list[Ending]) -> list[Any]:
    return [ending.returned()["error"] for ending in endings]


@pytest.mark.parametrize(
    "shape",
    [
        {"delay_s": 0.05, "jitter_s": 0.005},
        {"loss": 0.01},
        {"rate_bits_per_s": 20e6},
        {"delay_s": 0.01, "loss": 0.01, "rate_bits_per_s": 50e6},
    ],
    ids=["delay", "loss", "rate", "all of it"],
)
def test_values_are_right_on_a_bad_network(tmp_path: Path, shape: dict[str, float]) -> None:
    with lab_or_skip("a", "b", "c", seed=7) as lab:
        lab.set_all(**shape)
        assert errors(run(lab, tmp_path / "meet")) == [None, None, None]


def test_a_one_way_partition_aborts_at_every_member(tmp_path: Path) -> None:
    with lab_or_skip("a", "b", "c", seed=7) as lab:
        lab.set("a", "b", blocked=True)
        endings = run(lab, tmp_path / "meet", timeout_s=3.0, barrier=False)
        assert all(error in ("CollectiveAborted", "CollectiveTimeout") for error in errors(endings)), errors(endings)
        assert {ending.returned()["culprit"] for ending in endings} <= {"w0", "w1", "w2"}


def test_a_member_behind_a_silent_network_is_given_up(tmp_path: Path) -> None:
    with lab_or_skip("a", "b", "c", seed=7) as lab:
        lab.set("c", "a", blocked=True)
        lab.set("c", "b", blocked=True)
        endings = run(lab, tmp_path / "meet", timeout_s=3.0, barrier=False)
        assert [ending.returned()["culprit"] for ending in endings[:2]] == ["w2", "w2"]
        assert endings[2].returned()["error"] is not None


@pytest.mark.parametrize("lanes", [1, 4])
def test_stripes_over_several_connections_are_put_together(tmp_path: Path, lanes: int) -> None:
    with lab_or_skip("a", "b", seed=7) as lab:
        lab.set_all(delay_s=0.02, loss=0.002)
        assert errors(run(lab, tmp_path / "meet", lanes=lanes, numels=[2_000_000, 3])) == [None, None]
