"""Trains a small CNN on scikit-learn's handwritten digits with DDP: plain PyTorch, no import of any launcher.

Runs as `python train_digits.py`, and unchanged with any number of workers under `torchrun train_digits.py`.
1,797 real scans of 8 x 8 pixels; one in five is held out. BatchNorm and dropout are here on purpose: running
statistics and random streams are what a fault-tolerant launcher gets wrong first.
"""

import argparse
import gc
import json
import os
import time
from typing import Any

import torch
import torch.distributed as dist

# Imported while no process group exists, for its functions keep the group of that moment as default argument. Imported
# later (DDP does it), they keep gloo's threads alive into the interpreter's end; one that then frees a tensor aborts.
import torch.distributed.nn
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

HELD_OUT_EVERY = 5
PIXEL_MAX = 16.0


def make_model() -> nn.Module:
    """Images `[batch, 1, 8, 8]` -> logits `[batch, 10]`."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.25),
        nn.Linear(64 * 4 * 4, 64),
        nn.ReLU(),
        nn.Dropout(0.25),
        nn.Linear(64, 10),
    )


def load_digits(seed: int) -> tuple[TensorDataset, TensorDataset]:
    """The training and the held-out digits, split by a fixed permutation of `seed`."""
    try:
        from sklearn import datasets
    except ImportError:
        raise SystemExit("train_digits: scikit-learn is missing; run: pip install scikit-learn") from None
    digits = datasets.load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(seed))
    images = torch.tensor(digits.images, dtype=torch.float32)[order, None] / PIXEL_MAX
    labels = torch.tensor(digits.target, dtype=torch.int64)[order]
    held_out = torch.arange(len(labels)) % HELD_OUT_EVERY == 0
    return TensorDataset(images[~held_out], labels[~held_out]), TensorDataset(images[held_out], labels[held_out])


def train_epoch(
    model: nn.Module, loader: DataLoader[Any], optimizer: Any, schedule: Any, device: torch.device
) -> float:
    """One pass over this rank's share; the mean loss of its batches."""
    model.train()
    total = 0.0
    for images, labels in loader:
        loss = F.cross_entropy(model(images.to(device)), labels.to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        total += float(loss.detach())
    return total / len(loader)


@torch.no_grad()
def accuracy_of(model: nn.Module, held_out: TensorDataset, device: torch.device) -> float:
    """The share of `held_out` that is recognised, in percent."""
    model.eval()
    images, labels = (tensor.to(device) for tensor in held_out.tensors)
    guesses: Tensor = model(images).argmax(dim=1)
    return 100.0 * float((guesses == labels).double().mean())


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small CNN on handwritten digits.")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=16, help="images per rank and step")
    parser.add_argument("--lr", type=float, default=4e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.epochs < 1 or args.batch_size < 2:
        parser.error("--epochs must be at least 1 and --batch-size at least 2")
    return args


def main() -> None:
    args = parse_args()
    started_s = time.perf_counter()
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    train, held_out = load_digits(args.seed)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    torch.manual_seed(args.seed)
    core = make_model().to(device)
    model = core
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        model = DistributedDataParallel(core, device_ids=[device.index] if device.type == "cuda" else None)
    # Every rank began with one seed for equal weights; dropout must differ between ranks.
    torch.manual_seed(args.seed + 1 + rank)
    sampler: DistributedSampler[Any] = DistributedSampler(train, num_replicas=world_size, rank=rank, seed=args.seed)
    loader = DataLoader(train, batch_size=args.batch_size, sampler=sampler, drop_last=True)
    if len(loader) == 0:
        raise SystemExit(f"train_digits: {len(train)} images are too few for one batch of {args.batch_size} per rank")
    optimizer = torch.optim.AdamW(core.parameters(), lr=args.lr)
    steps = args.epochs * len(loader)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=args.lr, total_steps=steps)
    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)
        loss = train_epoch(model, loader, optimizer, schedule, device)
        if rank == 0:
            accuracy = accuracy_of(core, held_out, device)
            print(f"epoch {epoch + 1}/{args.epochs}  loss {loss:.4f}  held-out accuracy {accuracy:.1f} %", flush=True)
    if rank == 0:
        seconds = time.perf_counter() - started_s
        summary = {"steps": steps, "accuracy_percent": accuracy, "world_size": world_size, "seconds": round(seconds, 2)}
        print(json.dumps(summary), flush=True)
    # DDP goes first, and the cycle it is in: freed after the group, it joins gloo's threads while it holds the lock
    # that they may wait for.
    del model
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
