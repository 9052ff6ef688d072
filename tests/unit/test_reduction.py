"""What each reduction means for each type, and what is refused before anything is sent."""

import warnings
from collections.abc import Callable
from functools import reduce

import pytest
import torch
from torch import Tensor

from elastic_run.collectives.reduction import (
    CHUNK_ELEMENTS,
    Reduction,
    accumulate,
    accumulator_dtype,
    combine,
    finish,
)

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
FLOAT8 = [torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz]
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]
UNSIGNED = [torch.uint16, torch.uint32, torch.uint64]
COMPLEX = [torch.complex64, torch.complex128, torch.complex32]
ORDERINGS = [Reduction.MIN, Reduction.MAX]
BITWISE = [Reduction.BAND, Reduction.BOR, Reduction.BXOR]
PYTHON: dict[Reduction, Callable[[int, int], int]] = {
    Reduction.SUM: lambda a, b: a + b,
    Reduction.PRODUCT: lambda a, b: a * b,
    Reduction.MIN: min,
    Reduction.MAX: max,
    Reduction.BAND: lambda a, b: a & b,
    Reduction.BOR: lambda a, b: a | b,
    Reduction.BXOR: lambda a, b: a ^ b,
}


def reduced(parts: list[Tensor], reduction: Reduction) -> Tensor:
    """Reduce as an algorithm does: widen the first part, take in the others, finish."""
    accumulator = parts[0].to(accumulator_dtype(parts[0].dtype, reduction), copy=True)
    for part in parts[1:]:
        accumulate(accumulator, part, reduction)
    out = torch.empty_like(parts[0])
    finish(out, accumulator, reduction, len(parts))
    return out


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_sums_are_rounded_once(dtype: torch.dtype) -> None:
    # Each 1 alone is lost beside the 4096 when every sum is rounded.
    parts = [torch.tensor([value], dtype=dtype) for value in (4096.0, 1.0, 1.0, 1.0, 1.0)]
    once = torch.tensor([4100.0]).to(dtype)
    assert accumulator_dtype(dtype, Reduction.SUM) is torch.float32
    assert torch.equal(reduced(parts, Reduction.SUM), once)


@pytest.mark.parametrize("dtype", FLOATS + FLOAT8)
def test_floats_average(dtype: torch.dtype) -> None:
    parts = [torch.tensor([1.0, -2.0, 0.0]).to(dtype), torch.tensor([2.0, -4.0, 1.0]).to(dtype)]
    assert reduced(parts, Reduction.AVG).tolist() == [1.5, -3.0, 0.5]


@pytest.mark.parametrize("dtype", FLOATS + FLOAT8)
@pytest.mark.parametrize("reduction", ORDERINGS)
def test_orderings_propagate_nan_and_give_positive_zero(dtype: torch.dtype, reduction: Reduction) -> None:
    left = torch.tensor([torch.nan, 1.0, -0.0, 0.0, 3.0] * 50).to(dtype)
    right = torch.tensor([1.0, torch.nan, 0.0, -0.0, 2.0] * 50).to(dtype)
    last = 2.0 if reduction is Reduction.MIN else 3.0
    result = reduced([left, right], reduction)
    bits = result.view(torch.uint8).view(50, -1)
    assert torch.equal(bits, bits[:1].expand_as(bits))  # in the body and in the tail of torch's kernel
    result = result.to(torch.float64)[:5]
    assert result.isnan().tolist() == [True, True, False, False, False]
    assert result[2:].tolist() == [0.0, 0.0, last] and not result[2:].signbit().any()


@pytest.mark.parametrize("dtype", INTEGERS + UNSIGNED)
@pytest.mark.parametrize("reduction", PYTHON)
def test_integers_wrap_and_order_over_their_whole_range(dtype: torch.dtype, reduction: Reduction) -> None:
    least, most = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    columns = [[least, most, most, 3, most // 2 + 1], [most, most, 1, 5, most // 2], [2, most, least, 6, most // 2 + 1]]
    parts = [torch.tensor(column, dtype=dtype) for column in columns]
    width = most - least + 1
    exact = [reduce(PYTHON[reduction], values) for values in zip(*columns, strict=True)]
    assert reduced(parts, reduction).tolist() == [(value - least) % width + least for value in exact]


@pytest.mark.parametrize("reduction", [r for r in Reduction if r is not Reduction.AVG])
def test_bools_reduce_as_torch_distributed_does(reduction: Reduction) -> None:
    """gloo gives these: SUM and MAX are `or`, PRODUCT and MIN are `and`."""
    left, right = torch.tensor([True, False, True, False]), torch.tensor([True, True, False, False])
    either, both = left | right, left & right
    expected = {
        Reduction.SUM: either,
        Reduction.MAX: either,
        Reduction.BOR: either,
        Reduction.PRODUCT: both,
        Reduction.MIN: both,
        Reduction.BAND: both,
        Reduction.BXOR: left ^ right,
    }
    assert torch.equal(reduced([left, right], reduction), expected[reduction])


@pytest.mark.parametrize("dtype", COMPLEX)
def test_complex_numbers_sum_and_average(dtype: torch.dtype) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch calls complex32 experimental, once per process
        parts = [torch.tensor([1 + 2j, 3 - 1j]).to(dtype), torch.tensor([2 + 1j, -3 - 1j]).to(dtype)]
        assert reduced(parts, Reduction.SUM).tolist() == [3 + 3j, -2j]
        assert reduced(parts, Reduction.AVG).tolist() == [1.5 + 1.5j, -1j]
        infinite = torch.tensor([torch.inf + 1j, 1 + 1j]).to(dtype)
        assert reduced([parts[0], infinite], Reduction.SUM).tolist()[0] == torch.inf + 3j


@pytest.mark.parametrize(
    ("dtypes", "reductions"),
    [
        ([*INTEGERS, *UNSIGNED, torch.bool], [Reduction.AVG]),
        (FLOATS + FLOAT8 + COMPLEX, BITWISE),
        (COMPLEX, [*ORDERINGS, Reduction.PRODUCT]),
        ([torch.float8_e8m0fnu, torch.float4_e2m1fn_x2, torch.qint8, torch.quint4x2, torch.bits8], list(Reduction)),
    ],
)
def test_what_torch_distributed_refuses_is_a_value_error(
    dtypes: list[torch.dtype], reductions: list[Reduction]
) -> None:
    for dtype in dtypes:
        for reduction in reductions:
            with pytest.raises(ValueError, match=str(dtype)):
                accumulator_dtype(dtype, reduction)


def test_nothing_but_the_output_is_written() -> None:
    numel = CHUNK_ELEMENTS + 17  # more than one pass
    left, right = torch.arange(numel).to(torch.bfloat16), torch.ones(numel, dtype=torch.bfloat16)
    kept = left.clone(), right.clone()
    out = torch.empty(numel)
    combine(out, left, right, Reduction.SUM)
    assert torch.equal(out, left.float() + 1)
    rounded, exact = torch.empty_like(left), out.clone()
    finish(rounded, out, Reduction.AVG, 2)
    assert torch.equal(rounded, (exact / 2).to(torch.bfloat16))
    assert torch.equal(out, exact) and torch.equal(left, kept[0]) and torch.equal(right, kept[1])


@pytest.mark.parametrize("reduction", [Reduction.SUM, Reduction.MIN])
def test_out_may_be_either_half(reduction: Reduction) -> None:
    left, right = torch.tensor([1.0, 4.0]), torch.tensor([3.0, 2.0], dtype=torch.float16)
    expected = [4.0, 6.0] if reduction is Reduction.SUM else [1.0, 2.0]
    combine(right_out := right.float(), left, right_out, reduction)
    combine(left, left, right, reduction)
    assert left.tolist() == right_out.tolist() == expected


def test_an_accumulator_may_be_finished_in_place() -> None:
    accumulator = torch.tensor([3.0, 5.0])
    finish(accumulator, accumulator, Reduction.SUM, 2)
    assert accumulator.tolist() == [3.0, 5.0]
    finish(accumulator, accumulator, Reduction.AVG, 2)
    assert accumulator.tolist() == [1.5, 2.5]
    with pytest.raises(ValueError, match="0 parts"):
        finish(accumulator, accumulator, Reduction.AVG, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2])
@pytest.mark.parametrize("reduction", [Reduction.SUM, Reduction.AVG, Reduction.MAX])
def test_a_single_part_may_be_finished_in_its_own_type(dtype: torch.dtype, reduction: Reduction) -> None:
    part = (torch.arange(CHUNK_ELEMENTS + 17) % 5).to(dtype)
    finish(out := torch.empty_like(part), part, reduction, 1)
    assert torch.equal(out.view(torch.uint8), part.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint16, torch.bool])
def test_empty_slices_reduce_to_empty_slices(dtype: torch.dtype) -> None:
    assert reduced([torch.empty(0, dtype=dtype)] * 3, Reduction.MAX).numel() == 0
