"""q8: floats as 8-bit integers with one scale per block of 256, a quarter of float32's bytes and 1.6 % more.

Of each block, scale = peak / 127 (peak: the largest magnitude), code = round(value / scale) in -127..127, half to even.
Bytes: the scales (float32, host order), then the codes (int8). A block with an infinity or a NaN decodes to NaN
throughout: one bad gradient is seen, not clipped. float64 is first rounded to float32, beyond its range to infinity.
The all-reduce: every member encodes each slice for its owner; the owner sums the decoded parts in float32 by rank,
encodes the sum; all members decode those same bytes, so all hold the same bits.
Invariants (tests/property/test_quantised_property.py):
1. Encoding is a function of the values alone: not of the slice's address, of threads, or of how often it is done.
2. An element of that all-reduce is off by at most `error_bound`, about sum(peaks) / 127.
3. The largest float32 decodes to a finite value.
Not here: sending (algorithms/), where slices begin (partition.py; any start will do).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from elastic_run.collectives.reduction import Reduction

BLOCK_ELEMENTS = 256
SCALE_BYTES = 4
CODE_MAX = 127
CHUNK_ELEMENTS = 128 * 1024
"""Elements per pass, a multiple of a block: the scratch (512 KiB) stays in the core's cache over all steps."""

_SCALE_MIN = 2.0**-126
"""The smallest normal float32: a block of zeros has a scale to divide by, and no result depends on denormals."""
_SCALE_PER_PEAK = (1 - 2.0**-23) / CODE_MAX
"""A bit less than 1 / 127: 127 * scale never rounds past the peak, so the largest float32 stays finite."""
_ROUNDING = 0.5 * (1 + 2.0**-12)
"""Bound of |value - decoded| / scale: half a code, and the float32 roundings of scale, quotient and product."""
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def encoded_bytes(numel: int) -> int:
    """Return the bytes that `numel` values take."""
    return numel + SCALE_BYTES * _blocks(numel)


def check(dtype: torch.dtype, reduction: Reduction) -> None:
    """Raise ValueError for what q8 cannot reduce."""
    if dtype not in _FLOATS:
        raise ValueError(f"q8 takes {', '.join(map(str, _FLOATS))}, not {dtype}")
    if reduction not in (Reduction.SUM, Reduction.AVG):
        raise ValueError(f"q8 sums or averages; a {reduction} needs the exact values")


def encode(source: Tensor, out: Tensor) -> None:
    """Encode 1-D contiguous floats into `out`: `encoded_bytes` of uint8. Raises ValueError on another type or size."""
    scale_bytes, codes = _parts(out, source)
    scales = torch.empty(_blocks(source.numel()), dtype=torch.float32, device=source.device)
    scratch = torch.empty(min(source.numel(), CHUNK_ELEMENTS), dtype=torch.float32, device=source.device)
    for start, stop, width in _chunks(source.numel()):
        rows = scratch[: stop - start].view(-1, width)
        values = source[start:stop].view(-1, width).to(torch.float32)
        chunk_scales = scales[start // BLOCK_ELEMENTS :][: len(rows)]
        torch.amax(torch.abs(values, out=rows), dim=1, out=chunk_scales)
        chunk_scales.mul_(_SCALE_PER_PEAK).clamp_(min=_SCALE_MIN)
        torch.mul(values, chunk_scales.reciprocal().unsqueeze(1), out=rows)
        codes[start:stop].view(-1, width).copy_(rows.round_())
    _mark_not_finite(scales, codes)
    scale_bytes.copy_(scales.view(torch.uint8))


def decode(source: Tensor, out: Tensor) -> None:
    """Decode into `out`, a 1-D contiguous float tensor whose length says how many values `source` holds."""
    scale_bytes, codes = _parts(source, out)
    scales = torch.empty(_blocks(out.numel()), dtype=torch.float32, device=out.device)
    scales.view(torch.uint8).copy_(scale_bytes)  # by a copy: the bytes may lie at any address
    direct = out.dtype is torch.float32
    scratch = torch.empty(0 if direct else min(out.numel(), CHUNK_ELEMENTS), dtype=torch.float32, device=out.device)
    for start, stop, width in _chunks(out.numel()):
        exact = out[start:stop] if direct else scratch[: stop - start]
        rows = exact.copy_(codes[start:stop]).view(-1, width)
        rows.mul_(scales[start // BLOCK_ELEMENTS :][: len(rows)].unsqueeze(1))
        if not direct:
            out[start:stop].copy_(exact)


def error_bound(peaks: Tensor) -> Tensor:
    """Bound the error of each block's summed elements. `peaks`: (members, blocks), largest magnitudes; float64 result.

    With W members and S = sum of a block's peaks, an element of the all-reduce is within
        S / 127 * (1 + 2**-12 + W * 2**-15) + (W + 1) * 2**-126
    of the exact sum: S / 254 for the members' codes, at most S / 254 for the owner's (the sum's peak is at most S),
    W - 1 float32 additions, and denormals, which may be flushed. An average is off by a W-th of it.
    """
    members = len(peaks)
    total = peaks.to(torch.float64).sum(dim=0)
    return total / CODE_MAX * (2 * _ROUNDING + members * 2.0**-15) + (members + 1) * _SCALE_MIN


def _mark_not_finite(scales: Tensor, codes: Tensor) -> None:
    """Give blocks that hold an infinity or a NaN one scale (NaN) and code (0): the conversion left them to chance."""
    bad = torch.isfinite(scales).logical_not_()
    if not bool(bad.any()):
        return
    scales[bad] = torch.nan
    whole = codes.numel() // BLOCK_ELEMENTS
    codes[: whole * BLOCK_ELEMENTS].view(-1, BLOCK_ELEMENTS)[bad[:whole]] = 0
    if bool(bad[whole:].any()):
        codes[whole * BLOCK_ELEMENTS :] = 0


def _parts(encoded: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scales' bytes and the codes of the encoded form of `values`."""
    check(values.dtype, Reduction.SUM)
    size = encoded_bytes(values.numel())
    if encoded.dtype is not torch.uint8 or encoded.numel() != size:
        raise ValueError(f"{values.numel()} values take {size} uint8, not {encoded.numel()} {encoded.dtype}")
    scale_bytes = size - values.numel()
    return encoded[:scale_bytes], encoded[scale_bytes:].view(torch.int8)


def _blocks(numel: int) -> int:
    return -(-numel // BLOCK_ELEMENTS)


def _chunks(numel: int) -> Iterator[tuple[int, int, int]]:
    """Yield (start, stop, block width): many whole blocks at a time, the short last block alone."""
    whole = numel - numel % BLOCK_ELEMENTS
    for start in range(0, whole, CHUNK_ELEMENTS):
        yield start, min(start + CHUNK_ELEMENTS, whole), BLOCK_ELEMENTS
    if whole < numel:
        yield whole, numel, numel - whole
