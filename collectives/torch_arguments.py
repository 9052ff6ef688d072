"""What the torch facade asks of its arguments, before anything is sent. Raises ValueError that names both sides.

Not here: what the data plane asks of its own (group.py).
"""

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from elastic_run.collectives.reduction import Reduction
from elastic_run.collectives.torch_autoload import NAME

T = TypeVar("T")

_REDUCTIONS = {
    dist.ReduceOp.SUM: Reduction.SUM,
    dist.ReduceOp.AVG: Reduction.AVG,
    dist.ReduceOp.MIN: Reduction.MIN,
    dist.ReduceOp.MAX: Reduction.MAX,
    dist.ReduceOp.PRODUCT: Reduction.PRODUCT,
    dist.ReduceOp.BAND: Reduction.BAND,
    dist.ReduceOp.BOR: Reduction.BOR,
    dist.ReduceOp.BXOR: Reduction.BXOR,
}


def reduction_of(operator: Any) -> Reduction:
    """Return our name for torch's ReduceOp, or for one of its kinds."""
    kind = getattr(operator, "op", operator)
    reduction = _REDUCTIONS.get(kind)
    if reduction is None:
        raise ValueError(f"{kind} is not supported by backend {NAME}: scale the tensor, then use ReduceOp.SUM")
    return reduction


def only(items: Sequence[T]) -> T:
    """Return the one item: torch's lists of tensors per device have one entry here."""
    if len(items) != 1:
        raise ValueError(f"one tensor (or list) per process is expected, not {len(items)}")
    return items[0]


def dense(tensor: Tensor) -> Tensor:
    """Return `tensor`, which must be strided."""
    if tensor.layout is not torch.strided:
        raise ValueError(f"backend {NAME} takes dense tensors, not {tensor.layout}: convert it with to_dense()")
    return tensor


def same_kind(name: str, count: int, tensors: Sequence[Tensor], model: Tensor) -> None:
    """Check that there are `count` dense tensors of the type and on the device of `model`."""
    if len(tensors) != count:
        raise ValueError(f"{name}: {count} tensors are expected, one per rank, not {len(tensors)}")
    for tensor in (*tensors, model):
        dense(tensor)
        if tensor.dtype is not model.dtype or tensor.device != model.device:
            raise ValueError(
                f"{name}: {tensor.dtype} on {tensor.device} and {model.dtype} on {model.device} in one operation"
            )


def check_list(name: str, size: int, parts: Sequence[Tensor], own: Tensor) -> None:
    """Check a list with a tensor per rank, each as large as `own`."""
    same_kind(name, size, parts, own)
    for part in parts:
        if part.numel() != own.numel():
            raise ValueError(f"{name}: every tensor must have {own.numel()} elements, one has {part.numel()}")


def check_single(name: str, size: int, whole: Tensor, piece: Tensor) -> None:
    """Check a tensor with a piece per rank, each as large as `piece`."""
    same_kind(name, 1, [whole], piece)
    if whole.numel() != size * piece.numel():
        raise ValueError(f"{name}: {whole.numel()} elements are not {size} times {piece.numel()}, one piece per rank")


def elements_of(what: str, tensor: Tensor, splits: Sequence[int], size: int) -> list[int]:
    """Return elements per rank from rows per rank; no splits: equal ones."""
    rows = tensor.shape[0] if tensor.dim() else 1
    row_elements = math.prod(tensor.shape[1:])
    if not splits:
        if rows % size:
            raise ValueError(f"all_to_all_single: {rows} rows of {what} do not divide by {size} ranks")
        return [rows // size * row_elements] * size
    if len(splits) != size or sum(splits) != rows or min(splits) < 0:
        raise ValueError(f"all_to_all_single: {what} splits {list(splits)} do not add up to {rows} rows of {what}")
    return [split * row_elements for split in splits]
