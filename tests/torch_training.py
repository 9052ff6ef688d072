"""Programs for torch_ranks: training as scripts do it, over whichever backend the rank has."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch_ranks import Rank

import elastic_run.collectives.torch_backend  # noqa: F401 - registers the backend

STEPS = 5


class Net(nn.Module):
    """Small, with a buffer, a shared and an odd-sized parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(13, 37)
        self.norm = nn.BatchNorm1d(37)
        self.second = nn.Linear(37, 37)
        self.last = nn.Linear(37, 3)

    def forward(self, batch: Tensor) -> Tensor:
        hidden = torch.relu(self.norm(self.first(batch)))
        output: Tensor = self.last(self.second(torch.relu(self.second(hidden))))
        return output


def batches(rank: Rank) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(100 + rank.rank)
    for _ in range(STEPS):
        yield torch.randn(8, 13, generator=generator), torch.randint(0, 3, (8,), generator=generator)


def train(rank: Rank, model: nn.Module, learning_rate: float = 0.1) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9)
    losses = []
    for batch, target in batches(rank):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(batch), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def data_parallel(rank: Rank) -> dict[str, Any]:
    """DDP as it is, with hooks, with accumulation; one model after the other."""
    rank.init()
    results: dict[str, Any] = {}
    for name, hook in (
        ("plain", None),
        ("fp16 hook", default_hooks.fp16_compress_hook),
        ("allreduce hook", default_hooks.allreduce_hook),
    ):
        torch.manual_seed(rank.rank)  # DDP must bring them together
        model = DistributedDataParallel(Net(), bucket_cap_mb=0.002)
        if hook is not None:
            model.register_comm_hook(None, hook)
        results[f"{name} losses"] = train(rank, model)
        results[f"{name} weights"] = weights(model)
    results["sparse"] = sparse_gradients(rank)
    results["whole numbers"] = whole_number_gradients(rank)
    dist.barrier()
    dist.destroy_process_group()
    return results


def compressed(rank: Rank) -> dict[str, Any]:
    """PowerSGD: callbacks of futures that start collectives and wait for them."""
    rank.init()
    torch.manual_seed(0)
    model = DistributedDataParallel(Net())
    state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=2, start_powerSGD_iter=2)
    model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    results = {"losses": train(rank, model), "weights": weights(model)}
    dist.barrier()
    dist.destroy_process_group()
    return results


def whole_number_gradients(rank: Rank) -> list[Tensor]:
    """Gradients whose sum has one answer in whichever order: equal bit for bit over every backend."""
    model = DistributedDataParallel(nn.Linear(4, 4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    for step in range(3):
        (model(torch.full((2, 4), float(rank.rank + step))).sum() * 4).backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def sparse_gradients(rank: Rank) -> Tensor:
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.EmbeddingBag(20, 3, mode="sum", sparse=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        model(torch.arange(6).view(2, 3) + rank.rank + step).sum().backward()
        optimizer.step()
    return weights(model)["module.weight"]


def sharded(rank: Rank) -> dict[str, Any]:
    """FSDP2, and HSDP where the ranks make a rectangle."""
    rank.init()
    results: dict[str, Any] = {}
    shapes = [("fsdp", (rank.size,), ("shard",))]
    if rank.size == 4:
        shapes.append(("hsdp", (2, 2), ("replicate", "shard")))
    for name, shape, names in shapes:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        torch.manual_seed(0)
        model: Any = Net()
        fully_shard(model.second, mesh=mesh)
        fully_shard(model, mesh=mesh)
        results[f"{name} losses"] = train(rank, model)
        results[f"{name} weights"] = weights(model)
    dist.barrier()
    dist.destroy_process_group()
    return results


def tensors(rank: Rank) -> dict[str, Any]:
    """DTensor: redistribution in every direction, and a matrix product on shards."""
    rank.init()
    mesh = init_device_mesh("cpu", (rank.size,))
    whole = torch.arange(7 * 12, dtype=torch.float32).view(7, 12)
    rows = distribute_tensor(whole, mesh, [Shard(0)])
    results = {
        "rows to all": rows.full_tensor(),
        "rows to columns": rows.redistribute(mesh, [Shard(1)]).full_tensor(),
        "all to columns": distribute_tensor(whole, mesh, [Replicate()]).redistribute(mesh, [Shard(1)]).full_tensor(),
        "product": (rows @ distribute_tensor(whole.t().contiguous(), mesh, [Replicate()])).full_tensor(),
        "sum": rows.sum().full_tensor(),
    }
    dist.barrier()
    dist.destroy_process_group()
    return results


def weights(model: nn.Module) -> dict[str, Tensor]:
    kept = {}
    for name, tensor in model.state_dict().items():
        kept[name] = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()
    return kept
