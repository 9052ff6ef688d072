"""Answers about this machine that decide how a job starts: addresses, ports, devices, names.

Not here: what is asked and what is said when the answer does not fit (preflight.py).
"""

import asyncio
import errno
import os
import re
import signal
import socket
from collections.abc import Mapping

from elastic_run.runtime.edge.process import spawn
from elastic_run.runtime.protocol.errors import UserError

COUNT_TIMEOUT_S = 120.0
"""Importing torch takes seconds, minutes from a cold network disk."""
COUNT_BYTES_MAX = 4096
HOST_NAME_LENGTH_MAX = 100

_COUNT_DEVICES = """
import sys, torch
kind = sys.argv[1]
if kind == "auto":
    module = torch.accelerator if torch.accelerator.is_available() else None
elif kind == "gpu":
    module = torch.cuda
else:
    module = getattr(torch, kind, None)
if module is None:
    import os
    print(len(os.sched_getaffinity(0)) if kind == "auto" else "unknown")
elif not hasattr(module, "device_count") or not hasattr(module, "is_available"):
    print("unknown")
else:
    print(module.device_count() if module.is_available() else "none")
"""


async def count_devices(kind: str, *, python: str, env: Mapping[str, str]) -> int:
    """Return how many workers `--nproc-per-node=KIND` means here. Imports torch in a process of its own."""
    if kind == "cpu":
        return len(os.sched_getaffinity(0))
    reader, writer = os.pipe()
    try:
        child = spawn([python, "-c", _COUNT_DEVICES, kind], env=env, stdout=writer, death_signal=signal.SIGKILL)
        os.close(writer)
        writer = -1
        try:
            await asyncio.wait_for(child.wait(), COUNT_TIMEOUT_S)
        except TimeoutError:
            raise UserError(f"torch took over {COUNT_TIMEOUT_S:g} s to count devices; write their number") from None
        finally:
            await child.kill()
        answer = os.read(reader, COUNT_BYTES_MAX).decode(errors="replace").strip().rpartition("\n")[2]
    finally:
        for descriptor in {reader, writer} - {-1}:
            os.close(descriptor)
    if answer == "unknown":
        raise UserError(f"--nproc-per-node={kind}: torch knows no such device; write a number, auto, cpu, gpu or xpu")
    if not answer.isdecimal() or int(answer) == 0:
        raise UserError(f"--nproc-per-node={kind}: torch sees no such device here; write a number, auto or cpu")
    return int(answer)


def host_name() -> str:
    """Return this machine's name in the letters a node name may have."""
    name = re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname().partition(".")[0]).lstrip("._-")
    return name[:HOST_NAME_LENGTH_MAX] or "node"


def addresses_of(host: str) -> list[str]:
    """Return the numeric addresses of a host name, in the resolver's order; none when it has none."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError):
        return []
    return list(dict.fromkeys(str(item[4][0]) for item in found))


def local_address_of(host: str) -> str | None:
    """Return the address of `host` that this machine can listen on, or None when the host is another machine."""
    return next((address for address in addresses_of(host) if bind_error(address, 0) is None), None)


def bind_error(address: str, port: int) -> int | None:
    """Return the errno with which listening at `address:port` fails, or None when it is possible."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((address, port))
            listener.listen(1)
    except OSError as error:
        return error.errno or errno.EIO
    return None


def address_towards(host: str) -> str | None:
    """Return the address with which packets to `host` leave this machine; None without a route. Sends nothing."""
    for address in addresses_of(host):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as route:
                route.connect((address, 9))
                return str(route.getsockname()[0])
        except OSError:
            continue
    return None


def free_bytes(path: str) -> int:
    """Return how much this user can still write on the file system of `path`."""
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize
