"""The compiled kernels give the bits that torch's passes give."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_run.collectives import native
from elastic_run.collectives.algorithms.arithmetic import combine_parts, reduce_parts
from elastic_run.collectives.reduction import Reduction

built = pytest.mark.skipif(native.kernels is None, reason="the kernels are not built here: no compiler")
TYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int32, torch.int64]


def values(dtype: torch.dtype, parts: int, numel: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if not dtype.is_floating_point:
        info = torch.iinfo(dtype)
        return list(torch.randint(info.min, info.max, (parts, numel), dtype=dtype, generator=generator))
    drawn = torch.randn((parts, numel), generator=generator, dtype=torch.float64)
    scale = torch.pow(2.0, torch.randint(-140, 120, (parts, numel), generator=generator).double())
    drawn = torch.where(torch.rand((parts, numel), generator=generator) < 0.3, drawn * scale, drawn)
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-45, 3.3e38], dtype=torch.float64)
    chosen = special[torch.randint(0, len(special), (parts, numel), generator=generator)]
    return list(torch.where(torch.rand((parts, numel), generator=generator) < 0.02, chosen, drawn).to(dtype))


def without_kernels(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(native, "kernels", None)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """NaNs count as equal: a SUM promises which elements are NaN, not their payload."""
    if one.is_floating_point():
        nan = one.isnan()
        if not torch.equal(nan, other.isnan()):
            return False
        one, other = one.masked_fill(nan, 0), other.masked_fill(nan, 0)
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@built
@settings(deadline=None, max_examples=60)
@given(
    dtype=st.sampled_from(TYPES),
    parts=st.integers(2, 9),
    numel=st.one_of(st.integers(1, 40), st.integers(1000, 3000)),
    seed=st.integers(0, 1 << 30),
    reduction=st.sampled_from([Reduction.SUM, Reduction.AVG]),
)
def test_sums_have_torchs_bits(dtype: torch.dtype, parts: int, numel: int, seed: int, reduction: Reduction) -> None:
    if reduction is Reduction.AVG and not dtype.is_floating_point:
        reduction = Reduction.SUM
    given_parts = values(dtype, parts, numel, seed)
    results = []
    for kernels in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not kernels:
                without_kernels(patch)
            out = torch.empty_like(given_parts[0])
            reduce_parts(out, given_parts, reduction)
            into = given_parts[parts - 1].clone()
            reduce_parts(into, [*given_parts[: parts - 1], into], reduction)
            total = torch.empty_like(out)
            if dtype is not torch.bfloat16:
                combine_parts(total, given_parts, reduction)
            else:
                total.zero_()
            results.append((out, into, total))
    for one, other in zip(*results, strict=True):
        assert same_bits(one, other)


@built
@pytest.mark.parametrize("shift", [0, 1, 3, 16])
@pytest.mark.parametrize("nbytes", [0, 1, 15, 63, 64, 65, 1000, native.COPY_BYTES_MIN + 77])
def test_copies_every_byte_and_no_other(shift: int, nbytes: int) -> None:
    source = torch.randint(0, 256, (nbytes + 64,), dtype=torch.uint8)
    target = torch.zeros(nbytes + 64, dtype=torch.uint8)
    assert native.kernels is not None
    native.kernels.copy(target.data_ptr() + shift, source.data_ptr() + 5, nbytes)
    assert torch.equal(target[shift : shift + nbytes], source[5 : 5 + nbytes])
    assert not target[:shift].any() and not target[shift + nbytes :].any()


@built
def test_what_is_not_a_sum_is_refused() -> None:
    one = torch.ones(4)
    for out, parts, reduction in (
        (one, [one], Reduction.SUM),
        (one, [one, one], Reduction.MAX),
        (one.half(), [one.half(), one.half()], Reduction.SUM),
        (one, [one, torch.ones(8)[::2]], Reduction.SUM),
        (one.int(), [one.int(), one.int()], Reduction.AVG),
    ):
        assert not native.sum_parts(out, parts, reduction, 2)
    with pytest.raises(ValueError, match="parts"):
        native.kernels.sum(one.data_ptr(), (one.data_ptr(),), 4, 0, 1.0)  # type: ignore[union-attr]
