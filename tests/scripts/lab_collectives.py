"""A member of a group over the laboratory's network: reduces, checks every value, tells how long it took."""

import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from elastic_run.collectives.endpoint import DataView, Endpoint
from elastic_run.collectives.errors import CollectiveAborted
from elastic_run.collectives.mesh import Mesh
from elastic_run.collectives.options import MeshOptions

MEET_TIMEOUT_S = 60.0


def main(place: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(1)
    asked = place["arguments"]
    rank, size = place["rank"], len(place["addresses"])
    options = MeshOptions(listen_address=place["addresses"][rank], lanes_max=asked.get("lanes", 4))
    mesh = Mesh(f"w{rank}", b"laboratory secret", options=options)
    try:
        endpoints = meet(Path(asked["folder"]), rank, size, mesh.endpoint)
        group = mesh.install(DataView(number=1, members=endpoints))
        results = [reduce(group, rank, size, numel, asked["timeout_s"]) for numel in asked["numels"]]
        if asked.get("barrier", True):
            group.barrier(timeout_s=asked["timeout_s"]).wait()
        return {"results": results, "error": None}
    except CollectiveAborted as error:
        return {"results": [], "error": type(error).__name__, "culprit": error.culprit}
    finally:
        mesh.close()


def reduce(group: Any, rank: int, size: int, numel: int, timeout_s: float) -> float:
    """Return the seconds an all-reduce of `numel` floats took. Ends the process when a value is wrong."""
    tensor = torch.arange(numel, dtype=torch.float32).remainder_(1000).add_(rank)
    expected = torch.arange(numel, dtype=torch.float32).remainder_(1000).mul_(size).add_(size * (size - 1) / 2)
    begin = time.monotonic()
    group.all_reduce([tensor], timeout_s=timeout_s).wait()
    elapsed = time.monotonic() - begin
    if not torch.equal(tensor, expected):
        sys.exit("a wrong value")
    return elapsed


def meet(folder: Path, rank: int, size: int, mine: Endpoint) -> tuple[Endpoint, ...]:
    """Exchange endpoints through files."""
    draft = folder / f"{rank}.draft"
    draft.write_text(mine.to_text())
    os.rename(draft, folder / f"{rank}.endpoint")
    deadline = time.monotonic() + MEET_TIMEOUT_S
    while time.monotonic() < deadline:
        found = [folder / f"{other}.endpoint" for other in range(size)]
        if all(path.exists() for path in found):
            return tuple(Endpoint.from_text(path.read_text()) for path in found)
        time.sleep(0.01)
    sys.exit("the others did not come")
