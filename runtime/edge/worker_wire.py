"""The worker's half of worker.proto, written and read by hand: the script alone chooses the protobuf it loads.

Invariants (tests/property/test_worker_wire.py):
1. What is written here, the generated code reads, and the other way round.
2. Bytes that are not one envelope of a known message raise CodecError, and nothing else.
Not here: sockets (worker_link.py); the agent's half (worker_server.py, generated code).
"""

from typing import NamedTuple

from elastic_run.runtime.protocol.errors import CodecError

PACKET_BYTES_MAX = 4096
VARINT_BYTES_MAX = 10
_VARINT, _LENGTH = 0, 2
_WELCOME, _REFUSED, _RESUME = 1, 2, 3


class Welcome(NamedTuple):
    view: int


class Refused(NamedTuple):
    reason: str


class Resume(NamedTuple):
    view: int


AgentWord = Welcome | Refused | Resume


def hello(*, protocol_version: int, worker: str, pid: int) -> bytes:
    return _envelope(1, (protocol_version, worker, pid))


def parked(*, view: int, step: int) -> bytes:
    return _envelope(2, (view, step))


def running(*, view: int, step: int, unasked: bool) -> bytes:
    return _envelope(3, (view, step, int(unasked)))


def parse(packet: bytes) -> AgentWord:
    """Return what the agent said. Raises CodecError."""
    envelope = _fields(packet)
    if len(envelope) != 1:
        raise CodecError(f"a packet of the agent holds {len(envelope)} messages")
    ((number, body),) = envelope.items()
    if not isinstance(body, bytes):
        raise CodecError(f"field {number} of a packet of the agent is no message")
    value = _fields(body).get(1)
    if number == _REFUSED and isinstance(value, bytes | None):
        return Refused((value or b"").decode(errors="replace"))
    if number in (_WELCOME, _RESUME) and isinstance(value, int | None):
        return Welcome(value or 0) if number == _WELCOME else Resume(value or 0)
    raise CodecError(f"message {number} of the agent is unknown or mistyped")


def _envelope(number: int, fields: tuple[int | str, ...]) -> bytes:
    body = b"".join(_field(i, value) for i, value in enumerate(fields, start=1) if value)  # proto3 leaves zeros out
    return _varint(number << 3 | _LENGTH) + _varint(len(body)) + body


def _field(number: int, value: int | str) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3 | _VARINT) + _varint(value)
    text = value.encode()
    return _varint(number << 3 | _LENGTH) + _varint(len(text)) + text


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _fields(data: bytes) -> dict[int, int | bytes]:
    """Return the fields by number, the last of each. Raises CodecError on wire types that worker.proto does not use."""
    found: dict[int, int | bytes] = {}
    at = 0
    while at < len(data):
        tag, at = _read_varint(data, at)
        value, at = _read_varint(data, at)
        if tag & 7 == _VARINT:
            found[tag >> 3] = value
        elif tag & 7 == _LENGTH and at + value <= len(data):
            found[tag >> 3] = data[at : at + value]
            at += value
        else:
            raise CodecError("a packet of the agent is cut off or of another kind")
    return found


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for i, byte in enumerate(data[at : at + VARINT_BYTES_MAX]):
        value |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            return value & (1 << 64) - 1, at + i + 1
    raise CodecError("a packet of the agent ends inside a number")
