"""Made-up machines for tests about NUMA: what a kernel would show of them under /sys.

A machine is a list of CPUs, each with its place; `write` makes the files, in the kernel's own forms.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuPlace:
    number: int
    node: int
    package: int
    core: int
    """Any name of the physical core, unique on the machine."""
    cache: int
    """Any name of the last-level cache, unique on the machine."""
    online: bool = True


def machine(*, sockets: int, nodes: int, cores: int, threads: int = 1, cores_per_cache: int = 4) -> list[CpuPlace]:
    """`nodes` per socket, `cores` per node; numbered as in Linux: first threads of all cores, then second ones."""
    places = []
    total = sockets * nodes * cores
    for thread in range(threads):
        for core in range(total):
            node = core // cores
            cache = node * 1000 + core % cores // cores_per_cache
            places.append(
                CpuPlace(number=thread * total + core, node=node, package=node // nodes, core=core, cache=cache)
            )
    return places


def write(
    root: Path, cpus: Sequence[CpuPlace], *, empty_nodes: Iterable[int] = (), gpus: Mapping[str, int] | None = None
) -> Path:
    """Write the tree; `gpus`: NUMA node by PCI address. Returns the root."""
    online = [cpu for cpu in cpus if cpu.online]
    numbers = sorted({*(cpu.node for cpu in cpus), *empty_nodes})
    put(root / "devices/system/cpu/online", listed(cpu.number for cpu in online))
    put(root / "devices/system/node/possible", listed(numbers))
    for number in numbers:
        put(root / f"devices/system/node/node{number}/cpulist", listed(c.number for c in online if c.node == number))
    for cpu in online:  # the kernel takes the directories of an offline one away
        here = root / f"devices/system/cpu/cpu{cpu.number}"
        put(here / "topology/physical_package_id", str(cpu.package))
        put(here / "topology/thread_siblings_list", alike(online, cpu, lambda other: other.core))
        same_core = alike(online, cpu, lambda other: other.core)
        same_cache = alike(online, cpu, lambda other: other.cache)
        caches = [("1", "Data", same_core), ("1", "Instruction", same_core), ("3", "Unified", same_cache)]
        for index, (level, kind, shared) in enumerate(caches):
            for name, text in (("level", level), ("type", kind), ("shared_cpu_list", shared)):
                put(here / f"cache/index{index}" / name, text)
    for address, node in (gpus or {}).items():
        put(root / f"bus/pci/devices/{address}/numa_node", str(node))
    return root


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def alike(cpus: Sequence[CpuPlace], one: CpuPlace, of: Callable[[CpuPlace], int]) -> str:
    return listed(cpu.number for cpu in cpus if of(cpu) == of(one))


def listed(numbers: Iterable[int]) -> str:
    """The kernel's form, ranges for neighbours."""
    text: list[str] = []
    ordered = sorted(numbers)
    for position, number in enumerate(ordered):
        if position and number == ordered[position - 1] + 1:
            text[-1] = f"{text[-1].partition('-')[0]}-{number}"
        else:
            text.append(str(number))
    return ",".join(text)
