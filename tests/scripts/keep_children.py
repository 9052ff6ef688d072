"""Forks a plain child and one in a session of its own, touches DIR/rank-<RANK>, and waits with them.

Usage: keep_children.py DIR
"""

import os
import sys
import time
from pathlib import Path

from fork_children import CHILD_LIFE_S, fork_child

if __name__ == "__main__":
    fork_child(own_session=False)
    fork_child(own_session=True)
    (Path(sys.argv[1]) / f"rank-{os.environ['RANK']}").touch()
    time.sleep(CHILD_LIFE_S)
