"""Frames between two workers: a fixed header, a payload of `length` bytes, and after DATA one closing byte.

The closing byte says whether the payload may be used: a sender whose operation was aborted half-way through a payload
finishes the frame as VOID, so the connection lives on and nobody takes the torn bytes for a value.
Numbers are little-endian and unsigned. Nothing here is trusted: `unpack` refuses what no honest sender writes.
Invariants: 1. unpack(pack(header)) == header; 2. any other 56 bytes raise FrameError (tests/property/test_frames.py).
Not here: who may connect (handshake.py); what a frame makes happen (inbound.py, peer.py).
"""

import enum
import struct
from typing import NamedTuple

from elastic_run.runtime.protocol.errors import CodecError

MAGIC = 0xE1D7
VERSION = 1
_HEADER = struct.Struct("<HBBIQIIQQQII")
HEADER_BYTES = _HEADER.size
POINT_TO_POINT = 1 << 31
"""Bit of `slot`: the message belongs to send/receive, the other bits are its tag."""

PAYLOAD_BYTES_MAX = 16 << 20  # one DATA frame; a larger message is several frames
MESSAGE_BYTES_MAX = 1 << 46
TEXT_BYTES_MAX = 1024
VALID, VOID = b"\xa5", b"\x5a"

_REGION = struct.Struct("<IIQQQ")
REGION_BYTES = _REGION.size


class FrameError(CodecError):
    """Bytes that are no frame. The connection they came from is closed."""


class Kind(enum.IntEnum):
    DATA = 1  # part of a message
    GRANT = 2  # the receiver of a large message has its buffer ready
    OFFER = 3  # a large point-to-point message waits for its grant
    STAGED = 4  # part of a message lies in the sender's shared memory
    RELEASE = 5  # the reader is done with a region
    SEGMENT = 6  # a segment of shared memory; its descriptor travels beside the frame
    ABORT = 7  # the sender gave up a group in this view; payload: culprit and reason
    VIEW = 8  # the sender has installed this view
    BYE = 9  # the sender closes on purpose; payload: reason
    TAKEN = 10  # so many bytes of small point-to-point messages were received since it was last said


class Header(NamedTuple):
    """One frame's head. `total` and `offset` are bytes of the message, `length` bytes of payload that follow."""

    kind: Kind
    view: int = 0
    group: int = 0
    sequence: int = 0
    slot: int = 0
    check: int = 0
    """Signature of the operation, equal on all members."""
    total: int = 0
    offset: int = 0
    length: int = 0


class RegionRef(NamedTuple):
    """A piece of the sender's shared memory: payload of STAGED, RELEASE and SEGMENT (there: id and size only)."""

    segment: int
    offset: int
    generation: int
    nbytes: int


_PAYLOAD_MAX = {
    Kind.DATA: PAYLOAD_BYTES_MAX,
    Kind.GRANT: 0,
    Kind.OFFER: 0,
    Kind.STAGED: REGION_BYTES,
    Kind.RELEASE: REGION_BYTES,
    Kind.SEGMENT: REGION_BYTES,
    Kind.ABORT: TEXT_BYTES_MAX,
    Kind.VIEW: 0,
    Kind.BYE: TEXT_BYTES_MAX,
    Kind.TAKEN: 0,
}
_KINDS = {int(kind): kind for kind in Kind}


def pack(header: Header) -> bytes:
    kind, view, group, sequence, slot, check, total, offset, length = header
    return _HEADER.pack(MAGIC, VERSION, kind, slot, view, group, check, sequence, total, offset, length, 0)


def unpack(data: bytes | bytearray | memoryview, at: int = 0) -> Header:
    """Return the header at byte `at`. Raises FrameError when it is none."""
    magic, version, code, slot, view, group, check, sequence, total, offset, length, zero = _HEADER.unpack_from(
        data, at
    )
    if magic != MAGIC or version != VERSION:
        raise FrameError(f"not a frame of version {VERSION}: it begins with {magic:#06x}, version {version}")
    kind = _KINDS.get(code)
    if kind is None or zero:
        raise FrameError(f"frame kind {code} is unknown")
    if length > _PAYLOAD_MAX[kind]:
        raise FrameError(f"{kind.name} with {length} bytes of payload; at most {_PAYLOAD_MAX[kind]} are allowed")
    if total > MESSAGE_BYTES_MAX or (kind is Kind.DATA and offset + length > total):
        raise FrameError(f"{kind.name} covers bytes {offset} to {offset + length} of a message of {total}")
    if kind in (Kind.STAGED, Kind.RELEASE, Kind.SEGMENT) and length != REGION_BYTES:
        raise FrameError(f"{kind.name} with {length} bytes of payload instead of {REGION_BYTES}")
    return Header(kind, view, group, sequence, slot, check, total, offset, length)


def pack_region(region: RegionRef) -> bytes:
    return _REGION.pack(region.segment, 0, region.offset, region.generation, region.nbytes)


def unpack_region(data: bytes | bytearray | memoryview) -> RegionRef:
    """Return the region a payload names; its bounds are the reader's to check. Raises FrameError."""
    if len(data) != REGION_BYTES:
        raise FrameError(f"a region takes {REGION_BYTES} bytes, not {len(data)}")
    segment, zero, offset, generation, nbytes = _REGION.unpack(data)
    if zero:
        raise FrameError("a region's reserved word is not zero")
    return RegionRef(segment, offset, generation, nbytes)


def pack_text(*parts: str) -> bytes:
    """Return short texts, cut to what a frame may carry."""
    share = TEXT_BYTES_MAX // len(parts) - 1
    return b"\0".join(part.replace("\0", " ").encode()[:share] for part in parts)


def unpack_text(data: bytes | bytearray | memoryview, parts: int) -> tuple[str, ...]:
    texts = tuple(part.decode(errors="replace") for part in bytes(data).split(b"\0"))
    if len(texts) != parts:
        raise FrameError(f"{len(texts)} texts instead of {parts}")
    return tuple("".join(char if char.isprintable() else " " for char in text) for text in texts)
