"""The measured collective systems, each behind the same few calls.

`introduce` opens what others connect to and says how; `form` makes, or re-makes, the group a view describes;
`prepare` lets a later member's connections be made beforehand; `output_for` says where the sum of a tensor will be.
"""

import importlib
import itertools
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch._C._distributed_c10d import TCPStore
from torch.distributed import distributed_c10d as distributed

if TYPE_CHECKING:
    from elastic_run.collectives.group import Group
    from elastic_run.collectives.mesh import Mesh

TIMEOUT = timedelta(seconds=60)
PCCL_ATTEMPTS = 10
PCCL_POLL_S = 0.02
RING = "ring"
EXACT = "exact"
MESH_ALGORITHMS = {
    "elastic-mesh": None,
    "elastic-ring": RING,
    "elastic-exact": EXACT,
    "messages-exchange": "exchange",
    "messages-pairwise": "pairwise",
    "messages-ring": RING,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """The members by rank, as they introduced themselves, and where torch's groups meet."""

    number: int
    rank: int
    introductions: list[str]
    store_port: int

    @property
    def workers(self) -> int:
        return len(self.introductions)


class Backend(Protocol):
    """One member's end of a collective system."""

    errors: tuple[type[Exception], ...]
    """What an operation raises that lost a peer."""
    keeps_input: bool
    """Whether an operation that was interrupted promises to leave its tensor as it was."""

    def introduce(self, secret: bytes) -> str: ...
    def prepare(self, introductions: list[str]) -> None: ...
    def is_prepared(self) -> bool: ...
    def form(self, view: View) -> None: ...
    def output_for(self, tensor: torch.Tensor) -> torch.Tensor: ...
    def all_reduce(self, tensor: torch.Tensor, output: torch.Tensor) -> None: ...
    def leave(self) -> None: ...


class TorchGroup:
    """A torch.distributed backend by name, met through the store under a fresh prefix for each view."""

    errors: tuple[type[Exception], ...] = (RuntimeError,)
    keeps_input = False

    def __init__(self, name: str, options: Callable[[], Any]) -> None:
        self._name = name
        self._options = options

    def introduce(self, secret: bytes) -> str:
        return "by store"

    def prepare(self, introductions: list[str]) -> None:
        """Such a group is made of nothing that was there before."""

    def is_prepared(self) -> bool:
        return True

    def form(self, view: View) -> None:
        self.leave()
        store = TCPStore("127.0.0.1", view.store_port, is_master=False, timeout=TIMEOUT)
        distributed.init_process_group(
            self._name,
            store=distributed.PrefixStore(f"view-{view.number}", store),
            rank=view.rank,
            world_size=view.workers,
            timeout=TIMEOUT,
            pg_options=self._options(),
        )

    def output_for(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def all_reduce(self, tensor: torch.Tensor, output: torch.Tensor) -> None:
        distributed.all_reduce(tensor)

    def leave(self) -> None:
        if distributed.is_initialized():
            distributed.destroy_process_group()


class MeshGroup:
    """Our own data plane without the facade: links between survivors live through views."""

    keeps_input = True

    def __init__(self, algorithm: str | None) -> None:
        from elastic_run.collectives.errors import CollectiveError

        self.errors: tuple[type[Exception], ...] = (CollectiveError,)
        self._algorithm = algorithm
        self._mesh: Mesh | None = None
        self._group: Group | None = None
        self._preparing: list[str] = []
        # A worker id is of one mesh: whoever left and comes again is somebody else.
        self._lives = itertools.count()

    def introduce(self, secret: bytes) -> str:
        from elastic_run.collectives.mesh import Mesh

        self._mesh = Mesh(f"worker-{os.getpid()}-{next(self._lives)}", secret)
        return self._mesh.endpoint.to_text()

    def prepare(self, introductions: list[str]) -> None:
        from elastic_run.collectives.endpoint import Endpoint

        endpoints = [Endpoint.from_text(text) for text in introductions]
        self._preparing = [endpoint.worker for endpoint in endpoints]
        self._opened().prepare(endpoints)

    def is_prepared(self) -> bool:
        return self._opened().prepared(self._preparing)

    def form(self, view: View) -> None:
        from elastic_run.collectives.endpoint import DataView, Endpoint

        members = tuple(Endpoint.from_text(text) for text in view.introductions)
        self._group = self._opened().install(DataView(number=view.number, members=members))

    def output_for(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def all_reduce(self, tensor: torch.Tensor, output: torch.Tensor) -> None:
        from elastic_run.collectives.dyadic import Block
        from elastic_run.collectives.reduction import Reduction
        from elastic_run.collectives.selection import Method

        group = self._group
        assert group is not None
        if self._algorithm == EXACT:
            # One logical rank on each member, which a job's members know from their view.
            blocks = [Block(rank, 1) for rank in range(group.size)]
            partials = {blocks[group.rank]: tensor}
            placement = [[block] for block in blocks]
            group.all_reduce_exact(output, partials, group.size, placement=placement, sync=True).wait()
        else:
            method = Method(self._algorithm) if self._algorithm else None
            group.all_reduce([tensor], Reduction.SUM, method=method, sync=True).wait()

    def leave(self) -> None:
        mesh, self._mesh, self._group = self._mesh, None, None
        if mesh is not None:
            mesh.close()

    def _opened(self) -> "Mesh":
        assert self._mesh is not None
        return self._mesh


class Pccl:
    """PCCL's own communicator. The first member of a view also runs the master; votes bring the members together."""

    keeps_input = True

    def __init__(self) -> None:
        # By name: it is no dependency of the project, and type checkers need not find it.
        self._pccl = importlib.import_module("pccl")
        self.errors: tuple[type[Exception], ...] = (self._pccl.PCCLError,)
        self._master: Any = None
        self._communicator: Any = None

    def introduce(self, secret: bytes) -> str:
        # PCCL takes no open socket and tells no port it chose: whoever takes this one in between makes the run fail.
        with socket.create_server(("127.0.0.1", 0)) as probe:
            return f"127.0.0.1:{probe.getsockname()[1]}"

    def prepare(self, introductions: list[str]) -> None:
        """Newcomers wait until the others accept them."""

    def is_prepared(self) -> bool:
        return True

    def form(self, view: View) -> None:
        master = view.introductions[0]
        if view.rank == 0:
            self._master = self._pccl.MasterNode(listen_address=master)
            self._master.run()
        self._communicator = self._pccl.Communicator(master, 0)
        self._communicator.connect(n_attempts=PCCL_ATTEMPTS)
        deadline_s = time.monotonic() + TIMEOUT.total_seconds()
        while self._communicator.get_attribute(self._pccl.Attribute.GLOBAL_WORLD_SIZE) < view.workers:
            if time.monotonic() > deadline_s:
                raise TimeoutError("PCCL did not bring the members together")
            self._communicator.update_topology()
            time.sleep(PCCL_POLL_S)

    def output_for(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(tensor)

    def all_reduce(self, tensor: torch.Tensor, output: torch.Tensor) -> None:
        self._communicator.all_reduce(tensor, output, op=self._pccl.ReduceOp.SUM)

    def leave(self) -> None:
        """Its members do not leave in any benchmark; the processes' end takes master and communicator along."""


def backend_named(name: str) -> Callable[[], Backend]:
    """Imports what a system needs and gives its constructor. Raises ValueError for a name that is none."""
    if name == "gloo":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        return lambda: TorchGroup("gloo", options=lambda: None)
    if name in ("elastic", "elastic-tcp"):
        # The first import registers the backend; the environment chooses the transport.
        import elastic_run.collectives.torch_backend
        from elastic_run.collectives.options import this_process_options

        return lambda: TorchGroup("elastic", options=this_process_options)
    if name in MESH_ALGORITHMS:
        import elastic_run.collectives.mesh  # noqa: F401

        return lambda: MeshGroup(MESH_ALGORITHMS[name])
    if name == "pccl":
        # Its library starts threads when imported, so each member imports it for itself.
        return Pccl
    raise ValueError(f"no system is called {name!r}")
