"""Which pipe a group gets, and which one has to go for it. What travels there: tests/integration/test_pipe_ends.py."""

from dataclasses import dataclass, field
from typing import cast

from elastic_run.collectives.engine import Engine
from elastic_run.collectives.pipes import PIPES_MAX, PipeOut, Pipes


@dataclass(slots=True)
class Plain:
    """A pipe as far as the books know it: without a connection."""

    users: int = 0
    failure: str | None = None
    closed: bool = False

    def close(self) -> None:
        self.closed = True


@dataclass(slots=True)
class Books:
    """Those with one peer, and every pipe that was ever made."""

    pipes: Pipes = field(default_factory=lambda: Pipes(cast(Engine, None), "w1"))
    made: list[Plain] = field(default_factory=list)

    def make(self) -> PipeOut:
        self.made.append(Plain())
        return cast(PipeOut, self.made[-1])

    def to(self, group: int) -> Plain | None:
        return cast(Plain | None, self.pipes.to(group, self.make))

    def used(self, group: int) -> Plain:
        """Give the group its pipe for an operation that ends at once."""
        pipe = self.to(group)
        assert pipe is not None
        pipe.users -= 1
        return pipe

    def filled(self) -> list[Plain]:
        return [self.used(group) for group in range(PIPES_MAX)]


def test_a_group_keeps_its_pipe_and_every_user_counts() -> None:
    books = Books()
    first = books.to(1)
    assert first is books.to(1) is not books.to(2)
    assert first is not None and first.users == 2
    assert len(books.made) == 2


def test_a_broken_pipe_is_closed_and_another_one_made() -> None:
    books = Books()
    broken = books.used(1)
    broken.failure = "connection closed by the peer"
    fresh = books.to(1)
    assert fresh is not broken and broken.closed
    assert fresh is not None and fresh.users == 1


def test_of_too_many_the_one_used_longest_ago_is_closed() -> None:
    books = Books()
    pipes = books.filled()
    assert books.used(0) is pipes[0]  # so the next one in turn is the oldest
    books.used(PIPES_MAX)
    assert [number for number, pipe in enumerate(books.made) if pipe.closed] == [1]
    assert books.used(1) is not pipes[1]
    assert [number for number, pipe in enumerate(books.made) if pipe.closed] == [1, 2]


def test_one_in_use_is_never_closed_for_another() -> None:
    books = Books()
    pipes = books.filled()
    for group in range(PIPES_MAX - 1):
        books.to(group)
    books.used(PIPES_MAX)
    assert [number for number, pipe in enumerate(pipes) if pipe.closed] == [PIPES_MAX - 1]


def test_where_all_are_in_use_there_is_none_until_one_is_free() -> None:
    books = Books()
    for group in range(PIPES_MAX):
        books.to(group)
    assert books.to(PIPES_MAX) is None
    assert len(books.made) == PIPES_MAX, "nothing is dialled in vain"
    assert not any(pipe.closed for pipe in books.made)
    assert books.to(7) is books.made[7], "who has one keeps it"
    books.made[7].users = 0
    assert books.to(PIPES_MAX) is books.made[PIPES_MAX]
    assert books.made[7].closed


def test_a_broken_pipe_gives_its_place_to_its_own_group() -> None:
    books = Books()
    for group in range(PIPES_MAX):
        books.to(group)
    books.made[3].failure = "closed"
    assert books.to(3) is books.made[PIPES_MAX]
    assert [number for number, pipe in enumerate(books.made) if pipe.closed] == [3]


def test_a_lost_peer_takes_all_along() -> None:
    books = Books()
    pipes = books.filled()
    books.pipes.close()
    assert all(pipe.closed for pipe in pipes)
    assert books.to(0) is books.made[PIPES_MAX]
