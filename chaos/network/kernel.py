"""The calls to Linux that a network laboratory needs and Python 3.11 lacks: namespaces, mounts, TAP devices, addresses.

The one module of chaos that speaks to the kernel through ctypes and ioctl. Every function raises OSError.
Not here: which namespaces are made, and in what order (hosts.py).
"""

import ctypes
import fcntl
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path

CLONE_NEWNS = 0x0002_0000
CLONE_NEWUTS = 0x0400_0000
CLONE_NEWIPC = 0x0800_0000
CLONE_NEWPID = 0x2000_0000
CLONE_NEWNET = 0x4000_0000

MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 0x2, 0x4, 0x8, 0x1000, 0x4000, 0x4_0000
_PR_SET_PDEATHSIG = 1

_TUN_DEVICE = "/dev/net/tun"
_TUNSETIFF = 0x4004_54CA
_IFF_TAP, _IFF_NO_PI = 0x2, 0x1000
_SIOCGIFFLAGS, _SIOCSIFFLAGS = 0x8913, 0x8914
_SIOCSIFADDR, _SIOCSIFNETMASK = 0x8916, 0x891C
_SIOCSIFHWADDR, _SIOCSIFTXQLEN = 0x8924, 0x8943
_SIOCSARP = 0x8955
_IFF_UP = 0x1
_ATF_COM, _ATF_PERM = 0x2, 0x4
_ARPHRD_ETHER = 1
_REQUEST_BYTES = 40  # sizeof(struct ifreq)

_libc = ctypes.CDLL(None, use_errno=True)


def unshare(flags: int) -> None:
    """Move this process (for CLONE_NEWPID: its children) into new namespaces."""
    _checked(_libc.unshare(flags), f"unshare({flags:#x})")


def enter(namespace_fd: int) -> None:
    """Move this process into the namespace that the descriptor refers to."""
    _checked(_libc.setns(namespace_fd, 0), "setns")


def die_with_parent(number: int) -> None:
    """Ask for a signal at the death of the parent's thread that made this process."""
    _checked(_libc.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0), "prctl(PR_SET_PDEATHSIG)")


def mount(source: str, target: str, kind: str | None, flags: int) -> None:
    """Mount a filesystem, or bind a path (MS_BIND), or change propagation (MS_PRIVATE)."""
    encoded = kind.encode() if kind is not None else None
    result = _libc.mount(source.encode(), target.encode(), encoded, ctypes.c_ulong(flags), None)
    _checked(result, f"mount {source} on {target}")


def open_tap(name: str) -> int:
    """Create a TAP device in the current network namespace; it lives as long as the (non-blocking) descriptor."""
    descriptor = os.open(_TUN_DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.ioctl(descriptor, _TUNSETIFF, _request(name, struct.pack("=H", _IFF_TAP | _IFF_NO_PI)))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def configure(name: str, *, hardware: bytes, address: str, netmask: str, queue_frames: int) -> None:
    """Give an Ethernet device its addresses and queue length and bring it up."""
    _set(name, _SIOCSIFHWADDR, struct.pack("=H", _ARPHRD_ETHER) + hardware)
    _set(name, _SIOCSIFTXQLEN, struct.pack("=i", queue_frames))
    _set(name, _SIOCSIFADDR, _internet(address))
    _set(name, _SIOCSIFNETMASK, _internet(netmask))
    bring_up(name)


def bring_up(name: str) -> None:
    """Set a device's flag for up."""

    def raise_flag(control: socket.socket) -> None:
        answer = fcntl.ioctl(control, _SIOCGIFFLAGS, _request(name, b""))
        flags = struct.unpack_from("=H", answer, 16)[0]
        fcntl.ioctl(control, _SIOCSIFFLAGS, _request(name, struct.pack("=H", flags | _IFF_UP)))

    _with_control(raise_flag)


def add_neighbour(name: str, *, address: str, hardware: bytes) -> None:
    """Write a permanent ARP entry."""
    hardware_field = (struct.pack("=H", _ARPHRD_ETHER) + hardware).ljust(16, b"\0")
    flags = struct.pack("=i", _ATF_COM | _ATF_PERM)
    entry = _internet(address) + hardware_field + flags + bytes(16) + name.encode().ljust(16, b"\0")
    _with_control(lambda control: fcntl.ioctl(control, _SIOCSARP, entry))


def silence_ipv6() -> None:
    """Keep the current network namespace from sending IPv6 frames by itself."""
    switch = Path("/proc/sys/net/ipv6/conf/all/disable_ipv6")
    if switch.exists():
        switch.write_text("1")


def open_namespaces(*kinds: str) -> list[int]:
    """Return descriptors of this process's namespaces of these kinds ("net", "mnt", ...)."""
    return [os.open(f"/proc/self/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC) for kind in kinds]


def _set(name: str, request: int, value: bytes) -> None:
    _with_control(lambda control: fcntl.ioctl(control, request, _request(name, value)))


def _with_control(act: Callable[[socket.socket], object]) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        act(control)


def _request(name: str, value: bytes) -> bytes:
    return (name.encode().ljust(16, b"\0") + value).ljust(_REQUEST_BYTES, b"\0")


def _internet(address: str) -> bytes:
    return struct.pack("=HH4s8x", socket.AF_INET, 0, socket.inet_aton(address))


def _checked(result: int, step: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{step}: {os.strerror(number)}")
