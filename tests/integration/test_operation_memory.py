"""What an operation held is free when it has ended: the interpreter's search for cycles has nothing to find."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import mesh_workers
import pytest
import torch
from mesh_workers import Site

from elastic_run.collectives.errors import CollectiveAborted
from elastic_run.collectives.group import Group
from elastic_run.collectives.operation import Operation
from elastic_run.collectives.options import MeshOptions

Start = Callable[[Group, torch.Tensor], Operation]
STARTS: dict[str, Start] = {
    "all_reduce": lambda group, value: group.all_reduce([value]),
    "broadcast": lambda group, value: group.broadcast([value], 0),
    "all_gather": lambda group, value: group.all_gather(value.new_empty(group.size * value.numel()), value),
    "reduce_scatter": lambda group, value: group.reduce_scatter(value[: value.numel() // group.size], value),
}


@pytest.fixture(params=["shared memory", "tcp"])
def options(request: pytest.FixtureRequest) -> MeshOptions:
    return MeshOptions(shared_memory=request.param == "shared memory")


@pytest.mark.parametrize("recorded", [False, True], ids=["", "recorded"])
def test_an_operation_that_ended_well_leaves_no_cycle(
    options: MeshOptions, recorded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if recorded:
        monkeypatch.setenv("ELASTIC_RUN_TELEMETRY", str(tmp_path / "w.%p"))

    def count(site: Site) -> list[tuple[str, int]]:
        group = site.install()
        group.barrier().wait(30)
        gc.collect()
        gc.disable()
        left = []
        for name, start in STARTS.items():
            for numel in (100, 300_000):
                start(group, torch.ones(numel)).wait(30)
                group.barrier().wait(30)
                left.append((name, gc.collect()))
        return left

    for answers in mesh_workers.run(2, count, options):
        assert [count for _, count in answers] == [0] * (2 * len(STARTS)), answers


def test_an_aborted_operation_gives_its_tensors_back_at_once(options: MeshOptions) -> None:
    def abort(site: Site) -> bool:
        group = site.install()
        group.barrier().wait(30)
        if site.rank == 1:
            site.tell("here")
            return bool(site.hear())
        gc.disable()
        reference = _aborted(site, group)
        return reference() is None

    with mesh_workers.Crew(2, abort, options) as crew:
        crew.hear(1)
        assert crew.result(0)
        crew.tell(1, True)
        assert crew.result(1)


def _aborted(site: Site, group: Group) -> "weakref.ref[torch.Tensor]":
    value = torch.ones(300_000)
    operation = group.all_reduce([value])
    site.mesh.interrupt("enough")
    with pytest.raises(CollectiveAborted, match="enough"):
        operation.wait(30)
    return weakref.ref(value)
