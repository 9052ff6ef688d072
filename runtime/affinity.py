"""Decides on which CPUs each worker of a node runs, with the meanings of torchrun's --numa-binding. Pure.

A worker belongs to the NUMA node of the GPU whose index is its local rank; without GPUs, workers take the nodes in
turn. Only CPUs that this process may use itself are given out.

Invariants (tests/unit/test_affinity.py):
1. Every worker gets at least one CPU, all of them allowed and online; or the whole plan is refused with a reason.
2. `exclusive` gives no physical core to two workers.
3. Where torch 2.13 (torch/numa/binding.py) finds CPUs, these are the same (tests/integration/test_numa_binding.py). It
   fails without a GPU, and in socket mode when some node has no CPU to use; we do not.
Not here: what the machine looks like (numa_binding.py, gpus.py); the binding itself (runtime/edge/exec_wrapper.py).
"""

import enum
import itertools
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from typing import assert_never


class BindingMode(enum.StrEnum):
    """What a worker shares with its GPU."""

    NODE = "node"  # all CPUs of the GPU's NUMA node
    SOCKET = "socket"  # all CPUs of all NUMA nodes of the GPU's socket
    EXCLUSIVE = "exclusive"  # the node's physical cores, divided among the GPUs of the node
    CORE_COMPLEX = "core-complex"  # the CPUs behind one last-level cache of the node, another one for each GPU


@dataclass(frozen=True, slots=True, kw_only=True)
class Cpu:
    """One online logical CPU. None: the kernel does not tell."""

    number: int
    core: int
    """Lowest CPU of the physical core."""
    package: int | None
    cache: int | None
    """Lowest CPU of those behind the same last-level cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NumaNode:
    """A node and its online CPUs, ascending; it may have none."""

    number: int
    cpus: tuple[Cpu, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Binding:
    """A plan. `cpus`: by local rank, ascending. `reason`: a phrase for people."""

    cpus: tuple[tuple[int, ...], ...]
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why there is no plan, and what would help."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seat:
    """A worker is number `position` of the `count` that its node has to place."""

    worker: int
    node: NumaNode
    position: int
    count: int


def plan_binding(
    mode: BindingMode,
    nodes: Sequence[NumaNode],
    *,
    allowed: Set[int],
    gpu_nodes: Sequence[int | None],
    nproc: int,
) -> Binding | Refusal:
    """Place `nproc` workers.

    `nodes`: all of the machine, by number. `allowed`: CPUs that this process may use. `gpu_nodes`: NUMA node of each
    GPU that workers see, by index; -1 where the firmware does not say (then the first node, as in torch), None where
    nothing is known. Empty without GPUs.
    """
    seats = _seats(nodes, allowed, gpu_nodes, nproc)
    if isinstance(seats, Refusal):
        return seats
    placed: list[tuple[int, ...]] = []
    for seat in seats[:nproc]:
        cpus = _cpus(mode, seat, nodes, allowed)
        if isinstance(cpus, Refusal):
            return cpus
        placed.append(tuple(cpu.number for cpu in sorted(cpus, key=_number)))
    if gpu_nodes:
        reason = "each worker is bound to CPUs near the GPU of its local rank"
    else:
        used = format_cpus(sorted({seat.node.number for seat in seats}))
        reason = f"there is no GPU, so the workers take the NUMA nodes ({used}) in turn"
    return Binding(cpus=tuple(placed), reason=reason)


def format_cpus(numbers: Iterable[int]) -> str:
    """Return ascending numbers as the kernel writes them: `0-3,8`."""
    runs = itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    ends = [(run[0][1], run[-1][1]) for run in (list(pairs) for _, pairs in runs)]
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ends)


def _seats(
    nodes: Sequence[NumaNode], allowed: Set[int], gpu_nodes: Sequence[int | None], nproc: int
) -> list[_Seat] | Refusal:
    """One seat for each GPU, though only `nproc` are used: `exclusive` divides a node among all of its GPUs."""
    usable = [node for node in nodes if _usable(node, allowed)]
    if not usable:
        return Refusal(reason="the kernel tells of no NUMA node with CPUs that may be used here; leave the flag out")
    if not gpu_nodes:
        return _numbered([usable[worker % len(usable)] for worker in range(nproc)])
    if len(gpu_nodes) < nproc:
        return Refusal(
            reason=f"worker {len(gpu_nodes)} has no GPU to be near to, {len(gpu_nodes)} can be seen; "
            f"lower --nproc-per-node to {len(gpu_nodes)}, or leave the flag out"
        )
    known = {node.number: node for node in nodes}
    chosen: list[NumaNode] = []
    for gpu, number in enumerate(gpu_nodes):
        if number is None and len(nodes) > 1:
            return Refusal(reason=f"nothing tells on which of {len(nodes)} NUMA nodes GPU {gpu} is; leave the flag out")
        node = nodes[0] if number is None or number < 0 else known.get(number)
        if node is None:
            return Refusal(reason=f"GPU {gpu} is on NUMA node {number}, of which nothing is known; leave the flag out")
        chosen.append(node)
    return _numbered(chosen)


def _numbered(chosen: Sequence[NumaNode]) -> list[_Seat]:
    seen: dict[int, int] = {}
    positions = []
    for node in chosen:
        positions.append(seen.get(node.number, 0))
        seen[node.number] = positions[-1] + 1
    return [
        _Seat(worker=worker, node=node, position=position, count=seen[node.number])
        for worker, (node, position) in enumerate(zip(chosen, positions, strict=True))
    ]


def _cpus(mode: BindingMode, seat: _Seat, nodes: Sequence[NumaNode], allowed: Set[int]) -> Sequence[Cpu] | Refusal:
    usable = _usable(seat.node, allowed)
    if not usable and (mode is not BindingMode.SOCKET or not seat.node.cpus):
        return _none_usable(seat, f"NUMA node {seat.node.number}")
    match mode:
        case BindingMode.NODE:
            return usable
        case BindingMode.SOCKET:
            return _socket(seat, nodes, allowed)
        case BindingMode.EXCLUSIVE:
            return _share_of_cores(seat, usable)
        case BindingMode.CORE_COMPLEX:
            return _core_complex(seat, usable)
        case _:
            assert_never(mode)


def _socket(seat: _Seat, nodes: Sequence[NumaNode], allowed: Set[int]) -> Sequence[Cpu] | Refusal:
    package = seat.node.cpus[0].package
    if package is None:
        return Refusal(reason="the kernel does not tell which CPUs share a socket; take --numa-binding=node")
    same = [node for node in nodes if node.cpus and node.cpus[0].package == package]
    cpus = [cpu for node in same for cpu in _usable(node, allowed)]
    return cpus or _none_usable(seat, f"socket {package}")


def _share_of_cores(seat: _Seat, usable: Sequence[Cpu]) -> Sequence[Cpu] | Refusal:
    """The first workers of a node get one core more where the division leaves a rest."""
    cores = sorted({cpu.core for cpu in usable})
    if len(cores) < seat.count:
        return Refusal(
            reason=f"NUMA node {seat.node.number} has {len(cores)} physical cores that may be used here, "
            f"and {seat.count} workers or GPUs share it; take --numa-binding=node"
        )
    each, rest = divmod(len(cores), seat.count)
    start = seat.position * each + min(seat.position, rest)
    mine = cores[start : start + each + (seat.position < rest)]
    return [cpu for cpu in usable if cpu.core in mine]


def _core_complex(seat: _Seat, usable: Sequence[Cpu]) -> Sequence[Cpu] | Refusal:
    """Complexes with more CPUs come first; with more workers than complexes they are shared."""
    groups: dict[int, list[Cpu]] = {}
    for cpu in usable:
        if cpu.cache is None:
            return Refusal(reason=f"the kernel does not tell which caches CPU {cpu.number} has; take another mode")
        groups.setdefault(cpu.cache, []).append(cpu)
    ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    return ordered[seat.position % len(ordered)][1]


def _usable(node: NumaNode, allowed: Set[int]) -> list[Cpu]:
    return [cpu for cpu in node.cpus if cpu.number in allowed]


def _none_usable(seat: _Seat, where: str) -> Refusal:
    return Refusal(
        reason=f"worker {seat.worker} belongs on {where}, which has no CPU that may be used here; "
        "widen this process's CPU affinity, or leave the flag out"
    )


def _number(cpu: Cpu) -> int:
    return cpu.number
