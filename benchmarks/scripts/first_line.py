"""Notes the time as its very first act, in DIR/rank-<RANK>. Usage: first_line.py DIR"""

import time

NOW_NS = time.time_ns()

import os  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

if __name__ == "__main__":
    file = Path(sys.argv[1]) / f"rank-{os.environ.get('RANK', '0')}"
    unfinished = file.with_suffix(".new")
    unfinished.write_text(str(NOW_NS))
    unfinished.replace(file)
