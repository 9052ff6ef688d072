"""The network laboratory, with real namespaces, devices, sockets and processes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from network_lab import lab_or_skip

from elastic_run.chaos.network.fleet import Fleet
from elastic_run.chaos.network.host_process import HostProcess, LabError
from elastic_run.chaos.network.lab import Lab
from elastic_run.runtime.protocol.errors import UserError

SCRIPTS = Path(__file__).parents[1] / "scripts"
BOUND_S = 60.0
MARK = "LAB_TEST_MARK"


@pytest.fixture
def lab() -> Iterator[Lab]:
    with lab_or_skip("a", "b", seed=7) as opened:
        yield opened


class Talker:
    """tests/scripts/lab_datagrams.py on a host."""

    def __init__(self, lab: Lab, host: str) -> None:
        command = [sys.executable, str(SCRIPTS / "lab_datagrams.py")]
        self.process = lab.popen(host, command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.ask(f"bind {lab.address(host)}") == "bound"

    def tell(self, command: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()

    def answer(self) -> object:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def ask(self, command: str) -> object:
        self.tell(command)
        return self.answer()


def wait_until(reached: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + BOUND_S
    while not reached():
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.01)


def state_of(pid: int) -> str:
    return psutil.Process(pid).status()


def marked(mark: str) -> list[int]:
    """Processes whose environment holds the mark."""
    found = []
    for pid in psutil.pids():
        try:
            environ = Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:  # it has ended
            continue
        if f"{MARK}={mark}".encode() in environ.split(b"\0"):
            found.append(pid)
    return found


def holders(namespaces: set[str]) -> list[str]:
    """Where one of these namespaces is still referred to: by a process that is in it, or by a descriptor."""
    found = []
    for pid in psutil.pids():
        for pattern in ("ns/net", "fd/*"):
            try:
                links = list(Path(f"/proc/{pid}").glob(pattern))
            except OSError:
                continue
            for link in links:
                try:
                    target = os.readlink(link)
                except OSError:
                    continue
                if target in namespaces:
                    found.append(str(link))
    return found


def test_round_trip_takes_at_least_both_delays(lab: Lab) -> None:
    a, b = Talker(lab, "a"), Talker(lab, "b")
    lab.set("a", "b", delay_s=0.03)
    lab.set("b", "a", delay_s=0.01, jitter_s=0.01)
    b.tell("echo 20")
    round_trips_s = [a.ask(f"ping {lab.address('b')}") for _ in range(20)]
    assert min(float(str(round_trip_s)) for round_trip_s in round_trips_s) >= 0.04
    assert b.answer() == "echoed"


def test_loss_in_one_direction_is_seen_there_alone(lab: Lab) -> None:
    a, b = Talker(lab, "a"), Talker(lab, "b")
    lab.set("a", "b", loss=0.2)
    b.tell("collect")
    a.ask(f"many {lab.address('b')} 2000")
    received = b.answer()
    assert isinstance(received, list)
    assert received == sorted(set(received))
    assert 1400 < len(received) < 1800
    a.tell("collect")
    b.ask(f"many {lab.address('a')} 500")
    assert a.answer() == list(range(500))
    counters = lab.counters("a", "b")
    assert counters.offered_frames == counters.delivered_frames + counters.dropped_by_loss
    assert lab.counters("b", "a").dropped_by_loss == 0


def test_same_seed_loses_the_same_frames_and_another_seed_others() -> None:
    received = []
    for seed in (1, 1, 2):
        with lab_or_skip("a", "b", seed=seed) as lab:
            a, b = Talker(lab, "a"), Talker(lab, "b")
            lab.set("a", "b", loss=0.3)
            b.tell("collect")
            a.ask(f"many {lab.address('b')} 200")
            received.append(b.answer())
    assert received[0] == received[1] != received[2]


def test_one_way_partition_cuts_one_way(lab: Lab) -> None:
    a, b = Talker(lab, "a"), Talker(lab, "b")
    lab.set("a", "b", blocked=True)
    a.ask(f"send {lab.address('b')} lost")
    wait_until(lambda: lab.counters("a", "b").dropped_blocked == 1)
    b.ask(f"send {lab.address('a')} through")
    assert a.ask("receive") == "through"
    lab.set("a", "b", blocked=False)
    a.ask(f"send {lab.address('b')} later")
    assert b.ask("receive") == "later"


def test_cut_loses_and_heal_delivers_what_is_under_way(lab: Lab) -> None:
    a, b = Talker(lab, "a"), Talker(lab, "b")
    lab.set("a", "b", delay_s=3600.0)
    a.ask(f"send {lab.address('b')} one")
    wait_until(lambda: lab.counters("a", "b").offered_frames == 1)
    lab.set("a", "b", blocked=True)
    assert lab.counters("a", "b").dropped_blocked == 1
    lab.set("a", "b", blocked=False)
    a.ask(f"send {lab.address('b')} two")
    wait_until(lambda: lab.counters("a", "b").offered_frames == 2)
    lab.heal()
    assert b.ask("receive") == "two"


def test_fields_not_named_keep_their_value_until_heal(lab: Lab) -> None:
    lab.set("a", "b", delay_s=0.5, loss=0.1)
    lab.set("a", "b", rate_bits_per_s=1e6)
    shape = lab.shape("a", "b")
    assert (shape.delay_s, shape.loss, shape.rate_bits_per_s) == (0.5, 0.1, 1e6)
    assert lab.shape("b", "a").delay_s == 0.0
    lab.heal()
    assert lab.shape("a", "b") == lab.shape("b", "a")


@pytest.mark.parametrize("rate_bits_per_s", [4e6, 20e6])
def test_rate_limit_bounds_throughput_from_above(lab: Lab, rate_bits_per_s: float) -> None:
    lab.set("a", "b", rate_bits_per_s=rate_bits_per_s)
    sent_bytes = 1_000_000
    with Fleet(lab, SCRIPTS / "lab_stream.py", arguments={"bytes": sent_bytes}) as fleet:
        sender, receiver = (ending.returned() for ending in fleet.collect(BOUND_S))
    assert isinstance(sender, dict) and isinstance(receiver, dict)
    assert receiver["received"] == sent_bytes
    assert sent_bytes * 8 / (receiver["ended_s"] - sender["started_s"]) <= rate_bits_per_s


def test_unlimited_line_carries_a_stream_whole(lab: Lab) -> None:
    with Fleet(lab, SCRIPTS / "lab_stream.py", arguments={"bytes": 50_000_000}) as fleet:
        endings = fleet.collect(BOUND_S)
    assert isinstance(receiver := endings[1].returned(), dict)
    assert receiver["received"] == 50_000_000


def test_two_laboratories_do_not_see_each_other() -> None:
    with lab_or_skip("a", "b") as first, lab_or_skip("a", "b") as second:
        assert first.address("b") == second.address("b")
        talkers = {lab: (Talker(lab, "a"), Talker(lab, "b")) for lab in (first, second)}
        first.set("a", "b", blocked=True)
        talkers[first][0].ask(f"send {first.address('b')} first")
        wait_until(lambda: first.counters("a", "b").dropped_blocked == 1)
        talkers[second][0].ask(f"send {second.address('b')} second")
        assert talkers[second][1].ask("receive") == "second"
        assert second.counters("a", "b").offered_frames == 1
        first.heal()
        talkers[first][0].ask(f"send {first.address('b')} healed")
        assert talkers[first][1].ask("receive") == "healed"


def test_third_host_hears_nothing_of_two_others() -> None:
    with lab_or_skip("a", "b", "c") as lab:
        a, b = Talker(lab, "a"), Talker(lab, "b")
        b.tell("echo 1")
        a.ask(f"ping {lab.address('b')}")
        assert [lab.counters(source, "c").offered_frames for source in ("a", "b")] == [0, 0]
        assert lab.counters("a", "b").offered_frames == 1


def test_host_is_a_machine_of_its_own(lab: Lab) -> None:
    """Name, devices, shared memory and abstract sockets are the host's; files and control groups are everyone's."""
    program = (
        "import os, socket, json\n"
        "open('/dev/shm/x', 'x').close(); s = socket.socket(socket.AF_UNIX); s.bind(chr(0) + 'same-name')\n"
        "print(json.dumps([socket.gethostname(), sorted(os.listdir('/sys/class/net')), os.listdir('/dev/shm'),\n"
        "  os.getpid() == int(os.readlink('/proc/self')), sorted(os.listdir('/proc/self/fd'))[:3],\n"
        "  len(os.listdir('/proc/self/fd')), os.listdir('/sys/fs/cgroup')]), flush=True); input()"
    )
    processes = [
        lab.popen(host, [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for host in lab.hosts
    ]
    for host, process in zip(lab.hosts, processes, strict=True):
        assert process.stdout is not None
        name, devices, shared, own_proc, _, descriptors, cgroups = json.loads(process.stdout.readline())
        assert (name, devices, shared, own_proc) == (host, ["eth0", "lo"], ["x"], True)
        assert descriptors == 5  # standard streams, the socket, and the listing itself
        assert cgroups == os.listdir("/sys/fs/cgroup")
    for process in processes:
        process.communicate("\n", BOUND_S)
        assert process.returncode == 0


def test_process_ends_as_its_program_ended(lab: Lab) -> None:
    def run(*command: str) -> HostProcess:
        return lab.popen("a", command, stdout=subprocess.PIPE, env={"PATH": os.environ["PATH"], "WORD": "said"})

    spoken = run("sh", "-c", "echo $WORD; exit 7")
    assert spoken.communicate(timeout_s=BOUND_S) == ("said\n", "")
    assert spoken.returncode == 7
    ended = run("sleep", "1000")
    ended.terminate()
    assert ended.wait(BOUND_S) == -signal.SIGTERM
    ended.kill()  # reaches nobody
    with pytest.raises(LabError, match="no-such-program"):
        run("no-such-program")
    with pytest.raises(LabError, match="no-such-directory"):
        lab.popen("a", ["true"], cwd="/no-such-directory")
    for process in (spoken, ended):
        process.close()


def test_signals_reach_the_program_itself(lab: Lab) -> None:
    process = lab.popen("a", ["sleep", "1000"])
    process.send_signal(signal.SIGSTOP)
    wait_until(lambda: state_of(process.pid) == psutil.STATUS_STOPPED)
    process.send_signal(signal.SIGCONT)
    wait_until(lambda: state_of(process.pid) != psutil.STATUS_STOPPED)
    process.kill()
    assert process.wait(BOUND_S) == -signal.SIGKILL


def test_closing_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    mark = f"closing-{os.getpid()}"
    monkeypatch.setenv(MARK, mark)
    devices, descriptors = os.listdir("/sys/class/net"), set(os.listdir("/proc/self/fd"))
    mounts = Path("/proc/self/mounts").read_text()
    with lab_or_skip("a", "b") as lab:
        daemon = "setsid sleep 1000 & echo; exec sleep 1000"
        processes = [lab.popen(host, ["sh", "-c", daemon], stdout=subprocess.PIPE) for host in lab.hosts]
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()
        namespaces = {os.readlink(f"/proc/{process.pid}/ns/net") for process in processes}
        assert len(namespaces) == 2 and len(marked(mark)) > 4
        assert holders(namespaces)
    assert marked(mark) == []
    assert holders(namespaces) == []
    assert os.listdir("/sys/class/net") == devices
    assert set(os.listdir("/proc/self/fd")) == descriptors
    assert Path("/proc/self/mounts").read_text() == mounts
    lab.close()
    with pytest.raises(LabError):
        lab.popen("a", ["true"])
    with pytest.raises(LabError):
        lab.set("a", "b", loss=0.1)


def test_kill_of_the_owner_leaves_nothing_even_if_a_fork_holds_its_descriptors() -> None:
    with lab_or_skip("a"):
        mark = f"killed-{os.getpid()}"
        environment = os.environ | {MARK: mark}
        with subprocess.Popen(
            [sys.executable, str(SCRIPTS / "lab_owner.py")], stdout=subprocess.PIPE, env=environment, text=True
        ) as owner:
            assert owner.stdout is not None
            pids = [int(owner.stdout.readline()) for _ in range(2)]
            namespaces = {os.readlink(f"/proc/{pid}/ns/net") for pid in pids}
            assert owner.stdout.readline() == "watching\n"
            assert len(marked(mark)) >= 10  # owner and fork, relay (2 processes), per host: wrapper, sleep, daemon
            owner.kill()
            assert owner.stdout.readline() == "relay ended\n"
        wait_until(lambda: marked(mark) == [])
        assert holders(namespaces) == []


def test_kill_of_the_relay_ends_the_processes_and_is_reported(lab: Lab) -> None:
    process = lab.popen("a", ["sleep", "1000"])
    relay = next(child for child in psutil.Process().children() if "elastic_run.chaos.network.relay" in child.cmdline())
    relay.kill()
    assert process.wait(BOUND_S) == -signal.SIGKILL
    with pytest.raises(LabError, match="relay"):
        lab.set("a", "b", loss=0.5)


@pytest.mark.parametrize(("lack", "reason"), [("rights", "namespaces"), ("tun", "/dev/net/tun")])
def test_missing_permission_is_reported_with_its_reason(lack: str, reason: str) -> None:
    with lab_or_skip("a"):
        refused = subprocess.run(
            [sys.executable, str(SCRIPTS / "lab_refused.py"), lack], stdout=subprocess.PIPE, text=True, check=True
        )
    assert "no network laboratory here" in refused.stdout and reason in refused.stdout


def test_members_of_a_fleet_return_their_results_by_rank(lab: Lab) -> None:
    hosts = ("b", "a", "b")
    with Fleet(lab, SCRIPTS / "lab_member.py", hosts=hosts, arguments={"ends": ["return"] * 3}) as fleet:
        endings = fleet.collect(BOUND_S)
    assert [ending.returned() for ending in endings] == [
        [rank, host, host, lab.address(host)] for rank, host in enumerate(hosts)
    ]
    assert "rank 1 was here" in endings[1].log


def test_members_that_fail_or_hang_are_told_apart(lab: Lab) -> None:
    with Fleet(lab, SCRIPTS / "lab_member.py", arguments={"ends": ["raise", "hang"]}) as fleet:
        wait_until(lambda: fleet.processes[0].poll() is not None)
        failed, hung = fleet.collect(0.0)
    assert failed.returncode == 1 and "as asked" in failed.log
    assert hung.returncode is None
    for ending, words in ((failed, "ended with 1"), (hung, "time limit")):
        with pytest.raises(LabError, match=words):
            ending.returned()


@pytest.mark.parametrize("hosts", [(), ("a", "a"), ("A",), ("localhost",), ("a b",), tuple(f"h{n}" for n in range(17))])
def test_bad_host_names_are_refused(hosts: tuple[str, ...]) -> None:
    with pytest.raises(UserError):
        Lab(hosts)


def test_bad_directions_and_values_are_refused(lab: Lab) -> None:
    for source, to in (("a", "a"), ("a", "c"), ("c", "a")):
        with pytest.raises(UserError):
            lab.set(source, to, loss=0.5)
    with pytest.raises(UserError):
        lab.set("a", "b", loss=2.0)
    assert lab.shape("a", "b").loss == 0.0
