"""Touches DIR/rank-<RANK>.<LIFE> holding its pid, then waits until DIR/go exists. Usage: wait_for_go.py DIR"""

import os
import sys
import time
from pathlib import Path

LIFE_S = 600
POLL_S = 0.05

if __name__ == "__main__":
    directory = Path(sys.argv[1])
    ready = directory / f"rank-{os.environ['RANK']}.{os.environ['TORCHELASTIC_RESTART_COUNT']}"
    unfinished = directory / f"new-{os.getpid()}"
    unfinished.write_text(str(os.getpid()))
    unfinished.replace(ready)
    ends_at_s = time.monotonic() + LIFE_S
    while not (directory / "go").exists() and time.monotonic() < ends_at_s:
        time.sleep(POLL_S)
