"""Crews of real processes: gloo measured, struck and joined end to end; what is left behind; what a failure says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

# benchmarks/ stands beside the package and is never installed.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks import collective_faults
from benchmarks.crew import assembled
from benchmarks.harness import BenchmarkError
from benchmarks.systems import ROOT

TIMEOUT_S = 240


def test_allreduce_measures_gloo_and_says_why_pccl_cannot_run(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    argv = [sys.executable, "-m", "benchmarks", "allreduce", "--quick", "--json", str(file), "--systems"]
    environment = {**os.environ, "BENCHMARK_PCCL_PYTHON": "/bin/false"}
    done = subprocess.run(
        [*argv, "gloo"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(file.read_text())
    assert document["results"]["gloo"]["4_workers_bf16_16MB_ms"]["median"] > 0
    assert len(document["results"]["gloo"]) == 12
    refused = subprocess.run(
        [*argv, "pccl"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert refused.returncode == 2
    assert "pccl cannot run here" in refused.stderr


@pytest.mark.slow
def test_a_struck_group_of_gloo_is_formed_anew_and_a_fifth_member_joins(tmp_path: Path) -> None:
    with assembled("gloo", 7, tmp_path) as crew:
        troop = collective_faults.Troop(crew=crew, members=[0, 1, 2, 3], spares=[4, 5, 6])
        found = collective_faults.strike(troop)
        assert len(troop.members) == 4
        assert found is None or found[collective_faults.KILL_METRIC] > found[collective_faults.NOTICE_METRIC] > 0
        joined = collective_faults.join_loop(troop)
        assert joined[collective_faults.JOIN_METRIC] > 0
        family = psutil.Process().children(recursive=True)
        assert len(family) >= 7
    assert not [member for member in family if member.is_running() and member.status() != psutil.STATUS_ZOMBIE]


def test_a_member_that_fails_is_named_with_its_reason(tmp_path: Path) -> None:
    with assembled("gloo", 2, tmp_path) as crew:
        crew.form([0, 1])
        with pytest.raises(BenchmarkError, match=r"member 0 failed: KeyError"):
            crew.ask([0], "no such command")


def test_a_system_that_is_none_fails_at_once(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match=r"no system is called"), assembled("nothing", 2, tmp_path):
        pass
