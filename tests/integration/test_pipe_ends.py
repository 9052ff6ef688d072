"""A pipe's life between two sockets: it is waited for, said which one it is, ended early or late, and counted."""

import os
import socket
from collections.abc import Callable, Iterator

import pytest
from hostile_peer import read
from mesh_workers import SECRET, until

from elastic_run.collectives import handshake
from elastic_run.collectives.engine import Engine
from elastic_run.collectives.handshake import CHALLENGE_BYTES, HELLO_BYTES, PIPE_LANE, PROOF_BYTES
from elastic_run.collectives.pending import Pending
from elastic_run.collectives.pipes import PIPES_MAX, PipeOut, Pipes
from elastic_run.runtime.protocol.errors import PeerRefused

WAIT_S = 30.0
NUMBER = 0x1122334455667788


class Place:
    """A worker's pipes with one peer, and the peer's ends of them, which the test holds."""

    def __init__(self) -> None:
        self.broken: list[BaseException] = []
        self.engine = Engine(self.broken.append)
        self.pipes = Pipes(self.engine, "peer")
        self.outs: list[PipeOut] = []
        self.ends: list[socket.socket] = []

    def pair(self) -> tuple[socket.socket, socket.socket]:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.settimeout(WAIT_S)
        self.ends.append(theirs)
        return ours, theirs

    def attached(self, said: bytes = b"") -> socket.socket:
        """Return the peer's end of a pipe that it has dialled."""
        ours, theirs = self.pair()
        theirs.sendall(said)
        try:
            self.engine.call(lambda: self.pipes.attach(ours))
        except PeerRefused:
            ours.close()
            raise
        return theirs

    def out(self, dial: Callable[[], socket.socket]) -> PipeOut:
        def make() -> None:
            self.outs.append(PipeOut(self.engine, dial, "me", "peer", SECRET))

        self.engine.call(make)
        return self.outs[-1]

    def arrival(self, number: int) -> Pending:
        return self.asked(lambda: self.pipes.arrival(number))

    def opening(self, pipe: PipeOut) -> Pending:
        return self.asked(pipe.opening)

    def asked(self, question: Callable[[], Pending]) -> Pending:
        answers: list[Pending] = []
        self.engine.call(lambda: answers.append(question()))
        return answers[0]

    def close(self) -> None:
        def last() -> None:
            self.pipes.close()
            for pipe in self.outs:
                pipe.close()

        self.engine.close(last)
        for end in self.ends:
            end.close()


@pytest.fixture
def place() -> Iterator[Place]:
    before = len(os.listdir("/proc/self/fd"))
    made = Place()
    yield made
    made.close()
    assert not made.broken
    assert len(os.listdir("/proc/self/fd")) <= before, "every descriptor is given back"


def packed(number: int) -> bytes:
    return number.to_bytes(8, "little")


def proved(theirs: socket.socket) -> None:
    """Do what an honest listener does."""
    hello = read(theirs, HELLO_BYTES)
    assert handshake.unpack_hello(hello).lane == PIPE_LANE
    nonce = bytes(32)
    theirs.sendall(handshake.challenge(SECRET, hello, nonce))
    handshake.check_proof(SECRET, hello, nonce, read(theirs, PROOF_BYTES))


def test_all_who_wait_for_a_pipe_are_told_and_nobody_else(place: Place) -> None:
    waiting = [place.arrival(NUMBER) for _ in range(3)]
    for_another = place.arrival(NUMBER + 1)
    theirs = place.attached()
    for position, byte in enumerate(packed(NUMBER)):
        assert not any(pending.done for pending in waiting), position
        theirs.sendall(bytes([byte]))
    until(lambda: all(pending.done for pending in waiting))
    assert place.arrival(NUMBER).done, "who comes late need not wait"
    assert not for_another.done


def test_bytes_that_follow_the_number_are_left_to_its_user_even_after_the_end(place: Place) -> None:
    theirs = place.attached(packed(NUMBER) + b"parts")
    until(lambda: place.pipes.find(NUMBER) is not None)
    pipe = place.pipes.find(NUMBER)
    assert pipe is not None
    pipe.users += 1
    theirs.close()
    until(lambda: pipe.ended)
    assert place.pipes.find(NUMBER) is pipe, "ended, and still to be read"
    assert pipe.fd is not None
    assert [os.read(pipe.fd, 100), os.read(pipe.fd, 100)] == [b"parts", b""]


def test_an_idle_pipe_that_the_peer_closes_is_gone(place: Place) -> None:
    theirs = place.attached(packed(NUMBER))
    until(lambda: place.pipes.find(NUMBER) is not None)
    theirs.close()
    until(lambda: place.pipes.find(NUMBER) is None)
    assert not place.arrival(NUMBER).done


@pytest.mark.parametrize("said", [b"", packed(NUMBER)[:5]], ids=["nothing", "a part"])
def test_one_that_ends_before_it_says_its_number_leaves_who_waits_to_the_next(place: Place, said: bytes) -> None:
    waiting = place.arrival(NUMBER)
    place.attached(said).close()
    until(lambda: all(pipe.fd is None for pipe in place.pipes._in))
    assert not waiting.done
    place.attached(packed(NUMBER))
    until(lambda: waiting.done)


def test_connections_of_one_peer_are_counted_while_they_are_open(place: Place) -> None:
    most = 2 * PIPES_MAX + 1
    ends = [place.attached(packed(number)) for number in range(1, most + 1)]
    until(lambda: place.pipes.find(most) is not None)
    with pytest.raises(PeerRefused, match=f"peer has {most} pipes"):
        place.attached(packed(NUMBER))
    ends[3].close()
    until(lambda: place.pipes.find(4) is None)
    place.attached(packed(NUMBER))
    until(lambda: place.pipes.find(NUMBER) is not None)


def test_a_lost_peer_takes_what_arrived_along_or_leaves_it_to_be_read(place: Place) -> None:
    theirs = place.attached(packed(NUMBER) + b"rest")
    until(lambda: place.pipes.find(NUMBER) is not None)
    place.engine.call(lambda: place.pipes.close(keep_arrived=True))
    pipe = place.pipes.find(NUMBER)
    assert pipe is not None and pipe.fd is not None and os.read(pipe.fd, 100) == b"rest"
    waiting = place.arrival(NUMBER + 1)
    place.engine.call(place.pipes.close)
    assert place.pipes.find(NUMBER) is None
    assert theirs.recv(1) == b"", "it is closed"
    assert not waiting.done, "its operation is interrupted for another reason"


def test_the_number_is_the_first_thing_on_a_pipe_and_opens_it(place: Place) -> None:
    ours, theirs = place.pair()
    pipe = place.out(lambda: ours)
    waiting = [place.opening(pipe) for _ in range(2)]
    proved(theirs)
    assert read(theirs, 8) == packed(pipe.number)
    until(lambda: all(pending.done for pending in waiting))
    assert place.opening(pipe).done
    assert pipe.failure is None and pipe.fd is not None


def test_two_pipes_never_have_one_number(place: Place) -> None:
    pipes = [place.out(lambda: place.pair()[0]) for _ in range(5)]
    assert len({pipe.number for pipe in pipes} - {0}) == 5


@pytest.mark.parametrize("when", ["before the handshake", "in the handshake", "when it was open"])
def test_who_waits_for_a_pipe_hears_that_it_failed(place: Place, when: str) -> None:
    told: list[str] = []
    ours, theirs = place.pair()
    pipe = place.out(lambda: ours)
    pipe.on_failure.append(lambda: told.append("one"))
    pipe.on_failure.append(lambda: told.append("other"))
    waiting = [place.opening(pipe) for _ in range(2)]
    if when == "in the handshake":
        theirs.sendall(bytes(CHALLENGE_BYTES))
    elif when == "when it was open":
        proved(theirs)
        until(lambda: all(pending.done for pending in waiting))
        assert not told
    if when != "in the handshake":
        theirs.close()
    until(lambda: all(pending.done for pending in waiting) and len(told) == 2)
    assert told == ["one", "other"]
    assert pipe.failure is not None and pipe.fd is None
    assert place.opening(pipe).done, "nobody waits for what will never open"


def test_a_pipe_that_cannot_be_dialled_has_failed(place: Place) -> None:
    def refused() -> socket.socket:
        raise ConnectionRefusedError(111, "Connection refused")

    pipe = place.out(refused)
    waiting = place.opening(pipe)
    until(lambda: waiting.done)
    assert pipe.failure == "cannot connect: Connection refused"


def test_a_closed_pipe_tells_nobody_that_it_failed_and_whoever_asks_that_it_is_closed(place: Place) -> None:
    """Who closes it has ended what used it."""
    told: list[str] = []
    ours, theirs = place.pair()
    pipe = place.out(lambda: ours)
    pipe.on_failure.append(lambda: told.append("failed"))
    proved(theirs)
    place.engine.call(pipe.close)
    assert theirs.recv(8) in (b"", packed(pipe.number))
    assert place.opening(pipe).done
    assert pipe.failure == "closed" and not told


def test_a_group_that_finds_its_pipe_ended_gets_another(place: Place) -> None:
    ends: list[socket.socket] = []

    def dial() -> socket.socket:
        ours, theirs = place.pair()
        ends.append(theirs)
        return ours

    def pipe_to(group: int) -> PipeOut:
        def make() -> PipeOut:
            place.outs.append(PipeOut(place.engine, dial, "me", "peer", SECRET))
            return place.outs[-1]

        place.engine.call(lambda: found.append(place.pipes.to(group, make)))
        assert found[-1] is not None
        return found[-1]

    found: list[PipeOut | None] = []
    first = pipe_to(1)
    proved(ends[0])
    assert pipe_to(1) is first
    ends[0].close()
    until(lambda: first.failure is not None)
    second = pipe_to(1)
    assert second is not first and second.number != first.number
    assert (first.users, second.users) == (2, 1)
