"""Backend "elastic" of torch.distributed. Importing this module registers it.

    import elastic_run.collectives.torch_backend
    torch.distributed.init_process_group("elastic")

`pg_options` may be a `MeshOptions`. The group's `timeout` is the time limit of every operation.
It also lets `torch.distributed.monitored_barrier` through, which asks for a backend named "gloo" before it asks the
group: for groups of this backend the group is asked, for others nothing changes.
Not here: the operations (torch_group.py); the mesh (torch_mesh.py); registration without an import (torch_autoload.py).
"""

import functools
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from elastic_run.collectives import torch_autoload
from elastic_run.collectives.options import MeshOptions
from elastic_run.collectives.torch_group import ElasticProcessGroup
from elastic_run.collectives.torch_mesh import join, options_of_process

__all__ = ["ElasticProcessGroup", "create"]


def create(options: Any, group_options: object) -> ElasticProcessGroup:
    """Make the group that torch asks for: over the default group's mesh, or over a mesh of its own."""
    if not isinstance(group_options, MeshOptions | None):
        raise TypeError(f"pg_options of backend elastic are MeshOptions, not {type(group_options).__name__}")
    ranks = list(options.global_ranks_in_group)
    default = dist.group.WORLD
    if ranks and isinstance(default, ElasticProcessGroup):
        return default.subgroup(options.group_id, ranks, store=options.store, timeout=options.timeout)
    rank, size, store, timeout = options.group_rank, options.group_size, options.store, options.timeout
    shared = join(store, rank, size, timeout, group_options or options_of_process())
    return ElasticProcessGroup(shared, options.group_id, range(size), rank, store=store, timeout=timeout)


def _let_monitored_barrier_through() -> None:
    original = distributed_c10d.monitored_barrier

    @functools.wraps(original)
    def monitored_barrier(
        group: dist.ProcessGroup | None = None,
        timeout: timedelta | float | None = None,
        wait_all_ranks: bool = False,
    ) -> None:
        chosen = group or dist.group.WORLD
        if not isinstance(chosen, ElasticProcessGroup):
            original(group, timeout, wait_all_ranks)
            return
        limit = timedelta(seconds=timeout) if isinstance(timeout, int | float) else timeout
        chosen.monitored_barrier(limit, wait_all_ranks)

    distributed_c10d.monitored_barrier = monitored_barrier
    dist.monitored_barrier = monitored_barrier


torch_autoload.register()
_let_monitored_barrier_through()
