"""One mesh per process and default group, made through a torch Store and shared by its sub-groups.

Bringing it up: rank 0 puts a fresh secret into the store, every rank its endpoint, all install view 1. Keys lie under
`elastic/<n>/`: n counts the times that all ranks came, so a script may destroy and initialise again on the same store.
Whoever can read the store can join: as with torchrun's own store, keep it inside the job's network.
Invariants: 1. the mesh lives as long as the last group that uses it, destroyed in any order; 2. a failed start leaves
nothing open (tests/integration/test_torch_backend.py).
Not here: views that change (mesh.py); addresses and sockets (mesh.py, endpoint.py).
"""

import ipaddress
import os
import secrets
import socket
import threading
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, Store

from elastic_run.collectives.endpoint import DataView, Endpoint
from elastic_run.collectives.errors import CollectiveAborted
from elastic_run.collectives.group import Group
from elastic_run.collectives.mesh import Mesh
from elastic_run.collectives.options import MeshOptions, this_process_options
from elastic_run.collectives.torch_errors import BackendError, BackendTimeout
from elastic_run.collectives.torch_futures import FutureThreads
from elastic_run.collectives.torch_store import came

SECRET_BYTES = 32
FIRST_VIEW = 1
NAMED_MAX = 4  # ranks named in a message
ANY_PORT = 9


class SharedMesh:
    """A mesh and how many groups use it."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.threads = FutureThreads()
        self._users = 0
        self._names: Counter[str] = Counter()
        self._lock = threading.Lock()

    def group(self, name: str, ranks: Sequence[int] | None) -> Group:
        """Return the group of `ranks` (None: everyone), to be given back by `leave`.

        The same name may come again after its group was destroyed, on every member: it is another group then.
        """
        with self._lock:
            self._users += 1
            turn = self._names[name]
            self._names[name] += 1
        try:
            return self.mesh.group(f"{name}#{turn}", ranks)
        except BaseException:
            self._release()
            raise

    def abort(self, group: Group, reason: str) -> None:
        """End the group for every member."""
        error = CollectiveAborted(reason, self.mesh.worker)
        self.mesh.engine.call(lambda: self.mesh.give_up(group, error))

    def leave(self, group: Group) -> None:
        """Give a group back, telling nobody; the last one closes the mesh."""
        error = CollectiveAborted("the process group was destroyed", self.mesh.worker)
        self.mesh.engine.call(lambda: self.mesh.leave_group(group, error))
        self._release()

    def _release(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users:
                return
        self.mesh.close()
        self.threads.close()


def join(store: Store, rank: int, size: int, timeout: timedelta, options: MeshOptions) -> SharedMesh:
    """Meet the `size` ranks that came to `store`. Raises BackendTimeout naming who did not, BackendError."""
    limit_s = timeout.total_seconds()
    arrivals = store.add("elastic/arrivals", 1)
    store = PrefixStore(f"elastic/{(arrivals - 1) // size}", store)
    if rank == 0:
        store.set("secret", secrets.token_hex(SECRET_BYTES))
    if not came(store, ["secret"], limit_s):
        raise BackendTimeout(f"rank 0 did not come within {limit_s:g} s", _worker(0))
    secret = bytes.fromhex(store.get("secret").decode())
    mesh = Mesh(_worker(rank), secret, options=options)
    try:
        store.set(f"endpoint/{rank}", mesh.endpoint.to_text())
        members = _endpoints(store, size, limit_s)
        _check_reachable(members)
        mesh.install(DataView(number=FIRST_VIEW, members=members))
    except BaseException:
        mesh.close()
        raise
    return SharedMesh(mesh)


def _worker(rank: int) -> str:
    return f"rank{rank}"


def _endpoints(store: Store, size: int, limit_s: float) -> tuple[Endpoint, ...]:
    keys = [f"endpoint/{rank}" for rank in range(size)]
    if not came(store, keys, limit_s):
        missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
        named = ", ".join(map(str, missing[:NAMED_MAX])) + (" and more" if len(missing) > NAMED_MAX else "")
        culprit = _worker(missing[0]) if missing else None
        raise BackendTimeout(f"{len(missing)} of {size} ranks did not come within {limit_s:g} s: {named}", culprit)
    return tuple(Endpoint.from_text(store.get(key).decode()) for key in keys)


def _check_reachable(members: Sequence[Endpoint]) -> None:
    """Refuse what would only fail at the first operation: an address that means another machine to each reader."""
    if len({member.host for member in members}) == 1:
        return
    for member in members:
        if ipaddress.ip_address(member.address).is_loopback:
            raise BackendError(
                f"{member.worker} listens on {member.address}, which this job's other hosts cannot reach: set "
                "ELASTIC_COLLECTIVES_ADDRESS on each host to its address in the network of the others"
            )


def options_of_process() -> MeshOptions:
    """Return the options of the environment; MASTER_ADDR says which of this host's addresses the others can reach."""
    master = os.environ.get("MASTER_ADDR", "")
    if "ELASTIC_COLLECTIVES_ADDRESS" in os.environ or not master:
        return this_process_options()
    return this_process_options(_address_towards(master))


def _address_towards(host: str) -> str | None:
    """Return the local address that packets to `host` leave from; None when `host` means nothing here."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, ANY_PORT, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # sends nothing: it only makes the kernel choose a route
            return str(probe.getsockname()[0])
    except OSError:
        return None
