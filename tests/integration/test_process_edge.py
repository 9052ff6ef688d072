"""Real processes: nothing outlives its parent, its group, or the end of the job."""

import asyncio
import json
import os
import select
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from elastic_run.runtime.edge import exec_wrapper, process
from elastic_run.runtime.edge.process import Exit, Process, spawn
from elastic_run.runtime.protocol.errors import InvariantViolated, UserError

BOUND_S = 20.0
ENV = {"PATH": os.environ["PATH"]}


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(BOUND_S):
        while not condition():  # noqa: ASYNC110 - it is a fact about other processes
            await asyncio.sleep(0.01)


def wait_gone(pid: int) -> bool:
    """True when the process ended within the bound; it need not be a child of this one."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([fd], [], [], BOUND_S)[0])
    finally:
        os.close(fd)


def python(code: str, *args: str) -> list[str]:
    return [sys.executable, "-S", "-c", textwrap.dedent(code), *args]


async def started(code: str, ready: Path, *args: str) -> Process:
    """Start Python code that writes `ready` (its first argument) once it stands."""
    child = spawn(python(code, str(ready), *args), env=ENV)
    await until(ready.exists)
    return child


IGNORES_SIGTERM = """
    import signal, sys, time
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    open(sys.argv[1], "w").close()
    time.sleep(600)
"""


async def test_exit_code_and_signal_are_told_apart() -> None:
    assert await spawn(["sh", "-c", "exit 7"], env=ENV).wait() == Exit(code=7, signal=None)
    assert await spawn(["sh", "-c", "kill -SEGV $$"], env=ENV).wait() == Exit(code=None, signal=signal.SIGSEGV)
    assert str(Exit(code=None, signal=9)) == "was killed by SIGKILL"
    assert str(Exit(code=3, signal=None)) == "exited with code 3"


async def test_missing_program_exits_127_and_a_directory_126(capfd: pytest.CaptureFixture[str]) -> None:
    assert await spawn(["no-such-program"], env=ENV).wait() == Exit(code=exec_wrapper.EXIT_NOT_FOUND, signal=None)
    assert await spawn(["/tmp"], env=ENV).wait() == Exit(code=exec_wrapper.EXIT_NOT_EXECUTABLE, signal=None)
    assert "cannot start no-such-program" in capfd.readouterr().err


async def test_missing_working_directory_is_a_users_error() -> None:
    with pytest.raises(UserError, match="cannot start true"):
        spawn(["true"], env=ENV, cwd="/no/such/directory")


async def test_spawn_outside_the_main_thread_is_refused() -> None:
    async def attempt() -> None:
        spawn(["true"], env=ENV)

    with pytest.raises(InvariantViolated, match="main thread"):
        await asyncio.to_thread(asyncio.run, attempt())


@pytest.mark.parametrize("given", [{}, {"LC_CTYPE": "C"}, {"LC_ALL": "C", "PYTHONSTARTUP": "x"}])
async def test_program_sees_exactly_the_given_environment(given: dict[str, str], tmp_path: Path) -> None:
    shown = tmp_path / "env"
    with shown.open("wb") as out:
        assert (await spawn(["env", "-0"], env=ENV | given, stdout=out.fileno()).wait()).ok
    pairs = dict(item.split("=", 1) for item in shown.read_text().split("\0") if item)
    assert pairs == ENV | given


async def test_program_gets_default_sigpipe_and_no_stdin(tmp_path: Path) -> None:
    shown = tmp_path / "status"
    with shown.open("wb") as out:
        assert (await spawn(["cat", "/proc/self/status"], env=ENV, stdout=out.fileno()).wait()).ok
    ignored = int(next(line for line in shown.read_text().splitlines() if line.startswith("SigIgn")).split()[1], 16)
    assert not ignored & (1 << (signal.SIGPIPE - 1))
    assert not ignored & (1 << (signal.SIGXFSZ - 1))
    assert (await spawn(["sh", "-c", "! read line"], env=ENV).wait()).ok


SHOW_CPUS = "import os, sys; print(*sorted(os.sched_getaffinity(0)))"


async def test_program_runs_on_the_given_cpus_that_its_parent_may_use(tmp_path: Path) -> None:
    shown = tmp_path / "cpus"
    last = max(os.sched_getaffinity(0))
    with shown.open("wb") as out:
        child = spawn(python(SHOW_CPUS), env=ENV, stdout=out.fileno(), cpus=(last, 65_535))
        assert (await child.wait()).ok
    assert shown.read_text().split() == [str(last)]


async def test_program_that_may_use_none_of_its_cpus_does_not_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    child = spawn(["touch", str(tmp_path / "ran")], env=ENV, cpus=(65_534, 65_535))
    assert await child.wait() == Exit(code=exec_wrapper.EXIT_NOT_EXECUTABLE, signal=None)
    assert "none of the CPUs 65534,65535 may be used here" in capfd.readouterr().err
    assert not (tmp_path / "ran").exists()


async def test_child_leads_its_own_group(tmp_path: Path) -> None:
    child = await started(IGNORES_SIGTERM, tmp_path / "ready")
    assert os.getpgid(child.pid) == child.pgid == child.pid != os.getpgid(0)
    await child.kill()


async def test_stop_lets_a_program_end_by_itself(tmp_path: Path) -> None:
    code = """
        import signal, sys, time
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
        open(sys.argv[1], "w").close()
        time.sleep(600)
    """
    child = await started(code, tmp_path / "ready")
    assert await child.stop(BOUND_S) == Exit(code=5, signal=None)
    assert await child.stop(BOUND_S) == Exit(code=5, signal=None)
    assert child.signal_group(signal.SIGTERM) is False


async def test_stop_kills_what_ignores_sigterm_even_when_stopped(tmp_path: Path) -> None:
    child = await started(IGNORES_SIGTERM, tmp_path / "ready")
    child.signal(signal.SIGSTOP)
    assert await child.stop(0.05) == Exit(code=None, signal=signal.SIGKILL)


async def test_cancelled_stop_kills_and_passes_the_cancellation_on(tmp_path: Path) -> None:
    child = await started(IGNORES_SIGTERM, tmp_path / "ready")
    stopping = asyncio.create_task(child.stop(BOUND_S))
    await asyncio.sleep(0)
    stopping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stopping
    assert await child.wait() == Exit(code=None, signal=signal.SIGKILL)


async def test_group_ends_with_its_leader(tmp_path: Path) -> None:
    code = """
        import os, sys, time
        pid = os.fork()
        if pid == 0:
            time.sleep(600)
        open(sys.argv[1] + ".pid", "w").write(str(pid))
        os.rename(sys.argv[1] + ".pid", sys.argv[1])
    """
    child = await started(code, tmp_path / "member")
    assert (await child.wait()).ok
    assert wait_gone(int((tmp_path / "member").read_text()))


SPAWNS_AND_REPORTS = """
    import asyncio, os, sys
    from elastic_run.runtime.edge.process import spawn
    async def main():
        child = spawn(sys.argv[2:], env=dict(os.environ))
        with open(sys.argv[1] + ".tmp", "w") as file:
            file.write(str(child.pid))
        os.rename(sys.argv[1] + ".tmp", sys.argv[1])
        await child.wait()
    asyncio.run(main())
"""


async def test_child_dies_with_a_killed_parent(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    parent = spawn(
        [sys.executable, "-c", textwrap.dedent(SPAWNS_AND_REPORTS), str(pid_file), "sleep", "600"], env=dict(os.environ)
    )
    await until(pid_file.exists)
    grandchild = int(pid_file.read_text())
    await until(lambda: Path(f"/proc/{grandchild}/comm").read_text() == "sleep\n")
    parent.signal(signal.SIGKILL)
    await parent.wait()
    assert wait_gone(grandchild)


def test_child_whose_parent_died_before_the_kernel_was_asked_never_runs(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    parent_that_is_gone = subprocess.Popen(["true"])
    parent_that_is_gone.wait()
    how = (str(parent_that_is_gone.pid), "9", exec_wrapper.UNSET, exec_wrapper.UNSET)
    wrapper = [sys.executable, "-I", "-S", exec_wrapper.__file__, *how]
    result = subprocess.run([*wrapper, "/usr/bin/touch", str(ran)], stderr=subprocess.PIPE, check=False)
    assert result.returncode == exec_wrapper.EXIT_NOT_EXECUTABLE
    assert b"its parent is gone" in result.stderr
    assert not ran.exists()


async def test_death_signal_can_be_a_gentle_one(tmp_path: Path) -> None:
    shown = tmp_path / "signal"
    code = "import ctypes; n = ctypes.c_int(); ctypes.CDLL(None).prctl(2, ctypes.byref(n)); print(n.value)"
    with shown.open("wb") as out:
        child = spawn([sys.executable, "-S", "-c", code], env=ENV, stdout=out.fileno(), death_signal=signal.SIGTERM)
        assert (await child.wait()).ok
    assert int(shown.read_text()) == signal.SIGTERM


STRAYS = """
    import json, os, sys, time
    # Escapes twice: a child in a session of its own, which has a child in another session again.
    pids = []
    for depth in range(3):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid:
            os.close(writer)
            rest = json.loads(os.read(reader, 1000) or b"[]")
            break
        os.setsid()
        os.close(reader)
        upward = writer
    else:
        os.write(upward, b"[]")
        time.sleep(600)
    if depth:
        os.write(upward, json.dumps([pid, *rest]).encode())
        time.sleep(600)
    print(json.dumps([pid, *rest]), flush=True)
"""
SUBREAPER = """
    import asyncio, json, os, sys
    from elastic_run.runtime.edge import process
    async def main():
        process.set_subreaper()
        known = process.spawn(["sleep", "600"], env=dict(os.environ))
        leaver = process.spawn([sys.executable, "-S", "-c", sys.argv[1]], env=dict(os.environ), stdout=1)
        await leaver.wait()
        killed = await process.kill_strays({known.pid})
        left = process.adopted_children({known.pid})
        alive = known.exit is None
        await known.kill()
        print(json.dumps({"killed": killed, "left": left, "known_alive": alive}), flush=True)
    asyncio.run(main())
"""


def test_strays_in_other_sessions_are_killed_and_known_children_are_not() -> None:
    code = [sys.executable, "-c", textwrap.dedent(SUBREAPER), textwrap.dedent(STRAYS)]
    result = subprocess.run(code, stdout=subprocess.PIPE, timeout=BOUND_S, check=True)
    pids, summary = map(json.loads, result.stdout.splitlines())
    assert len(pids) == 3
    assert summary == {"killed": 3, "left": [], "known_alive": True}
    assert all(wait_gone(pid) for pid in pids)


def test_start_time_names_a_process_and_is_none_when_it_is_gone() -> None:
    child = subprocess.Popen(["sleep", "600"])
    try:
        first = process.start_time_ticks(child.pid)
        assert first is not None and first == process.start_time_ticks(child.pid)
    finally:
        child.kill()
        child.wait()
    assert process.start_time_ticks(child.pid) is None
