"""Sums the ranks with gloo and prints the result on every rank. Usage: ddp_sum.py"""

import os

import torch
import torch.distributed as dist

if __name__ == "__main__":
    dist.init_process_group("gloo")
    total = torch.tensor([float(dist.get_rank())])
    dist.all_reduce(total)
    print(f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}: sum {int(total.item())}\n", end="", flush=True)
    dist.destroy_process_group()
