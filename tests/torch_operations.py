"""Programs for torch_ranks: every operation of torch.distributed, on whole numbers, so that sums have one answer."""

from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor
from torch_ranks import Rank

import elastic_run.collectives.torch_backend  # noqa: F401 - registers the backend

Case = Callable[[Rank], object]
SIZES = (0, 1, 7, 1000, 40_000, 1_000_003)
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTEGERS = (torch.int32, torch.int64, torch.int8, torch.uint8)


def numbers(rank: int, count: int, dtype: torch.dtype = torch.float32, bound: int = 5) -> Tensor:
    """Return small whole numbers that differ by rank."""
    return ((torch.arange(count) * 7 + rank * 3) % bound).to(dtype)


def all_operations(rank: Rank) -> dict[str, Any]:
    """Run every case; stop at the first error, for the ranks are no longer together then."""
    rank.init()
    results: dict[str, Any] = {}
    for name, case in cases():
        try:
            results[name] = case(rank)
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error}"
            if not name.startswith("refused"):
                results["stopped at"] = name
                raise
    dist.barrier()
    dist.destroy_process_group()
    return results


def names() -> list[str]:
    return [name for name, _ in cases()]


def cases() -> Iterator[tuple[str, Case]]:
    for count in SIZES:
        yield f"all_reduce {count}", lambda rank, count=count: all_reduce(rank, count, torch.float32, dist.ReduceOp.SUM)
    for dtype in (*FLOATS, *INTEGERS):
        for operator in (dist.ReduceOp.SUM, dist.ReduceOp.MIN, dist.ReduceOp.MAX, dist.ReduceOp.PRODUCT):
            name = f"all_reduce {str(dtype).removeprefix('torch.')} {str(operator).removeprefix('RedOpType.')}"
            yield name, lambda rank, dtype=dtype, operator=operator: all_reduce(rank, 1000, dtype, operator)
    for operator in (dist.ReduceOp.BAND, dist.ReduceOp.BOR, dist.ReduceOp.BXOR):
        name = f"all_reduce int32 {str(operator).removeprefix('RedOpType.')}"
        yield name, lambda rank, operator=operator: all_reduce(rank, 1000, torch.int32, operator)
    for case in PLAIN_CASES:
        yield case.__name__, case


def all_reduce(rank: Rank, count: int, dtype: torch.dtype, operator: Any) -> Tensor:
    tensor = numbers(rank.rank, count, dtype, 3)
    dist.all_reduce(tensor, operator)
    return tensor


def all_reduce_async(rank: Rank) -> list[Tensor]:
    tensors = [numbers(rank.rank + i, 1000 * i + 1) for i in range(12)]
    works = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
    for work in reversed(works):
        assert work is not None
        work.wait()
        assert work.is_completed()
        assert work.is_success()
    return tensors


def all_reduce_transposed(rank: Rank) -> Tensor:
    tensor = numbers(rank.rank, 60).view(6, 10).t()
    if rank.backend == "gloo":  # which refuses it
        tensor = tensor.contiguous()
    dist.all_reduce(tensor)
    return tensor.contiguous()


def all_reduce_complex(rank: Rank) -> Tensor:
    tensor = torch.complex(numbers(rank.rank, 9), numbers(rank.rank + 1, 9))
    dist.all_reduce(tensor)
    return tensor


def all_reduce_sparse(rank: Rank) -> Tensor:
    rows = torch.arange(rank.rank * 3)  # rank 0 has none
    tensor = torch.sparse_coo_tensor(rows.view(1, -1), numbers(rank.rank, len(rows) * 4).view(-1, 4), (20, 4))
    dist.all_reduce(tensor)
    return tensor.to_dense()


def all_reduce_scalar(rank: Rank) -> Tensor:
    tensor = torch.tensor(float(rank.rank))
    dist.all_reduce(tensor)
    return tensor


def broadcast(rank: Rank) -> list[Tensor]:
    tensors = [numbers(rank.rank, count) for count in SIZES for _ in range(rank.size)]
    for position, tensor in enumerate(tensors):
        dist.broadcast(tensor, position % rank.size)
    return tensors


def broadcast_bool(rank: Rank) -> Tensor:
    tensor = numbers(rank.rank, 33, torch.bool, 2)
    dist.broadcast(tensor, rank.size - 1)
    return tensor


def broadcast_parameter(rank: Rank) -> Tensor:
    tensor = torch.nn.Parameter(numbers(rank.rank, 33))
    dist.broadcast(tensor, 0)
    return tensor.detach()


def reduce(rank: Rank) -> list[Tensor]:
    kept = []
    for root in range(rank.size):
        tensor = numbers(rank.rank, 10_001)
        dist.reduce(tensor, root)
        if root == rank.rank:
            kept.append(tensor)
    return kept


def all_gather(rank: Rank) -> list[Tensor]:
    outputs = [torch.empty(3, 5) for _ in range(rank.size)]
    dist.all_gather(outputs, numbers(rank.rank, 15).view(3, 5))
    return outputs


def all_gather_chunks(rank: Rank) -> Tensor:
    whole = torch.empty(rank.size * 15)
    dist.all_gather(list(whole.chunk(rank.size)), numbers(rank.rank, 15))
    return whole


def all_gather_single(rank: Rank) -> list[Tensor]:
    outputs = []
    for count in SIZES:
        output = torch.empty(rank.size * count)
        dist.all_gather_single(output, numbers(rank.rank, count))
        outputs.append(output)
    return outputs


def all_gather_object(rank: Rank) -> list[Any]:
    objects: list[Any] = [None] * rank.size
    dist.all_gather_object(objects, {"rank": rank.rank, "text": "x" * rank.rank})
    return objects


def broadcast_object_list(rank: Rank) -> list[Any]:
    objects = [{"rank": rank.rank}, rank.rank]
    dist.broadcast_object_list(objects, src=rank.size - 1)
    return objects


def gather_object(rank: Rank) -> list[Any]:
    objects: list[Any] | None = [None] * rank.size if rank.rank == 0 else None
    dist.gather_object(rank.rank * 2, objects, dst=0)
    return objects or []


def scatter_object_list(rank: Rank) -> list[Any]:
    output: list[Any] = [None]
    dist.scatter_object_list(output, [{"for": i} for i in range(rank.size)], src=0)
    return output


def reduce_scatter(rank: Rank) -> Tensor:
    output = torch.empty(1001)
    dist.reduce_scatter(output, [numbers(rank.rank + i, 1001) for i in range(rank.size)])
    return output


def reduce_scatter_single(rank: Rank) -> list[Tensor]:
    outputs = []
    for count in SIZES:
        output = torch.empty(count)
        dist.reduce_scatter_single(output, numbers(rank.rank, rank.size * count))
        outputs.append(output)
    return outputs


def gather(rank: Rank) -> list[Tensor]:
    kept: list[Tensor] = []
    for root in range(rank.size):
        outputs = [torch.empty(77) for _ in range(rank.size)] if root == rank.rank else None
        dist.gather(numbers(rank.rank, 77), outputs, dst=root)
        kept += outputs or []
    return kept


def scatter(rank: Rank) -> list[Tensor]:
    kept = []
    for root in range(rank.size):
        inputs = [numbers(i, 77) for i in range(rank.size)] if root == rank.rank else None
        output = torch.empty(77)
        dist.scatter(output, inputs, src=root)
        kept.append(output)
    return kept


def all_to_all(rank: Rank) -> list[Tensor]:
    inputs = [numbers(rank.rank + i, 77) for i in range(rank.size)]
    outputs = [torch.empty(77) for _ in range(rank.size)]
    dist.all_to_all(outputs, inputs)
    return outputs


def all_to_all_uneven(rank: Rank) -> list[Tensor]:
    inputs = [numbers(rank.rank + i, 10 * rank.rank + i) for i in range(rank.size)]
    outputs = [torch.empty(10 * i + rank.rank) for i in range(rank.size)]
    if rank.backend == "gloo":  # which takes lists of one size only
        sizes = [[tensor.numel() for tensor in tensors] for tensors in (outputs, inputs)]
        flat = torch.empty(sum(sizes[0]))
        dist.all_to_all_single(flat, torch.cat(inputs), *sizes)
        return list(flat.split(sizes[0]))
    dist.all_to_all(outputs, inputs)
    return outputs


def all_to_all_single(rank: Rank) -> list[Tensor]:
    even = torch.empty(rank.size * 3, 4)
    dist.all_to_all_single(even, numbers(rank.rank, rank.size * 12).view(rank.size * 3, 4))
    uneven = torch.empty(sum(i + rank.rank for i in range(rank.size)), 2)
    dist.all_to_all_single(
        uneven,
        numbers(rank.rank, 2 * sum(rank.rank + i for i in range(rank.size))).view(-1, 2),
        output_split_sizes=[i + rank.rank for i in range(rank.size)],
        input_split_sizes=[rank.rank + i for i in range(rank.size)],
    )
    return [even, uneven]


def send_and_receive(rank: Rank) -> list[Tensor]:
    kept = []
    for count in (1, 1000, 1_000_003):
        tensor = numbers(rank.rank, count)
        if rank.rank == 0:
            for to in range(1, rank.size):
                dist.send(tensor, to)
                dist.recv(tensor, to)
        else:
            received = torch.empty(count)
            assert dist.recv(received, 0) == 0
            dist.send(received + 1, 0)
        kept.append(tensor)
    return kept


def receive_from_anyone(rank: Rank) -> list[Tensor]:
    if rank.rank:
        dist.send(numbers(rank.rank, 100), 0, tag=5)
        return []
    received: dict[int, Tensor] = {}
    for _ in range(1, rank.size):
        tensor = torch.empty(100)
        received[dist.recv(tensor, tag=5)] = tensor
    return [received[source] for source in sorted(received)]


def send_with_tags(rank: Rank) -> list[Tensor]:
    to, source = (rank.rank + 1) % rank.size, (rank.rank - 1) % rank.size
    if rank.size == 1:
        return []
    sends = [dist.isend(numbers(rank.rank + tag, 50), to, tag=tag) for tag in range(4)]
    outputs = [torch.empty(50) for _ in range(4)]
    receives = [dist.irecv(outputs[tag], source, tag=tag) for tag in reversed(range(4))]
    for work in (*receives, *sends):
        assert work is not None
        work.wait()
    return outputs


def batch_isend_irecv(rank: Rank) -> Tensor:
    if rank.size == 1:
        return torch.empty(0)
    to, source = (rank.rank + 1) % rank.size, (rank.rank - 1) % rank.size
    output = torch.empty(500)
    operations = [dist.P2POp(dist.irecv, output, source), dist.P2POp(dist.isend, numbers(rank.rank, 500), to)]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    return output


def sub_groups(rank: Rank) -> list[Tensor]:
    kept = []
    chosen = [list(range(rank.size)), list(range(0, rank.size, 2)), [rank.size - 1]]
    groups = [dist.new_group(ranks) for ranks in chosen]
    for ranks, group in zip(chosen, groups, strict=True):
        if rank.rank in ranks:
            tensor = numbers(rank.rank, 1000)
            dist.all_reduce(tensor, group=group)
            kept.append(tensor)
            dist.barrier(group)
    assert dist.get_backend(groups[0]) == rank.backend
    dist.barrier()
    for ranks, group in zip(chosen, groups, strict=True):
        if rank.rank in ranks:
            dist.destroy_process_group(group)
    return kept


def functional_collectives(rank: Rank) -> list[Tensor]:
    world = dist.group.WORLD
    tensor = numbers(rank.rank, 12 * rank.size)
    splits = [12] * rank.size
    results = [
        functional.all_reduce(tensor, "sum", world),
        functional.all_gather_single(tensor, 0, world),
        functional.reduce_scatter_single(tensor, "sum", 0, world),
        functional.all_to_all_single(tensor, splits, splits, world),
        functional.broadcast(tensor, 0, world),
        *functional.all_reduce_coalesced([tensor, tensor + 1], "sum", world),
        *functional.all_gather_single_coalesced([tensor, tensor + 1], world),
        *functional.reduce_scatter_single_coalesced([tensor, tensor + 1], "sum", [0, 0], world),
    ]
    return [result + 0 for result in results]


def coalescing_manager(rank: Rank) -> list[Tensor]:
    tensors = [numbers(rank.rank + i, 100 + i) for i in range(4)]
    with dist._coalescing_manager():
        for tensor in tensors:
            dist.all_reduce(tensor)
    return tensors


def futures(rank: Rank) -> list[Tensor]:
    tensor = numbers(rank.rank, 1000)
    work = dist.all_reduce(tensor, async_op=True)
    assert work is not None
    doubled = work.get_future().then(lambda future: [future.value()[0] * 2])
    return [tensor, *doubled.wait()]


def callback_that_waits(rank: Rank) -> Tensor:
    def again(future: Any) -> Tensor:
        other = future.value()[0] + 1
        dist.all_reduce(other)
        return other

    tensor = numbers(rank.rank, 1000)
    work = dist.all_reduce(tensor, async_op=True)
    assert work is not None
    result: Tensor = work.get_future().then(again).wait()
    return result


def monitored_barrier(rank: Rank) -> None:
    for _ in range(3):
        dist.monitored_barrier(timeout=timedelta(seconds=60))


def barrier_async(rank: Rank) -> None:
    work = dist.barrier(async_op=True)
    assert work is not None
    work.wait()


PLAIN_CASES: tuple[Case, ...] = (
    all_reduce_async,
    all_reduce_transposed,
    all_reduce_complex,
    all_reduce_sparse,
    all_reduce_scalar,
    broadcast,
    broadcast_bool,
    broadcast_parameter,
    reduce,
    all_gather,
    all_gather_chunks,
    all_gather_single,
    all_gather_object,
    broadcast_object_list,
    gather_object,
    scatter_object_list,
    reduce_scatter,
    reduce_scatter_single,
    gather,
    scatter,
    all_to_all,
    all_to_all_uneven,
    all_to_all_single,
    send_and_receive,
    receive_from_anyone,
    send_with_tags,
    batch_isend_irecv,
    sub_groups,
    functional_collectives,
    coalescing_manager,
    futures,
    callback_that_waits,
    monitored_barrier,
    barrier_async,
)
