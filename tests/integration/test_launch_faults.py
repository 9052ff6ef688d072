"""Bad scripts, bad input, signals and kills, from end to end: exit code, first failure named, nothing left behind."""

import base64
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from etcd_cluster import EtcdCluster
from launching import AGENT, BOUND_S, CONTROLLER, SCRIPTS, Bench, Launched, wait_until

from elastic_run.runtime.protocol.codec import encode
from elastic_run.runtime.protocol.records import RESULT_KEY, JobResult, JobState

MEGABYTES_PER_RANK = 50


@pytest.fixture
def bench() -> Iterator[Bench]:
    with Bench() as made:
        yield made


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdCluster]:
    directory = Path(tempfile.mkdtemp(dir="/tmp", prefix="ele"))
    with EtcdCluster(directory=directory, size=1) as cluster:
        yield cluster
    shutil.rmtree(directory)


def external(etcd: EtcdCluster, job: str) -> tuple[str, ...]:
    return ("--nnodes=1", f"--rdzv-endpoint=etcd://{etcd.endpoints[0]}", f"--rdzv-id={job}")


def keys_of(etcd: EtcdCluster, job: str) -> dict[bytes, bytes]:
    """Every key of a job but the markers of store clients."""
    folder = f"/elastic/{job}/".encode()
    encoded = (base64.b64encode(folder).decode(), base64.b64encode(folder[:-1] + b"0").decode())
    found = etcd.api("kv/range", {"key": encoded[0], "range_end": encoded[1]}).get("kvs", [])
    assert isinstance(found, list)
    pairs = {base64.b64decode(kv["key"]): base64.b64decode(kv.get("value", "")) for kv in found}
    return {key: value for key, value in pairs.items() if not key.startswith(folder + b"writers/")}


def put(etcd: EtcdCluster, key: bytes, value: bytes) -> None:
    etcd.api("kv/put", {"key": base64.b64encode(key).decode(), "value": base64.b64encode(value).decode()})


def root_cause(run: Launched) -> str:
    """The first failure of the report."""
    match = re.search(r"Root cause.*?\n(.*?)\n-{10}", run.err, re.DOTALL)
    assert match, run.err
    return match[1]


# Scripts that fail


@pytest.mark.parametrize(
    ("argv", "exit_code", "trace"),
    [
        (["raise_at_import.py"], "1", "RuntimeError: raised at import, on purpose"),
        (["exit_code.py", "3"], "3", "no traceback was recorded"),
        (["segfault.py"], "-11", "Signal 11 (SIGSEGV)"),
    ],
)
def test_the_first_failure_is_named_with_its_end(argv: list[str], exit_code: str, trace: str, bench: Bench) -> None:
    run = bench.run("--node-name=here", SCRIPTS / argv[0], *argv[1:])
    assert run.end() == 1
    cause = root_cause(run)
    assert re.search(r"rank      : ([01]) \(local_rank: \1\)", cause), cause
    assert "(node: here)" in cause
    assert f"exitcode  : {exit_code} (pid: " in cause
    assert trace in cause
    bench.assert_nothing_left()


@pytest.mark.parametrize("argv", [["exit_code.py", "7", "1"], ["segfault.py", "1"], ["fail_lives.py", "1", "7", "9"]])
def test_the_rank_that_failed_is_named_though_others_end_well_or_wait(argv: list[str], bench: Bench) -> None:
    run = bench.run(SCRIPTS / argv[0], *argv[1:])
    assert run.end() == 1
    assert "rank      : 1 (local_rank: 1)" in root_cause(run)
    bench.assert_nothing_left()


def test_one_restart_saves_a_job_that_fails_once(bench: Bench) -> None:
    run = bench.run("--max-restarts=1", SCRIPTS / "fail_lives.py", 1, 7, 1)
    assert run.end() == 0, run.err
    assert sorted(run.out.splitlines()) == [f"life 1 of rank {rank} ends well" for rank in (0, 1)]
    assert "rank 1" in run.err and "7" in run.err
    bench.assert_nothing_left()


def test_one_restart_does_not_save_a_job_that_fails_twice(bench: Bench) -> None:
    run = bench.run("--max-restarts=1", SCRIPTS / "fail_lives.py", 1, 7, 2)
    assert run.end() == 1
    assert "rank      : 1 (local_rank: 1)" in root_cause(run)
    bench.assert_nothing_left()


def test_a_script_without_stdout_ends_well(bench: Bench) -> None:
    run = bench.run(SCRIPTS / "close_stdout.py")
    assert run.end() == 0
    assert run.out.splitlines() == ["before the close"] * 2
    assert run.err.count("worked on without stdout: 499500") == 2
    bench.assert_nothing_left()


@pytest.mark.parametrize("code", [0, 7])
def test_forked_children_do_not_outlive_the_job(code: int, bench: Bench) -> None:
    pids = bench.files / "pids"
    run = bench.run(SCRIPTS / "fork_children.py", pids, code)
    assert run.end() == min(code, 1)
    assert len(pids.read_text().split()) >= 2
    bench.assert_nothing_left()


# Output


def test_a_hundred_megabytes_reach_the_console_to_the_byte(bench: Bench) -> None:
    run = bench.run(SCRIPTS / "flood.py", MEGABYTES_PER_RANK)
    assert run.end() == 0
    assert run.stdout_file.stat().st_size == 2 * MEGABYTES_PER_RANK * 1_000_000


def test_a_hundred_megabytes_reach_console_and_files_through_tee(bench: Bench) -> None:
    logs = bench.files / "logs"
    run = bench.run("--tee=3", f"--log-dir={logs}", SCRIPTS / "flood.py", MEGABYTES_PER_RANK)
    assert run.end() == 0
    lines = MEGABYTES_PER_RANK * 1_000_000 // 100
    seen = {b"[default0]:": 0, b"[default1]:": 0}
    with run.stdout_file.open("rb") as output:
        for line in output:
            prefix, text = line[:11], line[11:]
            assert text.startswith(b"%010d " % seen[prefix]) and len(text) == 100
            seen[prefix] += 1
    assert list(seen.values()) == [lines, lines]
    files = sorted(logs.rglob("stdout.log"))
    assert [file.stat().st_size for file in files] == [lines * 100] * 2
    bench.assert_nothing_left()


def test_a_reader_of_stderr_that_goes_away_changes_nothing(bench: Bench) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    argv = bench.command("--max-restarts=1", SCRIPTS / "fail_lives.py", 1, 7, 1)  # agent and launcher both have to talk
    with subprocess.Popen(argv, env=bench.env, stdout=subprocess.DEVNULL, stderr=write_end) as run:
        os.close(write_end)
        assert run.wait(BOUND_S) == 0
    bench.assert_nothing_left()


@pytest.fixture
def full_disk(bench: Bench) -> Iterator[Path]:
    """A file system of one megabyte."""
    directory = bench.files / "small"
    directory.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(directory)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("this user may not mount")
    yield directory
    subprocess.run(["umount", str(directory)], check=True)


def test_a_disk_that_fills_up_costs_the_log_file_and_not_the_job(full_disk: Path, bench: Bench) -> None:
    run = bench.run("--tee=3", f"--log-dir={full_disk}", SCRIPTS / "flood.py", 2)
    assert run.end() == 0, run.err
    assert run.stdout_file.stat().st_size == 2 * 2 * 10_000 * 111
    assert "No space left on device" in run.err
    bench.assert_nothing_left()


def test_a_disk_that_is_full_is_refused_at_the_start(full_disk: Path, bench: Bench) -> None:
    (full_disk / "filler").write_bytes(b"x" * (1 << 20))
    run = bench.run("--tee=3", f"--log-dir={full_disk}", SCRIPTS / "flood.py", 2)
    assert run.end() == 2
    assert run.err.count("\n") == 1 and str(full_disk) in run.err
    bench.assert_nothing_left()


# Signals and kills


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_job_in_order_and_names_the_exit_code(number: signal.Signals, bench: Bench) -> None:
    run = bench.run(SCRIPTS / "wait_forever.py", bench.files)
    bench.await_files("rank-0", "rank-1")
    run.signal(number)
    assert run.end() == 128 + number
    assert f"{number.name} received" in run.err
    bench.assert_nothing_left()


def test_a_signal_that_is_asked_for_beside_sigterm_leaves_sigterm_handled(bench: Bench) -> None:
    run = bench.run("--signals-to-handle=SIGUSR1", SCRIPTS / "wait_forever.py", bench.files)
    bench.await_files("rank-0", "rank-1")
    run.signal(signal.SIGTERM)
    assert run.end() == 128 + signal.SIGTERM
    assert "passed to the workers" in run.err  # not killed with its agent
    bench.assert_nothing_left()


def test_deaf_workers_are_killed_when_their_time_is_over(bench: Bench) -> None:
    run = bench.run("--shutdown-timeout=2", SCRIPTS / "ignore_sigterm.py", bench.files)
    bench.await_files("rank-0", "rank-1")
    run.signal(signal.SIGTERM)
    assert run.end() == 128 + signal.SIGTERM
    bench.assert_nothing_left()


def test_a_second_ctrl_c_kills_deaf_workers_at_once(bench: Bench) -> None:
    run = bench.run("--shutdown-timeout=600", SCRIPTS / "ignore_sigterm.py", bench.files)
    bench.await_files("rank-0", "rank-1")
    run.signal(signal.SIGINT)
    run.until("passed to the workers")
    run.signal(signal.SIGINT)
    assert run.end() == 128 + signal.SIGINT
    bench.assert_nothing_left()


def test_nothing_outlives_a_killed_launcher(bench: Bench) -> None:
    run = bench.run(SCRIPTS / "keep_children.py", bench.files)
    bench.await_files("rank-0", "rank-1")
    assert len(bench.processes()) >= 10  # launcher, agent, controller, etcd, two workers, four children
    run.signal(signal.SIGKILL)
    wait_until(lambda: bench.processes() == [], "the end of everything that was started")
    run.end()
    assert "the launcher of this node is gone" in run.err
    bench.assert_nothing_left()


def test_deaf_workers_of_a_killed_launcher_are_killed_soon(bench: Bench) -> None:
    run = bench.run("--shutdown-timeout=600", SCRIPTS / "ignore_sigterm.py", bench.files)
    bench.await_files("rank-0", "rank-1")
    run.signal(signal.SIGKILL)
    wait_until(lambda: bench.processes() == [], "the end of everything that was started")
    run.end()
    bench.assert_nothing_left()


def test_a_run_directory_that_was_asked_for_outlives_a_killed_launcher(bench: Bench) -> None:
    kept = bench.path / "kept"
    run = bench.run(f"--run-dir={kept}", SCRIPTS / "wait_forever.py", bench.files)
    bench.await_files("rank-0", "rank-1")
    run.signal(signal.SIGKILL)
    wait_until(lambda: bench.processes() == [], "the end of everything that was started")
    run.end()
    assert [(path / "agent.json").exists() for path in kept.iterdir()] == [True]
    assert bench.run(SCRIPTS / "exit_code.py", 0).end() == 0  # sweeps the entry that pointed there
    bench.assert_nothing_left()


def test_a_killed_agent_ends_the_job_with_one_clear_line(bench: Bench) -> None:
    run = bench.run(SCRIPTS / "keep_children.py", bench.files)
    bench.await_files("rank-0", "rank-1")
    os.kill(bench.process(AGENT), signal.SIGKILL)
    assert run.end() == 1
    assert run.said[-1] == "elastic-run: the agent of this node was killed by SIGKILL; its workers are ended with it"
    bench.assert_nothing_left()


def test_a_killed_controller_does_not_disturb_the_workers(bench: Bench) -> None:
    run = bench.run(SCRIPTS / "wait_for_go.py", bench.files)
    bench.await_files("rank-0.0", "rank-1.0")
    first = bench.process(CONTROLLER)
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: bench.processes(CONTROLLER) not in ([], [first]), "another controller")
    (bench.files / "go").touch()
    assert run.end() == 0, run.err
    assert sorted(path.name for path in bench.files.glob("rank-*")) == ["rank-0.0", "rank-1.0"]
    bench.assert_nothing_left()


# Bad input


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--rdzv-endpoint=etcd://127.0.0.1:1", "--rdzv-id=j", "exit_code.py"], "etcd at 127.0.0.1:1 did not answer"),
        (["nothere.py"], "there is no script"),
        (["--nnodes=2:1", "exit_code.py"], "MIN must be at least 1 and not above MAX"),
        (["--metrics-port={port}", "exit_code.py"], "is in use"),
        (["--rdzv-endpoint=localhost:{port}", "exit_code.py"], "is in use by another program"),
    ],
)
def test_bad_input_is_one_line_before_anything_starts(
    argv: list[str], says: str, taken_port: int, bench: Bench
) -> None:
    *flags, script = [text.format(port=taken_port) for text in argv]
    run = bench.run(*flags, SCRIPTS / script, 0)
    assert run.end() == 2
    assert run.err.count("\n") == 1 and says in run.err, run.err
    assert run.out == ""
    assert not bench.root.exists()
    bench.assert_nothing_left()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (b"spec", b"garbage"),
        (b"spec", b'{"protocol":2,"kind":"JobSpec"}'),
        (b"sync/leader", b"somebody"),
        (b"nodes/a", b"{}"),
        (b"views/000000000001", b""),
        (b"foreign/key", b"x"),
        (b"\xff\xfe", b"x"),
    ],
)
def test_foreign_keys_are_one_clear_error_and_stay_as_they_are(
    key: bytes, value: bytes, etcd: EtcdCluster, bench: Bench
) -> None:
    job = f"foreign-{key.hex()}-{value.hex()[:8]}"
    put(etcd, f"/elastic/{job}/".encode() + key, value)
    before = keys_of(etcd, job)
    run = bench.run(*external(etcd, job), SCRIPTS / "exit_code.py", 0)
    assert run.end() == 2
    assert run.err.count("\n") == 1, run.err
    assert repr(key.decode(errors="replace"))[1:-1] in run.err or "\\xff" in run.err
    assert keys_of(etcd, job) == before
    bench.assert_nothing_left()


def test_two_jobs_on_one_etcd_do_not_see_each_other(etcd: EtcdCluster, bench: Bench) -> None:
    runs = {job: bench.run(*external(etcd, job), SCRIPTS / "wait_for_go.py", bench.files / job) for job in ("a", "b")}
    for job in runs:
        (bench.files / job).mkdir()
    bench.await_files("a/rank-0.0", "a/rank-1.0", "b/rank-0.0", "b/rank-1.0")
    os.kill(int((bench.files / "a/rank-1.0").read_text()), signal.SIGKILL)
    assert runs["a"].end() == 1
    (bench.files / "b/go").touch()
    assert runs["b"].end() == 0
    assert all(f"/elastic/{job}/{RESULT_KEY}".encode() in keys_of(etcd, job) for job in runs)
    bench.assert_nothing_left()


def test_a_second_launcher_of_a_complete_job_is_refused_and_the_first_goes_on(etcd: EtcdCluster, bench: Bench) -> None:
    first = bench.run(*external(etcd, "same"), SCRIPTS / "wait_for_go.py", bench.files)
    bench.await_files("rank-0.0", "rank-1.0")
    second = bench.run(*external(etcd, "same"), SCRIPTS / "wait_for_go.py", bench.files)
    assert second.end() == 2
    assert second.err.count("\n") == 1 and "complete with 1 of 1 nodes" in second.err
    assert first.process.poll() is None
    (bench.files / "go").touch()
    assert first.end() == 0
    assert len(first.said) == 1  # it did not even notice
    bench.assert_nothing_left()


def test_a_job_that_has_ended_is_not_run_again_in_silence(etcd: EtcdCluster, bench: Bench) -> None:
    assert bench.run(*external(etcd, "over"), SCRIPTS / "exit_code.py", 0).end() == 0
    before = keys_of(etcd, "over")
    again = bench.run(*external(etcd, "over"), SCRIPTS / "exit_code.py", 0)
    assert again.end() == 2
    assert again.err.count("\n") == 1 and "has ended already (succeeded)" in again.err
    assert keys_of(etcd, "over") == before
    bench.assert_nothing_left()


def controller(bench: Bench, etcd: EtcdCluster, job: str) -> subprocess.Popen[str]:
    where = [f"--rdzv-endpoint=etcd://{etcd.endpoints[0]}", f"--rdzv-id={job}"]
    command = [sys.executable, "-m", CONTROLLER, *where]
    return subprocess.Popen(command, env=bench.env, stderr=subprocess.PIPE, text=True)


def test_an_agent_that_no_controller_tells_of_the_end_reads_it_in_the_store(etcd: EtcdCluster, bench: Bench) -> None:
    run = bench.run("--no-controller", *external(etcd, "missed"), SCRIPTS / "exit_code.py", 3)
    bench.process(AGENT)
    result = JobResult(state=JobState.SUCCEEDED, message="without you", at=0.0)
    put(etcd, f"/elastic/missed/{RESULT_KEY}".encode(), encode(result))
    assert run.end() == 0, run.err
    bench.assert_nothing_left()


@pytest.mark.parametrize("key", [b"sync/leader", b"spec"])
def test_a_controller_writes_nothing_where_foreign_keys_lie(key: bytes, etcd: EtcdCluster, bench: Bench) -> None:
    job = f"alone-{key.hex()}"
    put(etcd, f"/elastic/{job}/".encode() + key, b"garbage")
    before = keys_of(etcd, job)
    with controller(bench, etcd, job) as alone:
        _, err = alone.communicate(timeout=BOUND_S)
    assert alone.returncode == 4
    assert err.count("\n") == 1 and key.decode() in err
    assert keys_of(etcd, job) == before


def test_two_jobs_without_any_flag_run_beside_each_other(bench: Bench) -> None:
    runs = [bench.run(SCRIPTS / "print_env.py") for _ in range(2)]
    assert [run.end() for run in runs] == [0, 0]
    ids = {tuple(re.findall(r'"TORCHELASTIC_RUN_ID": "(\w+)"', run.out)) for run in runs}
    assert len(ids) == 2 and all(len(set(found)) == 1 for found in ids)
    bench.assert_nothing_left()
