"""Each rank reads its share through a DataLoader of two forked processes; the ranks' sums are added and printed.

Usage: data_parallel_loader.py. Prints `sum 4950` on every rank: the numbers 0 to 99, each read once.
"""

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

SAMPLES = 100

if __name__ == "__main__":
    dist.init_process_group("gloo")
    numbers = TensorDataset(torch.arange(SAMPLES))
    sampler: DistributedSampler[object] = DistributedSampler(numbers, drop_last=True)
    loader = DataLoader(numbers, batch_size=5, sampler=sampler, num_workers=2, multiprocessing_context="fork")
    total = sum((batch.sum() for (batch,) in loader), torch.zeros((), dtype=torch.int64))
    dist.all_reduce(total)
    print(f"rank {dist.get_rank()} of {dist.get_world_size()}: sum {int(total)}\n", end="", flush=True)
    dist.destroy_process_group()
