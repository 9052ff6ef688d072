"""Makes the hosts of a laboratory: one network namespace each, all with an address on one common Ethernet segment.

A host has its own devices, host name, /sys, /dev/shm and abstract unix sockets; hosts share files, and know each
other by name (/etc/hosts) and by permanent ARP entries, so that a line cut in one direction stays open in the other.

Runs in the relay's process, after it was moved into namespaces of its own. Nothing made here outlives that process and
those it lent the namespaces to.
"""

import os
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path

from elastic_run.chaos.network import kernel

HOSTS_MAX = 16
DEVICE = "eth0"
NETMASK = "255.255.255.0"
DEVICE_QUEUE_FRAMES = 4000
"""Frames the kernel keeps for the relay, about 50 ms of its full speed. Beyond that it counts them as tx_dropped."""
_CGROUPS = "/sys/fs/cgroup"


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """A host as the relay sees it: the network end of its device, and its namespaces (net, uts, mnt)."""

    name: str
    tap_fd: int
    namespace_fds: tuple[int, ...]


def address_of(index: int) -> str:
    """The IPv4 address of the host with this index."""
    return f"10.77.0.{index + 1}"


def hardware_of(index: int) -> bytes:
    """The Ethernet address of the host with this index: locally administered, index in the last byte."""
    return bytes((0x02, 0x77, 0, 0, 0, index))


def make_hosts(names: tuple[str, ...]) -> tuple[Host, ...]:
    """Create every host and return to where the process was.

    Raises:
        OSError: the kernel refused a step.
    """
    _publish_names(names)
    base = kernel.open_namespaces("net", "uts", "mnt")
    hosts = []
    for index, name in enumerate(names):
        kernel.unshare(kernel.CLONE_NEWNET | kernel.CLONE_NEWUTS | kernel.CLONE_NEWNS)
        socket.sethostname(name)
        tap_fd = _open_device(index, len(names))
        _mount_own()
        namespace_fds = tuple(kernel.open_namespaces("net", "uts", "mnt"))
        hosts.append(Host(name=name, tap_fd=tap_fd, namespace_fds=namespace_fds))
        for namespace_fd in base:
            kernel.enter(namespace_fd)
    for namespace_fd in base:
        os.close(namespace_fd)
    return tuple(hosts)


def _open_device(index: int, count: int) -> int:
    kernel.silence_ipv6()
    kernel.bring_up("lo")
    tap_fd = kernel.open_tap(DEVICE)
    kernel.configure(
        DEVICE,
        hardware=hardware_of(index),
        address=address_of(index),
        netmask=NETMASK,
        queue_frames=DEVICE_QUEUE_FRAMES,
    )
    for other in range(count):
        if other != index:
            kernel.add_neighbour(DEVICE, address=address_of(other), hardware=hardware_of(other))
    return tap_fd


def _mount_own() -> None:
    """Show the host's own devices in /sys, leave the control groups in their place, give it its own /dev/shm."""
    closed = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
    cgroups_fd = os.open(_CGROUPS, os.O_PATH | os.O_CLOEXEC) if Path(_CGROUPS).is_dir() else None
    kernel.mount("sysfs", "/sys", "sysfs", closed)
    if cgroups_fd is not None:
        kernel.mount(f"/proc/self/fd/{cgroups_fd}", _CGROUPS, None, kernel.MS_BIND | kernel.MS_REC)
        os.close(cgroups_fd)
    if Path("/dev/shm").is_dir():
        kernel.mount("tmpfs", "/dev/shm", "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV)


def _publish_names(names: tuple[str, ...]) -> None:
    """Bind a file with every host's address over /etc/hosts; the file is unlinked at once and lives by the bind."""
    lines = ["127.0.0.1 localhost", *(f"{address_of(index)} {name}" for index, name in enumerate(names))]
    descriptor, path = tempfile.mkstemp(prefix="lab-hosts-")
    try:
        os.write(descriptor, ("\n".join(lines) + "\n").encode())
        os.fchmod(descriptor, 0o644)
        kernel.mount(path, "/etc/hosts", None, kernel.MS_BIND)
    finally:
        os.close(descriptor)
        os.unlink(path)
