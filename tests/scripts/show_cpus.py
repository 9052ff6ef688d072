"""Prints local rank and CPUs this process may run on, one line. Usage: show_cpus.py"""

import os
import sys

if __name__ == "__main__":
    cpus = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    sys.stdout.write(f"{os.environ['LOCAL_RANK']} {cpus}\n")  # one write, so that lines of several ranks do not mix
    sys.stdout.flush()
