"""Exits with the code it is given. Usage: exit_code.py CODE [RANK]: with RANK, the other ranks exit with 0."""

import os
import sys

if __name__ == "__main__":
    chosen = len(sys.argv) < 3 or os.environ["RANK"] == sys.argv[2]
    sys.exit(int(sys.argv[1]) if chosen else 0)
