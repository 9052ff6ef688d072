"""What a worker's process runs: `python bootstrap.py SCRIPT ARGS...` or `python bootstrap.py -m MODULE ARGS...`.

Ties the process to the agent its environment names, then runs the script as Python would have; without such an agent it
only runs the script. `python -m elastic_run.runtime.bootstrap` does the same, but Python then first searches the
working directory, where anything may lie.
Invariants (tests/integration/test_bootstrap.py):
1. The script sees what it would see under plain Python: argv, path, `__main__`, exit code, traceback.
2. Before the script, only parts of the standard library and of this package are imported.
Not here: the ties (worker_session.py); `__main__` (script_main.py).
"""

import os
import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    del sys.path[0]  # this folder, or with -m the working directory: neither may shadow what is imported next

from elastic_run.runtime import script_main
from elastic_run.runtime.edge.notice import notice
from elastic_run.runtime.protocol.errors import ElasticError

USAGE = "bootstrap: give a script, or -m and a module, to run"
EXIT_USAGE = 2
EXIT_NOT_ATTACHED = 1
OWN_MODULE = "elastic_run.runtime.bootstrap"


def main() -> None:
    """Run what sys.argv names; leave this process's end to Python."""
    words = sys.argv[1:]
    by_module = words[:1] == ["-m"]
    target, args = (words[1:2], words[2:]) if by_module else (words[:1], words[1:])
    if not target:
        notice(USAGE)
        sys.exit(EXIT_USAGE)
    attached = "ELASTIC_RUN_AGENT_SOCKET" in os.environ
    sys.orig_argv = _without_bootstrap(sys.orig_argv, len(words))
    on_end = _attach() if attached else _no_agent
    run = script_main.run_module if by_module else script_main.run_script
    run(target[0], args, on_end, safe_path=bool(sys.flags.safe_path))


def _attach() -> script_main.OnEnd:
    from elastic_run.runtime.worker_session import attach

    try:
        session = attach(os.environ)
    except ElasticError as error:
        notice(f"this worker cannot start: {error}")
        sys.exit(EXIT_NOT_ATTACHED)
    session.begin_script()
    return session.end_script


def _no_agent(_error: BaseException | None) -> None:
    return None


def _without_bootstrap(command: list[str], words: int) -> list[str]:
    """Return the command line as it would be without us, for scripts that start themselves again."""
    head, tail = command[: len(command) - words], command[len(command) - words :]
    return (head[:-2] if head[-2:] == ["-m", OWN_MODULE] else head[:-1]) + tail


if __name__ == "__main__":
    main()
