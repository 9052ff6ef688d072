"""The benchmark command line on real processes: the cheapest benchmark end to end, and what a wrong request gets."""

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

# benchmarks/ stands beside the package and is never installed.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks.harness import BenchmarkError
from benchmarks.registry import BENCHMARKS
from benchmarks.systems import ROOT, finish, started, wait_for_files

TIMEOUT_S = 120
PARENT = """
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
pathlib.Path("child.new").write_text(str(child.pid))
pathlib.Path("child.new").rename("child")
time.sleep(600)
"""


def run_benchmarks(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def test_a_quick_run_prints_its_table_and_writes_its_json(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    done = run_benchmarks("startup", "--quick", "--systems", "python", "--json", str(file))
    assert done.returncode == 0, done.stderr
    assert "process_to_first_line_s" in done.stdout
    document = json.loads(file.read_text())
    assert document["benchmark"] == "startup"
    assert document["conditions"]["systems"] == ["python"]
    assert document["machine"]["cores"] >= 1
    found = document["results"]["python"]["process_to_first_line_s"]
    assert found["n"] == 3
    assert 0 < found["min"] <= found["median"]


def test_list_names_every_benchmark_with_a_line() -> None:
    done = run_benchmarks("--list")
    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.splitlines()] == [benchmark.name for benchmark in BENCHMARKS]


def test_what_is_not_there_is_one_line_and_exit_2() -> None:
    for arguments, reason in ((["nothing"], "name one of"), (["idle", "--systems", "python"], "knows the systems")):
        done = run_benchmarks(*arguments)
        assert done.returncode == 2
        assert reason in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_a_started_program_ends_with_its_block_and_so_does_its_child_of_another_session(tmp_path: Path) -> None:
    with started([sys.executable, "-c", PARENT], tmp_path) as program:
        child = psutil.Process(int(wait_for_files(program, ["child"])[0]))
        assert child.is_running()
    assert program.process.returncode is not None
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_a_failing_program_is_shown_with_its_last_words(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", "raise SystemExit('its last words')"]
    with started(argv, tmp_path) as program, pytest.raises(BenchmarkError, match=r"exit code 1(.|\n)*its last words"):
        finish(program)
