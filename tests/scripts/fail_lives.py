"""Rank RANK exits with CODE in the first LIVES lives of the job, while the others wait.

Usage: fail_lives.py RANK CODE LIVES. Lives are counted by TORCHELASTIC_RESTART_COUNT.
"""

import os
import sys
import time

LIFE_S = 600

if __name__ == "__main__":
    rank, code, lives = (int(text) for text in sys.argv[1:])
    if int(os.environ["TORCHELASTIC_RESTART_COUNT"]) < lives:
        if int(os.environ["RANK"]) == rank:
            sys.exit(code)
        time.sleep(LIFE_S)
    sys.stdout.write(f"life {os.environ['TORCHELASTIC_RESTART_COUNT']} of rank {os.environ['RANK']} ends well\n")
