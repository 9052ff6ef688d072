"""Sum of sparse tensors (gradients of `nn.Embedding(sparse=True)`) over a group.

Every member gets all entries and adds them in rank order, so results are bit-equal. It waits: three small gathers, the
first of which tells how large the other two are.
"""

import torch
from torch import Tensor

from elastic_run.collectives.group import Group
from elastic_run.collectives.reduction import Reduction


def all_reduce(group: Group, tensor: Tensor, reduction: Reduction, limit_s: float) -> None:
    """Sum `tensor` (COO, on the CPU) over the members, in place. Raises ValueError, CollectiveError."""
    if reduction is not Reduction.SUM or tensor.layout is not torch.sparse_coo or tensor.device.type != "cpu":
        raise ValueError(
            f"{reduction} of a {tensor.layout} tensor on {tensor.device}: only sums of COO tensors on the CPU are "
            "reduced sparse; convert others with to_dense()"
        )
    own = tensor.detach().coalesce()
    counts = torch.empty(group.size, dtype=torch.int64)
    group.all_gather(counts, torch.tensor([own._nnz()]), timeout_s=limit_s, sync=True).wait()
    entries = int(counts.max())
    indices = _gathered(group, own.indices().t(), entries, limit_s)
    values = _gathered(group, own.values(), entries, limit_s)
    total = _tensor(own.indices()[:, :0], own.values()[:0], own.shape)
    for rank, count in enumerate(counts.tolist()):
        total = total + _tensor(indices[rank, :count].t(), values[rank, :count], own.shape)
    with torch.no_grad():  # a detached sparse tensor shares its entries only until they are replaced
        tensor.copy_(total.coalesce())


def _gathered(group: Group, rows: Tensor, count: int, limit_s: float) -> Tensor:
    """Return every member's rows, each padded to `count` of them, by rank."""
    padded = rows.new_zeros((count, *rows.shape[1:]))
    padded[: len(rows)] = rows
    output = rows.new_empty((group.size, count, *rows.shape[1:]))
    group.all_gather(output, padded, timeout_s=limit_s, sync=True).wait()
    return output


def _tensor(indices: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    # Checked: torch would follow a wrong index of a peer out of bounds.
    return torch.sparse_coo_tensor(indices, values, shape, check_invariants=True)
