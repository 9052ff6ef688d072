"""elastic-ctl against real jobs: every question, in words and in JSON, from the leader and from the store alone."""

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from etcd_cluster import EtcdCluster
from launching import AGENT, BOUND_S, CONTROLLER, SCRIPTS, Bench, Launched, wait_until

STATUS_FIELDS = {
    *("job_id", "source", "problem", "leader", "leader_metrics_port", "fencing_token", "condition", "reason"),
    *(
        "nodes_min",
        "nodes_max",
        "view",
        "world_size",
        "restarts_used",
        "max_restarts",
        "step",
        "step_rate_hz",
        "last_event",
        "nodes",
    ),
}
NODE_FIELDS = {
    *("node", "incarnation", "address", "nproc", "condition", "reason", "in_view", "view", "phase"),
    *("workers_alive", "step", "step_rate_hz", "metrics_port"),
}
VIEW_FIELDS = {
    *("number", "status", "members", "restart_count", "reason", "proposed_at", "stop_at_step"),
    *("master_addr", "master_port"),
}
EVENT_FIELDS = {"sequence", "at", "kind", "message", "node", "view"}


@pytest.fixture
def bench() -> Iterator[Bench]:
    with Bench() as made:
        yield made


@pytest.fixture
def etcd(request: pytest.FixtureRequest) -> Iterator[EtcdCluster]:
    """One member, or as many as the test's parameter says."""
    directory = Path(tempfile.mkdtemp(dir="/tmp", prefix="ele"))
    with EtcdCluster(directory=directory, size=getattr(request, "param", 1)) as cluster:
        yield cluster
    shutil.rmtree(directory)


class Follower:
    """`elastic-ctl events --follow --json` as it goes."""

    def __init__(self, bench: Bench, *argv: str) -> None:
        command = [sys.executable, "-m", "elastic_run.runtime.ctl.cli", "events", "--follow", "--json", *argv]
        self.process = subprocess.Popen(
            command, env=bench.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
        )
        self.events: list[dict[str, object]] = []

    def until(self, kind: str, *, view: int | None = None) -> dict[str, object]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.events.append(json.loads(line))
            if self.events[-1]["kind"] == kind and view in (None, self.events[-1]["view"]):
                return self.events[-1]
        raise AssertionError(f"no {kind} in {self.events}")

    def end(self) -> tuple[int, str]:
        out, err = self.process.communicate(timeout=BOUND_S)
        self.events += [json.loads(line) for line in out.splitlines()]
        return self.process.returncode, err


def started(bench: Bench, *flags: str) -> Launched:
    run = bench.run(*flags, SCRIPTS / "wait_for_go.py", bench.files)
    bench.await_files("rank-0.0", "rank-1.0")
    return run


def ended(run: Launched, bench: Bench) -> None:
    (bench.files / "go").touch()
    assert run.end() == 0, run.err
    bench.assert_nothing_left()


def put(etcd: EtcdCluster, key: bytes, value: bytes) -> None:
    etcd.api("kv/put", {"key": base64.b64encode(key).decode(), "value": base64.b64encode(value).decode()})


def count(etcd: EtcdCluster, prefix: bytes) -> int:
    key, end = (base64.b64encode(text).decode() for text in (prefix, prefix[:-1] + bytes((prefix[-1] + 1,))))
    return int(str(etcd.api("kv/range", {"key": key, "range_end": end, "count_only": True}).get("count", 0)))


def test_a_local_job_answers_every_question_by_itself(bench: Bench) -> None:
    run = started(bench, "--node-name=here")
    wait_until(lambda: bench.ask("status")["nodes"][0]["workers_alive"] == 2, "a heartbeat with both workers")
    status = bench.ask("status")
    assert set(status) == STATUS_FIELDS
    assert (status["source"], status["problem"], status["condition"]) == ("leader", None, "running")
    assert (status["view"], status["world_size"], status["restarts_used"]) == (1, 2, 0)
    nodes = bench.ask("nodes")
    assert set(nodes) == {"job_id", "source", "problem", "nodes"} and nodes["job_id"] == status["job_id"]
    [node] = nodes["nodes"]
    assert set(node) == NODE_FIELDS
    assert (node["node"], node["condition"], node["phase"], node["in_view"]) == ("here", "alive", "running", True)
    views = bench.ask("views")
    assert set(views) == {"job_id", "current", "views"} and views["current"] == 1
    [view] = views["views"]
    assert set(view) == VIEW_FIELDS and view["status"] == "installed"
    assert [member["node"] for member in view["members"]] == ["here"]
    events = bench.ask("events")["events"]
    assert all(set(event) == EVENT_FIELDS for event in events)
    assert [event["sequence"] for event in events] == list(range(1, len(events) + 1))
    for question, shows in [("status", "running"), ("nodes", "here"), ("views", "1 *"), ("events", "view_installed")]:
        result = bench.ctl(question)
        assert (result.returncode, result.stderr) == (0, "") and shows in result.stdout
    ended(run, bench)


def test_follow_tells_of_a_failure_the_new_view_and_the_end_then_stops(bench: Bench) -> None:
    run = started(bench, "--max-restarts=1")
    follower = Follower(bench)
    follower.until("view_installed", view=1)
    os.kill(int((bench.files / "rank-1.0").read_text()), signal.SIGKILL)
    assert "rank 1" in str(follower.until("worker_failed")["message"])
    follower.until("view_installed", view=2)
    bench.await_files("rank-0.1", "rank-1.1")
    os.kill(bench.process(CONTROLLER), signal.SIGKILL)
    follower.until("leader_elected")
    ended(run, bench)
    assert follower.end() == (0, "")
    assert follower.events[-1]["kind"] == "job_ended"
    assert [event["sequence"] for event in follower.events] == list(range(1, len(follower.events) + 1))


def test_ctrl_c_ends_follow_with_130_and_no_traceback(bench: Bench) -> None:
    run = started(bench)
    follower = Follower(bench)
    follower.until("view_installed")
    follower.process.send_signal(signal.SIGINT)
    assert follower.end() == (130, "")
    ended(run, bench)


def test_follow_ends_when_its_local_job_is_killed(bench: Bench) -> None:
    run = started(bench)
    follower = Follower(bench)
    follower.until("view_installed")
    run.signal(signal.SIGKILL)
    run.end()
    code, err = follower.end()
    assert (code, err.count("\n")) == (1, 1) and "the job's launcher is gone" in err


@pytest.mark.parametrize("etcd", [3], indirect=True)
def test_follow_survives_the_loss_of_the_member_it_talks_to(etcd: EtcdCluster, bench: Bench) -> None:
    where = (f"--rdzv-endpoint=etcd://{','.join(etcd.endpoints)}", "--rdzv-id=f")
    run = started(bench, "--nnodes=1", "--max-restarts=1", *where)
    follower = Follower(bench, *where)
    follower.until("view_installed", view=1)
    etcd.kill(0)  # endpoints are taken in order
    os.kill(int((bench.files / "rank-0.0").read_text()), signal.SIGKILL)
    follower.until("view_installed", view=2)
    ended(run, bench)
    assert follower.end() == (0, "")
    assert [event["sequence"] for event in follower.events] == list(range(1, len(follower.events) + 1))


def test_no_local_job_is_one_line_and_several_ask_for_a_choice(bench: Bench) -> None:
    none = bench.ctl("status")
    assert none.returncode == 1
    assert none.stderr.count("\n") == 1 and "no job of this user runs on this machine" in none.stderr
    runs = []
    for job in ("one", "two"):
        (bench.files / job).mkdir()
        runs.append(bench.run("--standalone", SCRIPTS / "wait_for_go.py", bench.files / job))
        bench.await_files(f"{job}/rank-0.0", f"{job}/rank-1.0")
    several = bench.ctl("status")
    assert several.returncode == 2 and several.stderr.count("\n") == 1
    found = re.findall(r"(\w+) \(process (\d+)\)", several.stderr)
    assert sorted(int(pid) for _, pid in found) == sorted(run.pid for run in runs)
    for job_id, _ in found:
        assert bench.ask("status", f"--rdzv-id={job_id}")["job_id"] == job_id
    unknown = bench.ctl("status", "--rdzv-id=another")
    assert unknown.returncode == 1 and "another" in unknown.stderr
    for job in ("one", "two"):
        (bench.files / job / "go").touch()
    assert [run.end() for run in runs] == [0, 0]
    bench.assert_nothing_left()


def test_when_no_leader_answers_the_store_does_and_says_so(etcd: EtcdCluster, bench: Bench) -> None:
    where = (f"--rdzv-endpoint=etcd://{etcd.endpoints[0]}", "--rdzv-id=s")
    run = started(bench, "--nnodes=1", "--node-name=here", *where)
    controller = bench.process(CONTROLLER)
    os.kill(controller, signal.SIGSTOP)
    try:
        frozen = bench.ask("status", *where)
    finally:
        os.kill(controller, signal.SIGCONT)
    assert (frozen["source"], frozen["condition"], frozen["view"]) == ("store", "unknown", 1)
    assert frozen["problem"]
    ended(run, bench)
    over = bench.ask("status", *where)
    assert (over["source"], over["condition"], over["leader"]) == ("store", "succeeded", None)
    [node] = bench.ask("nodes", *where)["nodes"]
    assert (node["node"], node["condition"]) == ("here", "no lease")
    assert bench.ask("events", *where)["events"][-1]["kind"] == "job_ended"
    assert "no controller answers (the job has ended)" in bench.ctl("status", *where).stdout


@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        (["status", "--rdzv-endpoint=etcd://127.0.0.1:1"], 2, "--rdzv-id"),
        (["status", "--rdzv-endpoint=etcd://127.0.0.1:1", "--rdzv-id=j"], 1, "127.0.0.1:1"),
        (["status", "--rdzv-endpoint=etcd://?", "--rdzv-id=j"], 2, "HOST:PORT"),
        (["status", "--rdzv-id=a/b"], 2, "a/b"),
        (["status", "--store-ca=x"], 2, "--rdzv-endpoint"),
        (["nonsense"], 2, "nonsense"),
        ([], 2, "COMMAND"),
    ],
)
def test_usage_errors_and_silence_have_their_exit_codes(argv: list[str], code: int, says: str, bench: Bench) -> None:
    result = bench.ctl(*argv)
    assert result.returncode == code
    assert says in result.stderr and "Traceback" not in result.stderr and result.stdout == ""


def test_forget_leaves_a_living_job_alone_and_deletes_one_that_is_over(etcd: EtcdCluster, bench: Bench) -> None:
    where = (f"--rdzv-endpoint=etcd://{etcd.endpoints[0]}", "--rdzv-id=f")
    put(etcd, b"/elastic/ff/spec", b"of another job")
    run = started(bench, "--nnodes=1", *where)
    living = bench.ctl("forget", "--yes", *where)
    assert living.returncode == 1 and "living leader" in living.stderr
    assert "workers" in bench.ctl("status", *where).stdout
    ended(run, bench)
    unasked = bench.ctl("forget", *where)
    assert unasked.returncode == 2 and "--yes" in unasked.stderr
    assert "spec" in unasked.stdout and count(etcd, b"/elastic/f/") > 0
    done = bench.ctl("forget", "--yes", *where)
    assert done.returncode == 0 and "is forgotten" in done.stdout
    assert count(etcd, b"/elastic/f/") == 0
    assert count(etcd, b"/elastic/ff/") == 1
    again = bench.ctl("forget", "--yes", *where)
    assert again.returncode == 1 and "there is nothing of job f" in again.stderr


def test_forget_waits_for_the_lease_of_a_node_whose_controller_is_gone(etcd: EtcdCluster, bench: Bench) -> None:
    where = (f"--rdzv-endpoint=etcd://{etcd.endpoints[0]}", "--rdzv-id=l")
    grant = etcd.api("lease/grant", {"TTL": 600})
    lease, key = str(grant["ID"]), base64.b64encode(b"/elastic/l/nodes/away").decode()
    etcd.api("kv/put", {"key": key, "value": "", "lease": lease})
    refused = bench.ctl("forget", "--yes", *where)
    assert refused.returncode == 1 and "node away still holds its lease" in refused.stderr
    assert count(etcd, b"/elastic/l/") == 1


@pytest.mark.parametrize("key", [b"spec", b"sync/leader", b"foreign/key", b"\xff\xfe"])
def test_what_an_error_names_can_be_forgotten(key: bytes, etcd: EtcdCluster, bench: Bench) -> None:
    where = (f"--rdzv-endpoint=etcd://{etcd.endpoints[0]}", "--rdzv-id=c")
    put(etcd, b"/elastic/c/" + key, b"garbage")
    for number in range(250):  # more than a transaction takes
        put(etcd, b"/elastic/c/events/%d" % number, b"garbage")
    assert bench.ctl("status", *where).returncode == 1
    assert bench.ctl("forget", "--yes", *where).returncode == 0
    assert count(etcd, b"/elastic/c/") == 0
    run = bench.run("--nnodes=1", *where, SCRIPTS / "exit_code.py", 0)
    assert run.end() == 0, run.err
    assert bench.processes(AGENT) == []
