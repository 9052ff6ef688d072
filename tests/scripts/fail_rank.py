"""Only rank RANK raises, after a barrier of all. Usage: fail_rank.py RANK [all_reduce]

The others wait ten minutes, or with `all_reduce` go on into a collective with the dead rank, and so fail second.
"""

import sys
import time

import torch
import torch.distributed as dist

LIFE_S = 600

if __name__ == "__main__":
    dist.init_process_group("gloo")
    dist.barrier()
    if dist.get_rank() == int(sys.argv[1]):
        raise RuntimeError(f"rank {dist.get_rank()} fails on purpose")
    if sys.argv[2:] == ["all_reduce"]:
        dist.all_reduce(torch.ones(1))
    time.sleep(LIFE_S)
