"""One direction of the network laboratory, by what arrives and when."""

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_run.chaos.network.direction import BITS, Direction, Shape
from elastic_run.runtime.protocol.errors import UserError

HOUR_S = 3600.0
FRAME = bytes(1000)


def direction(shape: Shape, *, seed: int = 0, in_flight_bytes_max: int = 10**9) -> Direction:
    made = Direction(chance=random.Random(seed), in_flight_bytes_max=in_flight_bytes_max)
    made.reshape(shape, 0.0)
    return made


def arrivals(line: Direction, offered: list[tuple[float, int]]) -> list[tuple[int, float]]:
    """Offer frames (time, bytes), numbered in their first bytes, and return (number, arrival time) as they arrive."""
    arrived = []
    for number, (now_s, size) in enumerate(offered):
        arrived += drain(line, now_s)
        if line.offer(number.to_bytes(4, "big").ljust(size, b"\0"), now_s):
            arrived.append((number, now_s))
    return arrived + drain(line, float("inf"))


def drain(line: Direction, until_s: float) -> list[tuple[int, float]]:
    arrived = []
    while (due_s := line.next_due_s()) is not None and due_s <= until_s:
        arrived += [(int.from_bytes(frame[:4], "big"), due_s) for frame in line.arrived(due_s)]
    return arrived


offers = st.lists(st.tuples(st.floats(0.0, 0.01), st.integers(64, 1514)), max_size=60).map(
    lambda steps: [(sum(gap for gap, _ in steps[: index + 1]), size) for index, (_, size) in enumerate(steps)]
)
shapes = st.builds(
    Shape,
    delay_s=st.sampled_from((0.0, 0.005, 0.05)),
    jitter_s=st.sampled_from((0.0, 0.02)),
    loss=st.sampled_from((0.0, 0.3)),
    rate_bits_per_s=st.sampled_from((None, 1e5, 2e7)),
    queue_bytes=st.sampled_from((1, 5000, 10**6)),
)


@given(shape=shapes, offered=offers, seed=st.integers(0, 100))
def test_frames_arrive_in_order_and_never_before_their_delay(
    shape: Shape, offered: list[tuple[float, int]], seed: int
) -> None:
    arrived = arrivals(direction(shape, seed=seed), offered)
    assert [number for number, _ in arrived] == sorted({number for number, _ in arrived})
    assert all(due_s >= offered[number][0] + shape.delay_s for number, due_s in arrived)


@given(shape=shapes, offered=offers, seed=st.integers(0, 100))
def test_every_frame_is_delivered_or_counted_under_a_cause(
    shape: Shape, offered: list[tuple[float, int]], seed: int
) -> None:
    line = direction(shape, seed=seed)
    arrived, counters = arrivals(line, offered), line.counters
    dropped = counters.dropped_by_loss + counters.dropped_queue_full + counters.dropped_memory_full
    assert counters.offered_frames == len(offered) == len(arrived) + dropped
    assert counters.dropped_blocked == 0


@given(offered=offers, rate=st.sampled_from((1e5, 2e7)))
def test_no_stretch_of_time_carries_more_than_the_rate(offered: list[tuple[float, int]], rate: float) -> None:
    arrived = arrivals(direction(Shape(rate_bits_per_s=rate, queue_bytes=10**9)), offered)
    assert len(arrived) == len(offered)
    for first in range(len(arrived)):
        carried_bits = 0
        for number, due_s in arrived[first + 1 :]:
            carried_bits += offered[number][1] * BITS
            assert due_s - arrived[first][1] >= carried_bits / rate * (1 - 1e-9)


def test_a_full_queue_drops_and_counts() -> None:
    line = direction(Shape(rate_bits_per_s=8000.0, queue_bytes=2500))
    arrived = arrivals(line, [(0.0, 1000)] * 10)
    assert [number for number, _ in arrived] == [0, 1, 2]
    assert line.counters.dropped_queue_full == 7


def test_frames_under_way_are_bounded_in_bytes() -> None:
    line = direction(Shape(delay_s=1.0), in_flight_bytes_max=2500)
    assert len(arrivals(line, [(0.0, 1000)] * 5)) == 2
    assert line.counters.dropped_memory_full == 3
    assert len(arrivals(line, [(10.0, 1000)] * 2)) == 2


def test_jitter_stays_within_its_bounds_and_is_used() -> None:
    offered = [(float(second), 100) for second in range(200)]
    arrived = arrivals(direction(Shape(delay_s=0.1, jitter_s=0.2)), offered)
    extra = [due_s - offered[number][0] - 0.1 for number, due_s in arrived]
    assert -1e-9 <= min(extra) < 0.05 and 0.15 < max(extra) <= 0.2 + 1e-9


@pytest.mark.parametrize("loss", [0.0, 0.02, 0.5, 1.0])
def test_loss_is_near_its_probability(loss: float) -> None:
    line = direction(Shape(loss=loss), seed=1)
    arrived = sum(line.offer(FRAME, 0.0) for _ in range(20_000))
    assert abs((20_000 - arrived) / 20_000 - loss) < 0.015


def test_cutting_the_line_loses_what_is_under_way() -> None:
    line = direction(Shape(delay_s=1.0))
    line.offer(FRAME, 0.0)
    line.reshape(Shape(blocked=True), 0.5)
    line.offer(FRAME, 0.6)
    line.reshape(Shape(), 0.7)
    assert line.counters.dropped_blocked == 2
    assert line.next_due_s() is None


@pytest.mark.parametrize("slow", [Shape(delay_s=HOUR_S), Shape(rate_bits_per_s=1.0), Shape(jitter_s=HOUR_S)])
def test_a_healed_line_delivers_what_is_under_way_at_once(slow: Shape) -> None:
    line = direction(slow)
    for _ in range(3):
        line.offer(FRAME, 0.0)
    line.reshape(Shape(), 1.0)
    assert len(line.arrived(1.0)) == 3
    assert line.offer(FRAME, 1.0)


@given(before=shapes, after=shapes, offered=offers, seed=st.integers(0, 100))
def test_a_change_never_delays_or_reorders_what_is_under_way(
    before: Shape, after: Shape, offered: list[tuple[float, int]], seed: int
) -> None:
    changed, unchanged = direction(before, seed=seed), direction(before, seed=seed)
    for number, (now_s, size) in enumerate(offered):
        for line in (changed, unchanged):
            line.arrived(now_s)
            line.offer(number.to_bytes(4, "big").ljust(size, b"\0"), now_s)
    changed.reshape(after, offered[-1][0] if offered else 0.0)
    expected = dict(drain(unchanged, float("inf")))
    arrived = drain(changed, float("inf"))
    assert [number for number, _ in arrived] == list(expected)
    assert all(due_s <= expected[number] for number, due_s in arrived)
    assert all(earlier <= later for (_, earlier), (_, later) in pairwise(arrived))


@pytest.mark.parametrize(
    "wrong",
    [
        {"delay_s": -0.1},
        {"delay_s": float("nan")},
        {"jitter_s": float("inf")},
        {"loss": 1.1},
        {"rate_bits_per_s": 0.0},
        {"rate_bits_per_s": float("nan")},
        {"queue_bytes": 0},
    ],
)
def test_what_no_line_can_be_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError):
        Shape(**wrong)  # type: ignore[arg-type]
