"""The encoded form of known values, and what is refused."""

import pytest
import torch
from torch import Tensor

from elastic_run.collectives.quantised import BLOCK_ELEMENTS, decode, encode, encoded_bytes


def encoded(source: Tensor) -> Tensor:
    out = torch.full((encoded_bytes(source.numel()),), 0xAA, dtype=torch.uint8)
    encode(source, out)
    return out


def decoded(source: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    out = torch.full(source.shape, torch.nan, dtype=dtype)
    decode(encoded(source), out)
    return out


def close(result: Tensor, expected: Tensor) -> bool:
    """Up to the roundings of scale and product."""
    return bool(((result - expected).abs() <= expected.abs() * 2.0**-22).all())


@pytest.mark.parametrize(("numel", "size"), [(0, 0), (1, 5), (256, 260), (257, 265), (1 << 20, (1 << 20) + (1 << 14))])
def test_a_block_costs_four_bytes_more_than_its_elements(numel: int, size: int) -> None:
    assert encoded_bytes(numel) == size


def test_whole_multiples_of_the_scale_come_back() -> None:
    codes = torch.arange(-127, 128, dtype=torch.float32)
    for scale in (1.0, 2.0**-100, 3.0):
        assert close(decoded(codes * scale), codes * scale)


def test_zeros_come_back_as_zeros() -> None:
    assert torch.equal(decoded(torch.zeros(300)), torch.zeros(300))
    assert encoded(torch.zeros(300))[:8].view(torch.float32).tolist() == [2.0**-126] * 2  # never divided by zero
    assert torch.equal(decoded(torch.zeros(0)), torch.zeros(0))


def test_each_block_has_its_own_scale() -> None:
    source = torch.ones(3 * BLOCK_ELEMENTS + 5)
    source[BLOCK_ELEMENTS : 2 * BLOCK_ELEMENTS] = 1e30
    source[-5:] = 1e-30
    assert close(decoded(source), source)


def test_the_largest_float_stays_finite() -> None:
    largest = torch.finfo(torch.float32).max
    source = torch.tensor([largest, -largest, 0.0])
    assert decoded(source).isfinite().all()
    assert close(decoded(source), source)


def test_denormals_stay_small() -> None:
    source = torch.full((10,), 1e-41)
    assert decoded(source).abs().max() <= 2.0**-126


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("place", [0, 300, 600])
def test_a_value_that_is_not_finite_spoils_its_block_alone(bad: float, place: int) -> None:
    source = torch.ones(2 * BLOCK_ELEMENTS + 100)
    source[place] = bad
    spoiled = torch.arange(source.numel()) // BLOCK_ELEMENTS == place // BLOCK_ELEMENTS
    assert torch.equal(decoded(source).isnan(), spoiled)
    # The bytes do not tell which value it was: no member's encoding depends on how its machine converts NaN.
    source[spoiled] = torch.nan
    other = torch.ones_like(source)
    other[place] = bad
    assert torch.equal(encoded(source), encoded(other))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_floats_go_through_float32(dtype: torch.dtype) -> None:
    source = torch.linspace(-3.0, 3.0, 700).to(dtype)
    assert torch.equal(encoded(source), encoded(source.float()))
    assert torch.equal(decoded(source, dtype), decoded(source.float()).to(dtype))


def test_float64_beyond_float32_is_not_finite() -> None:
    assert decoded(torch.tensor([1e300, 1.0], dtype=torch.float64)).isnan().all()


def test_bytes_may_lie_at_any_address() -> None:
    source = torch.linspace(-1.0, 1.0, 300)
    room = torch.zeros(encoded_bytes(300) + 3, dtype=torch.uint8)
    for offset in range(4):
        place = room[offset : offset + encoded_bytes(300)]
        encode(source, place)
        assert torch.equal(place, encoded(source))
        decode(place, out := torch.empty(300))
        assert torch.equal(out, decoded(source))


def test_wrong_types_and_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="int32"):
        encode(torch.zeros(4, dtype=torch.int32), torch.empty(8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="4 values take 8 uint8"):
        encode(torch.zeros(4), torch.empty(9, dtype=torch.uint8))
    with pytest.raises(ValueError, match="4 values take 8 uint8"):
        decode(torch.zeros(8, dtype=torch.int8), torch.empty(4))
