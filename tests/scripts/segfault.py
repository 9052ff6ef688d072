"""Dies by SIGSEGV from a read of address zero. Usage: segfault.py [RANK]: with RANK, the other ranks exit with 0."""

import ctypes
import os
import resource
import sys

if __name__ == "__main__":
    # The signal is wanted, a core file in the test's directory is not.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if len(sys.argv) < 2 or os.environ["RANK"] == sys.argv[1]:
        ctypes.string_at(0)
