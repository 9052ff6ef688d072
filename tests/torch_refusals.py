"""Programs for torch_ranks: what is refused, what fails, what only backend "elastic" does."""

import os
import signal
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch_ranks import Rank

import elastic_run.collectives.torch_backend
from elastic_run.collectives.errors import CollectiveAborted
from elastic_run.collectives.torch_errors import BackendAborted

assert elastic_run.collectives.torch_backend.ElasticProcessGroup is not None


def refusals(rank: Rank) -> dict[str, Any]:
    """Arguments that cannot be meant raise at the call, on every rank alike, and leave the group whole."""
    results: dict[str, Any] = {"options": said(lambda: rank.init("unused", pg_options="fast"))}
    rank.init()
    average = torch.arange(2.0) + rank.rank
    dist.all_reduce(average, dist.ReduceOp.AVG)
    transposed = torch.tensor([[1.0, 1.0], [2.0, 2.0]]).t()
    dist.all_reduce(transposed)
    results |= {"average": average, "transposed": transposed.contiguous()}
    batch = [torch.full((3,), float(rank.rank)) for _ in range(4)]
    with dist._coalescing_manager(device=torch.device("cpu"), async_ops=True) as manager:
        for tensor in batch:
            dist.broadcast(tensor, 1, async_op=True)
    manager.wait()
    results["batch"] = batch
    group = dist.group.WORLD
    assert group is not None
    premul_sum = dist._make_nccl_premul_sum(2.0)
    complex_numbers = torch.ones(2, dtype=torch.complex64)
    lists = [torch.empty(2), torch.empty(3)]
    calls: dict[str, Callable[[], object]] = {
        "premul_sum": lambda: dist.all_reduce(torch.ones(2), premul_sum),
        "complex product": lambda: dist.all_reduce(complex_numbers, dist.ReduceOp.PRODUCT),
        "sparse": lambda: dist.all_reduce(torch.eye(2).to_sparse(), dist.ReduceOp.MAX),
        "two types": lambda: group.allgather([lists], [torch.ones(2, dtype=torch.int32)]),
        "list of another size": lambda: dist.all_gather(lists, torch.ones(2)),
        "self": lambda: dist.send(torch.ones(2), rank.rank),
    }
    for name, call in calls.items():
        results[name] = said(call)
    dist.barrier()
    dist.destroy_process_group()
    return results


def groups(rank: Rank) -> dict[str, Any]:
    """Splits, groups made again under one name, groups of a world that is not ours, and what is left at the end."""
    results: dict[str, Any] = {"threads before": threading.active_count(), "descriptors before": descriptors()}
    rank.init()
    world = dist.group.WORLD
    assert world is not None
    part = world.split_group([0, 2] if rank.rank % 2 == 0 else [1, 3])
    assert part is not None
    results["split"] = total(part, rank.rank)
    part.shutdown()
    alone = world.split_group([1])
    assert (alone is None) == (rank.rank != 1)
    if alone is not None:
        alone.shutdown()
    for _ in range(3):
        again = dist.new_group([0, 1, 2, 3], use_local_synchronization=True)
        results["again"] = total(again, rank.rank)
        dist.barrier(again)
        dist.destroy_process_group(again)
    dist.destroy_process_group()
    rank.init()  # on the same store
    assert total(dist.group.WORLD, rank.rank) == 6
    dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=f"file://{rank.directory}/gloo", rank=rank.rank, world_size=rank.size)
    results["under gloo"] = None
    even = dist.new_group([0, 2], backend="elastic")
    if rank.rank % 2 == 0:
        results["under gloo"] = total(even, rank.rank) + 1
    dist.barrier()
    dist.destroy_process_group()
    results |= {"threads after": threading.active_count(), "descriptors after": descriptors()}
    return results


def one_is_killed(rank: Rank) -> dict[str, Any]:
    rank.init()
    model = DistributedDataParallel(nn.Linear(2, 2))
    tensor = torch.full((100,), float(rank.rank))
    dist.barrier()
    if rank.rank == 1:
        rank.see("waiting", 0)
        rank.see("waiting", 2)
        os.kill(os.getpid(), signal.SIGKILL)
    rank.say("waiting")
    error = raised(lambda: dist.all_reduce(tensor))
    bases = (BackendAborted, CollectiveAborted, dist.DistBackendError, RuntimeError)
    results: dict[str, Any] = {
        "kinds": [base.__name__ for base in bases if isinstance(error, base)],
        "culprit": getattr(error, "culprit", None),
        "input": tensor,
    }
    results["in backward"] = said(lambda: model(torch.ones(1, 2)).sum().backward())
    dist.destroy_process_group()
    return results


def one_aborts(rank: Rank) -> dict[str, Any]:
    """An abort on one rank ends what the others wait for; a group may be made anew afterwards."""
    rank.init()
    dist.barrier()
    results: dict[str, Any] = {}
    if rank.rank == 1:
        rank.see("waiting", 0)
        dist.distributed_c10d._abort_process_group()
    else:
        work = dist.all_reduce(torch.ones(2), async_op=True)
        assert work is not None
        rank.say("waiting")
        error = raised(work.wait)
        results = {"kind": type(error).__name__, "culprit": getattr(error, "culprit", None)}
        dist.destroy_process_group()
    rank.init("afterwards")
    results["total"] = total(dist.group.WORLD, rank.rank)
    dist.destroy_process_group()
    return results


def one_is_late(rank: Rank) -> dict[str, Any]:
    rank.init(timeout=timedelta(seconds=20))
    dist.barrier()
    results: dict[str, Any] = {}
    if rank.rank == 0:
        results["monitored"] = said(lambda: dist.monitored_barrier(timeout=timedelta(seconds=0.3)))
        work = dist.all_reduce(torch.ones(2), async_op=True)
        assert work is not None
        results["kind"] = said(lambda: work.wait(timedelta(seconds=0.2))).partition(":")[0]
        rank.say("over")
    else:
        rank.see("over", 0)
    dist.destroy_process_group()
    return results


def one_does_not_come(rank: Rank) -> dict[str, Any]:
    if rank.rank == 2:
        return {}
    before = threading.active_count()
    text = said(lambda: rank.init(timeout=timedelta(seconds=3)))
    return {"text": text, "threads before": before, "threads after": threading.active_count()}


def said(call: Callable[[], object]) -> str:
    """Return the error that `call` raises, as text."""
    error = raised(call)
    return "nothing" if error is None else f"{type(error).__name__}: {error}"


def raised(call: Callable[[], object]) -> Exception | None:
    try:
        call()
    except (RuntimeError, ValueError, TypeError) as error:
        return error
    return None


def total(group: Any, value: int) -> int:
    tensor = torch.tensor([value])
    dist.all_reduce(tensor, group=group) if group in dist.distributed_c10d._world.pg_map else group.allreduce(
        [tensor]
    ).wait()
    return int(tensor.item())


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))
