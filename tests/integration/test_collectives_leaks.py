"""What a mesh leaves behind: nothing. What it keeps while it lives: bounded, and given back after faults."""

import gc
import os
import signal

import pytest
import torch
from mesh_workers import Crew, Site, meshes, until
from stress.collectives_churn import footprint

from elastic_run.collectives import native
from elastic_run.collectives.endpoint import DataView
from elastic_run.collectives.errors import CollectiveAborted
from elastic_run.collectives.options import MeshOptions

TRANSPORTS = pytest.mark.parametrize(
    "options", [MeshOptions(), MeshOptions(shared_memory=False)], ids=["shared memory", "tcp"]
)
WAIT_S = 60.0


@TRANSPORTS
def test_a_closed_mesh_leaves_nothing(options: MeshOptions) -> None:
    gc.collect()
    before = footprint()
    for _ in range(3):
        with meshes(3, options) as members:
            view = DataView(number=1, members=tuple(mesh.endpoint for mesh in members))
            groups = [mesh.install(view) for mesh in members]
            for numel in (10, 10_000, 1_000_000):
                for operation in [group.all_reduce([torch.ones(numel)]) for group in groups]:
                    operation.wait(WAIT_S)
    del members, groups, operation
    gc.collect()
    assert footprint() == before


@TRANSPORTS
def test_a_mesh_closed_in_the_middle_of_operations_leaves_nothing(options: MeshOptions) -> None:
    gc.collect()
    before = footprint()
    with meshes(3, options) as members:
        view = DataView(number=1, members=tuple(mesh.endpoint for mesh in members))
        groups = [mesh.install(view) for mesh in members]
        running = [groups[rank].all_reduce([torch.ones(1_000_000)]) for rank in (0, 1)]
        members[0].close()
        for operation in running:
            with pytest.raises(CollectiveAborted):
                operation.wait(WAIT_S)
    del members, groups, running, operation
    gc.collect()
    assert footprint() == before


def lose_members(site: Site) -> object:
    """Reduce in view after view, each without the member that was killed in the one before."""
    for number, ranks in enumerate(([0, 1, 2, 3], [0, 1, 2], [0, 1]), start=1):
        group = site.install(number, ranks)
        try:
            while True:
                group.all_reduce([torch.ones(300_000)], sync=True).wait(WAIT_S)
                group.all_reduce([torch.ones(10)], sync=True).wait(WAIT_S)
                if site.rank == ranks[-1] or len(ranks) == 2:
                    break
        except CollectiveAborted:
            continue
        if site.rank == ranks[-1] and len(ranks) > 2:
            os.kill(os.getpid(), signal.SIGKILL)
    group.barrier().wait(WAIT_S)
    site.mesh.engine.call(site.mesh.arena.validate)
    until(lambda: site.mesh.arena.used_bytes == 0)
    now = footprint()
    site.tell("counted")
    site.hear()
    del group
    site.mesh.close()
    gc.collect()
    after = footprint()
    return now["sockets"] - after["sockets"], now["threads"] - after["threads"], after["mappings"]


@TRANSPORTS
def test_survivors_keep_only_what_their_last_view_needs(options: MeshOptions) -> None:
    with Crew(4, lose_members, options) as crew:
        for rank in (0, 1):
            assert crew.hear(rank) == "counted"
        for rank in (0, 1):
            crew.tell(rank, "close")
        for rank in (0, 1):
            # Two listeners, one connection each way, and over TCP a pipe each way for large sums; one thread.
            piped = not options.shared_memory and native.kernels is not None
            assert crew.result(rank) == (6 if piped else 4, 1, 0)
