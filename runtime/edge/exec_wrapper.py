"""Becomes a program that cannot outlive its parent.

    python -I -S exec_wrapper.py PARENT SIGNAL LOCALE CPUS PROGRAM ARG...

Asks the kernel for SIGNAL at the parent's death, makes sure that the process PARENT (a pid) is still the parent, then
executes PROGRAM. A file of its own because Python code between fork and exec is not safe in a process with threads.

Invariants (tests/integration/test_process_edge.py):
1. Once PROGRAM runs, the death of PARENT ends it, however early that death came.
2. PROGRAM finds the environment and signal dispositions that the parent gave, not those of this interpreter.
3. PROGRAM runs on those of CPUS that the parent may use; without one it does not run at all.
Not here: process groups, waiting, stopping (process.py). Standard library only: every worker pays for its start-up.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
UNSET = "-"
"""As LOCALE: the parent gave no LC_CTYPE. As CPUS: the same ones as the parent."""
EXIT_NOT_EXECUTABLE = 126
EXIT_NOT_FOUND = 127


def main(argv: list[str]) -> int:
    """Replace this process; return an exit code only when that failed."""
    parent_pid, death_signal, locale, cpus, program = int(argv[1]), int(argv[2]), argv[3], argv[4], argv[5]
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, death_signal, 0, 0, 0) != 0:
        return _failed(program, os.strerror(ctypes.get_errno()), EXIT_NOT_EXECUTABLE)
    if os.getppid() != parent_pid:  # it died before the kernel was asked
        return _failed(program, "its parent is gone", EXIT_NOT_EXECUTABLE)
    if cpus != UNSET and (problem := _bind(cpus)) is not None:
        return _failed(program, problem, EXIT_NOT_EXECUTABLE)
    os.environ.pop("LC_CTYPE", None)  # the interpreter sets it for itself under the C locale (PEP 538)
    if locale != UNSET:
        os.environ["LC_CTYPE"] = locale
    for ignored_by_python in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(ignored_by_python, signal.SIG_DFL)
    try:
        os.execv(program, argv[5:])
    except FileNotFoundError as error:
        return _failed(program, str(error.strerror), EXIT_NOT_FOUND)
    except OSError as error:
        return _failed(program, str(error.strerror), EXIT_NOT_EXECUTABLE)


def _bind(cpus: str) -> str | None:
    usable = os.sched_getaffinity(0).intersection(map(int, cpus.split(",")))
    if not usable:
        return f"none of the CPUs {cpus} may be used here"
    try:
        os.sched_setaffinity(0, usable)
    except OSError as error:  # they went offline, or a cpuset took them away, in this moment
        return f"it cannot be bound to the CPUs {cpus}: {error.strerror}"
    return None


def _failed(program: str, why: str, code: int) -> int:
    os.write(2, f"elastic-run: cannot start {program}: {why}\n".encode(errors="backslashreplace"))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv))
