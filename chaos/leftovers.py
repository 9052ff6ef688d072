"""Looks for what a campaign should not leave behind.

Markers of the store's client below writers/ are not counted: a process killed by SIGKILL leaves its own to expire.
"""

import asyncio
import os
from pathlib import Path

from elastic_run.chaos.nodes import MARK
from elastic_run.runtime.edge.store import NO_LEASE, Store

SETTLE_S = 5.0
"""For killed processes to be reaped and for leases of the last ones killed to run out."""
POLL_S = 0.2
SHOWN_MAX = 50
OF_TORCH = ("torchinductor_",)
"""Begin of the names that torch itself leaves in the directory for temporary files."""


async def find_leftovers(store: Store, *, mark: str, roots: tuple[Path, ...]) -> list[str]:
    """Return what is still there after a while: processes with the mark, files and sockets below roots, leased keys."""
    left: list[str] = []
    for _ in range(int(SETTLE_S / POLL_S)):
        left = [*_processes(mark), *_files(roots), *_sockets(roots), *await _leased_keys(store)]
        if not left:
            return []
        await asyncio.sleep(POLL_S)
    return left[:SHOWN_MAX]


def _processes(mark: str) -> list[str]:
    wanted = f"{MARK}={mark}".encode()
    found = []
    for name in os.listdir("/proc"):
        if not name.isdecimal() or int(name) == os.getpid():
            continue
        try:
            environ = Path(f"/proc/{name}/environ").read_bytes()
            command = Path(f"/proc/{name}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has ended, or is another user's
            continue
        if wanted in environ.split(b"\0"):
            found.append(f"process {name}: {command[:200]}")
    return found


def _files(roots: tuple[Path, ...]) -> list[str]:
    return [f"file {path}" for root in roots for path in sorted(root.iterdir()) if not path.name.startswith(OF_TORCH)]


def _sockets(roots: tuple[Path, ...]) -> list[str]:
    listed = Path("/proc/net/unix").read_text(errors="replace")
    return [f"socket {line.split()[-1]}" for line in listed.splitlines() for root in roots if f" {root}/" in line]


async def _leased_keys(store: Store) -> list[str]:
    return [f"leased key {item.key}" for item in (await store.list("")).items if item.lease_id != NO_LEASE]
