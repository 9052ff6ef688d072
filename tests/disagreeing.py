"""Members of a group that call different operations at the same place of its sequence: who means what."""

from collections.abc import Callable

import pytest
import torch
from mesh_workers import Crew, Site

from elastic_run.collectives.dyadic import blocks_of
from elastic_run.collectives.errors import CollectiveError
from elastic_run.collectives.group import Group
from elastic_run.collectives.operation import Operation
from elastic_run.collectives.options import MeshOptions

NUMEL = 50_000
"""Of float32: what compiled kernels take."""
WAIT_S = 30.0


def _exact(group: Group, numel: int, dtype: torch.dtype = torch.float32, *, placed: bool = False) -> Operation:
    (block,) = blocks_of(range(group.rank, group.rank + 1), group.size)
    data = torch.ones(numel, dtype=dtype)
    placement = [blocks_of(range(rank, rank + 1), group.size) for rank in range(group.size)] if placed else None
    return group.all_reduce_exact(data, {block: data}, group.size, placement=placement)


MOST: dict[str, Callable[[Group], Operation]] = {
    "all_reduce": lambda group: group.all_reduce([torch.ones(NUMEL)]),
    "exact": lambda group: _exact(group, NUMEL),
    "exact, placed": lambda group: _exact(group, NUMEL, placed=True),
}
OTHERS: dict[str, Callable[[Group], Operation]] = {
    "a smaller all_reduce": lambda group: group.all_reduce([torch.ones(NUMEL // 2)]),
    "an all_reduce of little": lambda group: group.all_reduce([torch.ones(2)]),
    "a larger all_reduce": lambda group: group.all_reduce([torch.ones(20 * NUMEL)]),
    "integers": lambda group: group.all_reduce([torch.ones(NUMEL, dtype=torch.int32)]),
    "what is not compiled": lambda group: group.all_reduce([torch.ones(2 * NUMEL, dtype=torch.float16)]),
    "all_gather": lambda group: group.all_gather(torch.ones(group.size * NUMEL), torch.ones(NUMEL)),
    "broadcast": lambda group: group.broadcast([torch.ones(NUMEL)], 0),
    "barrier": lambda group: group.barrier(),
    "a smaller exact": lambda group: _exact(group, NUMEL // 2),
    "an exact that is not compiled": lambda group: _exact(group, 2 * NUMEL, torch.float16),
    "a smaller exact, placed": lambda group: _exact(group, NUMEL // 2, placed=True),
}
OWN_BROADCAST: dict[str, Callable[[Group], Operation]] = {
    "a broadcast of its own": lambda group: group.broadcast([torch.ones(NUMEL)], group.size - 1),
}
"""Through shared memory its root is done before it can hear anything."""


def _in_step(group: Group, called: Callable[[Group], Operation]) -> None:
    """Let all begin together; whom the barrier lets go last may hear of the disagreement in it."""
    group.barrier().wait(WAIT_S)
    called(group).wait(WAIT_S)


def disagree(most: str, options: MeshOptions | None = None) -> None:
    """Let the last of three members call each of the others' operations in turn: all must be told."""
    one_way = OWN_BROADCAST if options is not None and not options.shared_memory else {}
    others = OTHERS | one_way

    def program(site: Site) -> None:
        for number, other in enumerate(sorted(others), start=1):
            group = site.install(number)
            called = others[other] if site.rank == group.size - 1 else MOST[most]
            with pytest.raises(CollectiveError) as told:
                _in_step(group, called)
            assert "must call the same operations" in str(told.value), (other, told.value)
            site.tell("told")
            site.hear()

    with Crew(3, program, options) as crew:
        for _ in others:
            for rank in range(3):
                assert crew.hear(rank) == "told"
            for rank in range(3):
                crew.tell(rank, "next")
        crew.results()
