"""Forks a plain child and one in a session of its own, both of which would outlive it; appends their pids to FILE.

Usage: fork_children.py FILE [CODE]. Exits with CODE (0) once both children stand; they hold its output pipes.
Each child ends by itself after ten minutes, should nobody end it.
"""

import os
import sys
import time

CHILD_LIFE_S = 600


def fork_child(*, own_session: bool) -> int:
    ready_read, ready_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        if own_session:
            os.setsid()
        os.write(ready_write, b".")
        time.sleep(CHILD_LIFE_S)
        os._exit(0)
    os.read(ready_read, 1)
    return pid


if __name__ == "__main__":
    pids = [fork_child(own_session=False), fork_child(own_session=True)]
    file = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(file, "".join(f"{pid}\n" for pid in pids).encode())
    os.close(file)
    sys.stdout.flush()
    os._exit(int(sys.argv[2]) if len(sys.argv) > 2 else 0)
