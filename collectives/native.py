"""Compiled kernels where they were built, torch's own where not: the same bits either way.

Torch sums k parts in k-1 passes over memory and reads every line it is about to overwrite; kernels.c does one pass, and
copies around the caches. Measured: ARCHITECTURE.md, "Data plane".
Invariants: 1. with and without kernels every result is the same (tests/property/test_native.py); 2. what the kernels
cannot do is left to torch: other types, other reductions, strided tensors.
Not here: which parts, in which order (algorithms/).
"""

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from elastic_run.collectives.reduction import Reduction, finish

kernels: ModuleType | None
try:
    from elastic_run.collectives import _kernels

    kernels = _kernels
except ImportError:  # no compiler when the package was installed
    kernels = None

COPY_BYTES_MIN = 4 << 20
"""Smaller targets are still in a cache when they are read next."""
PARTS_MAX = 1024
TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.int32: 3, torch.int64: 4}


def streamable(dtype: torch.dtype, reduction: Reduction) -> bool:
    """Say whether the kernels can reduce that: the same answer with and without them, as members must agree."""
    return dtype in TYPES and (reduction is Reduction.SUM or (reduction is Reduction.AVG and dtype.is_floating_point))


def sum_parts(out: Tensor, parts: Sequence[Tensor], reduction: Reduction, count: int) -> bool:
    """Write the sum or average of `parts` to `out`, which may be one of them; False: nothing was done.

    All one-dimensional, contiguous, of one length and dtype. `count`: what AVG divides by.
    """
    code = TYPES.get(out.dtype)
    if kernels is None or code is None or not 2 <= len(parts) <= PARTS_MAX:
        return False
    if reduction is not Reduction.SUM and (reduction is not Reduction.AVG or not out.is_floating_point()):
        return False
    if not out.is_contiguous() or not all(part.is_contiguous() and part.dtype is out.dtype for part in parts):
        return False
    average = reduction is Reduction.AVG
    within = average and out.dtype is torch.bfloat16  # divided before it is rounded
    addresses = tuple(part.data_ptr() for part in parts)
    kernels.sum(out.data_ptr(), addresses, out.numel(), code, float(count) if within else 1.0)
    if average and not within:
        finish(out, out, reduction, count)
    return True


def copy_through(target: Tensor, source: Tensor, bytes_min: int = COPY_BYTES_MIN) -> None:
    """Copy what will not be read again soon. Both one-dimensional, contiguous, of one length and dtype."""
    nbytes = target.numel() * target.element_size()
    if kernels is None or nbytes < bytes_min or source.dtype is not target.dtype:
        target.copy_(source)
    else:
        kernels.copy(target.data_ptr(), source.data_ptr(), nbytes)
