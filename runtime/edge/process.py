"""Starts, watches and ends child processes of an asyncio program.

Each child leads a process group of its own, gets a signal when its parent dies, and is watched through a pidfd: its end
is known within a millisecond, and no pid is signalled after it may have been reused.

Invariants (tests/integration/test_process_edge.py):
1. The group ends with its leader: what is left of it is killed before the leader's pid is given back.
2. A child whose parent dies, at any moment, dies too (exec_wrapper.py closes the race around exec).
3. stop() returns only after the leader was reaped.
4. kill_strays() ends every descendant that escaped into other groups or sessions, if this process is a subreaper.
Not here: what to start, and when to start it again (launcher.py, the agent).
"""

import asyncio
import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from signal import SIGTERM
from subprocess import DEVNULL

from elastic_run.runtime.edge import exec_wrapper
from elastic_run.runtime.protocol.errors import InvariantViolated, UserError

PR_SET_CHILD_SUBREAPER = 36
STRAY_ROUNDS_MAX = 200
"""Rounds of kill and reap; each round takes one generation of descendants."""
STRAY_ROUND_S = 0.02
KILL_WAIT_S = 10.0
"""A killed process that is still there after this sits in the kernel (dead file system, dead device)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exit:
    """How a process ended: exactly one of the two is set."""

    code: int | None
    signal: int | None

    @property
    def ok(self) -> bool:
        return self.code == 0

    def __str__(self) -> str:
        if self.signal is None:
            return f"exited with code {self.code}"
        try:
            return f"was killed by {signal.Signals(self.signal).name}"
        except ValueError:  # real-time signals have no name
            return f"was killed by signal {self.signal}"


class Process:
    """A running or ended child; made by `spawn`."""

    def __init__(self, popen: subprocess.Popen[bytes]) -> None:
        self.pid = popen.pid
        self.pgid = popen.pid
        self.exit: Exit | None = None
        """Set once the process was reaped."""
        self._popen = popen
        self._ended = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._pidfd = os.pidfd_open(popen.pid)
        self._loop.add_reader(self._pidfd, self._on_exit)

    async def wait(self) -> Exit:
        """Return how the process ended, as soon as it did. Any number of tasks may wait; cancelling changes nothing."""
        await self._ended.wait()
        if self.exit is None:
            raise InvariantViolated(f"process {self.pid} ended without a status")
        return self.exit

    def signal(self, number: int) -> bool:
        """Send a signal to the process alone; False when it has ended."""
        if self.exit is not None:
            return False
        signal.pidfd_send_signal(self._pidfd, number)
        return True

    def signal_group(self, number: int) -> bool:
        """Send a signal to the process and its group; False when it has ended."""
        if self.exit is not None:
            return False
        with contextlib.suppress(ProcessLookupError):  # as in _on_exit
            os.killpg(self.pgid, number)
        return True

    async def stop(self, term_s: float, number: int = SIGTERM) -> Exit:
        """Signal the group (and SIGCONT), wait at most `term_s` seconds for its leader, then SIGKILL.

        A cancelled stop() kills the group before it passes the cancellation on.
        """
        self.signal_group(number)
        self.signal_group(signal.SIGCONT)
        try:
            return await asyncio.wait_for(self.wait(), term_s)
        except TimeoutError:
            return await self.kill()
        except asyncio.CancelledError:
            self.signal_group(signal.SIGKILL)
            raise

    async def kill(self) -> Exit:
        """SIGKILL the group and wait for its leader. Raises InvariantViolated when the kernel does not let go of it."""
        self.signal_group(signal.SIGKILL)
        try:
            return await asyncio.wait_for(self.wait(), KILL_WAIT_S)
        except TimeoutError:
            raise InvariantViolated(f"process {self.pid} is still there {KILL_WAIT_S:g} s after SIGKILL") from None

    def _on_exit(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        # The leader is still a zombie here, which keeps its pid, hence the group's id, from being reused.
        with contextlib.suppress(ProcessLookupError):  # it may have moved to another group and left its own empty
            os.killpg(self.pgid, signal.SIGKILL)
        code = self._popen.wait()
        self.exit = Exit(code=code, signal=None) if code >= 0 else Exit(code=None, signal=-code)
        self._ended.set()


def spawn(
    argv: Sequence[str],
    *,
    env: Mapping[str, str],
    stdin: int = DEVNULL,
    stdout: int | None = None,
    stderr: int | None = None,
    cwd: str | None = None,
    death_signal: int = signal.SIGKILL,
    cpus: Sequence[int] = (),
) -> Process:
    """Start a program, found on the PATH of `env`, in a new process group. Needs a running loop in the main thread.

    With `cpus` it runs on these CPUs, as far as this process may use them. A program that cannot be executed or bound
    shows as exit code 126 or 127 and a line on its stderr. Raises UserError when no process can be made (limits,
    memory, missing `cwd`).
    """
    if threading.current_thread() is not threading.main_thread():
        raise InvariantViolated("spawn() outside the main thread: the kernel ties the death signal to the thread")
    asyncio.get_running_loop()  # before there is a child to lose
    program = shutil.which(argv[0], path=env.get("PATH", os.defpath)) or argv[0]
    locale = env.get("LC_CTYPE", exec_wrapper.UNSET)
    bound_to = ",".join(map(str, cpus)) or exec_wrapper.UNSET
    how = (str(os.getpid()), str(int(death_signal)), locale, bound_to)
    wrapper = [sys.executable, "-I", "-S", exec_wrapper.__file__, *how]
    try:
        popen = subprocess.Popen(
            [*wrapper, program, *argv[1:]], env=env, stdin=stdin, stdout=stdout, stderr=stderr, cwd=cwd, process_group=0
        )
    except OSError as error:
        raise UserError(f"cannot start {argv[0]}: {error.strerror} ({error.filename or 'no process'})") from None
    try:
        return Process(popen)
    except OSError as error:  # no pidfd: too many open files, or a kernel before 5.3
        popen.kill()
        popen.wait()
        raise UserError(f"cannot watch {argv[0]}: {error.strerror}; raise the limit of open files") from None


def set_subreaper() -> None:
    """Make orphaned descendants children of this process, so that kill_strays() finds them. Raises OSError."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def adopted_children(known: Container[int]) -> list[int]:
    """Return the pids of this process's children, zombies included, that are not in `known`."""
    own_pid = os.getpid()
    return [pid for pid in _all_pids() if pid not in known and _parent_pid(pid) == own_pid]


async def kill_strays(known: Container[int]) -> int:
    """Kill and reap every descendant not in `known` nor below one in it; return how many there were.

    Raises InvariantViolated when some are left after STRAY_ROUNDS_MAX generations.
    """
    killed = 0
    for _round in range(STRAY_ROUNDS_MAX):
        strays = adopted_children(known)
        if not strays:
            return killed
        for pid in strays:  # ours and not reaped yet: the pid cannot name another process
            os.kill(pid, signal.SIGKILL)
        reaped = sum(_reaped(pid) for pid in strays)
        killed += reaped
        if reaped < len(strays):
            await asyncio.sleep(STRAY_ROUND_S)
    raise InvariantViolated(f"{len(adopted_children(known))} stray processes are left after {STRAY_ROUNDS_MAX} rounds")


def start_time_ticks(pid: int) -> int | None:
    """Return when process `pid` started, in clock ticks since boot, or None without such a process or for a zombie.

    With the pid it names one process for good: a reused pid has another start time.
    """
    fields = _stat_fields(pid)
    return None if fields is None or fields[0] in ("Z", "X") else int(fields[19])


def _reaped(pid: int) -> bool:
    return os.waitpid(pid, os.WNOHANG)[0] == pid


def _all_pids() -> list[int]:
    return sorted(int(name) for name in os.listdir("/proc") if name.isdecimal())


def _parent_pid(pid: int) -> int | None:
    fields = _stat_fields(pid)
    return None if fields is None else int(fields[1])


def _stat_fields(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the state on; the name before them may hold spaces and brackets."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return text.rpartition(")")[2].split()
