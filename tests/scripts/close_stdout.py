"""Closes its standard output at both levels, then goes on and reports on standard error. Usage: close_stdout.py"""

import os
import sys

if __name__ == "__main__":
    print("before the close\n", end="", flush=True)
    sys.stdout.close()
    os.close(1)
    total = sum(range(1000))
    sys.stderr.write(f"worked on without stdout: {total}\n")
    sys.stderr.flush()
    # The interpreter must not try to flush what is closed.
    sys.stdout = None
