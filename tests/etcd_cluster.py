"""A real etcd cluster on loopback for tests: members that can be killed, stopped, restarted and cut off.

Members die with the test process (parent-death signal), even after `kill -9` of it. With `peer_urls` and `peer_ports`
members reach each other only through links of tests/blackhole.py, which can be held up per pair.
"""

import base64
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

ETCD = shutil.which("etcd") or "/usr/bin/etcd"
START_S = 30.0  # a bound; three members take about one second
POLL_S = 0.02
HTTP_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """A certificate authority with a server and a client certificate, all PEM."""

    ca_file: Path
    server_cert_file: Path
    server_key_file: Path
    client_cert_file: Path
    client_key_file: Path


@dataclass(slots=True, kw_only=True)
class Member:
    """`peer_url` is what the others are told; `peer_port` is where the member listens."""

    name: str
    client_port: int
    peer_port: int
    metrics_port: int
    peer_url: str
    process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self.client_port}"


@dataclass(kw_only=True)
class EtcdCluster:
    """`directory` is private to the cluster, and the caller's to remove. Start and stop it from the main thread."""

    directory: Path
    size: int = 3
    tls: TlsFiles | None = None
    peer_urls: tuple[str, ...] = ()  # advertised instead of the members' own, for members behind links
    peer_ports: tuple[int, ...] = ()
    extra_arguments: tuple[str, ...] = ()
    heartbeat_ms: int = 50
    election_ms: int = 300
    members: list[Member] = field(default_factory=list)

    def __post_init__(self) -> None:
        count = self.size * (2 if self.peer_ports else 3)
        ports = free_ports(count)
        for index in range(self.size):
            peer_port = self.peer_ports[index] if self.peer_ports else ports[2 * self.size + index]
            self.members.append(
                Member(
                    name=f"m{index}",
                    client_port=ports[index],
                    metrics_port=ports[self.size + index],
                    peer_port=peer_port,
                    peer_url=self.peer_urls[index] if self.peer_urls else f"http://127.0.0.1:{peer_port}",
                )
            )

    @property
    def endpoints(self) -> tuple[str, ...]:
        return tuple(member.endpoint for member in self.members)

    def start(self) -> None:
        """Start every member that does not run, and wait until there is a leader and all answer."""
        for index, member in enumerate(self.members):
            if member.process is None:
                self.restart(index)
        self.wait_healthy(range(self.size))

    def restart(self, index: int) -> None:
        """Start a member, with the data it had. Does not wait."""
        member = self.members[index]
        assert member.process is None, f"{member.name} runs already"
        log = self.directory / f"{member.name}.log"
        with log.open("ab") as output:
            member.process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", ETCD, *self._arguments(member)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={"PATH": os.environ.get("PATH", "/usr/bin:/bin")},
            )

    def kill(self, index: int) -> None:
        """SIGKILL, and wait for the end."""
        process = self._running(index)
        process.send_signal(signal.SIGKILL)
        process.wait()
        self.members[index].process = None

    def pause(self, index: int) -> None:
        self._running(index).send_signal(signal.SIGSTOP)

    def resume(self, index: int) -> None:
        self._running(index).send_signal(signal.SIGCONT)

    def pid(self, index: int) -> int:
        return self._running(index).pid

    def leader(self) -> int:
        """The member that says it leads, waited for. A paused member does not answer, and is not asked for long."""
        ends_at_s = time.monotonic() + START_S
        while time.monotonic() < ends_at_s:
            for index in range(self.size):
                if "\netcd_server_is_leader 1\n" in self._fetch(index, "/metrics"):
                    return index
            time.sleep(POLL_S)
        raise AssertionError(f"no leader within {START_S:g} s; logs in {self.directory}")

    def wait_healthy(self, indices: range | tuple[int, ...]) -> None:
        """Until each of these members says that it is healthy, which takes a leader and a quorum."""
        ends_at_s = time.monotonic() + START_S
        waiting = list(indices)
        while waiting:
            waiting = [index for index in waiting if '"health":"true"' not in self._fetch(index, "/health")]
            for index in waiting:
                process = self._running(index)
                if process.poll() is not None:
                    raise AssertionError(f"etcd ended with {process.returncode}; see {self.directory}")
            if waiting and time.monotonic() > ends_at_s:
                raise AssertionError(f"members {waiting} not healthy within {START_S:g} s; logs in {self.directory}")
            if waiting:
                time.sleep(POLL_S)

    def api(self, path: str, body: dict[str, object], token: str = "") -> dict[str, object]:
        """Call etcd's JSON gateway, for set-up that the client under test does not offer (users and roles)."""
        request = urllib.request.Request(
            f"http://{self.members[0].endpoint}/v3/{path}",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json", **({"Authorization": token} if token else {})},
        )
        with urllib.request.urlopen(request, timeout=START_S) as response:
            answer: dict[str, object] = json.load(response)
            return answer

    def enable_users(self, user: str, password: str, namespace: str) -> None:
        """Switch authentication on: `user` may read and write below `namespace`, nothing else."""
        self.api("auth/user/add", {"name": "root", "password": password})
        self.api("auth/user/grant", {"user": "root", "role": "root"})
        self.api("auth/role/add", {"name": "job"})
        below, beyond = (base64.b64encode(f"{namespace}{end}".encode()).decode() for end in "/0")
        permission = {"permType": "READWRITE", "key": below, "range_end": beyond}
        self.api("auth/role/grant", {"name": "job", "perm": permission})
        self.api("auth/user/add", {"name": user, "password": password})
        self.api("auth/user/grant", {"user": user, "role": "job"})
        self.api("auth/enable", {})

    def close(self) -> None:
        for member in self.members:
            if member.process is not None:
                member.process.send_signal(signal.SIGKILL)
                member.process.wait()
                member.process = None

    def __enter__(self) -> Self:
        assert threading.current_thread() is threading.main_thread(), "members die with the thread that started them"
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _running(self, index: int) -> subprocess.Popen[bytes]:
        process = self.members[index].process
        assert process is not None, f"{self.members[index].name} does not run"
        return process

    def _fetch(self, index: int, path: str) -> str:
        try:
            url = f"http://127.0.0.1:{self.members[index].metrics_port}{path}"
            with urllib.request.urlopen(url, timeout=HTTP_S) as response:
                text: str = response.read().decode()
                return text
        except (urllib.error.URLError, OSError):
            return ""  # not up yet, stopped, or unhealthy: the caller asks again

    def _arguments(self, member: Member) -> list[str]:
        data = self.directory / member.name
        data.mkdir(mode=0o700, exist_ok=True)
        scheme = "https" if self.tls else "http"
        client_url = f"{scheme}://{member.endpoint}"
        peers = ",".join(f"{other.name}={other.peer_url}" for other in self.members)
        arguments = [
            *("--name", member.name, "--data-dir", str(data), "--logger", "zap", "--log-level", "warn"),
            *("--listen-client-urls", client_url, "--advertise-client-urls", client_url),
            *("--listen-peer-urls", f"http://127.0.0.1:{member.peer_port}"),
            *("--initial-advertise-peer-urls", member.peer_url),
            *("--listen-metrics-urls", f"http://127.0.0.1:{member.metrics_port}"),
            *("--initial-cluster", peers, "--initial-cluster-token", self.directory.name),
            *("--heartbeat-interval", str(self.heartbeat_ms), "--election-timeout", str(self.election_ms)),
            *self.extra_arguments,
        ]
        if self.tls:
            arguments += [
                *("--cert-file", str(self.tls.server_cert_file), "--key-file", str(self.tls.server_key_file)),
                *("--client-cert-auth", "--trusted-ca-file", str(self.tls.ca_file)),
            ]
        return arguments


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on, held together so that no two are the same."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for held in sockets:
            held.bind(("127.0.0.1", 0))
        return [held.getsockname()[1] for held in sockets]
    finally:
        for held in sockets:
            held.close()


def make_tls_files(directory: Path) -> TlsFiles:
    """A fresh authority and certificates for 127.0.0.1, by the openssl command."""
    (directory / "san").write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\n")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=directory, check=True, capture_output=True)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj")
    openssl("req", "-x509", *key, "/CN=test authority", "-days", "2", "-keyout", "ca.key", "-out", "ca.pem")
    for name in ("server", "client"):
        openssl("req", *key, f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr")
        signing = ("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial")
        openssl(*signing, "-days", "2", "-extfile", "san", "-out", f"{name}.pem")
    return TlsFiles(
        ca_file=directory / "ca.pem",
        server_cert_file=directory / "server.pem",
        server_key_file=directory / "server.key",
        client_cert_file=directory / "client.pem",
        client_key_file=directory / "client.key",
    )
