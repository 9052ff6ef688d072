"""Who does not hold the secret, or repeats what somebody else said, is refused by either side."""

import struct

import pytest

from elastic_run.collectives import handshake
from elastic_run.collectives.handshake import Hello
from elastic_run.collectives.wire import FrameError

SECRET, OTHER_SECRET = b"s" * 32, b"t" * 32
NONCE, NEXT_NONCE = b"n" * 32, b"m" * 32


def hello(source: str = "w1", target: str = "w2", lane: int = 0, nonce: bytes = b"d" * 32) -> bytes:
    return handshake.pack_hello(Hello(source=source, target=target, lane=lane, nonce=nonce))


def honest_proof(greeting: bytes, nonce: bytes = NONCE, secret: bytes = SECRET) -> bytes:
    return handshake.proof(secret, greeting, handshake.challenge(secret, greeting, nonce))


def test_both_sides_accept_who_holds_the_secret() -> None:
    greeting = hello(lane=3)
    handshake.check_proof(SECRET, greeting, NONCE, honest_proof(greeting))
    assert handshake.unpack_hello(greeting) == Hello(source="w1", target="w2", lane=3, nonce=b"d" * 32)


def test_sizes_are_fixed() -> None:
    greeting = hello()
    assert len(greeting) == handshake.HELLO_BYTES
    assert len(handshake.challenge(SECRET, greeting, NONCE)) == handshake.CHALLENGE_BYTES
    assert len(honest_proof(greeting)) == handshake.PROOF_BYTES


def test_dialler_refuses_a_listener_without_the_secret() -> None:
    with pytest.raises(FrameError, match="listener does not hold"):
        handshake.proof(SECRET, hello(), handshake.challenge(OTHER_SECRET, hello(), NONCE))


def test_listener_refuses_a_dialler_without_the_secret() -> None:
    with pytest.raises(FrameError, match="dialler does not hold"):
        handshake.check_proof(SECRET, hello(), NONCE, honest_proof(hello(), secret=OTHER_SECRET))


def test_a_recorded_proof_is_worthless_against_a_fresh_number() -> None:
    with pytest.raises(FrameError):
        handshake.check_proof(SECRET, hello(), NEXT_NONCE, honest_proof(hello(), NONCE))


def test_a_recorded_challenge_is_worthless_against_a_fresh_hello() -> None:
    recorded = handshake.challenge(SECRET, hello(nonce=b"d" * 32), NONCE)
    with pytest.raises(FrameError):
        handshake.proof(SECRET, hello(nonce=b"e" * 32), recorded)


def test_the_listeners_own_answer_does_not_serve_as_a_proof() -> None:
    mac = handshake.challenge(SECRET, hello(), NONCE)[handshake.NONCE_BYTES :]
    with pytest.raises(FrameError):
        handshake.check_proof(SECRET, hello(), NONCE, mac)


@pytest.mark.parametrize(
    "other", [hello(target="w3"), hello(source="w3"), hello(lane=1)], ids=["third listener", "other name", "other lane"]
)
def test_a_proof_serves_no_other_greeting(other: bytes) -> None:
    with pytest.raises(FrameError):
        handshake.check_proof(SECRET, other, NONCE, honest_proof(hello()))


@pytest.mark.parametrize("bit", range(0, handshake.PROOF_BYTES * 8, 37))
def test_a_proof_with_one_bit_turned_is_refused(bit: int) -> None:
    changed = bytearray(honest_proof(hello()))
    changed[bit // 8] ^= 1 << bit % 8
    with pytest.raises(FrameError):
        handshake.check_proof(SECRET, hello(), NONCE, bytes(changed))


@pytest.mark.parametrize("size", [0, 1, handshake.PROOF_BYTES - 1, handshake.PROOF_BYTES + 1])
def test_a_proof_of_another_size_is_refused(size: int) -> None:
    with pytest.raises(FrameError):
        handshake.check_proof(SECRET, hello(), NONCE, (honest_proof(hello()) + b"x")[:size])


def raw(lane: int = 0, source: bytes = b"w1", target: bytes = b"w2", source_bytes: int | None = None) -> bytes:
    count = len(source) if source_bytes is None else source_bytes
    return struct.pack("<4sHH32sBB128s128s", b"ELDP", 1, lane, NONCE, count, len(target), source, target)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (bytes(handshake.HELLO_BYTES), "does not begin with our greeting"),
        (b"GET / HTTP/1.1\r\n".ljust(handshake.HELLO_BYTES), "does not begin with our greeting"),
        (hello()[:4] + b"\x02\x00" + hello()[6:], "version 2"),
        (raw(lane=handshake.LANES_MAX), "impossible lane"),
        (raw(source_bytes=200), "impossible lane or name"),
        (raw(source=b""), "unusable name"),
        (raw(source=b"../w1"), "unusable name"),
        (raw(source=b"w1\n"), "unusable name"),
        (raw(target=b"\xff\xfe"), "unusable name"),
    ],
    ids=["zeros", "http", "version", "lane", "length", "empty", "path", "newline", "not ascii"],
)
def test_a_greeting_that_cannot_be_meant_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(FrameError, match=message):
        handshake.unpack_hello(data)
