"""Touches DIR/rank-<RANK> holding its pid, then waits for an hour at most. Usage: wait_forever.py DIR"""

import os
import sys
import time
from pathlib import Path

LIFE_S = 3600

if __name__ == "__main__":
    ready = Path(sys.argv[1]) / f"rank-{os.environ.get('RANK', '0')}"
    unfinished = ready.with_suffix(".new")
    unfinished.write_text(str(os.getpid()))
    unfinished.replace(ready)
    time.sleep(LIFE_S)
