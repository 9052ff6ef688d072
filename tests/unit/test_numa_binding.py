"""What is read of a machine under /sys, on made-up trees."""

import dataclasses
import os
from pathlib import Path

import pytest
from sysfs_tree import CpuPlace, machine, put, write

from elastic_run.runtime.affinity import Binding, BindingMode, Cpu, plan_binding
from elastic_run.runtime.numa_binding import bind_workers, describe, read_nodes, read_pci_node
from elastic_run.runtime.protocol.errors import UserError

EVERY = frozenset(range(4096))


def planned(root: Path, mode: str, nproc: int, *gpu_nodes: int) -> list[tuple[int, ...]]:
    plan = plan_binding(BindingMode(mode), read_nodes(root), allowed=EVERY, gpu_nodes=gpu_nodes, nproc=nproc)
    assert isinstance(plan, Binding), plan
    return list(plan.cpus)


def test_two_sockets_of_two_nodes_with_threads(tmp_path: Path) -> None:
    root = write(tmp_path, machine(sockets=2, nodes=2, cores=4, threads=2, cores_per_cache=2))
    nodes = read_nodes(root)
    assert [[cpu.number for cpu in node.cpus] for node in nodes[:2]] == [
        [0, 1, 2, 3, 16, 17, 18, 19],
        [4, 5, 6, 7, 20, 21, 22, 23],
    ]
    assert nodes[2].cpus[5] == Cpu(number=25, core=9, package=1, cache=8)
    assert planned(root, "exclusive", 2, 1, 1) == [(4, 5, 20, 21), (6, 7, 22, 23)]
    assert planned(root, "core-complex", 2, 1, 1) == [(4, 5, 20, 21), (6, 7, 22, 23)]
    assert planned(root, "socket", 1, 3) == [(*range(8, 16), *range(24, 32))]


def test_a_node_without_cpus_is_a_node(tmp_path: Path) -> None:
    root = write(tmp_path, machine(sockets=1, nodes=1, cores=2), empty_nodes=[1])
    assert [len(node.cpus) for node in read_nodes(root)] == [2, 0]
    assert planned(root, "node", 2) == [(0, 1), (0, 1)]
    assert planned(root, "socket", 1, 0) == [(0, 1)]


def test_offline_cpus_are_left_out(tmp_path: Path) -> None:
    places = [dataclasses.replace(place, online=place.number != 1) for place in machine(sockets=1, nodes=1, cores=4)]
    root = write(tmp_path, places)
    assert planned(root, "node", 1) == [(0, 2, 3)]
    put(root / "devices/system/node/node0/cpulist", "0-3")  # went offline between two reads
    assert planned(root, "node", 1) == [(0, 2, 3)]


def test_a_kernel_without_numa_has_one_node(tmp_path: Path) -> None:
    put(tmp_path / "devices/system/cpu/online", "0-2")
    assert planned(tmp_path, "exclusive", 3) == [(0,), (1,), (2,)]
    assert read_nodes(tmp_path / "nothing") == ()


@pytest.mark.parametrize("text", ["0-", "a", "3-1", "0-999999", "0-65536", "1,,2", "-1"])
def test_what_is_not_understood_is_unknown(tmp_path: Path, text: str) -> None:
    root = write(tmp_path, [CpuPlace(number=0, node=0, package=0, core=0, cache=0)])
    put(root / "devices/system/cpu/cpu0/topology/thread_siblings_list", text)
    put(root / "devices/system/cpu/cpu0/topology/physical_package_id", "?")
    put(root / "devices/system/cpu/cpu0/cache/index2/shared_cpu_list", text)
    put(root / "devices/system/cpu/cpu0/cache/index0/shared_cpu_list", text)
    assert read_nodes(root)[0].cpus == (Cpu(number=0, core=0, package=None, cache=None),)
    put(root / "devices/system/node/node0/cpulist", text)
    assert [len(node.cpus) for node in read_nodes(root)] == [1]  # as of a kernel without NUMA


def test_the_node_of_a_pci_device(tmp_path: Path) -> None:
    write(tmp_path, [], gpus={"0000:dc:00.0": 3, "0000:dd:00.0": -1})
    assert read_pci_node(tmp_path, "0000:dc:00.0") == 3
    assert read_pci_node(tmp_path, "0000:dd:00.0") == -1
    assert read_pci_node(tmp_path, "0000:de:00.0") is None


def test_a_binding_that_cannot_be_had_is_a_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--numa-binding=node: the kernel tells of no NUMA node"):
        bind_workers(BindingMode.NODE, 1, {}, sysfs=tmp_path, devices=tmp_path)
    write(tmp_path, [CpuPlace(number=4000, node=0, package=0, core=0, cache=0)])
    with pytest.raises(UserError, match="may be used here"):  # not one of ours
        bind_workers(BindingMode.NODE, 1, {}, sysfs=tmp_path, devices=tmp_path)
    (tmp_path / "nvidiactl").touch()
    with pytest.raises(UserError, match="may be used here"):  # the driver, which could not be asked, is not
        bind_workers(BindingMode.NODE, 1, {"CUDA_VISIBLE_DEVICES": ""}, sysfs=tmp_path, devices=tmp_path)


def test_the_plan_is_told_in_a_line_of_bounded_length(tmp_path: Path) -> None:
    mine = sorted(os.sched_getaffinity(0))
    write(tmp_path, [CpuPlace(number=cpu, node=0, package=0, core=cpu, cache=0) for cpu in mine])
    plan = bind_workers(BindingMode.SOCKET, 100, {}, sysfs=tmp_path, devices=tmp_path)
    assert plan.cpus == (tuple(mine),) * 100
    line = describe(BindingMode.SOCKET, plan)
    assert line.startswith(
        "--numa-binding=socket: there is no GPU, so the workers take the NUMA nodes (0) in turn; CPUs of"
    )
    assert "worker 7: " in line and "worker 8: " not in line and line.endswith("92 more")
