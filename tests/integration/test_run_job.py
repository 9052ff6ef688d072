"""The whole launcher with a real etcd; small programs in the places of agent and controller say what they are told."""

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from elastic_run.runtime.edge.rundir import local_jobs
from elastic_run.runtime.launcher import EXIT_SIGNAL_BASE

BOUND_S = 60.0
# Argument 1: what the agent does after its report. The rest: the command line.
HARNESS = """
    import asyncio, os, sys
    from elastic_run.runtime import cli, flags
    AGENT = '''
    import json, os, signal, socket, sys, time, urllib.request
    told = json.load(open(sys.argv[2]))
    host, port = told["store"]["endpoints"][0].rsplit(":", 1)
    health = urllib.request.urlopen(f"http://{host}:{port}/health", timeout=30).read().decode()
    mode = oct(os.stat(sys.argv[2]).st_mode & 0o777)
    held = socket.create_connection((host, int(port)))
    os.write(1, (json.dumps({"agent": told, "health": health, "mode": mode, "etcd_dir": os.path.isdir(
        told["run_dir"] + "/etcd"), "omp": os.environ.get("OMP_NUM_THREADS")}) + chr(10)).encode())
    os.write(2, b"agent reported" + bytes([10]))
    ''' + sys.argv[1]
    CONTROLLER = "import time; time.sleep(600)"
    programs = cli.Programs(
        agent=(sys.executable, "-c", "\\n".join(line.strip() for line in AGENT.splitlines())),
        controller=(sys.executable, "-c", CONTROLLER),
    )
    config = flags.read_command_line(sys.argv[2:], os.environ, python=sys.executable, random_id="random")
    sys.exit(asyncio.run(cli.run_job(config, dict(os.environ), programs=programs)))
"""


@pytest.fixture
def root() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(dir="/tmp"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "train.py"
    path.write_text("")
    return str(path)


@contextlib.contextmanager
def start(root: Path, agent: str, *argv: str) -> Iterator[subprocess.Popen[str]]:
    """A launcher as a process; killed, and with it its children, when the test is over and it is not."""
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-c", textwrap.dedent(HARNESS), agent, *argv]
    run = subprocess.Popen(
        command,
        env=env | {"ELASTIC_RUN_DIR": str(root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with run:
        try:
            yield run
        finally:
            run.kill()


def report(run: subprocess.Popen[str]) -> dict[str, Any]:
    assert run.stdout is not None
    line = run.stdout.readline()
    assert line, run.communicate(timeout=BOUND_S)
    told: dict[str, Any] = json.loads(line)
    return told


def port_open(endpoint: str) -> bool:
    host, port = endpoint.rsplit(":", 1)
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


def test_a_job_on_one_machine_gets_a_store_and_leaves_nothing(root: Path, script: str) -> None:
    with start(root, "raise SystemExit(7)", "--nproc-per-node=2", script, "--lr", "3") as run:
        told = report(run)
        _, errors = run.communicate(timeout=BOUND_S)
    assert run.returncode == 7
    assert json.loads(told["health"])["health"] == "true"
    assert (told["mode"], told["etcd_dir"], told["omp"]) == ("0o600", True, "1")
    agent = told["agent"]
    assert agent["command"]["args"] == ["--lr", "3"]
    assert (agent["job"]["job_id"], agent["nproc"], agent["address"]) == ("random", 2, "127.0.0.1")
    assert errors.count("OMP_NUM_THREADS=1") == 1
    assert not port_open(agent["store"]["endpoints"][0])
    assert list(root.iterdir()) == []


def test_a_running_job_is_found_by_local_tools_and_ends_by_a_signal(root: Path, script: str) -> None:
    with start(root, "time.sleep(600)", script) as run:
        told = report(run)
        (job,) = local_jobs(root)
        assert job.endpoints == tuple(told["agent"]["store"]["endpoints"])
        assert (job.launcher_pid, job.run_dir) == (run.pid, told["agent"]["run_dir"])
        run.send_signal(signal.SIGTERM)
        run.communicate(timeout=BOUND_S)
    assert run.returncode == EXIT_SIGNAL_BASE + signal.SIGTERM
    assert list(root.iterdir()) == []


def test_what_a_killed_launcher_leaves_behind_is_swept_by_the_next(root: Path, script: str) -> None:
    with start(root, "time.sleep(600)", script) as run:
        left_behind = report(run)["agent"]["run_dir"]
        run.kill()
    assert os.path.isdir(left_behind)
    with start(root, "", script) as run:
        run.communicate(timeout=BOUND_S)
    assert run.returncode == 0
    assert list(root.iterdir()) == []


def test_a_run_directory_asked_for_is_kept(root: Path, script: str) -> None:
    with start(root / "r", "", f"--run-dir={root / 'kept'}", script) as run:
        told = report(run)
        _, errors = run.communicate(timeout=BOUND_S)
    assert run.returncode == 0
    run_dir = told["agent"]["run_dir"]
    assert os.path.isfile(f"{run_dir}/agent.json") and f"the run directory {run_dir} is kept" in errors
    assert list((root / "r").iterdir()) == []


def test_two_nodes_of_one_machine_meet_at_a_port_and_the_store_waits_for_the_second(root: Path, script: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    flags = ("--nnodes=1:2", f"--rdzv-endpoint={endpoint}", "--rdzv-id=job7", script)
    waits = (
        "signal.signal(signal.SIGUSR1, lambda *_: sys.exit(0))\nos.write(1, b'ready' + bytes([10]))\ntime.sleep(600)"
    )
    with start(root, waits, "--signals-to-handle=SIGTERM", *flags) as first:
        assert report(first)["agent"]["store"]["endpoints"] == [endpoint]
        with start(root, waits, *flags) as second:
            told = report(second)
            assert told["agent"]["store"]["endpoints"] == [endpoint]
            assert not told["etcd_dir"]
            assert {job.job_id for job in local_jobs(root)} == {"job7"}
            _end_agent_of(first)
            assert first.stderr is not None
            assert any("stays for the other nodes" in line for line in iter(first.stderr.readline, ""))
            assert port_open(endpoint)
            _end_agent_of(second)
            second.communicate(timeout=BOUND_S)
        first.communicate(timeout=BOUND_S)
    assert (first.returncode, second.returncode) == (0, 0)
    assert not port_open(endpoint)


def _end_agent_of(run: subprocess.Popen[str]) -> None:
    """Make the agent end by itself, as at the end of a job, and wait until it did."""
    assert run.stdout is not None and run.stdout.readline() == "ready\n"
    agent = next(pid for pid in _children_of(run.pid) if b"agent.json" in Path(f"/proc/{pid}/cmdline").read_bytes())
    watched = os.pidfd_open(agent)
    os.kill(agent, signal.SIGUSR1)
    try:
        assert select.select([watched], [], [], BOUND_S)[0]
    finally:
        os.close(watched)


def _children_of(pid: int) -> list[int]:
    found = []
    for name in os.listdir("/proc"):
        if name.isdecimal():
            try:
                fields = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[1]) == pid:
                found.append(int(name))
    return found


def test_an_external_store_is_asked_first_and_outlives_the_job(root: Path, script: str) -> None:
    with start(root, "time.sleep(600)", script) as provider:
        endpoint = report(provider)["agent"]["store"]["endpoints"][0]
        external = ("--rdzv-backend=etcd", f"--rdzv-endpoint={endpoint}", "--rdzv-id=other", script)
        with start(root, "", *external) as run:
            told = report(run)
            _, errors = run.communicate(timeout=BOUND_S)
        assert run.returncode == 0, errors
        assert told["agent"]["job"]["job_id"] == "other" and not told["etcd_dir"]
        assert port_open(endpoint)
        provider.send_signal(signal.SIGTERM)
        provider.communicate(timeout=BOUND_S)
