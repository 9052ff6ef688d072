"""Reductions against plain torch, and the promise that how a slice is cut shows in no bit."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from elastic_run.collectives.reduction import CHUNK_ELEMENTS, Reduction, accumulate, accumulator_dtype, finish

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn]
SPECIAL = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, -torch.nan, 1.0, -1.0])


def reduced(parts: list[Tensor], reduction: Reduction) -> Tensor:
    accumulator = parts[0].to(accumulator_dtype(parts[0].dtype, reduction), copy=True)
    for part in parts[1:]:
        accumulate(accumulator, part, reduction)
    out = torch.empty_like(parts[0])
    finish(out, accumulator, reduction, len(parts))
    return out


def parts_of(seed: int, members: int, numel: int, dtype: torch.dtype, special: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if special:
        return [SPECIAL[torch.randint(0, 8, (numel,), generator=generator)].to(dtype) for _ in range(members)]
    return [torch.randn(numel, generator=generator).to(dtype) for _ in range(members)]


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    members=st.integers(1, 6),
    cut=st.integers(0, 150),
    dtype=st.sampled_from(FLOATS),
    reduction=st.sampled_from([Reduction.SUM, Reduction.AVG, Reduction.MIN, Reduction.MAX, Reduction.PRODUCT]),
    special=st.booleans(),
)
def test_cutting_a_slice_changes_no_bit(
    seed: int, members: int, cut: int, dtype: torch.dtype, reduction: Reduction, special: bool
) -> None:
    parts = parts_of(seed, members, 150, dtype, special)
    whole = reduced(parts, reduction)
    pieces = torch.cat([reduced([p[:cut] for p in parts], reduction), reduced([p[cut:] for p in parts], reduction)])
    if reduction not in (Reduction.MIN, Reduction.MAX):  # which of two NaNs remains is not promised
        assert torch.equal(whole.isnan(), pieces.isnan())
        whole, pieces = (torch.where(t.isnan(), 1.0, t.to(torch.float64)) for t in (whole, pieces))
    assert torch.equal(whole.view(torch.uint8), pieces.view(torch.uint8))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    members=st.integers(1, 8),
    numel=st.sampled_from([0, 1, 7, 1000, CHUNK_ELEMENTS + 3]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
)
def test_sixteen_bit_reductions_are_float32_ones_rounded(
    seed: int, members: int, numel: int, dtype: torch.dtype
) -> None:
    parts = parts_of(seed, members, numel, dtype, special=False)
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    assert torch.equal(reduced(parts, Reduction.SUM), total.to(dtype))
    assert torch.equal(reduced(parts, Reduction.AVG), (total / members).to(dtype))
    assert torch.equal(reduced(parts, Reduction.MIN), torch.stack(parts).amin(0))
