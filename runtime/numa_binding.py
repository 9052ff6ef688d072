"""Looks at this machine for --numa-binding: its NUMA nodes and its GPUs' places, from sysfs, and asks for a plan.

Invariants (tests/unit/test_numa_binding.py):
1. What sysfs does not tell, or tells in a form that is not understood, is unknown, never an exception.
2. A binding that cannot be had is a UserError of one line, before anything is started.
Not here: the decision (affinity.py), finding GPUs (gpus.py), the binding itself (runtime/edge/exec_wrapper.py).
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from elastic_run.runtime.affinity import Binding, BindingMode, Cpu, NumaNode, Refusal, format_cpus, plan_binding
from elastic_run.runtime.gpus import find_gpus
from elastic_run.runtime.protocol.errors import UserError

SYSFS = Path("/sys")
DEVICES = Path("/dev")
CPUS_MAX = 65_536
"""More than any kernel counts; a longer list is no list of CPUs."""
NODES_MAX = 4096
FILE_BYTES_MAX = 65_536
WORKERS_SHOWN_MAX = 8

_RANGE = re.compile(r"(\d{1,6})(?:-(\d{1,6}))?")
_DATA_CACHES = ("Unified", "Data")


def bind_workers(
    mode: BindingMode, nproc: int, environ: Mapping[str, str], *, sysfs: Path = SYSFS, devices: Path = DEVICES
) -> Binding:
    """Return the CPUs of each worker. Raises UserError."""
    gpus = find_gpus(devices, environ)
    if isinstance(gpus, Refusal):
        raise _refused(mode, gpus)
    plan = plan_binding(
        mode,
        read_nodes(sysfs),
        allowed=frozenset(os.sched_getaffinity(0)),
        gpu_nodes=[read_pci_node(sysfs, gpu.pci_address) for gpu in gpus],
        nproc=nproc,
    )
    if isinstance(plan, Refusal):
        raise _refused(mode, plan)
    return plan


def describe(mode: BindingMode, plan: Binding) -> str:
    """Return one line for the user."""
    shown = [f"worker {rank}: {format_cpus(cpus)}" for rank, cpus in enumerate(plan.cpus[:WORKERS_SHOWN_MAX])]
    more = [f"{len(plan.cpus) - len(shown)} more"] if len(plan.cpus) > len(shown) else []
    return f"--numa-binding={mode}: {plan.reason}; CPUs of {', '.join([*shown, *more])}"


def read_nodes(sysfs: Path) -> tuple[NumaNode, ...]:
    """Return the NUMA nodes with their online CPUs, by number; a kernel without NUMA has one. Empty: not told."""
    system = sysfs / "devices" / "system"
    online = _cpu_list(_text(system / "cpu" / "online"))
    nodes = []
    for number in _node_numbers(system / "node"):
        listed = _cpu_list(_text(system / "node" / f"node{number}" / "cpulist"))
        if listed is not None:
            cpus = [cpu for cpu in listed if online is None or cpu in online]
            nodes.append(NumaNode(number=number, cpus=tuple(_cpu(system, cpu) for cpu in cpus)))
    if not nodes and online:
        nodes = [NumaNode(number=0, cpus=tuple(_cpu(system, cpu) for cpu in online))]
    return tuple(nodes)


def read_pci_node(sysfs: Path, address: str) -> int | None:
    """Return the NUMA node of a PCI device; -1 where the firmware does not say, None where nothing is told."""
    return _number(_text(sysfs / "bus" / "pci" / "devices" / address / "numa_node"))


def _cpu(system: Path, number: int) -> Cpu:
    here = system / "cpu" / f"cpu{number}"
    siblings = _cpu_list(_text(here / "topology" / "thread_siblings_list"))
    return Cpu(
        number=number,
        core=siblings[0] if siblings else number,
        package=_number(_text(here / "topology" / "physical_package_id")),
        cache=_last_level_cache(here / "cache"),
    )


def _last_level_cache(directory: Path) -> int | None:
    """Return the lowest CPU behind the cache of the highest level that holds data."""
    best: tuple[int, int] | None = None
    for name in _names(directory, r"index\d{1,3}"):
        if _text(directory / name / "type") not in _DATA_CACHES:
            continue
        level = _number(_text(directory / name / "level"))
        shared = _cpu_list(_text(directory / name / "shared_cpu_list"))
        if level is not None and shared and (best is None or level > best[0]):
            best = (level, shared[0])
    return None if best is None else best[1]


def _node_numbers(directory: Path) -> list[int]:
    return sorted(int(name.removeprefix("node")) for name in _names(directory, r"node\d{1,6}"))[:NODES_MAX]


def _names(directory: Path, pattern: str) -> list[str]:
    try:
        return sorted(name for name in os.listdir(directory) if re.fullmatch(pattern, name))
    except OSError:
        return []


def _text(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return file.read(FILE_BYTES_MAX).decode(errors="replace").strip()
    except OSError:
        return None


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and re.fullmatch(r"-?\d{1,9}", text) else None


def _cpu_list(text: str | None) -> tuple[int, ...] | None:
    """Return the numbers of `0-3,8`, ascending; an empty text is an empty list. None when it is no such list."""
    if text is None:
        return None
    numbers: set[int] = set()
    for part in text.split(",") if text else ():
        match = _RANGE.fullmatch(part.strip())
        if match is None:
            return None
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < CPUS_MAX:
            return None
        numbers.update(range(first, last + 1))
    return tuple(sorted(numbers))


def _refused(mode: BindingMode, refusal: Refusal) -> UserError:
    return UserError(f"--numa-binding={mode}: {refusal.reason}")
