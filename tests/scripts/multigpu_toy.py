"""The toy multi-GPU training script of many a first day with DDP: a Trainer, a snapshot, a DistributedSampler.

Usage: multigpu_toy.py TOTAL_EPOCHS SAVE_EVERY [--batch-size N] [--snapshot FILE]. gloo on CPU, nccl on CUDA.
"""

import argparse
import gc
import os
from pathlib import Path
from typing import Any

import torch

# Before there is a process group, which it would keep alive past the interpreter's end: see examples/train_gpt.py.
import torch.distributed.nn
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import destroy_process_group, init_process_group
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler

SAMPLES = 512


class Cloud(Dataset[tuple[Tensor, Tensor]]):
    """Points of 20 coordinates and a linear function of them."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(7)
        self.points = torch.rand(SAMPLES, 20, generator=generator)
        self.values = self.points @ torch.rand(20, 1, generator=generator)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.points[index], self.values[index]


class Trainer:
    """One rank's model and loop; resumes at the epoch after the snapshot's."""

    def __init__(self, loader: DataLoader[Any], save_every: int, snapshot: Path) -> None:
        self.local_rank = int(os.environ["LOCAL_RANK"])
        self.rank = int(os.environ["RANK"])
        self.device = torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")
        self.loader = loader
        self.save_every = save_every
        self.snapshot = snapshot
        self.first_epoch = 0
        torch.manual_seed(1)
        model = nn.Linear(20, 1).to(self.device)
        if snapshot.exists():
            state = torch.load(snapshot, map_location=self.device, weights_only=True)
            model.load_state_dict(state["model"])
            self.first_epoch = state["epochs_run"]
            print(f"[rank {self.rank}] resuming at epoch {self.first_epoch}\n", end="", flush=True)
        device_ids = [self.local_rank] if self.device.type == "cuda" else None
        self.model = DistributedDataParallel(model, device_ids=device_ids)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-2)

    def train(self, total_epochs: int) -> None:
        for epoch in range(self.first_epoch, total_epochs):
            self.loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
            for points, values in self.loader:
                self.optimizer.zero_grad()
                loss = F.mse_loss(self.model(points.to(self.device)), values.to(self.device))
                loss.backward()
                self.optimizer.step()
            line = f"[rank {self.rank}] epoch {epoch} | steps {len(self.loader)} | loss {loss.item():.5f}"
            print(line + "\n", end="", flush=True)
            if self.local_rank == 0 and (epoch + 1) % self.save_every == 0:
                self._save(epoch + 1)

    def _save(self, epochs_run: int) -> None:
        temporary = self.snapshot.with_suffix(".new")
        torch.save({"model": self.model.module.state_dict(), "epochs_run": epochs_run}, temporary)
        temporary.replace(self.snapshot)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("total_epochs", type=int)
    parser.add_argument("save_every", type=int)
    parser.add_argument("--batch-size", "--batch_size", type=int, default=32)
    parser.add_argument("--snapshot", type=Path, default=Path("snapshot.pt"))
    args = parser.parse_args()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    cloud = Cloud()
    loader = DataLoader(cloud, batch_size=args.batch_size, shuffle=False, sampler=DistributedSampler(cloud))
    Trainer(loader, args.save_every, args.snapshot).train(args.total_epochs)
    gc.collect()  # DDP must not outlive the group either
    destroy_process_group()


if __name__ == "__main__":
    main()
