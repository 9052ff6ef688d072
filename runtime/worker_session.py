"""Ties a worker's process to its agent before the script runs: parent death, telemetry, link, interceptions, crash
traces.

Invariants:
1. The worker dies with its agent, however early that died (tests/integration/test_bootstrap.py).
2. The five variables of ours are gone from the environment when the script, and any child of it, runs (same test).
3. A forked child neither writes the telemetry nor holds the link (tests/integration/test_safe_point.py).
4. torch, numpy, gRPC and protobuf are not imported (tests/integration/test_bootstrap.py).
Not here: running the script (script_main.py); the agent's side (agent/environment.py, edge/worker_server.py).
"""

import atexit
import ctypes
import faulthandler
import os
import signal
from collections.abc import MutableMapping
from types import ModuleType

from elastic_run.runtime.edge.notice import notice
from elastic_run.runtime.edge.operations_source import OF_THIS_PROCESS
from elastic_run.runtime.edge.telemetry_layout import Phase
from elastic_run.runtime.edge.telemetry_writer import TelemetryWriter
from elastic_run.runtime.edge.worker_link import WorkerLink
from elastic_run.runtime.error_file import write_error_file
from elastic_run.runtime.interceptions.import_hook import when_imported
from elastic_run.runtime.protocol.errors import CodecError, PeerError, UserError

AGENT_SOCKET = "ELASTIC_RUN_AGENT_SOCKET"
WORKER = "ELASTIC_RUN_WORKER"
TELEMETRY = "ELASTIC_RUN_TELEMETRY"
VIEW = "ELASTIC_RUN_VIEW"
AGENT_PID = "ELASTIC_RUN_AGENT_PID"
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"

PR_SET_PDEATHSIG = 1
ANCESTORS_MAX = 16  # a wrapper or two between agent and worker


class WorkerSession:
    """One worker's ties, from before its script until its process exits."""

    def __init__(self, telemetry: TelemetryWriter, link: WorkerLink, error_file: str | None) -> None:
        self._telemetry = telemetry
        self._link = link
        self._error_file = error_file
        self._outcome = Phase.FINISHED
        atexit.register(self._at_exit)  # the first one registered is the last one called
        os.register_at_fork(after_in_child=self._in_forked_child)

    def begin_script(self) -> None:
        self._telemetry.set_phase(Phase.IMPORTING)

    def end_script(self, error: BaseException | None) -> None:
        """Remember how the script ended; leave its uncaught exception for the agent."""
        if error is None or (isinstance(error, SystemExit) and error.code in (None, 0)):
            return
        self._outcome = Phase.FAILED
        if self._error_file and isinstance(error, Exception):
            write_error_file(self._error_file, error)

    def _at_exit(self) -> None:
        self._telemetry.set_phase(self._outcome)

    def _in_forked_child(self) -> None:
        self._telemetry.disarm()
        self._link.close()


def attach(environment: MutableMapping[str, str]) -> WorkerSession:
    """Take our variables out of `environment` and tie this process to the agent they name.

    Raises UserError, PeerError, CodecError; the error is recorded in the worker's error file first.
    """
    error_file = environment.get(ERROR_FILE)
    given = {name: environment.pop(name, "") for name in (AGENT_SOCKET, WORKER, TELEMETRY, VIEW, AGENT_PID)}
    try:
        return _attach(given, error_file)
    except (UserError, PeerError, CodecError) as error:
        if error_file:
            write_error_file(error_file, error)
        raise


def _attach(given: dict[str, str], error_file: str | None) -> WorkerSession:
    if missing := [name for name, value in given.items() if not value]:
        raise UserError(f"{missing[0]} is not set: start workers by elastic-run, or unset {AGENT_SOCKET}")
    if not (given[VIEW].isdecimal() and given[AGENT_PID].isdecimal()):
        raise UserError(f"{VIEW} and {AGENT_PID} must be numbers: start workers by elastic-run")
    _die_with(int(given[AGENT_PID]))
    telemetry = TelemetryWriter(given[TELEMETRY])
    telemetry.begin(pid=os.getpid())
    OF_THIS_PROCESS.offer(telemetry.operations)
    link = WorkerLink(given[AGENT_SOCKET])
    link.hello(worker=given[WORKER], pid=os.getpid())
    # The agent answers while this process goes on with its own part.
    _trace_crashes()
    when_imported("torch.optim.optimizer", lambda module: _count_steps(module, telemetry, link, view))
    when_imported("torch.distributed", lambda _module: _register_backend())
    view = link.welcome()
    telemetry.set_view(view)
    return WorkerSession(telemetry, link, error_file)


def _register_backend() -> None:
    from elastic_run.collectives.torch_autoload import register

    register()


def _count_steps(module: ModuleType, telemetry: TelemetryWriter, link: WorkerLink, view: int) -> None:
    # Loaded with torch: a script without it does not pay.
    from elastic_run.runtime.interceptions.safe_point import SafePoint
    from elastic_run.runtime.interceptions.step_counter import StepCounter

    StepCounter(telemetry, SafePoint(telemetry, link, view=view).after_step).install(module)


def _die_with(agent_pid: int) -> None:
    """Have the kernel kill this process when its parent dies. Raises PeerError when the agent is gone already."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise PeerError(f"cannot ask for a signal at the agent's death: {os.strerror(ctypes.get_errno())}")
    ancestor = os.getppid()
    for _ in range(ANCESTORS_MAX):  # a wrapper script may stand between the agent and this process
        if ancestor == agent_pid:
            return
        if ancestor <= 1:
            break
        ancestor = _parent_of(ancestor)
    raise PeerError(f"the agent (pid {agent_pid}) is gone")


def _parent_of(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[1])
    except (OSError, ValueError, IndexError):  # it is gone too
        return 0


def _trace_crashes() -> None:
    """Let a fatal signal print the Python stack first; the signal stays what ends the process.

    A user who does not want it sets PYTHONFAULTHANDLER to the empty string.
    """
    if os.environ.get("PYTHONFAULTHANDLER") == "" or faulthandler.is_enabled():
        return
    try:
        faulthandler.enable()
    except (OSError, ValueError, RuntimeError, AttributeError):  # stderr is closed: there is nowhere to print
        notice("no crash traces: stderr has no file descriptor")
