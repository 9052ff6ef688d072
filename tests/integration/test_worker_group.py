"""Real workers that fail, hang, fork, flood and hide, and a group that must outlive and outdo them all."""

import asyncio
import contextlib
import dataclasses
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from worker_setup import agent_config, eventually, install, program_command, script_command

from elastic_run.agent.failure import first_failure, render
from elastic_run.agent.output import LogDirectory
from elastic_run.agent.workers import SpawnFailed, Surroundings, WorkerExited, WorkerGroup
from elastic_run.runtime.edge.process import Exit, adopted_children, start_time_ticks
from elastic_run.runtime.edge.telemetry import TelemetryFile
from elastic_run.runtime.edge.worker_server import WorkerEvent, WorkerGone, WorkerHello, WorkerServer
from elastic_run.runtime.protocol.config import AgentConfig, CommandConfig
from elastic_run.runtime.protocol.ids import ViewNumber

SCRIPTS = Path(__file__).parent.parent / "scripts"
LIMIT_S = 60.0
TERM_S = 20.0
DAEMON = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        with open(sys.argv[1] + ".new", "w") as file:
            file.write(str(os.getpid()))
        os.rename(sys.argv[1] + ".new", sys.argv[1])
        time.sleep(600)
    os._exit(0)
os.wait()
time.sleep(600)
"""
PARENT = """
import asyncio, os, sys
sys.path.insert(0, sys.argv[1])
from worker_setup import agent_config, install, program_command
from elastic_run.agent.output import LogDirectory
from elastic_run.agent.workers import Surroundings, WorkerGroup

async def main():
    command = program_command(sys.executable, sys.argv[3], sys.argv[2])
    config = agent_config(command, run_dir=sys.argv[2], nproc=2, tee="1", log_dir=sys.argv[2])
    logs = LogDirectory(config.output, "j", sys.argv[2])
    group = WorkerGroup(config, install(nproc=2), Surroundings(
        agent_socket="", environment=os.environ, logs=logs, report=print, say=print))
    assert await group.start() is None
    await asyncio.Event().wait()

asyncio.run(main())
"""


class Bench:
    """Makes groups, remembers what they reported, and ends them all."""

    def __init__(self, run_dir: str) -> None:
        self.run_dir = run_dir
        self.exits: list[WorkerExited] = []
        self.said: list[str] = []
        self.groups: list[WorkerGroup] = []
        self._bystanders = frozenset(adopted_children(()))
        self._logs: dict[Any, LogDirectory] = {}

    def group(
        self, command: CommandConfig, *, view: int = 1, environ: Mapping[str, str] = os.environ, **changes: Any
    ) -> WorkerGroup:
        config = agent_config(command, run_dir=self.run_dir, **{"log_dir": f"{self.run_dir}/logs", **changes})
        around = Surroundings(
            agent_socket=f"{self.run_dir}/a.sock",
            environment=environ,
            logs=self.logs(config),
            report=self.exits.append,
            say=self.said.append,
            bystanders=lambda: self._bystanders | {w.pid for g in self.groups for w in g.workers if w.alive},
        )
        self.groups.append(WorkerGroup(config, install(nproc=config.nproc, view=view), around))
        return self.groups[-1]

    def logs(self, config: AgentConfig) -> LogDirectory:
        key = dataclasses.astuple(config.output)
        return self._logs.setdefault(key, LogDirectory(config.output, config.job.job_id, self.run_dir))

    async def run(self, command: CommandConfig, **changes: Any) -> list[WorkerExited]:
        """Start a group, wait for all its workers, stop it; return how they ended."""
        group = self.group(command, **changes)
        assert await group.start() is None
        await self.all_exited(group)
        await group.stop(TERM_S)
        return self.exits

    async def all_exited(self, group: WorkerGroup) -> None:
        await asyncio.wait_for(asyncio.gather(*(w.process.wait() for w in group.workers)), LIMIT_S)
        await eventually(lambda: len(self.exits) >= len(group.workers))


@pytest.fixture
def run_dir() -> Iterator[str]:
    path = tempfile.mkdtemp(dir="/tmp", prefix="erw")
    yield path
    shutil.rmtree(path)


@pytest.fixture
async def bench(run_dir: str) -> AsyncIterator[Bench]:
    result = Bench(run_dir)
    yield result
    for group in result.groups:
        await group.stop(0.0)


@pytest.fixture
async def agent_socket(bench: Bench) -> AsyncIterator[list[WorkerEvent]]:
    events: list[WorkerEvent] = []
    server = WorkerServer(f"{bench.run_dir}/a.sock", lambda hello: ViewNumber(1), events.append)
    await server.start()
    yield events
    await server.close()


def python(script: str, *args: str) -> CommandConfig:
    return program_command(sys.executable, "-u", str(SCRIPTS / script), *args)


def inline(source: str, *args: str) -> CommandConfig:
    return program_command(sys.executable, "-u", "-c", source, *args)


def gone(pid: int) -> bool:
    return start_time_ticks(pid) is None


def telemetry_files(run_dir: str) -> list[Path]:
    return list(Path(run_dir).glob("*.telemetry"))


def attempt_dir(log_dir: Path, attempt: int = 0) -> Path:
    (result,) = log_dir.glob(f"job7_*/attempt_{attempt}")
    return result


def collect(pids: list[int]) -> None:
    """Reap the dead that were left to whoever above them is a subreaper, should that be this very process."""
    for pid in pids:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


def read_pids(path: Path) -> list[int]:
    return [int(line) for line in path.read_text().split()]


async def ready(directory: str, ranks: int) -> list[int]:
    """Wait for the scripts' own files; return their pids."""
    paths = [Path(directory) / f"rank-{rank}" for rank in range(ranks)]
    await eventually(lambda: all(path.exists() for path in paths))
    return [int(path.read_text()) for path in paths]


@pytest.mark.parametrize(
    ("command", "exit_", "message"),
    [
        (python("exit_code.py", "0"), Exit(code=0, signal=None), None),
        (python("exit_code.py", "3"), Exit(code=3, signal=None), "exited with code 3; no traceback was recorded"),
        (python("segfault.py"), Exit(code=None, signal=signal.SIGSEGV), "Signal 11 (SIGSEGV) received"),
        (python("raise_at_import.py"), Exit(code=1, signal=None), "exited with code 1; no traceback was recorded"),
        (python("close_stdout.py"), Exit(code=0, signal=None), None),
    ],
)
async def test_every_end_is_reported_once_with_its_code_or_signal(
    bench: Bench, command: CommandConfig, exit_: Exit, message: str | None
) -> None:
    (ended,) = await bench.run(command, tee="3", redirects="3")
    assert ended.exit == exit_
    assert (ended.failure.message if ended.failure else None) == message
    assert bench.said == []


@pytest.mark.parametrize("kept", [True, False])
async def test_an_exception_under_the_bootstrap_is_reported_with_its_traceback(
    bench: Bench, tmp_path: Path, kept: bool, agent_socket: list[WorkerEvent]
) -> None:
    (ended,) = await bench.run(
        script_command(str(SCRIPTS / "raise_at_import.py")),
        log_dir=str(tmp_path / "logs") if kept else None,
        redirects="3" if kept else "0",
    )
    assert ended.exit == Exit(code=1, signal=None) and ended.failure is not None
    assert ended.failure.message == "RuntimeError: raised at import, on purpose"
    assert ended.failure.traceback.endswith("RuntimeError: raised at import, on purpose\n")
    text = render("raise_at_import.py", [ended.failure])
    assert "in settings" in text and f"(pid: {ended.pid})" in text
    assert (ended.failure.error_file is not None) == kept
    assert [type(event) for event in agent_socket] == [WorkerHello, WorkerGone]


async def test_the_first_failure_is_told_from_those_that_were_stopped(bench: Bench, run_dir: str) -> None:
    group = bench.group(python("exit_code.py", "7", "1"), nproc=1)
    waiting = bench.group(python("wait_forever.py", run_dir), nproc=2, view=2)
    assert await waiting.start() is None
    await ready(run_dir, 2)
    assert await group.start() is None
    os.kill(waiting.workers[1].pid, signal.SIGABRT)
    await eventually(lambda: len(bench.exits) >= 1 and any(e.exit.signal == signal.SIGABRT for e in bench.exits))
    await waiting.stop(TERM_S)
    failures = [
        ended.failure for ended in bench.exits if ended.failure is not None and ended.pid != group.workers[0].pid
    ]
    assert len(failures) == 2
    cause = first_failure(failures)
    assert cause is not None and (cause.rank, cause.signal) == (1, signal.SIGABRT)
    assert [failure.stopped for failure in failures if failure is not cause] == [True]


async def test_who_ignores_sigterm_is_killed_after_the_patience_asked_for(bench: Bench, run_dir: str) -> None:
    group = bench.group(python("ignore_sigterm.py", run_dir), nproc=2)
    assert await group.start() is None
    pids = await ready(run_dir, 2)
    await group.stop(0.2)
    assert all(gone(pid) for pid in pids)
    assert [ended.exit.signal for ended in bench.exits] == [signal.SIGKILL] * 2
    assert all(ended.failure is not None and ended.failure.stopped for ended in bench.exits)


async def test_a_second_stop_shortens_the_patience_of_the_first(bench: Bench, run_dir: str) -> None:
    group = bench.group(python("ignore_sigterm.py", run_dir))
    assert await group.start() is None
    await ready(run_dir, 1)
    patient = asyncio.ensure_future(group.stop(600.0))
    await asyncio.sleep(0)
    await group.stop(0.0)
    await asyncio.wait_for(patient, LIMIT_S)
    assert len(bench.exits) == 1


async def test_a_stopped_process_is_ended_too(bench: Bench, run_dir: str) -> None:
    group = bench.group(python("wait_forever.py", run_dir))
    assert await group.start() is None
    (pid,) = await ready(run_dir, 1)
    os.kill(pid, signal.SIGSTOP)
    await group.stop(TERM_S)
    assert gone(pid) and bench.exits[0].exit.signal == signal.SIGTERM


async def test_children_die_with_their_worker_and_those_in_other_sessions_with_the_group(
    bench: Bench, tmp_path: Path
) -> None:
    group = bench.group(python("fork_children.py", str(tmp_path / "pids"), "5"), nproc=2, tee="1")
    assert await group.start() is None
    await bench.all_exited(group)
    pids = read_pids(tmp_path / "pids")
    assert [ended.exit.code for ended in bench.exits] == [5, 5]
    await eventually(lambda: sum(gone(pid) for pid in pids) == 2)  # the plain ones; both sessions go on
    await group.stop(TERM_S)
    assert all(gone(pid) for pid in pids)
    assert bench.said == []  # the pipes that the children held were drained to their end


async def test_a_daemon_does_not_outlive_the_group(bench: Bench, tmp_path: Path) -> None:
    group = bench.group(inline(DAEMON, str(tmp_path / "pid")))
    assert await group.start() is None
    await eventually((tmp_path / "pid").exists)
    (pid,) = read_pids(tmp_path / "pid")
    assert not gone(pid)
    await group.stop(TERM_S)
    assert gone(pid) and gone(group.workers[0].pid)


async def test_dead_orphans_are_collected_while_the_group_runs(bench: Bench, tmp_path: Path) -> None:
    group = bench.group(inline(DAEMON, str(tmp_path / "pid")))
    assert await group.start() is None
    await eventually((tmp_path / "pid").exists)
    (pid,) = read_pids(tmp_path / "pid")
    os.kill(pid, signal.SIGKILL)

    def collected() -> bool:
        group.reap_orphans()
        return not Path(f"/proc/{pid}").exists()

    await eventually(collected)
    assert group.alive == 1


async def test_two_groups_end_without_touching_each_other(bench: Bench, tmp_path: Path) -> None:
    directories = [tmp_path / name for name in "ab"]
    groups = []
    for view, directory in enumerate(directories, 1):
        directory.mkdir()
        groups.append(bench.group(python("wait_forever.py", str(directory)), nproc=2, view=view))
        assert await groups[-1].start() is None
    first, second = [await ready(str(directory), 2) for directory in directories]
    await groups[0].stop(TERM_S)
    assert all(gone(pid) for pid in first) and not any(gone(pid) for pid in second)
    assert (groups[0].alive, groups[1].alive) == (0, 2)
    await groups[1].stop(TERM_S)
    assert all(gone(pid) for pid in second)
    assert sorted(ended.pid for ended in bench.exits) == sorted(first + second)


async def test_workers_die_with_an_agent_that_is_killed(run_dir: str) -> None:
    tests = str(SCRIPTS.parent)
    agent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PARENT, tests, run_dir, str(SCRIPTS / "ignore_sigterm.py")
    )
    pids = await ready(run_dir, 2)
    agent.kill()
    await agent.wait()
    await eventually(lambda: all(gone(pid) for pid in pids))
    collect(pids)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (program_command("/nowhere/python", "x"), "/nowhere/python is no program"),
        (program_command("no-such-program"), "no-such-program is no program"),
        (program_command(sys.executable, "x" * (1 << 20)), "Argument list too long"),
    ],
    ids=["no such file", "not on PATH", "too long"],
)
async def test_what_cannot_be_started_is_an_answer(
    bench: Bench, run_dir: str, command: CommandConfig, message: str
) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    group = bench.group(command, nproc=2, tee="3")
    failed = await group.start()
    assert isinstance(failed, SpawnFailed) and failed.local_rank == 0
    assert message in failed.message and failed.message.startswith("worker 0 of 2 could not be started: ")
    assert not telemetry_files(run_dir)
    assert len(os.listdir("/proc/self/fd")) == descriptors


async def test_when_one_cannot_be_started_those_before_it_are_ended(bench: Bench, run_dir: str) -> None:
    group = bench.group(
        python("wait_forever.py", run_dir),
        nproc=2,
        virtual_local_rank=True,
        environ={**os.environ, "CUDA_VISIBLE_DEVICES": "0"},
    )
    failed = await group.start()
    assert failed is not None and failed.local_rank == 1 and "--virtual-local-rank" in failed.message
    assert [gone(worker.pid) for worker in group.workers] == [True]


async def test_a_full_run_directory_is_an_answer_too(bench: Bench) -> None:
    bench.run_dir = "/dev/full"
    failed = await bench.group(python("exit_code.py", "0")).start()
    assert failed is not None and "could not be started" in failed.message


async def test_streams_go_where_torchrun_would_send_them(
    bench: Bench, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = "import os, sys; print('out', os.environ['RANK']); print('err', os.environ['RANK'], file=sys.stderr)"
    await bench.run(
        inline(source), nproc=4, log_dir=str(tmp_path), tee="0:1,1:3", redirects="2:3", local_ranks_filter=(0, 3)
    )
    attempt = attempt_dir(tmp_path)
    files = {str(path.relative_to(attempt)): path.read_text() for path in attempt.rglob("*.log")}
    assert files == {
        "0/stdout.log": "out 0\n",
        "1/stdout.log": "out 1\n",
        "1/stderr.log": "err 1\n",
        "2/stdout.log": "out 2\n",
        "2/stderr.log": "err 2\n",
    }
    shown = capfd.readouterr()
    assert sorted(shown.out.splitlines()) == ["[default0]:out 0", "out 3"]
    assert sorted(shown.err.splitlines()) == ["err 0", "err 3"]
    assert all(path.stat().st_mode & 0o077 == 0 for path in attempt.rglob("*"))


async def test_filtered_files_hold_the_matching_lines_of_all_teed_ranks(bench: Bench, tmp_path: Path) -> None:
    source = "import os; print('loss', os.environ['RANK']); print('noise')"
    await bench.run(inline(source), nproc=2, log_dir=str(tmp_path), tee="3", stdout_filters=("loss",))
    attempt = attempt_dir(tmp_path)
    lines = (attempt / "filtered_stdout.log").read_text().splitlines()
    assert sorted(lines) == ["[default0]:loss 0", "[default1]:loss 1"]
    assert not (attempt / "filtered_stderr.log").exists()


async def test_no_attempts_files_are_overwritten(bench: Bench, tmp_path: Path) -> None:
    for attempt in range(2):
        await bench.run(inline(f"print('attempt {attempt}')"), view=attempt + 1, log_dir=str(tmp_path), redirects="1")
    logs = [attempt_dir(tmp_path, attempt) / "0" / "stdout.log" for attempt in range(2)]
    assert [path.read_text() for path in logs] == ["attempt 0\n", "attempt 1\n"]


async def test_without_a_log_dir_logs_are_kept_in_a_new_directory(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    await bench.run(inline("print('x')"), redirects="1", log_dir=None)
    (directory,) = os.listdir(tmp_path)
    assert directory.startswith("elastic_run_")
    assert (attempt_dir(tmp_path / directory) / "0" / "stdout.log").read_text() == "x\n"


async def test_a_console_that_is_a_terminal_stays_one(run_dir: str) -> None:
    main_fd, terminal = os.openpty()
    source = PARENT.replace(
        "await asyncio.Event().wait()", "await group.workers[0].process.wait(); await group.stop(5)"
    )
    source = (
        source.replace(', tee="1", log_dir=sys.argv[2]', "")
        .replace("nproc=2", "nproc=1")
        .replace("report=print", "report=id")
    )
    show = Path(run_dir) / "show.py"
    show.write_text("import os; print(os.isatty(1), os.isatty(2))")
    agent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", source, str(SCRIPTS.parent), run_dir, str(show), stdout=terminal, stderr=terminal
    )
    assert await asyncio.wait_for(agent.wait(), LIMIT_S) == 0
    os.close(terminal)
    shown = os.read(main_fd, 1000)
    os.close(main_fd)
    assert shown == b"True True\r\n"


async def test_telemetry_is_readable_while_a_worker_runs_and_gone_after_the_group(bench: Bench, run_dir: str) -> None:
    group = bench.group(python("wait_forever.py", run_dir), nproc=2, view=4)
    assert await group.start() is None
    file = TelemetryFile(group.workers[1].telemetry_path)
    found = file.read()
    file.close()
    assert (found.rank, found.world_size, found.view) == (1, 2, 4)
    assert len({worker.incarnation for worker in group.workers}) == 2
    await group.stop(TERM_S)
    assert not telemetry_files(run_dir)


async def test_a_group_leaves_no_descriptor_behind(bench: Bench) -> None:
    counts = []
    for view in range(1, 4):
        await bench.run(python("exit_code.py", "0"), nproc=2, view=view, tee="3")
        counts.append(len(os.listdir("/proc/self/fd")))
    assert len(set(counts)) == 1


async def test_all_output_has_passed_when_stop_returns(
    bench: Bench, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lines = 50_000
    group = bench.group(python("flood.py", "5"), nproc=2, tee="1", log_dir=str(tmp_path))
    assert await group.start() is None
    await bench.all_exited(group)
    await group.stop(TERM_S)
    shown = capfd.readouterr().out.splitlines()
    for rank in range(2):
        prefix = f"[default{rank}]:"
        assert [int(line[len(prefix) :][:10]) for line in shown if line.startswith(prefix)] == list(range(lines))
        assert (attempt_dir(tmp_path) / str(rank) / "stdout.log").read_text().count("\n") == lines
    assert bench.said == []


async def test_a_cancelled_stop_still_kills_and_a_second_one_completes_it(bench: Bench, run_dir: str) -> None:
    group = bench.group(python("ignore_sigterm.py", run_dir), nproc=2)
    assert await group.start() is None
    pids = await ready(run_dir, 2)
    patient = asyncio.ensure_future(group.stop(600.0))
    await asyncio.sleep(0)
    patient.cancel()
    with pytest.raises(asyncio.CancelledError):
        await patient
    await group.stop(TERM_S)
    assert all(gone(pid) for pid in pids)
    assert [ended.exit.signal for ended in bench.exits] == [signal.SIGKILL] * 2


async def test_workers_end_by_the_signal_asked_for(bench: Bench, run_dir: str) -> None:
    group = bench.group(python("wait_forever.py", run_dir))
    assert await group.start() is None
    await ready(run_dir, 1)
    await group.stop(TERM_S, signal.SIGHUP)
    assert bench.exits[0].exit.signal == signal.SIGHUP
