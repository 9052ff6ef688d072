"""Thousands of hostile worlds, each replayed from its number: `make sim SEED=n`."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from simulation.clock import RanAway
from simulation.world import World

LINES_SHOWN = 120
TESTS = Path(__file__).parents[1]
DIGESTS = """
import sys
from simulation.world import World
for seed in map(int, sys.argv[1:]):
    world = World(seed)
    world.live()
    print(seed, world.sim.digest)
"""


def live(world: World) -> None:
    """Live a world through; a failure tells all that is needed to see it again."""
    try:
        world.live()
    except (AssertionError, RanAway) as failure:
        story = "\n".join(list(world.sim.tail)[-LINES_SHOWN:])
        pytest.fail(f"{story}\n\n{world.options}\n{failure}\n\nreplay: make sim SEED={world.seed}", pytrace=False)


def test_worlds_keep_their_promises(seeds: range) -> None:
    for seed in seeds:
        live(World(seed))


def test_worlds_are_hostile_enough_to_mean_something() -> None:
    seen: Counter[str] = Counter()
    for seed in range(60):
        world = World(seed)
        live(world)
        seen["views"] += len(world.checkers.views)
        seen["terms"] += len(world.checkers.leaders)
        seen["lives of nodes"] += sum(world.lives.values())
        seen[str(world.checkers.result.state if world.checkers.result else None)] += 1
    assert seen["views"] > 120
    assert seen["terms"] > 120
    assert seen["lives of nodes"] > 250
    assert seen["succeeded"] > 20
    assert seen["failed"] > 3


def digests(hash_seed: str, seeds: list[str]) -> str:
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(TESTS)}
    run = subprocess.run(
        [sys.executable, "-c", DIGESTS, *seeds],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return run.stdout


def test_a_seed_gives_the_same_transcript_whatever_the_hash_seed() -> None:
    seeds = ["1", "2", "3", "17", "43"]
    first = digests("0", seeds)
    assert len(set(first.split())) == 2 * len(seeds)
    assert digests("1", seeds) == first
    assert digests("4711", seeds) == first
