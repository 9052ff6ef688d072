"""Prints MEGABYTES of numbered lines of 100 bytes, so that a lost or torn one shows. Usage: flood.py MEGABYTES"""

import sys

LINE_BYTES = 100
LINES_PER_WRITE = 1000

if __name__ == "__main__":
    lines = int(sys.argv[1]) * 1_000_000 // LINE_BYTES
    for start in range(0, lines, LINES_PER_WRITE):
        block = range(start, min(lines, start + LINES_PER_WRITE))
        sys.stdout.write("".join(f"{number:010d} {'x' * (LINE_BYTES - 12)}\n" for number in block))
    sys.stdout.flush()
