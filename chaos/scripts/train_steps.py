"""The workload: a plain DDP script on gloo with snapshots, as it would run under torchrun.

Usage: train_steps.py DIRECTORY SAVE_EVERY PACE_S. Every step trains on the same samples whatever the world size. Rank 0
appends one JSON line per step to DIRECTORY/steps.jsonl. Ends after the step whose number stands in DIRECTORY/last.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

# While there is no process group: it would become a default argument in there and live too long.
import torch.distributed.nn
from torch import nn
from torch.nn.parallel import DistributedDataParallel

SAMPLES = 840  # shared out evenly to 1 to 8 workers
FEATURES = 16
NO_END = 1 << 30


def main(directory: Path, save_every: int, pace_s: float) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    train(directory, save_every, pace_s)  # its replica is gone before the group: the other way round gloo may hang
    dist.destroy_process_group()


def train(directory: Path, save_every: int, pace_s: float) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(FEATURES, 64), nn.Tanh(), nn.Linear(64, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    snapshot = directory / "snapshot.pt"
    step = 0
    if snapshot.exists():
        state = torch.load(snapshot, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    replica = DistributedDataParallel(model)
    while step < last_step(directory, rank):
        step += 1
        samples = torch.randn(SAMPLES, FEATURES, generator=torch.Generator().manual_seed(step))
        mine = samples[rank::world_size]
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(replica(mine), mine.square().mean(dim=1, keepdim=True))
        torch.autograd.backward(loss)
        optimizer.step()
        total = loss.detach()
        dist.all_reduce(total)
        if rank == 0:
            line = {"at_s": time.monotonic(), "step": step, "world_size": world_size, "pid": os.getpid()}
            append(directory / "steps.jsonl", {**line, "loss": total.item() / world_size})
            if step % save_every == 0:
                save(snapshot, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step})
        time.sleep(pace_s)


def last_step(directory: Path, rank: int) -> int:
    """What rank 0 finds in the file, told to all ranks."""
    last = torch.tensor([NO_END])
    path = directory / "last"
    if rank == 0 and path.exists():
        last[0] = int(path.read_text())
    dist.broadcast(last, 0)
    return int(last.item())


def append(path: Path, line: dict[str, float]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def save(path: Path, state: dict[str, object]) -> None:
    temporary = path.with_suffix(f".{os.getpid()}")
    torch.save(state, temporary)
    temporary.replace(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
