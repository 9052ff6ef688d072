"""The store under test: a real etcd cluster on loopback whose members can be killed, stopped and started again.

Members die with this process, even after kill -9 of it.
Not here: which member is hit when (faults/store.py).
"""

import asyncio
import os
import shutil
import signal
import socket
import sys
from pathlib import Path

from elastic_run.runtime.edge import store_access
from elastic_run.runtime.edge.process import Process, spawn
from elastic_run.runtime.edge.store import Store
from elastic_run.runtime.protocol.config import StoreConfig
from elastic_run.runtime.protocol.errors import StoreError, StoreUnavailable, UserError

HEARTBEAT_MS, ELECTION_MS = 50, 300
START_S = 30.0
POLL_S = 0.1


def find_etcd() -> str:
    """Return etcd's program. Raises UserError when there is none."""
    own = os.path.join(sys.prefix, "etcd", "usr", "bin")
    found = shutil.which("etcd", path=own + os.pathsep + os.environ.get("PATH", os.defpath))
    if found is None:
        raise UserError("no etcd on the PATH; install it (Debian: apt-get install etcd-server), or run make venv")
    return found


class EtcdMembers:
    """Made of `size` members, their data below `directory`."""

    def __init__(self, directory: Path, size: int) -> None:
        self._directory, self._program = directory, find_etcd()
        ports = _free_ports(2 * size)
        self._client_ports, self._peer_ports = ports[:size], ports[size:]
        self._processes: list[Process | None] = [None] * size

    @property
    def endpoints(self) -> tuple[str, ...]:
        return tuple(f"127.0.0.1:{port}" for port in self._client_ports)

    @property
    def running(self) -> tuple[int, ...]:
        return tuple(i for i, process in enumerate(self._processes) if process is not None and process.exit is None)

    async def start(self) -> None:
        """Start all members and wait until they answer. Raises StoreUnavailable."""
        for index in range(len(self._processes)):
            self.start_member(index)
        store = store_access.open_store(StoreConfig(endpoints=self.endpoints), "/chaos")
        try:
            async with asyncio.timeout(START_S):
                while not await _answers(store):  # noqa: ASYNC110 - another program's state, bounded
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            raise StoreUnavailable(f"etcd did not start within {START_S:g} s; logs in {self._directory}") from None
        finally:
            await store.close()

    def start_member(self, index: int) -> None:
        """Start a member, with the data it had. Does not wait."""
        name = f"m{index}"
        peers = ",".join(f"m{i}=http://127.0.0.1:{port}" for i, port in enumerate(self._peer_ports))
        client, peer = f"http://{self.endpoints[index]}", f"http://127.0.0.1:{self._peer_ports[index]}"
        data = self._directory / name
        data.mkdir(mode=0o700, exist_ok=True)
        argv = [self._program, "--name", name, "--data-dir", str(data), "--logger", "zap", "--log-level", "warn"]
        argv += ["--listen-client-urls", client, "--advertise-client-urls", client]
        argv += ["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", peers]
        argv += ["--heartbeat-interval", str(HEARTBEAT_MS), "--election-timeout", str(ELECTION_MS)]
        log = os.open(self._directory / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            environ = {"PATH": os.environ.get("PATH", os.defpath)}
            self._processes[index] = spawn(argv, env=environ, stdout=log, stderr=log)
        finally:
            os.close(log)

    async def kill_member(self, index: int) -> None:
        process = self._processes[index]
        if process is not None:
            await process.kill()

    def signal_member(self, index: int, number: int) -> None:
        process = self._processes[index]
        if process is not None:
            process.signal(number)

    async def leader(self, store: Store) -> int | None:
        """The member that leads; None when nobody can tell now."""
        try:
            status, members = await store.status(), await store.members()
        except StoreError:
            return None
        names = [member.name for member in members if member.member_id == status.leader_id]
        return int(names[0].removeprefix("m")) if names else None

    async def stop(self) -> None:
        for index in self.running:
            self.signal_member(index, signal.SIGCONT)
            await self.kill_member(index)


async def _answers(store: Store) -> bool:
    try:
        await store.get("started", deadline_s=1.0)
    except StoreError:
        return False
    return True


def _free_ports(count: int) -> list[int]:
    """Ports nobody listens on, held together so that no two are the same."""
    held = [socket.socket() for _ in range(count)]
    try:
        for each in held:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in held]
    finally:
        for each in held:
            each.close()
