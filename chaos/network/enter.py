"""Runs a program on a host of a laboratory: `python -I -S enter.py REPORT_FD FDS DIRECTORY LOCALE PROGRAM ARG...`.

Enters the namespaces (FDS: descriptors joined by commas, the mount namespace last), starts PROGRAM in a child, reports
on REPORT_FD ("pid N", and "failed REASON" when PROGRAM could not be executed), then waits and ends as the child ended.
Only a child can be in the laboratory's PID namespace; this process cannot.

Invariants (tests/integration/test_network_lab.py):
1. PROGRAM dies when this process dies, and when the laboratory's relay dies.
2. PROGRAM finds the environment, directory and signal dispositions the caller gave, and only descriptors 0 to 2.
Not here: the caller's side (host_process.py). Standard library only, so that it starts at once.
"""

import ctypes
import os
import resource
import signal
import sys

PR_SET_PDEATHSIG = 1
UNSET = "-"
"""As LOCALE: the caller's environment has no LC_CTYPE."""
EXIT_NOT_STARTED = 127


def main(argv: list[str]) -> int:
    """Return the exit code of the program, or end by the signal that ended it."""
    report_fd = int(argv[1])
    namespace_fds = [int(text) for text in argv[2].split(",")]
    libc = ctypes.CDLL(None, use_errno=True)
    os.set_inheritable(report_fd, False)
    for namespace_fd in namespace_fds:
        if libc.setns(namespace_fd, 0) != 0:
            return _failed(report_fd, f"the laboratory cannot be entered: {os.strerror(ctypes.get_errno())}")
        os.close(namespace_fd)
    try:
        os.chdir(argv[3])  # entering a mount namespace led to its root
    except OSError as error:
        return _failed(report_fd, f"{argv[3]}: {error.strerror}")
    child = os.fork()
    if child == 0:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        _become(argv[5:], locale=argv[4], report_fd=report_fd)
    os.write(report_fd, f"pid {child}\n".encode())
    os.close(report_fd)
    for descriptor in (0, 1, 2):  # so that the ends of its pipes are the program's alone
        os.close(descriptor)
    return _end_like(os.waitpid(child, 0)[1])


def _become(command: list[str], *, locale: str, report_fd: int) -> None:
    os.environ.pop("LC_CTYPE", None)  # the interpreter sets it for itself under the C locale (PEP 538)
    if locale != UNSET:
        os.environ["LC_CTYPE"] = locale
    for ignored_by_python in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(ignored_by_python, signal.SIG_DFL)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        _failed(report_fd, f"{command[0]}: {error.strerror}")
    os._exit(EXIT_NOT_STARTED)


def _failed(report_fd: int, reason: str) -> int:
    os.write(report_fd, f"failed {reason}\n".encode())
    return EXIT_NOT_STARTED


def _end_like(status: int) -> int:
    if not os.WIFSIGNALED(status):
        return os.WEXITSTATUS(status)
    number = os.WTERMSIG(status)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if number not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    return EXIT_NOT_STARTED


if __name__ == "__main__":
    sys.exit(main(sys.argv))
