"""Trains a small byte-level GPT on real text with DDP: plain PyTorch, no import of any launcher.

Runs as `python train_gpt.py`, and unchanged with any number of workers under `torchrun train_gpt.py`.
The text is the source of Python's own standard library (identical on nodes with the same Python), or `--text FILE`.
With `--snapshot FILE` (on a file system that all ranks share) the run resumes at the step of the newest snapshot, on
any number of workers: the position is kept in samples of the epoch, and a world of another size goes on from there.

Invariants: 1. the same flags, world size and seed give the same losses, resumed or not; 2. a snapshot file is whole
or absent (temporary file, fsync, rename); 3. a snapshot or curve that cannot be written is said, and training goes on.
"""

import argparse
import csv
import gc
import hashlib
import io
import json
import math
import os
import sys
import sysconfig
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

# Imported while no process group exists, for its functions keep the group of that moment as default argument. Imported
# later (DDP does it), they keep gloo's threads alive into the interpreter's end; one that then frees a tensor aborts.
import torch.distributed.nn
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler

VOCABULARY = 256
HELD_OUT_FRACTION = 0.05
VALIDATION_WINDOWS = 64
WEIGHT_DECAY = 0.1
LR_FLOOR_FRACTION = 0.1


class GPT(nn.Module):
    """Decoder-only transformer over bytes: tokens `[batch, time]` -> logits `[batch, time, 256]`."""

    def __init__(self, *, layers: int, heads: int, width: int, block_size: int) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, width)
        self.position = nn.Embedding(block_size, width)
        self.blocks = nn.ModuleList(Block(heads=heads, width=width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.token.weight
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Block(nn.Module):
    """Causal self-attention and a feed-forward layer, each behind a norm and beside a residual."""

    def __init__(self, *, heads: int, width: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, time_steps, width = x.shape
        q, k, v = (
            part.view(batch, time_steps, self.heads, width // self.heads).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).split(width, dim=2)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, time_steps, width))
        return x + self.feed_forward(self.norm2(x))


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Consecutive windows of `block_size` bytes; each target is the input moved by one byte."""

    def __init__(self, text: np.ndarray, block_size: int) -> None:
        self.text = text
        self.block_size = block_size

    def __len__(self) -> int:
        return (len(self.text) - 1) // self.block_size

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = index * self.block_size
        window = torch.from_numpy(self.text[start : start + self.block_size + 1].astype(np.int64))
        return window[:-1], window[1:]


@dataclass(kw_only=True)
class Progress:
    """Where the run stands; `history` rows are step, loss, learning rate, tokens per second."""

    step: int = 0
    tokens: int = 0
    epoch: int = 0
    epoch_samples: int = 0
    history: list[list[float]] = field(default_factory=list)


class World:
    """The ranks of this run: one without a launcher, otherwise what its environment says."""

    def __init__(self) -> None:
        self.launched = "RANK" in os.environ
        self.rank = int(os.environ.get("RANK", "0"))
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(self.device)
        if self.launched:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

    def sum(self, *values: float) -> list[float]:
        """The element-wise sum of `values` over all ranks."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.launched:
            dist.all_reduce(total)
        return [float(value) for value in total]

    def close(self) -> None:
        if self.launched:
            dist.destroy_process_group()

    def say(self, line: str) -> None:
        if self.rank == 0:
            print(line, flush=True)


class Trainer:
    """Model, optimizer, schedule and position of one rank."""

    def __init__(self, args: argparse.Namespace, world: World, train: Windows) -> None:
        self.args = args
        self.world = world
        self.progress = Progress()
        torch.manual_seed(args.seed)
        self.core = GPT(layers=args.layers, heads=args.heads, width=args.width, block_size=args.block_size)
        self.core.to(world.device)
        self.optimizer = torch.optim.AdamW(
            self.core.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, partial(lr_factor, args))
        self._load_snapshot()
        self.model: nn.Module = self.core
        if world.launched:
            device_ids = [world.device.index] if world.device.type == "cuda" else None
            self.model = DistributedDataParallel(self.core, device_ids=device_ids)
        self.sampler: DistributedSampler[Any] = DistributedSampler(
            train, num_replicas=world.size, rank=world.rank, seed=args.seed, drop_last=True
        )
        self.loader = DataLoader(train, batch_size=args.batch_size, sampler=self.sampler, drop_last=True)
        if len(self.loader) == 0:
            raise SystemExit(f"train_gpt: the text has {len(train)} windows, too few for one batch on every rank")
        self.step_times_s: list[float] = []
        self._step_started_s = self._logged_at_s = time.perf_counter()
        self._logged_tokens = self.progress.tokens

    def train(self) -> None:
        """Steps until `--steps`, epoch after epoch, from wherever the snapshot left off."""
        while self.progress.step < self.args.steps:
            self.sampler.set_epoch(self.progress.epoch)
            # A world of another size may not divide the position: then part of one global batch is seen again.
            skip = self.progress.epoch_samples // (self.args.batch_size * self.world.size)
            for index, (inputs, targets) in enumerate(self.loader):
                if index < skip:
                    continue
                self._step(inputs, targets)
                if self.progress.step >= self.args.steps:
                    return
            self.progress.epoch += 1
            self.progress.epoch_samples = 0

    def _step(self, inputs: Tensor, targets: Tensor) -> None:
        loss = loss_of(self.model, inputs.to(self.world.device), targets.to(self.world.device))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.core.parameters(), self.args.clip)
        self.optimizer.step()
        self.schedule.step()
        progress = self.progress
        progress.step += 1
        progress.tokens += inputs.numel() * self.world.size
        progress.epoch_samples += inputs.shape[0] * self.world.size
        local_loss = float(loss.detach())
        self.step_times_s.append(time.perf_counter() - self._step_started_s)
        if progress.step == 1 or progress.step % self.args.log_every == 0 or progress.step == self.args.steps:
            self._log(local_loss)
        if progress.step % self.args.snapshot_every == 0 or progress.step == self.args.steps:
            self._save_snapshot()
        # From here, so that a step's time holds its own data loading, and no logging or saving.
        self._step_started_s = time.perf_counter()

    def _log(self, local_loss: float) -> None:
        loss = self.world.sum(local_loss)[0] / self.world.size
        now_s = time.perf_counter()
        tokens_per_s = (self.progress.tokens - self._logged_tokens) / max(1e-9, now_s - self._logged_at_s)
        self._logged_at_s, self._logged_tokens = now_s, self.progress.tokens
        lr = self.optimizer.param_groups[0]["lr"]
        self.progress.history.append([self.progress.step, loss, lr, tokens_per_s])
        self.world.say(
            f"step {self.progress.step}/{self.args.steps}  loss {loss:.4f}  lr {lr:.2e}  {tokens_per_s:,.0f} tokens/s"
        )

    def _save_snapshot(self) -> None:
        if self.args.snapshot is None or self.world.rank != 0:
            return
        buffer = io.BytesIO()
        torch.save(
            {
                "model": self.core.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "step": self.progress.step,
                "tokens": self.progress.tokens,
                "epoch": self.progress.epoch,
                "epoch_samples": self.progress.epoch_samples,
                "history": self.progress.history,
            },
            buffer,
        )
        try:
            write_atomically(self.args.snapshot, buffer.getbuffer())
        except OSError as error:
            print(f"train_gpt: no snapshot at step {self.progress.step}: {error}", file=sys.stderr, flush=True)

    def _load_snapshot(self) -> None:
        path: Path | None = self.args.snapshot
        if path is None or not path.exists():
            return
        state = torch.load(path, map_location=self.world.device, weights_only=True)
        self.core.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.progress = Progress(
            step=state["step"],
            tokens=state["tokens"],
            epoch=state["epoch"],
            epoch_samples=state["epoch_samples"],
            history=state["history"],
        )
        self.world.say(f"resumed from {path} at step {self.progress.step}")

    @torch.no_grad()
    def validate(self, held_out: Windows) -> float:
        """Mean loss over windows spread evenly over the held-out text, shared out between the ranks."""
        count = min(VALIDATION_WINDOWS, len(held_out))
        mine = [held_out[i * len(held_out) // count] for i in range(self.world.rank, count, self.world.size)]
        total = 0.0
        self.core.eval()
        for inputs, targets in mine:
            loss = loss_of(self.core, inputs[None].to(self.world.device), targets[None].to(self.world.device))
            total += float(loss)
        self.core.train()
        total, windows = self.world.sum(total, len(mine))
        return total / windows


def lr_factor(args: argparse.Namespace, step: int) -> float:
    """Linear warm-up, then a cosine down to a tenth."""
    if step < args.warmup_steps:
        return (step + 1) / args.warmup_steps
    span = max(1, args.decay_steps - args.warmup_steps)
    done = min(1.0, (step - args.warmup_steps) / span)
    return LR_FLOOR_FRACTION + (1 - LR_FLOOR_FRACTION) * 0.5 * (1 + math.cos(math.pi * done))


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats per byte."""
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


def read_text(path: Path | None) -> np.ndarray:
    """The corpus as bytes: `path`, or every source file of the standard library in an order fixed by their names."""
    if path is not None:
        return np.frombuffer(path.read_bytes(), dtype=np.uint8)
    root = Path(sysconfig.get_paths()["stdlib"])
    names = [
        str(file.relative_to(root))
        for file in root.rglob("*.py")
        if not {"site-packages", "dist-packages"} & set(file.relative_to(root).parts)
    ]
    # Ordered by digest, so that the held-out end of the text is a mixture and not the last package of the alphabet.
    names.sort(key=lambda name: hashlib.sha256(name.encode()).digest())
    return np.frombuffer(b"\n".join((root / name).read_bytes() for name in names), dtype=np.uint8)


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Replaces `path` by a whole new file; on OSError the old file stands and no part of the new one is left."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_curve(directory: Path, history: list[list[float]]) -> None:
    """Writes the loss curve as `loss.csv`, and as `loss.png` where matplotlib is installed."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "loss.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["step", "loss", "lr", "tokens_per_s"])
        rows.writerows([int(step), f"{loss:.6f}", f"{lr:.6e}", f"{speed:.1f}"] for step, loss, lr, speed in history)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([row[0] for row in history], [row[1] for row in history])
    axes.set_xlabel("step")
    axes.set_ylabel("training loss (nats per byte)")
    axes.grid(alpha=0.3)
    figure.savefig(directory / "loss.png", dpi=120)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small byte-level GPT on real text.")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of the whole run")
    parser.add_argument("--batch-size", type=int, default=4, help="windows per rank and step")
    parser.add_argument("--block-size", type=int, default=64, help="bytes per window")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--warmup-steps", type=int, default=20)
    parser.add_argument("--decay-steps", type=int, help="step at which the cosine ends (default: --steps)")
    parser.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", type=Path, help="train on this file (default: Python's standard library)")
    parser.add_argument("--snapshot", type=Path, help="resume from and save to this file")
    parser.add_argument("--snapshot-every", type=int, default=50, help="steps between snapshots")
    parser.add_argument("--out", type=Path, default=Path("out"), help="directory of loss.csv and loss.png")
    parser.add_argument("--log-every", type=int, default=10, help="steps between lines of output")
    parser.add_argument("--step-times", type=Path, help="write rank 0's seconds per step to this file, one a line")
    args = parser.parse_args()
    for name in ("steps", "batch_size", "block_size", "layers", "heads", "snapshot_every", "log_every", "warmup_steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.width % args.heads:
        parser.error("--width must be a multiple of --heads")
    if args.text is not None and not args.text.is_file():
        parser.error(f"--text: no such file: {args.text}")
    args.decay_steps = args.decay_steps or args.steps
    return args


def main() -> None:
    args = parse_args()
    world = World()
    text = read_text(args.text)
    cut = int(len(text) * (1 - HELD_OUT_FRACTION))
    train, held_out = Windows(text[:cut], args.block_size), Windows(text[cut:], args.block_size)
    if len(held_out) < 1:
        raise SystemExit(f"train_gpt: {len(text)} bytes of text are too few for windows of {args.block_size} bytes")
    trainer = Trainer(args, world, train)
    parameters = sum(parameter.numel() for parameter in trainer.core.parameters())
    world.say(f"{parameters / 1e6:.1f} M parameters, {len(text) / 1e6:.1f} MB of text, {world.size} workers")
    trainer.train()
    val_loss = trainer.validate(held_out)
    progress = trainer.progress
    if world.rank == 0:
        try:
            write_curve(args.out, progress.history)
            if args.step_times is not None:
                args.step_times.write_text("".join(f"{seconds:.9f}\n" for seconds in trainer.step_times_s))
        except OSError as error:
            print(f"train_gpt: no loss curve: {error}", file=sys.stderr, flush=True)
        summary = {
            "steps": progress.step,
            "tokens": progress.tokens,
            "loss_first": progress.history[0][1],
            "loss_last": progress.history[-1][1],
            "val_loss": val_loss,
            "world_size": world.size,
        }
        print(json.dumps(summary), flush=True)
    # DDP goes first, and the cycle it is in: freed after the group, it joins gloo's threads while it holds the lock
    # that they may wait for.
    del trainer
    gc.collect()
    world.close()


if __name__ == "__main__":
    main()
