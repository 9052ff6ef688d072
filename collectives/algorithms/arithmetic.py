"""Reducing several slices of memory into one, in the order given, piece by piece so that each piece stays in cache."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from elastic_run.collectives.native import sum_parts
from elastic_run.collectives.reduction import Reduction, accumulate, accumulator_dtype, combine, finish

PIECE_BYTES = 1 << 20


def reduce_parts(out: Tensor, parts: Sequence[Tensor], reduction: Reduction) -> None:
    """Write the reduction of `parts`, in their order, to `out`, which may be one of them.

    All one-dimensional, contiguous and of one length and dtype.
    """
    if sum_parts(out, parts, reduction, len(parts)):
        return
    wide = accumulator_dtype(out.dtype, reduction)
    # Elementwise: writing over an operand is safe when there is no third one.
    overwrites = len(parts) > 2 and any(part.data_ptr() == out.data_ptr() for part in parts)
    aside = overwrites or wide is not out.dtype
    scratch = torch.empty(min(_step(out), out.numel()), dtype=wide) if aside else out
    for piece in _pieces(out):
        total = scratch[: piece.stop - piece.start] if aside else out[piece]
        _combine(total, parts, piece, reduction)
        finish(out[piece], total, reduction, len(parts))


def combine_parts(total: Tensor, parts: Sequence[Tensor], reduction: Reduction) -> None:
    """Write the reduction of `parts`, not yet finished, to `total`: of the accumulator's type, overlapping none."""
    if sum_parts(total, parts, Reduction.SUM if reduction is Reduction.AVG else reduction, 1):
        return
    for piece in _pieces(total):
        _combine(total[piece], parts, piece, reduction)


def _combine(total: Tensor, parts: Sequence[Tensor], piece: slice, reduction: Reduction) -> None:
    if len(parts) == 1:
        total.copy_(parts[0][piece])
        return
    combine(total, parts[0][piece], parts[1][piece], reduction)
    for part in parts[2:]:
        accumulate(total, part[piece], reduction)


def _pieces(whole: Tensor) -> Iterator[slice]:
    step = _step(whole)
    return (slice(start, min(start + step, whole.numel())) for start in range(0, whole.numel(), step))


def _step(whole: Tensor) -> int:
    return PIECE_BYTES // whole.element_size()
