"""Options of the simulation: --seed=N replays one world, --worlds=N says how many are tried."""

import pytest

WORLDS_DEFAULT = 2000
BLOCK = 50
"""Worlds in one test."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("simulation")
    group.addoption("--seed", type=int, default=None, help="replay the world of this seed only")
    group.addoption("--worlds", type=int, default=WORLDS_DEFAULT, help="how many seeded worlds to try")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seeds" not in metafunc.fixturenames:
        return
    seed = metafunc.config.getoption("--seed", default=None)
    worlds = metafunc.config.getoption("--worlds", default=WORLDS_DEFAULT)
    blocks = [range(first, min(first + BLOCK, worlds)) for first in range(0, worlds, BLOCK)]
    if seed is not None:
        blocks = [range(seed, seed + 1)]
    metafunc.parametrize("seeds", blocks, ids=[f"{block[0]}-{block[-1]}" for block in blocks])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A replay runs nothing else."""
    if config.getoption("--seed", default=None) is not None:
        items[:] = [item for item in items if item.name.startswith("test_worlds_keep_their_promises")]
