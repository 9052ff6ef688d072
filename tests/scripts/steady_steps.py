"""Trains a small model with gloo, steadily: the same data whatever the world size, a snapshot now and then, and one
JSON line per step by rank 0. Ends when the step named by the file LAST is done; the file may come while it runs.

Usage: steady_steps.py DIRECTORY [--pace SECONDS] [--fail-at STEP]. With --fail-at the last rank raises after that step,
in every life.
"""

import argparse
import json
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist

# Before there is a process group, which it would keep alive past the interpreter's end: see examples/train_gpt.py.
import torch.distributed.nn
from torch import nn
from torch.nn.parallel import DistributedDataParallel

BATCH = 12  # divides by 1, 2, 3, 4, 6 workers
SAVE_EVERY = 5
NO_END = 1 << 30


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--pace", type=float, default=0.05)
    parser.add_argument("--fail-at", type=int, default=NO_END)
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    # A function of its own: a replica that outlives the process group takes gloo down with the GIL held, and hangs.
    train(args.directory, args.pace, args.fail_at)
    dist.destroy_process_group()


def train(directory: Path, pace_s: float, fail_at: int) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    snapshot = directory / "snapshot.pt"
    step = 0
    if snapshot.exists():
        saved = torch.load(snapshot, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step = saved["step"]
    replica = DistributedDataParallel(model)
    last = agreed_last(directory, rank)
    while step < last:
        step += 1
        generator = torch.Generator().manual_seed(step)
        batch = torch.rand(BATCH, 8, generator=generator)[rank::world_size]
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(replica(batch), batch.sum(dim=1, keepdim=True))
        torch.autograd.backward(loss)
        optimizer.step()
        mean = loss.detach()
        dist.all_reduce(mean)
        if rank == 0:
            line = {"step": step, "world_size": world_size, "pid": os.getpid(), "at_s": time.monotonic()}
            with (directory / "steps.jsonl").open("a") as steps:
                steps.write(json.dumps({**line, "loss": mean.item() / world_size}) + "\n")
            if step % SAVE_EVERY == 0:
                save(snapshot, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step})
        if step == fail_at and rank == world_size - 1:
            raise RuntimeError(f"asked to fail at step {step}")
        time.sleep(pace_s)
        last = agreed_last(directory, rank)


def agreed_last(directory: Path, rank: int) -> int:
    """What rank 0 reads in the file LAST, told to all."""
    last = torch.tensor([NO_END])
    path = directory / "last"
    if rank == 0 and path.exists():
        last[0] = int(path.read_text())
    dist.broadcast(last, 0)
    return int(last.item())


def save(path: Path, state: dict[str, object]) -> None:
    temporary = path.with_suffix(f".{os.getpid()}")
    torch.save(state, temporary)
    temporary.replace(path)


if __name__ == "__main__":
    main()
