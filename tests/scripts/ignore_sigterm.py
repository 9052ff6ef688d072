"""Ignores SIGTERM and SIGINT, touches DIR/rank-<RANK> holding its pid, and waits. Usage: ignore_sigterm.py DIR"""

import os
import signal
import sys
import time
from pathlib import Path

LIFE_S = 600

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ready = Path(sys.argv[1]) / f"rank-{os.environ.get('RANK', '0')}"
    unfinished = ready.with_suffix(".new")
    unfinished.write_text(str(os.getpid()))
    unfinished.replace(ready)
    time.sleep(LIFE_S)
