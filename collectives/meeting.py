"""Bringing up a mesh without a controller: members that know each other's addresses wait for each other.

Not here: addresses through a torch Store (torch_mesh.py); membership that changes (`Mesh.install`, by whoever decides).
"""

import time
from collections.abc import Mapping

from elastic_run.collectives.endpoint import DataView, Endpoint
from elastic_run.collectives.group import Group
from elastic_run.collectives.mesh import Mesh
from elastic_run.runtime.protocol.errors import PeerError

KNOCK_S = 0.05  # between two attempts to reach who is not there yet
TIMEOUT_S = 300.0
NAMED_MAX = 4  # workers named in a message


def meet(mesh: Mesh, addresses: Mapping[str, tuple[str, int]], *, timeout_s: float = TIMEOUT_S) -> Group:
    """Return the group of all workers in `addresses`, in that order, when all are connected: the mesh's view 1.

    Workers with the same address share memory. The mesh was made with `MeshOptions.at(*addresses[worker])`. Raises
    ValueError when `addresses` does not name the mesh's worker, PeerError after `timeout_s`, saying who is missing.
    """
    members = tuple(Endpoint.at(worker, *place) for worker, place in addresses.items())
    view = DataView(number=1, members=members)
    if mesh.worker not in view.workers:
        raise ValueError(f"the addresses name {', '.join(view.workers)}, but not this worker, {mesh.worker}")
    deadline = time.monotonic() + timeout_s
    while missing := [worker for worker in view.workers if worker != mesh.worker and not mesh.prepared([worker])]:
        if time.monotonic() > deadline:
            named = ", ".join(missing[:NAMED_MAX]) + (" and more" if len(missing) > NAMED_MAX else "")
            raise PeerError(f"{len(missing)} of {len(members)} workers cannot be reached: {named}")
        mesh.prepare([member for member in members if member.worker in missing])
        time.sleep(KNOCK_S)
    return mesh.install(view)
