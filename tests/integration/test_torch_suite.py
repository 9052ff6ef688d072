"""torch's own collective tests, those listed in docs/torch_suite.md, over backend "elastic"."""

from pathlib import Path
from typing import Any

import pytest
from torch_ranks import run_ranks

NAMES = [
    line.strip()
    for line in (Path(__file__).parents[2] / "docs" / "torch_suite.md").read_text().splitlines()
    if line.startswith("test_")
]
RANKS = 4

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    directory = tmp_path_factory.mktemp("suite")
    (directory / "names").write_text("\n".join(NAMES))
    return run_ranks(
        "torch_suite:run_suite",
        size=RANKS,
        backend="elastic",
        directory=directory,
        environment={"BACKEND": "elastic", "WORLD_SIZE": str(RANKS)},
    )


@pytest.mark.parametrize("name", NAMES)
def test_torch_says_the_backend_is_right(outcomes: list[dict[str, Any]], name: str) -> None:
    assert [outcome.get(name, outcome.get("error")) for outcome in outcomes] == ["passed"] * RANKS
