"""Frames come back as they were packed; bytes that no honest sender writes are refused with one kind of error."""

import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_run.collectives import wire
from elastic_run.collectives.wire import FrameError, Header, Kind, RegionRef

U32, U64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
CODE_BYTE, SLOT_BYTE = 3, 4


@st.composite
def headers(draw: st.DrawFn) -> Header:
    kind = draw(st.sampled_from(Kind))
    if kind is Kind.DATA:
        length = draw(st.integers(0, wire.PAYLOAD_BYTES_MAX))
        offset = draw(st.integers(0, wire.MESSAGE_BYTES_MAX - length))
        total = draw(st.integers(offset + length, wire.MESSAGE_BYTES_MAX))
    else:
        length = draw(
            {
                Kind.STAGED: st.just(wire.REGION_BYTES),
                Kind.RELEASE: st.just(wire.REGION_BYTES),
                Kind.SEGMENT: st.just(wire.REGION_BYTES),
                Kind.ABORT: st.integers(0, wire.TEXT_BYTES_MAX),
                Kind.BYE: st.integers(0, wire.TEXT_BYTES_MAX),
            }.get(kind, st.just(0))
        )
        offset = draw(U64)
        total = draw(st.integers(0, wire.MESSAGE_BYTES_MAX))
    return Header(kind, draw(U64), draw(U32), draw(U64), draw(U32), draw(U32), total, offset, length)


@given(headers(), st.binary(max_size=100))
def test_a_header_comes_back_as_it_was(header: Header, before: bytes) -> None:
    packed = wire.pack(header)
    assert len(packed) == wire.HEADER_BYTES
    assert wire.unpack(before + packed + b"more", len(before)) == header


@given(headers(), st.integers(0, wire.HEADER_BYTES * 8 - 1))
def test_a_header_with_one_bit_turned_is_refused_or_means_just_that(header: Header, bit: int) -> None:
    changed = bytearray(wire.pack(header))
    changed[bit // 8] ^= 1 << bit % 8
    with contextlib.suppress(FrameError):
        assert wire.pack(wire.unpack(changed)) == changed


@given(st.binary(min_size=wire.HEADER_BYTES, max_size=wire.HEADER_BYTES))
def test_any_bytes_are_refused_or_pack_to_themselves(data: bytes) -> None:
    with contextlib.suppress(FrameError):
        assert wire.pack(wire.unpack(data)) == data


@given(
    st.sampled_from(Kind),
    st.tuples(U32, U64, U32, U32, U64, U64, U64, U32),
)
def test_what_is_accepted_is_bounded(kind: Kind, fields: tuple[int, ...]) -> None:
    data = struct.pack("<HBBIQIIQQQII", wire.MAGIC, wire.VERSION, kind, *fields, 0)
    try:
        header = wire.unpack(data)
    except FrameError:
        return
    assert header.length <= wire.PAYLOAD_BYTES_MAX and header.total <= wire.MESSAGE_BYTES_MAX
    if kind is Kind.DATA:
        assert header.offset + header.length <= header.total
    else:
        assert header.length <= wire.TEXT_BYTES_MAX


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (Header(Kind.DATA, total=1 << 47), "message of"),
        (Header(Kind.DATA, total=4, offset=2, length=3), "covers bytes 2 to 5"),
        (Header(Kind.DATA, total=1 << 40, length=wire.PAYLOAD_BYTES_MAX + 1), "at most"),
        (Header(Kind.GRANT, length=1), "at most 0"),
        (Header(Kind.ABORT, length=wire.TEXT_BYTES_MAX + 1), "at most"),
        (Header(Kind.STAGED, length=8), "instead of"),
        (Header(Kind.SEGMENT, length=0), "instead of"),
    ],
    ids=lambda value: value.kind.name if isinstance(value, Header) else "",
)
def test_a_refusal_says_what_is_wrong(header: Header, message: str) -> None:
    with pytest.raises(FrameError, match=message):
        wire.unpack(wire.pack(header))


@given(U32, U64, U64, U64)
def test_a_region_comes_back_as_it_was(segment: int, offset: int, generation: int, nbytes: int) -> None:
    region = RegionRef(segment, offset, generation, nbytes)
    assert wire.unpack_region(wire.pack_region(region)) == region


@given(st.binary(max_size=64))
def test_any_bytes_are_no_region_or_pack_to_themselves(data: bytes) -> None:
    with contextlib.suppress(FrameError):
        assert wire.pack_region(wire.unpack_region(data)) == data


@given(st.lists(st.text(max_size=2000), min_size=1, max_size=3))
def test_texts_fit_their_frame_and_come_back_printable(texts: list[str]) -> None:
    packed = wire.pack_text(*texts)
    assert len(packed) <= wire.TEXT_BYTES_MAX
    back = wire.unpack_text(packed, len(texts))
    assert all(text.isprintable() for text in back)
    for text, given_text in zip(back, texts, strict=True):
        if given_text.isprintable() and len(given_text.encode()) < 300:
            assert text == given_text


@given(st.binary(max_size=wire.TEXT_BYTES_MAX), st.integers(1, 3))
def test_any_bytes_are_texts_without_control_characters_or_refused(data: bytes, parts: int) -> None:
    with contextlib.suppress(FrameError):
        texts = wire.unpack_text(data, parts)
        assert len(texts) == parts and all(text.isprintable() for text in texts)
