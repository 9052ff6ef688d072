"""What a reduction does to two slices: in place, by torch's own bulk kernels, rounded once at the end.

16-bit and 8-bit floats and complex32 sum and multiply in an accumulator of twice (four times) their width.
Integers wrap, as in torch; a bool sums by `or` and multiplies by `and`. MIN and MAX propagate NaN.
Refused by ValueError, as torch.distributed refuses them: AVG of integers and bool; bitwise reductions of anything
else; everything but SUM and AVG of complex numbers. Also refused: types torch cannot compute with (quantised ones,
float8_e8m0fnu, 4-bit floats).
Invariants:
1. Splitting a slice, or swapping which process computes it, changes no bit of a result: zeros from a floating MIN or
   MAX are +0 and its NaNs one NaN. A SUM or PRODUCT promises which elements are NaN, not their payload
   (tests/property/test_reduction_property.py).
2. Nothing but the tensor named first is written (tests/unit/test_reduction.py).
Not here: the order of the parts (dyadic.py, algorithms/), gradients: tensors must not require them.
"""

import enum
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

CHUNK_ELEMENTS = 128 * 1024
"""Elements per pass when a slice changes its type: the widened copy (512 KiB) stays in the core's cache. Measured on
4 MiB of bf16: 0.59 ms so, 1.05 ms in one pass, 0.74 ms at a quarter of it; float32 itself needs 0.58 ms."""


class Reduction(enum.StrEnum):
    """How the members' values become one."""

    SUM = "sum"
    AVG = "avg"
    MIN = "min"
    MAX = "max"
    PRODUCT = "product"
    BAND = "band"
    BOR = "bor"
    BXOR = "bxor"


def accumulator_dtype(dtype: torch.dtype, reduction: Reduction) -> torch.dtype:
    """Return the type partial results of `dtype` have. Raises ValueError for what cannot be reduced."""
    if dtype not in _ARITHMETIC_DTYPES:
        raise ValueError(f"torch has no arithmetic for {dtype}; convert it before reducing")
    if not _defined(dtype, reduction):
        raise ValueError(f"{reduction} of {dtype} is not defined; {_REMEDY[reduction]}")
    if dtype in _ORDERED_WITHOUT_WIDENING and reduction in _ORDERINGS:
        return dtype
    return _WIDENED.get(dtype, dtype)


def accumulate(into: Tensor, part: Tensor, reduction: Reduction) -> None:
    """Reduce `part` into `into`, both 1-D contiguous and as long; `part` may have the wire or the accumulator type."""
    combine(into, into, part, reduction)


def combine(out: Tensor, left: Tensor, right: Tensor, reduction: Reduction) -> None:
    """Write the reduction of `left` and `right` to `out`, which may be one of them and has the accumulator type."""
    if left.dtype is out.dtype and right.dtype is out.dtype:
        _apply(out, left, right, reduction)
        return
    scratch = _scratch(out, out.dtype)
    for chunk in _chunks(out.numel()):
        # Widened by hand: torch would add two bf16 as bf16, whatever the type of the result.
        into, one, other = out[chunk], left[chunk], right[chunk]
        place = scratch[: len(into)]
        if one.dtype is not into.dtype:
            one, place = place.copy_(one), into
        if other.dtype is not into.dtype:
            other = place.copy_(other)
        _apply(into, one, other, reduction)


def finish(out: Tensor, accumulator: Tensor, reduction: Reduction, parts: int) -> None:
    """Round the accumulator of `parts` values into `out`, which may be the accumulator itself.

    The accumulator of a single part may have that part's own type.
    """
    if parts < 1:
        raise ValueError(f"a reduction of {parts} parts has no result")
    if reduction is Reduction.AVG or (reduction in _ORDERINGS and accumulator.is_floating_point()):
        wide = accumulator_dtype(out.dtype, reduction)
        scratch = None if out.dtype is wide else _scratch(out, wide)
        for chunk in _chunks(out.numel()):
            into, exact = out[chunk], accumulator[chunk].to(wide)
            result = into if scratch is None else scratch[: len(into)]
            if reduction is Reduction.AVG:
                _divide(result, exact, parts)
            else:
                _make_canonical(result, exact)
            if result is not into:
                into.copy_(result)
    elif out.data_ptr() != accumulator.data_ptr():
        out.copy_(accumulator)


def _scratch(like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(min(like.numel(), CHUNK_ELEMENTS), dtype=dtype, device=like.device)


def _chunks(numel: int) -> Iterator[slice]:
    return (slice(start, min(start + CHUNK_ELEMENTS, numel)) for start in range(0, numel, CHUNK_ELEMENTS))


def _apply(out: Tensor, left: Tensor, right: Tensor, reduction: Reduction) -> None:
    if out.dtype not in _THROUGH_ANOTHER_TYPE:
        _KERNELS[reduction](left, right, out=out)
        return
    if out.is_complex():
        # torch adds complex numbers as left + (1 + 0j) * right: an infinity on the right would become a NaN.
        _KERNELS[reduction](torch.view_as_real(left), torch.view_as_real(right), out=torch.view_as_real(out))
        return
    # torch has no such kernels for wide unsigned integers. In two's complement the signed ones give the same bits,
    # and the same order once the top bit is turned round.
    signed = _SIGNED_TWIN[out.dtype]
    out, left, right = out.view(signed), left.view(signed), right.view(signed)
    if reduction in _ORDERINGS:
        top_bit = torch.iinfo(signed).min
        torch.bitwise_xor(_KERNELS[reduction](left ^ top_bit, right ^ top_bit), top_bit, out=out)
    else:
        _KERNELS[reduction](left, right, out=out)


def _divide(out: Tensor, accumulator: Tensor, parts: int) -> None:
    if accumulator.is_complex():
        # A real divisor: dividing by parts + 0j costs more and rounds differently.
        out, accumulator = torch.view_as_real(out), torch.view_as_real(accumulator)
    torch.div(accumulator, parts, out=out)


def _make_canonical(out: Tensor, accumulator: Tensor) -> None:
    """Hide which of two equal zeros, and which NaN, torch's kernel took: that depends on the place in the slice."""
    torch.add(accumulator, 0.0, out=out)
    torch.nan_to_num(out, nan=math.nan, posinf=math.inf, neginf=-math.inf, out=out)


def _defined(dtype: torch.dtype, reduction: Reduction) -> bool:
    real_number = dtype.is_floating_point or dtype.is_complex
    if reduction in _BITWISE:
        return not real_number
    if reduction is Reduction.AVG:
        return real_number
    return reduction is Reduction.SUM or not dtype.is_complex


_BITWISE = frozenset({Reduction.BAND, Reduction.BOR, Reduction.BXOR})
_ORDERINGS = frozenset({Reduction.MIN, Reduction.MAX})
_KERNELS: dict[Reduction, Callable[..., Tensor]] = {
    Reduction.SUM: torch.add,
    Reduction.AVG: torch.add,
    Reduction.MIN: torch.minimum,
    Reduction.MAX: torch.maximum,
    Reduction.PRODUCT: torch.mul,
    Reduction.BAND: torch.bitwise_and,
    Reduction.BOR: torch.bitwise_or,
    Reduction.BXOR: torch.bitwise_xor,
}
_REMEDY = {
    Reduction.AVG: "sum, then divide as you mean it",
    Reduction.MIN: "complex numbers have no order",
    Reduction.MAX: "complex numbers have no order",
    Reduction.PRODUCT: "gather the values and multiply them yourself",
    Reduction.BAND: "bitwise reductions take integers and bool",
    Reduction.BOR: "bitwise reductions take integers and bool",
    Reduction.BXOR: "bitwise reductions take integers and bool",
}
_SIGNED_TWIN = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}
_THROUGH_ANOTHER_TYPE = frozenset({*_SIGNED_TWIN, torch.complex64, torch.complex128})
_ORDERED_WITHOUT_WIDENING = frozenset({torch.float16, torch.bfloat16})
_WIDENED = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float8_e4m3fn: torch.float32,
    torch.float8_e4m3fnuz: torch.float32,
    torch.float8_e5m2: torch.float32,
    torch.float8_e5m2fnuz: torch.float32,
    torch.complex32: torch.complex64,
}
_ARITHMETIC_DTYPES = frozenset(
    {
        *_WIDENED,
        *_SIGNED_TWIN,
        *(torch.float32, torch.float64, torch.complex64, torch.complex128, torch.bool),
        *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    }
)
