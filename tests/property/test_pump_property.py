"""The compiled pump, driven by threads in place of processes: its bits, its order, its way back."""

import os
import socket
import threading
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_run.collectives import native
from elastic_run.collectives.algorithms.arithmetic import reduce_parts
from elastic_run.collectives.algorithms.flows import DONE, PAUSED, in_turn, packed
from elastic_run.collectives.algorithms.piped import BROKEN
from elastic_run.collectives.exact import Step
from elastic_run.collectives.reduction import Reduction

kernels = native.kernels
pytestmark = pytest.mark.skipif(kernels is None, reason="the kernels are not built here: no compiler")
LINE_BYTES = 64
LONG_NS = 10**9
TURNS_MAX = 100_000


@pytest.fixture(scope="module")
def quiet_fd() -> Iterator[int]:
    """Something that is never readable."""
    fd = os.eventfd(0, os.EFD_CLOEXEC)
    yield fd
    os.close(fd)


class Member:
    """Its tensors, with a guard behind what arrives."""

    def __init__(self, rank: int, value: torch.Tensor, arrived_bytes: int, *, in_place: bool, askew: bool) -> None:
        self.rank = rank
        self.given = value.clone()
        self.source = torch.empty(value.numel() + askew, dtype=value.dtype)[int(askew) :].copy_(value)
        self.target = self.source if in_place else torch.zeros_like(value)
        self.undo = torch.full((value.nbytes,), 0xA5, dtype=torch.uint8)
        memory = torch.randint(0, 256, (arrived_bytes + LINE_BYTES,), dtype=torch.uint8)
        self.arrived, self.beyond = memory[:arrived_bytes], (memory[arrived_bytes:], memory[arrived_bytes:].clone())
        self.pump: object = None


class Crowd:
    """Members with a byte stream each way between any two. Use as a context: it closes the sockets."""

    def __init__(
        self,
        values: list[torch.Tensor],
        *,
        piece: int = LINE_BYTES,
        window: int = 1,
        steps: bytes | None = None,
        divisor: float = 1.0,
        in_place: bool = True,
        askew: bool = False,
        buffer_bytes: int = 0,
    ) -> None:
        assert kernels is not None
        size = len(values)
        self.sends: dict[tuple[int, int], socket.socket] = {}
        """By who sends and who receives."""
        self.receives: dict[tuple[int, int], socket.socket] = {}
        for pair in [(one, other) for one in range(size) for other in range(size) if one != other]:
            self.receives[pair], self.sends[pair] = socket.socketpair()
            if buffer_bytes:
                self.sends[pair].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
        try:
            arrived_bytes = size * (window + 1) * piece
            self.members = [
                Member(rank, value, arrived_bytes, in_place=in_place, askew=askew) for rank, value in enumerate(values)
            ]
            for member in self.members:
                rank = member.rank
                member.pump = kernels.pump(
                    rank,
                    tuple(
                        (-1, -1)
                        if other == rank
                        else (self.receives[other, rank].fileno(), self.sends[rank, other].fileno())
                        for other in range(size)
                    ),
                    member.source.data_ptr(),
                    member.target.data_ptr(),
                    member.undo.data_ptr() if in_place else 0,
                    member.source.nbytes,
                    native.TYPES[member.source.dtype],
                    piece,
                    window,
                    member.arrived.data_ptr(),
                    member.arrived.numel(),
                    in_turn(size) if steps is None else steps,
                    divisor,
                )
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> "Crowd":
        return self

    def __exit__(self, *_: object) -> None:
        for sock in (*self.sends.values(), *self.receives.values()):
            sock.close()

    def finish(self, fd: int, limit_ns: int = LONG_NS) -> list[int]:
        """Drive every member by a thread of its own to its end."""
        states = [PAUSED] * len(self.members)

        def drive(member: Member) -> None:
            assert kernels is not None
            for _ in range(TURNS_MAX):
                states[member.rank], _ = kernels.pump_advance(member.pump, fd, limit_ns)
                if states[member.rank] != PAUSED:
                    return

        threads = [threading.Thread(target=drive, args=(member,)) for member in self.members]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return states

    def turn(self, rank: int, fd: int) -> tuple[int, int]:
        """Give a member a turn of no length."""
        assert kernels is not None
        state, other = kernels.pump_advance(self.members[rank].pump, fd, 0)
        return state, other


def drawn(dtype: torch.dtype, size: int, numel: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return list(torch.randn((size, numel), generator=generator).to(dtype))
    info = torch.iinfo(dtype)
    return list(torch.randint(info.min, info.max, (size, numel), dtype=dtype, generator=generator))


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@settings(deadline=None, max_examples=80)
@given(
    dtype=st.sampled_from(sorted(native.TYPES, key=str)),
    size=st.integers(2, 6),
    numel=st.integers(0, 6000),
    lines=st.integers(1, 40),
    window=st.integers(1, 4),
    in_place=st.booleans(),
    data=st.data(),
)
def test_bits_are_those_of_the_other_algorithms(
    quiet_fd: int,
    dtype: torch.dtype,
    size: int,
    numel: int,
    lines: int,
    window: int,
    in_place: bool,
    data: st.DataObject,
) -> None:
    average, askew, small = (data.draw(st.booleans()) for _ in range(3))
    values = drawn(dtype, size, numel, data.draw(st.integers(0, 1 << 30)))
    reduction = Reduction.AVG if average and dtype.is_floating_point else Reduction.SUM
    crowd = Crowd(
        values,
        piece=lines * LINE_BYTES,
        window=window,
        divisor=float(size) if reduction is Reduction.AVG else 1.0,
        in_place=in_place,
        askew=askew,
        buffer_bytes=1 if small else 0,  # the least the system has: sends stop in the middle of a piece
    )
    with crowd:
        assert crowd.finish(quiet_fd) == [DONE] * size
    expected = torch.empty_like(values[0])
    reduce_parts(expected, values, reduction)
    for member in crowd.members:
        assert same(member.target, expected)
        assert in_place or same(member.source, member.given), "what is not in place leaves its source alone"
        assert torch.equal(*member.beyond), "nothing is written behind what arrives"


@settings(deadline=None, max_examples=30)
@given(size=st.integers(2, 6), numel=st.integers(1, 3000), seed=st.integers(0, 1 << 30))
def test_steps_say_the_order_of_the_sum(quiet_fd: int, size: int, numel: int, seed: int) -> None:
    """From the last to the first, which rounds differently."""
    values = drawn(torch.float32, size, numel, seed)
    order = list(range(size - 1, -1, -1))
    steps = packed((Step(0, 0, 1), *(Step(0, ~0, part) for part in range(2, size))), tuple(order))
    with Crowd(values, steps=steps) as crowd:
        assert crowd.finish(quiet_fd) == [DONE] * size
    expected = torch.empty_like(values[0])
    reduce_parts(expected, [values[rank] for rank in order], Reduction.SUM)
    assert all(same(member.target, expected) for member in crowd.members)


@settings(deadline=None, max_examples=60)
@given(
    size=st.integers(2, 5),
    numel=st.integers(1, 20_000),
    lines=st.integers(1, 20),
    turns=st.lists(st.integers(0, 4), max_size=60),
    small=st.booleans(),
    seed=st.integers(0, 1 << 30),
)
def test_interrupted_anywhere_the_input_comes_back(
    quiet_fd: int, size: int, numel: int, lines: int, turns: list[int], small: bool, seed: int
) -> None:
    """Members get turns of no length; then all are interrupted."""
    assert kernels is not None
    values = drawn(torch.float32, size, numel, seed)
    with Crowd(values, piece=lines * LINE_BYTES, window=2, buffer_bytes=1 if small else 0) as crowd:
        for turn in turns:
            crowd.turn(turn % size, quiet_fd)
        for member in crowd.members:
            kernels.pump_restore(member.pump)
            assert same(member.source, member.given)


@settings(deadline=None, max_examples=30)
@given(ahead=st.integers(0, 2000), parts=st.booleans(), seed=st.integers(0, 1 << 30))
def test_whoever_sends_what_was_not_asked_for_yet_ruins_no_input(
    quiet_fd: int, ahead: int, parts: bool, seed: int
) -> None:
    """Rank 1 sends junk, also in place of results of what it has not got; nobody reads what goes to it."""
    assert kernels is not None
    values = drawn(torch.float32, 2, 20_000, seed)
    with Crowd(values, piece=4 * LINE_BYTES, buffer_bytes=1) as crowd:
        junk = torch.randint(0, 256, (64 * ahead,), dtype=torch.uint8).numpy().tobytes()
        crowd.sends[1, 0].setblocking(False)
        if junk:
            crowd.sends[1, 0].send(junk)
        for _ in range(10 if parts else 100):
            crowd.turn(0, quiet_fd)
        member = crowd.members[0]
        kernels.pump_restore(member.pump)
        assert same(member.source, member.given)
        assert torch.equal(*member.beyond)


@settings(deadline=None, max_examples=30)
@given(
    size=st.integers(2, 5),
    ended=st.integers(0, 4),
    turns=st.lists(st.integers(0, 4), max_size=20),
    receiving=st.booleans(),
)
def test_a_closed_socket_is_told_with_its_rank(
    quiet_fd: int, size: int, ended: int, turns: list[int], receiving: bool
) -> None:
    """Everybody who is told anything is told that; at the very beginning everybody is."""
    assert kernels is not None
    ended %= size
    with Crowd(drawn(torch.float32, size, 400_000, 1), piece=64 * LINE_BYTES, buffer_bytes=1) as crowd:
        for turn in turns:
            crowd.turn(turn % size, quiet_fd)
        for pair, sock in (crowd.receives if receiving else crowd.sends).items():
            if pair[receiving] == ended:
                sock.close()
        for member in crowd.members:
            if member.rank == ended:
                continue
            told = {crowd.turn(member.rank, quiet_fd) for _ in range(30)}
            assert all(rank == ended for state, rank in told if state == BROKEN)
            assert not any(state == DONE for state, _ in told)
            assert turns or any(state == BROKEN for state, _ in told)
            kernels.pump_restore(member.pump)
            assert same(member.source, member.given)


def test_something_readable_ends_the_slice() -> None:
    """A member that waits for another one must not wait on when its connections have news."""
    assert kernels is not None
    fd = os.eventfd(1, os.EFD_CLOEXEC)
    try:
        with Crowd(drawn(torch.float32, 2, 5000, 1), piece=256) as crowd:
            pump = crowd.members[0].pump
            assert kernels.pump_advance(pump, fd, 3600 * 10**9) == (PAUSED, 1)
            sent, received, _, blocked_ns, sent_all, received_all = kernels.pump_progress(pump, 1)
            assert (sent, received) == (256, 0), "as many pieces as the window has, then results, which are not there"
            assert blocked_ns > 0
            assert not sent_all
            assert not received_all
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    "wrong",
    [
        {"descriptors": ((-1, -1),)},
        {"descriptors": ((-1, -1),) * 65, "memory_bytes": 65 * 128, "steps": in_turn(65)},
        {"rank": 2},
        {"rank": -1},
        {"type": 9},
        {"nbytes": -4},
        {"nbytes": 6},
        {"piece": 0},
        {"piece": 100},
        {"window": 0},
        {"window": 2},
        {"memory_bytes": 2 * 128 - 1},
        {"steps": b""},
        {"steps": packed((Step(0, 0, 2),))},
        {"steps": packed((Step(16, 0, 1),))},
        {"steps": packed((Step(0, ~16, 1),))},
    ],
)
def test_a_pump_that_cannot_be_is_refused(wrong: dict[str, object]) -> None:
    assert kernels is not None
    arguments = {
        "rank": 0,
        "descriptors": ((-1, -1), (-1, -1)),
        "source": 64,
        "target": 64,
        "undo": 0,
        "nbytes": 8,
        "type": 0,
        "piece": 64,
        "window": 1,
        "memory": 64,
        "memory_bytes": 2 * 128,
        "steps": in_turn(2),
        "divisor": 1.0,
    }
    with pytest.raises(ValueError, match="no such pump"):
        kernels.pump(*(arguments | wrong).values())  # type: ignore[arg-type]
