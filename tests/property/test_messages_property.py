"""Which bytes of a message came, against an oracle that marks each of them."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_run.collectives.messages import PIECES_MAX, Key, Receive
from elastic_run.collectives.wire import FrameError

TOTAL = 40


def receive(total: int = TOTAL) -> Receive:
    return Receive("w1", Key(1, 0, 0), 0, memoryview(bytearray(total)))


@given(st.lists(st.tuples(st.integers(0, TOTAL), st.integers(0, 12)), max_size=30))
def test_a_byte_is_claimed_once(claims: list[tuple[int, int]]) -> None:
    waiting, came = receive(), [False] * (TOTAL + 12)
    for start, nbytes in claims:
        try:
            waiting.claim(start, nbytes)
        except FrameError:
            assert any(came[start : start + nbytes])
            return
        assert not any(came[start : start + nbytes])
        came[start : start + nbytes] = [True] * nbytes
        assert [i for i, mark in enumerate(came) if mark] == [i for piece in waiting.pieces for i in range(*piece)]
        gaps = zip(waiting.pieces, waiting.pieces[1:], strict=False)
        assert all(before[1] < after[0] for before, after in gaps)


@given(st.randoms(use_true_random=False))
def test_pieces_in_any_order_are_one_in_the_end(chance: random.Random) -> None:
    waiting, starts = receive(), list(range(0, TOTAL, 4))
    chance.shuffle(starts)
    for start in starts:
        waiting.claim(start, 4)
    assert waiting.pieces == [(0, TOTAL)]


def test_pieces_that_do_not_touch_are_bounded() -> None:
    waiting = receive()
    for number in range(PIECES_MAX):
        waiting.claim(2 * number, 1)
    with pytest.raises(FrameError, match="do not touch"):
        waiting.claim(2 * PIECES_MAX, 1)
