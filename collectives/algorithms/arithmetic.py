"""Reducing several slices of memory into one, in the order given, piece by piece so that each piece stays in cache."""

from collections.abc import Sequence

import torch
from torch import Tensor

from elastic_run.collectives.native import sum_parts
from elastic_run.collectives.reduction import Reduction, accumulate, accumulator_dtype, combine, finish

PIECE_BYTES = 1 << 20


def reduce_parts(out: Tensor, parts: Sequence[Tensor], reduction: Reduction, count: int | None = None) -> None:
    """Write the reduction of `parts`, in their order, to `out`, which overlaps none of them.

    All one-dimensional, contiguous and of one length and dtype. `count`: what AVG divides by, if not by the parts.
    """
    if sum_parts(out, parts, reduction, count or len(parts)):
        return
    wide = accumulator_dtype(out.dtype, reduction)
    step = PIECE_BYTES // out.element_size()
    for start in range(0, out.numel(), step):
        piece = slice(start, min(start + step, out.numel()))
        target = out[piece]
        total = target if wide is out.dtype else torch.empty(target.numel(), dtype=wide)
        if len(parts) == 1:
            total.copy_(parts[0][piece])
        else:
            combine(total, parts[0][piece], parts[1][piece], reduction)
            for part in parts[2:]:
                accumulate(total, part[piece], reduction)
        finish(target, total, reduction, count or len(parts))


def combine_parts(total: Tensor, parts: Sequence[Tensor], reduction: Reduction) -> None:
    """Write the reduction of `parts`, not yet finished, to `total`: of the accumulator's type, overlapping none."""
    if sum_parts(total, parts, Reduction.SUM if reduction is Reduction.AVG else reduction, 1):
        return
    step = PIECE_BYTES // total.element_size()
    for start in range(0, total.numel(), step):
        piece = slice(start, min(start + step, total.numel()))
        if len(parts) == 1:
            total[piece].copy_(parts[0][piece])
        else:
            combine(total[piece], parts[0][piece], parts[1][piece], reduction)
            for part in parts[2:]:
                accumulate(total[piece], part[piece], reduction)


def reduce_into(data: Tensor, parts: Sequence[Tensor], reduction: Reduction) -> None:
    """Like `reduce_parts`, with a result that may itself be one of the parts."""
    if sum_parts(data, parts, reduction, len(parts)):
        return
    wide = accumulator_dtype(data.dtype, reduction)
    step = PIECE_BYTES // data.element_size()
    scratch = torch.empty(min(step, data.numel()), dtype=wide)
    for start in range(0, data.numel(), step):
        piece = slice(start, min(start + step, data.numel()))
        total = scratch[: piece.stop - piece.start]
        if len(parts) == 2 and wide is data.dtype:
            total = data[piece]  # elementwise: writing over an operand is safe when there is no third one
        if len(parts) == 1:
            total.copy_(parts[0][piece])
        else:
            combine(total, parts[0][piece], parts[1][piece], reduction)
            for part in parts[2:]:
                accumulate(total, part[piece], reduction)
        finish(data[piece], total, reduction, len(parts))
