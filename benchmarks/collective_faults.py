"""What a lost and a new member cost those that go on: ours, whose groups are edited, and gloo, formed anew.

`kill`: SIGKILL of one of four members in the middle of a 64 MB all-reduce. The others are told the next view at once;
the value is the time from the kill to the end of the last survivor's next all-reduce. gloo's group is destroyed and
formed again through a TCPStore, kept in the benchmark's process, under a fresh prefix.

`join`: four members reduce 1 MB in a loop while a fifth is brought in; the value is the longest time between the ends
of two operations in a row at any of the four, from the fifth's first connection to the first result that has its part;
beside it the same before anything happened, and the one gap in which the view changed. In ours the fifth connects
before the view that has it comes; the four take that view at the same operation.
"""

import contextlib
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.crew import Crew, assembled
from benchmarks.harness import Benchmark, BenchmarkError, Case, Context, Target
from benchmarks.systems import ELASTIC_MESH, GLOO

SEEDS = 20
SEEDS_QUICK = 5
WORKERS = 4
MIB = 1 << 20
STRUCK_BYTES = 64 * MIB
LOOP_BYTES = MIB
# The first touches new memory.
PLAIN_OPERATIONS = 3
# Where in the expected duration of the operation the kill falls.
STRIKE_EARLIEST = 0.1
STRIKE_LATEST = 0.5
TRIES_MAX = 5
# Long enough to see how the loop goes undisturbed, and that it goes on after the join.
SETTLED_AFTER = 80
LOOP_WARM_UP = 20
KILL_METRIC = "kill_to_next_result_ms"
NOTICE_METRIC = "kill_to_all_noticed_ms"
PLAIN_METRIC = "plain_operation_ms"
JOIN_METRIC = "join_longest_gap_ms"
UNDISTURBED_METRIC = "undisturbed_longest_gap_ms"
CHANGE_METRIC = "join_change_of_view_ms"
KILL_AT_MOST_MS = 150.0
JOIN_AT_MOST_MS = 20.0
NS_PER_MS = 1e6


@dataclass(slots=True, kw_only=True)
class Troop:
    """A crew, who of it is in the group, and who has not been needed yet."""

    crew: Crew
    members: list[int]
    spares: list[int]
    chance: random.Random = field(default_factory=lambda: random.Random(0))

    def take_spare(self) -> int:
        if not self.spares:
            raise BenchmarkError(f"{self.crew.backend}: more members died than were planned for")
        return self.spares.pop(0)


def kill(system: str, context: Context) -> Mapping[str, float]:
    """One kill that hit an operation under way."""
    troop = troop_of(system, context)
    for _ in range(TRIES_MAX):
        found = strike(troop)
        if found is not None:
            return found
    raise BenchmarkError(f"{system}: {TRIES_MAX} kills in a row came after the operation's end")


def strike(troop: Troop) -> Mapping[str, float] | None:
    """Kills a member within an operation, and puts a spare in its place; None when it was too late."""
    crew, members = troop.crew, troop.members
    crew.form(members)
    victim = troop.chance.choice(members)
    survivors = [member for member in members if member != victim]
    for rank, member in enumerate(members):
        crew.tell(
            member,
            "be_struck",
            bytes=STRUCK_BYTES,
            rank=rank,
            workers=len(members),
            plain=PLAIN_OPERATIONS,
            victim_rank=members.index(victim),
        )
    plain_ns = plain_operation_ns(crew, members)
    views = crew.next_view(survivors)
    delay_s = plain_ns / 1e9 * troop.chance.uniform(STRIKE_EARLIEST, STRIKE_LATEST)
    crew.start_together(members)
    time.sleep(delay_s)
    killed_ns = time.monotonic_ns()
    crew.kill(victim)
    for member, view in zip(survivors, views, strict=True):
        crew.tell(member, "next_view", view=view)
    said = [crew.answer(member) for member in survivors]
    troop.members[members.index(victim)] = troop.take_spare()
    if not all(one["unchanged"] for one in said):
        raise BenchmarkError(f"{crew.backend}: an interrupted operation changed its input")
    if all(one["reason"] is None for one in said):
        return None
    return {
        KILL_METRIC: (max(one["done_ns"] for one in said) - killed_ns) / NS_PER_MS,
        NOTICE_METRIC: (max(one["noticed_ns"] for one in said) - killed_ns) / NS_PER_MS,
        PLAIN_METRIC: plain_ns / NS_PER_MS,
    }


def plain_operation_ns(crew: Crew, members: Sequence[int]) -> float:
    """The median over the undisturbed operations of the slowest member's time, the first left out."""
    slowest: list[int] = []
    for _ in range(PLAIN_OPERATIONS):
        crew.start_together(members)
        slowest.append(max(crew.answer(member)["plain_ns"] for member in members))
    return median(slowest[1:])


def join(system: str, context: Context) -> Mapping[str, float]:
    """One join."""
    return join_loop(troop_of(system, context))


def join_loop(troop: Troop) -> Mapping[str, float]:
    """A fifth member comes into a running loop, and goes when the loop is over."""
    crew, members, newcomer = troop.crew, troop.members, troop.take_spare()
    crew.form(members)
    start_loop(crew, members, crew.last_view(members), newcomer=False)
    settle(crew, members)
    began_ns = time.monotonic_ns()
    everyone = [*members, newcomer]
    fresh = crew.introduce(newcomer)
    known = [crew.introduce(member) for member in members]
    for member in members:
        crew.tell(member, "prepare", introductions=[fresh])
    crew.tell(newcomer, "prepare", introductions=known)
    for member in everyone:
        crew.answer(member)
    views = crew.next_view(everyone)
    start_loop(crew, [newcomer], views[-1:], newcomer=True)
    crew.answer(newcomer)
    for member, view in zip(members, views, strict=False):
        crew.tell(member, "next_view", view=view)
    settle(crew, everyone)
    for member in everyone:
        crew.tell(member, "over")
    said = [crew.answer(member) for member in everyone]
    crew.leave(newcomer)
    troop.spares.append(newcomer)
    # What comes after is no pause: five share the machine then.
    own = [one["done_ns"][: one["first_of_next"] + 1] for one in said[:-1]]
    return {
        JOIN_METRIC: max(longest_gap_ns(done_ns, since_ns=began_ns) for done_ns in own) / NS_PER_MS,
        UNDISTURBED_METRIC: max(longest_gap_ns(done_ns, until_ns=began_ns) for done_ns in own) / NS_PER_MS,
        CHANGE_METRIC: max(done_ns[-1] - done_ns[-2] for done_ns in own) / NS_PER_MS,
    }


def start_loop(crew: Crew, members: Sequence[int], views: Sequence[dict[str, Any]], *, newcomer: bool) -> None:
    for member, view in zip(members, views, strict=True):
        crew.tell(member, "loop", bytes=LOOP_BYTES, settled_after=SETTLED_AFTER, view=view, newcomer=newcomer)


def settle(crew: Crew, members: Sequence[int]) -> None:
    """Waits until each has done so many operations in its view."""
    for member in members:
        crew.answer(member)


def longest_gap_ns(done_ns: Sequence[int], *, since_ns: int = 0, until_ns: int | None = None) -> int:
    """The longest time between two ends in a row of which the later lies in the given time; warm-up left out."""
    later = done_ns[LOOP_WARM_UP + 1 :]
    gaps = [end - before for before, end in zip(done_ns[LOOP_WARM_UP:], later, strict=False)]
    chosen = [
        gap for gap, end in zip(gaps, later, strict=True) if end >= since_ns and (until_ns is None or end < until_ns)
    ]
    if not chosen:
        raise BenchmarkError("the loop did nothing in the time looked at")
    return max(chosen)


def troop_of(system: str, context: Context) -> Troop:
    seeds = SEEDS_QUICK if context.quick else SEEDS
    # For each kill, warm-up included, one that came too late, and the one that joins: a member that waits is cheap.
    spares = 2 * (seeds + 1) + TRIES_MAX + 1
    return context.kept.get(system, lambda: mustered(system, spares, context.directory))


@contextlib.contextmanager
def mustered(system: str, spares: int, directory: Path) -> Iterator[Troop]:
    with assembled(system, WORKERS + spares, directory) as crew:
        members = list(range(WORKERS))
        yield Troop(crew=crew, members=members, spares=list(range(WORKERS, WORKERS + spares)))


def conditions(quick: bool) -> dict[str, Any]:
    return {
        "workers": WORKERS,
        "struck_bytes": STRUCK_BYTES,
        "loop_bytes": LOOP_BYTES,
        "seeds": SEEDS_QUICK if quick else SEEDS,
        "kill_at": f"{STRIKE_EARLIEST} to {STRIKE_LATEST} of a plain operation's time, by seed",
        "loop_operations_before_join": SETTLED_AFTER,
        "gap": "between the ends of two operations in a row, filling and checking included",
    }


BENCHMARK = Benchmark(
    name="collective_faults",
    summary="kill of a peer within an all-reduce, join of a peer: ours edited in place, gloo formed anew",
    cases=(
        Case(
            name="kill of one of 4",
            systems=(GLOO, ELASTIC_MESH),
            units={KILL_METRIC: "ms", NOTICE_METRIC: "ms", PLAIN_METRIC: "ms"},
            run=kill,
        ),
        Case(
            name="join of a fifth",
            systems=(GLOO, ELASTIC_MESH),
            units={JOIN_METRIC: "ms", UNDISTURBED_METRIC: "ms", CHANGE_METRIC: "ms"},
            run=join,
        ),
    ),
    rounds=SEEDS,
    rounds_quick=SEEDS_QUICK,
    warm_up_quick=False,
    conditions=conditions,
    targets=(
        Target(metric=KILL_METRIC, over=ELASTIC_MESH, at_most=KILL_AT_MOST_MS),
        Target(metric=JOIN_METRIC, over=ELASTIC_MESH, at_most=JOIN_AT_MOST_MS),
    ),
)
