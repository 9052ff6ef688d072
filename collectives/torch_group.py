"""`ElasticProcessGroup`: torch.distributed's process group over a group of the mesh.

Methods have the names and options that distributed_c10d.py and torch's C++ trampoline call; each prepares host memory
(staging.py), starts operations and returns an ElasticWork. One tensor, or one list, per process, as with gloo.
Invariants: 1. results equal gloo's (tests/integration/test_torch_backend.py); 2. `shutdown` and `abort` may be called
in any order and again.
Not here: making the mesh (torch_mesh.py); the arithmetic (reduction.py); view changes: a group whose member is lost
fails until it is destroyed and made again.
"""

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C import _distributed_c10d as c10d
from torch._C._distributed_c10d import PrefixStore, Store

from elastic_run.collectives import torch_sparse
from elastic_run.collectives.errors import CollectiveError
from elastic_run.collectives.group import Group
from elastic_run.collectives.operation import Operation
from elastic_run.collectives.reduction import Reduction
from elastic_run.collectives.staging import Staging
from elastic_run.collectives.torch_arguments import (
    check_list,
    check_single,
    dense,
    elements_of,
    only,
    reduction_of,
    same_kind,
)
from elastic_run.collectives.torch_autoload import DEVICES, NAME
from elastic_run.collectives.torch_barrier import MonitoredBarrier
from elastic_run.collectives.torch_errors import BackendError, as_torch
from elastic_run.collectives.torch_mesh import SharedMesh
from elastic_run.collectives.torch_work import ElasticWork, Result

Start = Callable[[float, bool], Operation]
"""Starts an operation, given its time limit in seconds and whether the caller waits at once."""

# torch's stubs also list shorthands with a single tensor; here are the forms that torch itself calls.
_ProcessGroup: Any = dist.ProcessGroup


class ElasticProcessGroup(_ProcessGroup):  # type: ignore[misc]
    """A process group of backend "elastic". `world_ranks`: the mesh ranks of its members, in its own order."""

    def __init__(
        self,
        shared: SharedMesh,
        name: str,
        world_ranks: Sequence[int],
        rank: int,
        *,
        store: Store,
        timeout: timedelta,
    ) -> None:
        super().__init__(rank, len(world_ranks))
        self._name = name
        self._description = "undefined"
        self._world_ranks = tuple(world_ranks)
        self._store = store
        self._timeout = timeout
        self._barrier = MonitoredBarrier(store, rank, len(world_ranks))
        self._batch: ElasticBatch | None = None
        self._shared = shared
        self._open = True
        self._group: Group = shared.group(name, self._world_ranks)

    # Reductions ------------------------------------------------------------------------------------------------------

    def allreduce(self, tensors: Sequence[Tensor], opts: Any = None) -> ElasticWork:
        """Reduce each of `tensors` over the members, in place."""
        opts = opts or c10d.AllreduceOptions()
        reduction = reduction_of(opts.reduceOp)
        if any(tensor.is_sparse for tensor in tensors):
            return self._all_reduce_sparse(tensors, reduction, opts)
        staging = Staging()
        host = [staging.update(dense(tensor)) for tensor in tensors]
        return self._run(
            opts,
            tensors,
            staging,
            lambda limit_s, sync: self._group.all_reduce(host, reduction, timeout_s=limit_s, sync=sync),
        )

    def allreduce_coalesced(self, tensors: Sequence[Tensor], opts: Any = None) -> ElasticWork:
        """Reduce `tensors`, together one operation."""
        return self.allreduce(tensors, opts or c10d.AllreduceCoalescedOptions())

    def reduce(self, tensors: Sequence[Tensor], opts: Any = None) -> ElasticWork:
        """Reduce each of `tensors` to `opts.rootRank`, in place there."""
        opts = opts or c10d.ReduceOptions()
        reduction = reduction_of(opts.reduceOp)
        staging = Staging()
        keep = staging.update if opts.rootRank == self.rank() else staging.read
        host = [keep(dense(tensor)) for tensor in tensors]
        return self._run(
            opts,
            tensors,
            staging,
            lambda limit_s, sync: self._group.reduce(host, opts.rootRank, reduction, timeout_s=limit_s, sync=sync),
        )

    def reduce_scatter(
        self, outputs: Sequence[Tensor], inputs: Sequence[Sequence[Tensor]], opts: Any = None
    ) -> ElasticWork:
        """Reduce the lists of the members, and leave entry `rank` of the result in `outputs[0]`."""
        output, parts = only(outputs), only(inputs)
        check_list("reduce_scatter", self.size(), parts, output)
        staging = Staging()
        return self._reduce_scatter(staging, staging.write(output), staging.read_list(parts), outputs, opts)

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any = None) -> ElasticWork:
        """Reduce `input`, and leave piece `rank` of the result in `output`."""
        check_single("reduce_scatter", self.size(), input, output)
        staging = Staging()
        return self._reduce_scatter(staging, staging.write(output), staging.read(input), [output], opts)

    def reduce_scatter_single_coalesced(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None
    ) -> ElasticWork:
        """Do `reduce_scatter_single` on each pair."""
        pairs = zip(outputs, inputs, strict=True)
        return self._together(outputs, [self.reduce_scatter_single(*pair, opts) for pair in pairs])

    # Movement --------------------------------------------------------------------------------------------------------

    def broadcast(self, tensors: Sequence[Tensor], opts: Any = None) -> ElasticWork:
        """Copy each of `tensors` from `opts.rootRank` to the others."""
        opts = opts or c10d.BroadcastOptions()
        staging = Staging()
        keep = staging.read if opts.rootRank == self.rank() else staging.write
        host = [keep(dense(tensor)) for tensor in tensors]
        return self._run(
            opts,
            tensors,
            staging,
            lambda limit_s, sync: self._group.broadcast(host, opts.rootRank, timeout_s=limit_s, sync=sync),
        )

    def allgather(self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], opts: Any = None) -> ElasticWork:
        """Copy every member's `inputs[0]` to entry `rank` of everyone's `outputs[0]`."""
        parts, own = only(outputs), only(inputs)
        check_list("all_gather", self.size(), parts, own)
        staging = Staging()
        return self._all_gather(staging, staging.write_list(parts), staging.read(own), outputs, opts)

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None) -> ElasticWork:
        """Copy every member's `input` to piece `rank` of everyone's `output`."""
        check_single("all_gather", self.size(), output, input)
        staging = Staging()
        return self._all_gather(staging, staging.write(output), staging.read(input), [output], opts)

    def all_gather_single_coalesced(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None
    ) -> ElasticWork:
        """Do `all_gather_single` on each pair."""
        pairs = zip(outputs, inputs, strict=True)
        return self._together(outputs, [self.all_gather_single(*pair, opts) for pair in pairs])

    def allgather_coalesced(
        self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], opts: Any = None
    ) -> ElasticWork:
        """Copy every member's `inputs[i]` to `outputs[rank][i]`."""
        columns = zip(*outputs, strict=True)
        works = [self.allgather([list(column)], [own], opts) for column, own in zip(columns, inputs, strict=True)]
        return self._together(outputs, works)

    def gather(self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], opts: Any = None) -> ElasticWork:
        """Copy every member's `inputs[0]` to entry `rank` of `outputs[0]` at `opts.rootRank`."""
        opts = opts or c10d.GatherOptions()
        own = only(inputs)
        staging = Staging()
        room: Tensor | None = None
        if opts.rootRank == self.rank():
            parts = only(outputs)
            check_list("gather", self.size(), parts, own)
            room = staging.write_list(parts)
        host = staging.read(own)
        return self._run(
            opts,
            outputs,
            staging,
            lambda limit_s, sync: self._group.gather(room, host, opts.rootRank, timeout_s=limit_s, sync=sync),
        )

    def scatter(self, outputs: Sequence[Tensor], inputs: Sequence[Sequence[Tensor]], opts: Any = None) -> ElasticWork:
        """Copy entry `rank` of the list at `opts.rootRank` to every member's `outputs[0]`."""
        opts = opts or c10d.ScatterOptions()
        output = only(outputs)
        staging = Staging()
        source: Tensor | None = None
        if opts.rootRank == self.rank():
            parts = only(inputs)
            check_list("scatter", self.size(), parts, output)
            source = staging.read_list(parts)
        host = staging.write(output)
        return self._run(
            opts,
            outputs,
            staging,
            lambda limit_s, sync: self._group.scatter(host, source, opts.rootRank, timeout_s=limit_s, sync=sync),
        )

    def alltoall(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None) -> ElasticWork:
        """Copy `inputs[j]` of member i to `outputs[i]` of member j; entries may differ in size."""
        for tensors in (outputs, inputs):
            same_kind("all_to_all", self.size(), tensors, outputs[0])
        counts = ([tensor.numel() for tensor in outputs], [tensor.numel() for tensor in inputs])
        staging = Staging()
        return self._all_to_all(staging, staging.write_list(outputs), staging.read_list(inputs), counts, outputs, opts)

    def all_to_all_single(
        self,
        output: Tensor,
        input: Tensor,
        output_splits: Sequence[int],
        input_splits: Sequence[int],
        opts: Any = None,
    ) -> ElasticWork:
        """Copy piece j of member i's `input` to piece i of member j's `output`; splits are rows, none: equal ones."""
        counts = (
            elements_of("output", output, output_splits, self.size()),
            elements_of("input", input, input_splits, self.size()),
        )
        staging = Staging()
        return self._all_to_all(staging, staging.write(output), staging.read(input), counts, [output], opts)

    # Older names, still called by some of torch's own code.
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single

    # Point to point --------------------------------------------------------------------------------------------------

    def send(self, tensors: Sequence[Tensor], to: int, tag: int = 0) -> ElasticWork:
        """Send one tensor to rank `to`."""
        staging = Staging()
        host = staging.read(dense(only(tensors)))
        return self._run(
            None, tensors, staging, lambda limit_s, sync: self._group.send(host, to, tag, timeout_s=limit_s, sync=sync)
        )

    def recv(self, tensors: Sequence[Tensor], source: int | None, tag: int = 0) -> ElasticWork:
        """Receive one tensor from rank `source`."""
        staging = Staging()
        host = staging.write(dense(only(tensors)))
        return self._run(
            None,
            tensors,
            staging,
            lambda limit_s, sync: self._group.receive(host, source, tag, timeout_s=limit_s, sync=sync),
        )

    def recv_anysource(self, tensors: Sequence[Tensor], tag: int = 0) -> ElasticWork:
        """Receive one tensor from whoever sends first; `source_rank()` of the work says who did."""
        return self.recv(tensors, None, tag)

    # Barriers --------------------------------------------------------------------------------------------------------

    def barrier(self, opts: Any = None) -> ElasticWork:
        """Be done when every member came."""
        opts = opts or c10d.BarrierOptions()
        return self._run(opts, [], Staging(), lambda limit_s, sync: self._group.barrier(timeout_s=limit_s, sync=sync))

    def monitored_barrier(self, timeout: timedelta | None = None, wait_all_ranks: bool = False) -> None:
        """Return when every member came; the error on rank 0 names who did not."""
        self._barrier.pass_through(self._timeout if timeout is None else timeout, wait_all_ranks=wait_all_ranks)

    # Batches (torch's coalescing manager) ----------------------------------------------------------------------------

    def _start_coalescing(self, device: torch.device) -> None:
        self._batch = ElasticBatch()

    def _end_coalescing(self, device: torch.device) -> ElasticWork:
        batch, self._batch = self._batch, None
        if batch is None:
            raise ValueError("no batch was started on this group")
        return self._together([], batch.works)

    # Groups ----------------------------------------------------------------------------------------------------------

    def subgroup(
        self, name: str, world_ranks: Sequence[int], *, store: Store, timeout: timedelta
    ) -> "ElasticProcessGroup":
        """Return a group of some members of the default group, this process among them, over the same mesh."""
        rank = world_ranks.index(self._world_ranks[self.rank()])
        return ElasticProcessGroup(self._shared, name, world_ranks, rank, store=store, timeout=timeout)

    def split_group(
        self,
        new_ranks: Sequence[int],
        timeout: timedelta | None = None,
        opts: object = None,
        group_name: str | None = None,
        group_desc: str | None = None,
        device_types: Sequence[torch.device] | None = None,
    ) -> "ElasticProcessGroup | None":
        """Return the group of these ranks of this group; None where this process is not among them."""
        if self.rank() not in new_ranks:
            return None
        ranks = [self._world_ranks[rank] for rank in new_ranks]
        name = group_name or f"{self._name}:split:{'-'.join(map(str, ranks))}"
        store = PrefixStore(f"{name}/", self._store)
        group = self.subgroup(name, ranks, store=store, timeout=timeout or self._timeout)
        group.setGroupDesc(group_desc or f"{self._description}:split")
        return group

    def shutdown(self) -> None:
        """Leave the group: what is under way here ends with an error. The last group closes the mesh."""
        if self._open:
            self._open = False
            self._shared.leave(self._group)

    def abort(self) -> None:
        """End what is under way on every member with an error that blames this one, and leave the group."""
        if self._open:
            self._shared.abort(self._group, f"process group {self._name} was aborted")
        self.shutdown()

    # What torch asks a group about itself ----------------------------------------------------------------------------

    def getBackendName(self) -> str:
        return NAME

    def getGroupName(self) -> str:
        return self._name

    def setGroupName(self, name: str) -> None:
        self._name = name

    def getGroupDesc(self) -> str:
        return self._description

    def setGroupDesc(self, description: str) -> None:
        self._description = description

    def get_group_store(self) -> Store:
        return self._store

    def set_timeout(self, timeout: timedelta) -> None:
        self._timeout = timeout

    _set_default_timeout = set_timeout

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device(name) for name in DEVICES if name == "cpu" or torch.cuda.is_available()]

    def _get_backend(self, device: torch.device) -> "ElasticProcessGroup":
        return self  # it is its own backend, on every device

    def supports_tensor_alloc(self, device: torch.device) -> bool:
        return False

    @property
    def supports_splitting(self) -> bool:
        return True

    @property
    def supports_coalescing(self) -> bool:
        return False  # of point-to-point operations: they need no batch to go at the same time

    @property
    def supports_time_estimate(self) -> bool:
        return False

    @property
    def options(self) -> None:
        return None

    def eager_connect_single_device(self, device: torch.device | None) -> None:
        """Nothing to do: the mesh serves every device."""

    def _set_sequence_number_for_group(self) -> None:
        """Nothing to agree on: every frame carries its sequence number."""

    # Helpers ---------------------------------------------------------------------------------------------------------

    def _limit_s(self, opts: Any) -> float:
        if not self._open:
            raise BackendError(f"process group {self._name} was destroyed")
        given_s = opts.timeout.total_seconds() if opts is not None else 0.0
        return float(given_s if given_s > 0 else self._timeout.total_seconds())

    def _run(self, opts: Any, result: Result, staging: Staging, start: Start) -> ElasticWork:
        """Start an operation under the options' time limit, or the group's."""
        limit_s = self._limit_s(opts)
        staging.ready()
        try:
            operation = start(limit_s, opts is not None and not opts.asyncOp)
        except Exception as error:
            raise as_torch(error) from error
        work = ElasticWork([(operation, staging)], result, self._shared.threads)
        if self._batch is not None:
            self._batch.works.append(work)
        return work

    def _all_reduce_sparse(self, tensors: Sequence[Tensor], reduction: Reduction, opts: Any) -> ElasticWork:
        for tensor in tensors:
            try:
                torch_sparse.all_reduce(self._group, tensor, reduction, self._limit_s(opts))
            except CollectiveError as error:
                raise as_torch(error) from error
        return self._together(tensors, [])

    def _together(self, result: Result, works: Sequence[ElasticWork]) -> ElasticWork:
        return ElasticWork([part for work in works for part in work.parts], result, self._shared.threads)

    def _reduce_scatter(
        self, staging: Staging, output: Tensor, source: Tensor, result: Result, opts: Any
    ) -> ElasticWork:
        opts = opts or c10d.ReduceScatterOptions()
        reduction = reduction_of(opts.reduceOp)
        return self._run(
            opts,
            result,
            staging,
            lambda limit_s, sync: self._group.reduce_scatter(output, source, reduction, timeout_s=limit_s, sync=sync),
        )

    def _all_gather(self, staging: Staging, output: Tensor, source: Tensor, result: Result, opts: Any) -> ElasticWork:
        return self._run(
            opts or c10d.AllgatherOptions(),
            result,
            staging,
            lambda limit_s, sync: self._group.all_gather(output, source, timeout_s=limit_s, sync=sync),
        )

    def _all_to_all(
        self,
        staging: Staging,
        output: Tensor,
        source: Tensor,
        counts: tuple[Sequence[int], Sequence[int]],
        result: Result,
        opts: Any,
    ) -> ElasticWork:
        return self._run(
            opts or c10d.AllToAllOptions(),
            result,
            staging,
            lambda limit_s, sync: self._group.all_to_all(output, source, *counts, timeout_s=limit_s, sync=sync),
        )


class ElasticBatch:
    """What was started since a batch began."""

    __slots__ = ("works",)

    def __init__(self) -> None:
        self.works: list[ElasticWork] = []
