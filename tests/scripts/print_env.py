"""Prints one JSON line per rank: what a launcher promises a script. Usage: print_env.py ARGS..."""

import json
import os
import sys

NAMES = (
    "LOCAL_RANK",
    "RANK",
    "GROUP_RANK",
    "ROLE_RANK",
    "ROLE_NAME",
    "LOCAL_WORLD_SIZE",
    "WORLD_SIZE",
    "GROUP_WORLD_SIZE",
    "ROLE_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_RESTART_COUNT",
    "TORCHELASTIC_MAX_RESTARTS",
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_USE_AGENT_STORE",
    "TORCHELASTIC_ERROR_FILE",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING",
    "OMP_NUM_THREADS",
)

if __name__ == "__main__":
    facts = {
        "env": {name: os.environ.get(name) for name in NAMES},
        "argv": sys.argv,
        "path0": sys.path[0],
        "name": __name__,
        "file": __file__,
        "pid": os.getpid(),
    }
    # One write, so that the lines of several ranks do not mix.
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()
