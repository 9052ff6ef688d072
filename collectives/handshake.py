"""Proof, both ways, that two workers hold the job's secret, before either trusts a byte of the other.

    dialler -> listener   HELLO      who I am, whom I want, which lane, a fresh random number
    listener -> dialler   CHALLENGE  another one, and HMAC-SHA256(secret, "listener" | HELLO | it)
    dialler -> listener   PROOF      HMAC-SHA256(secret, "dialler" | HELLO | the listener's number)

A recording is worthless: each side's proof covers the other's fresh number. The secret itself never travels, and names
are covered too, so a proof cannot be relayed to a third worker.
Invariants: tests/unit/test_handshake.py. Not here: the sockets (inbound.py, outbound.py).
"""

import hashlib
import hmac
import struct
from dataclasses import dataclass

from elastic_run.collectives.wire import FrameError
from elastic_run.runtime.protocol.errors import UserError
from elastic_run.runtime.protocol.ids import check_name

_MAGIC = b"ELDP"
_VERSION = 1
_HELLO = struct.Struct("<4sHH32sBB128s128s")
_CHALLENGE = struct.Struct("<32s32s")
HELLO_BYTES = _HELLO.size
CHALLENGE_BYTES = _CHALLENGE.size
PROOF_BYTES = 32
NONCE_BYTES = 32
LANES_MAX = 64
PIPE_LANE = LANES_MAX - 1
"""A connection that carries no frames (pipes.py)."""
SECRET_BYTES_MIN = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    source: str
    target: str
    lane: int
    nonce: bytes


def pack_hello(hello: Hello) -> bytes:
    source, target = hello.source.encode(), hello.target.encode()
    return _HELLO.pack(_MAGIC, _VERSION, hello.lane, hello.nonce, len(source), len(target), source, target)


def unpack_hello(data: bytes) -> Hello:
    """Raises FrameError."""
    magic, version, lane, nonce, source_bytes, target_bytes, source, target = _HELLO.unpack(data)
    if magic != _MAGIC:
        raise FrameError("a connection that does not begin with our greeting")
    if version != _VERSION:
        raise FrameError(f"a peer speaks data-plane version {version}, we speak {_VERSION}: install the same release")
    if lane >= LANES_MAX or max(source_bytes, target_bytes) > 128:
        raise FrameError("a greeting with an impossible lane or name")
    try:
        names = [part.decode("ascii") for part in (source[:source_bytes], target[:target_bytes])]
        return Hello(
            source=check_name(names[0], what="worker"),
            target=check_name(names[1], what="worker"),
            lane=lane,
            nonce=nonce,
        )
    except (UnicodeDecodeError, UserError) as error:
        raise FrameError(f"a greeting with an unusable name: {error}") from None


def challenge(secret: bytes, hello: bytes, nonce: bytes) -> bytes:
    return _CHALLENGE.pack(nonce, _mac(secret, b"listener", hello, nonce))


def proof(secret: bytes, hello: bytes, answer: bytes) -> bytes:
    """Return the dialler's proof. Raises FrameError when the listener's is wrong."""
    nonce, mac = _CHALLENGE.unpack(answer)
    if not hmac.compare_digest(mac, _mac(secret, b"listener", hello, nonce)):
        raise FrameError("the listener does not hold this job's secret")
    return _mac(secret, b"dialler", hello, nonce)


def check_proof(secret: bytes, hello: bytes, nonce: bytes, given: bytes) -> None:
    """Raises FrameError when the dialler's proof is wrong."""
    if not hmac.compare_digest(given, _mac(secret, b"dialler", hello, nonce)):
        raise FrameError("the dialler does not hold this job's secret")


def _mac(secret: bytes, role: bytes, hello: bytes, nonce: bytes) -> bytes:
    return hmac.new(secret, role + b"|" + hello + nonce, hashlib.sha256).digest()
