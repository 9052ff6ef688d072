"""The q8 all-reduce, played by pure arithmetic: the same bits everywhere, within the documented bound."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from elastic_run.collectives.partition import slices
from elastic_run.collectives.quantised import BLOCK_ELEMENTS, CHUNK_ELEMENTS, decode, encode, encoded_bytes, error_bound
from elastic_run.collectives.reduction import Reduction, accumulate


def encoded(source: Tensor) -> Tensor:
    encode(source, out := torch.empty(encoded_bytes(source.numel()), dtype=torch.uint8))
    return out


def decoded(source: Tensor, numel: int) -> Tensor:
    decode(source, out := torch.empty(numel))
    return out


def all_reduced(inputs: list[Tensor]) -> Tensor:
    """Every member sends each slice, encoded, to its owner; the owner sums by rank and sends the sum, encoded."""
    numel = inputs[0].numel()
    out = torch.empty(numel)
    for start, stop in slices(numel, len(inputs), BLOCK_ELEMENTS):
        total = torch.zeros(stop - start)
        for tensor in inputs:
            accumulate(total, decoded(encoded(tensor[start:stop]), stop - start), Reduction.SUM)
        decode(encoded(total), out[start:stop])
    return out


def peaks(inputs: list[Tensor], start: int, stop: int) -> Tensor:
    """(members, blocks) of one slice."""
    blocks = [[block.abs().max() for block in tensor[start:stop].split(BLOCK_ELEMENTS)] for tensor in inputs]
    return torch.tensor(blocks)


@st.composite
def member_inputs(draw: st.DrawFn) -> list[Tensor]:
    """Tensors of 1 to 8 members: bell curves of any scale, equal values (codes at their ends), or single spikes."""
    members, numel = draw(st.integers(1, 8)), draw(st.integers(1, 3000))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    inputs = []
    for _ in range(members):
        scale = 2.0 ** draw(st.integers(-149, 120))
        match draw(st.sampled_from(["bell", "equal", "spike", "half codes"])):
            case "bell":
                tensor = torch.randn(numel, generator=generator)
            case "equal":
                tensor = torch.full((numel,), draw(st.sampled_from([-1.0, 1.0])))
            case "spike":
                tensor = torch.zeros(numel)
                tensor[draw(st.integers(0, numel - 1))] = 1.0
            case _:
                tensor = (torch.randint(-127, 127, (numel,), generator=generator) + 0.5) / 127
        inputs.append(tensor * scale)
    return inputs


@settings(max_examples=150, deadline=None)
@given(inputs=member_inputs())
def test_the_all_reduce_stays_within_its_bound(inputs: list[Tensor]) -> None:
    exact = torch.stack(inputs).to(torch.float64).sum(0)
    error = (all_reduced(inputs).to(torch.float64) - exact).abs()
    for start, stop in slices(len(exact), len(inputs), BLOCK_ELEMENTS):
        if start < stop:
            bound = error_bound(peaks(inputs, start, stop)).repeat_interleave(BLOCK_ELEMENTS)[: stop - start]
            assert bool((error[start:stop] <= bound).all())


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), blocks=st.integers(0, 8), rest=st.integers(0, 255), cut=st.integers(0, 8))
def test_encoding_does_not_depend_on_where_a_slice_is_cut(seed: int, blocks: int, rest: int, cut: int) -> None:
    numel = blocks * BLOCK_ELEMENTS + rest
    source = torch.randn(numel, generator=torch.Generator().manual_seed(seed))
    source[::97] *= torch.inf
    border = min(cut, blocks) * BLOCK_ELEMENTS
    whole = decoded(encoded(source), numel)
    shifted = torch.empty(numel + 1)[1:].copy_(source)  # another address, another alignment
    pieces = [decoded(encoded(piece), piece.numel()) for piece in (shifted[:border], shifted[border:])]
    assert torch.equal(whole.view(torch.int32), torch.cat(pieces).view(torch.int32))
    assert torch.equal(encoded(source), encoded(shifted))


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**32), threads=st.integers(1, 3))
def test_large_tensors_encode_the_same_on_any_number_of_threads(seed: int, threads: int) -> None:
    numel = CHUNK_ELEMENTS + 3 * BLOCK_ELEMENTS + 11
    source = torch.randn(numel, generator=torch.Generator().manual_seed(seed))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        first = encoded(source)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(first, encoded(source))
    blocks = [encoded(block) for block in source.split(BLOCK_ELEMENTS)]
    assert torch.equal(first, torch.cat([b[:4] for b in blocks] + [b[4:] for b in blocks]))


@given(data=st.binary(min_size=1, max_size=600))
def test_bytes_from_anywhere_decode_to_something(data: bytes) -> None:
    """A hostile peer can send any bytes: they give some numbers, never an error or a stray write."""
    numel = next(n for n in range(len(data) + 1) if encoded_bytes(n + 1) > len(data))
    source = torch.frombuffer(bytearray(data), dtype=torch.uint8)[: encoded_bytes(numel)]
    out = torch.full((numel + 2,), 7.0)
    decode(source, out[1:-1])
    assert out[0] == out[-1] == 7.0
