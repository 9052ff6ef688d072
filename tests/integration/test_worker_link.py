"""The link between worker and agent over real sockets, with everything a worker or an agent may do wrong."""

import asyncio
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator

import pytest

from elastic_run.runtime.edge import worker_server, worker_wire
from elastic_run.runtime.edge.worker_link import FD_MIN, WorkerLink
from elastic_run.runtime.edge.worker_server import (
    WorkerEvent,
    WorkerGone,
    WorkerHello,
    WorkerParked,
    WorkerRefused,
    WorkerRunning,
    WorkerServer,
)
from elastic_run.runtime.edge.worker_wire import PACKET_BYTES_MAX
from elastic_run.runtime.protocol.errors import PeerError, PeerRefused, UserError
from elastic_run.runtime.protocol.ids import PROTOCOL_VERSION, Incarnation, ViewNumber
from elastic_run.runtime.protocol.proto import worker_pb2

BOUND_S = 20.0
ME = Incarnation("w-1")


class Agent:
    """A server with the list of what it reported."""

    def __init__(self, folder: str, hello_timeout_s: float = BOUND_S) -> None:
        self.path = f"{folder}/agent.sock"
        self.events: asyncio.Queue[WorkerEvent] = asyncio.Queue()
        self.server = WorkerServer(self.path, self.admit, self.events.put_nowait, hello_timeout_s)

    def admit(self, hello: WorkerHello) -> ViewNumber:
        if not hello.worker.startswith("w-"):
            raise PeerRefused(f"no worker {hello.worker} is awaited")
        return ViewNumber(7)

    async def next(self) -> WorkerEvent:
        async with asyncio.timeout(BOUND_S):
            return await self.events.get()


@pytest.fixture
def folder() -> Iterator[str]:
    made = tempfile.mkdtemp(dir="/tmp", prefix="er-")
    yield made
    shutil.rmtree(made)


@pytest.fixture
async def agent(folder: str) -> AsyncIterator[Agent]:
    made = Agent(folder)
    await made.server.start()
    yield made
    await made.server.close()
    assert "agent.sock" not in os.listdir(folder)


async def connect(agent: Agent, worker: str = ME, version: int = PROTOCOL_VERSION) -> WorkerLink:
    link = await asyncio.to_thread(WorkerLink, agent.path)
    link.hello(worker=worker, pid=os.getpid(), protocol_version=version)
    return link


async def welcomed(agent: Agent) -> WorkerLink:
    link = await connect(agent)
    assert await asyncio.to_thread(link.welcome) == 7
    assert await agent.next() == WorkerHello(worker=ME, pid=os.getpid())
    return link


def raw(agent: Agent) -> socket.socket:
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    peer.settimeout(BOUND_S)
    peer.connect(agent.path)
    return peer


async def test_worker_parks_is_resumed_and_leaves(agent: Agent) -> None:
    link = await welcomed(agent)
    link.parked(view=8, step=120)
    assert await agent.next() == WorkerParked(worker=ME, view=ViewNumber(8), step=120)
    assert agent.server.resume(ME, ViewNumber(8))
    assert await asyncio.to_thread(link.wait_resume, view=8, timeout_s=BOUND_S)
    link.running(view=8, step=120, unasked=False)
    assert await agent.next() == WorkerRunning(worker=ME, view=ViewNumber(8), step=120, unasked=False)
    link.close()
    assert await agent.next() == WorkerGone(worker=ME, reason="it closed the link")
    assert not agent.server.resume(ME, ViewNumber(8))


async def test_late_answer_to_an_earlier_stop_does_not_resume_a_later_one(agent: Agent) -> None:
    link = await welcomed(agent)
    agent.server.resume(ME, ViewNumber(8))
    link.parked(view=9, step=1)
    await agent.next()
    waiting = asyncio.create_task(asyncio.to_thread(link.wait_resume, view=9, timeout_s=BOUND_S))
    agent.server.resume(ME, ViewNumber(8))
    agent.server.resume(ME, ViewNumber(9))
    assert await waiting
    link.close()


async def test_wait_for_resume_ends_by_itself(agent: Agent) -> None:
    link = await welcomed(agent)
    assert not await asyncio.to_thread(link.wait_resume, view=8, timeout_s=0.05)
    link.close()


async def test_other_protocol_version_is_refused_with_both_versions(agent: Agent) -> None:
    link = await connect(agent, version=PROTOCOL_VERSION + 41)
    with pytest.raises(PeerRefused, match=rf"version {PROTOCOL_VERSION + 41}, its agent speaks {PROTOCOL_VERSION}"):
        await asyncio.to_thread(link.welcome)
    assert isinstance(await agent.next(), WorkerRefused)
    link.close()


async def test_worker_nobody_awaits_is_refused_with_the_reason(agent: Agent) -> None:
    link = await connect(agent, worker="x-1")
    with pytest.raises(PeerRefused, match="no worker x-1 is awaited"):
        await asyncio.to_thread(link.welcome)
    assert await agent.next() == WorkerRefused(pid=os.getpid(), reason="no worker x-1 is awaited")
    link.close()


async def test_second_link_of_the_same_worker_is_refused_and_the_first_lives(agent: Agent) -> None:
    first = await welcomed(agent)
    second = await connect(agent)
    with pytest.raises(PeerRefused, match="connected already"):
        await asyncio.to_thread(second.welcome)
    assert isinstance(await agent.next(), WorkerRefused)
    first.parked(view=8, step=1)
    assert isinstance(await agent.next(), WorkerParked)
    first.close()
    second.close()


GREETING = worker_wire.hello(protocol_version=PROTOCOL_VERSION, worker="w-2", pid=1)


@pytest.mark.parametrize(
    ("packet", "reason"),
    [
        (b"\xff\xff\xff\xff", "are no message"),
        (b"\x00" * (PACKET_BYTES_MAX + 1), "over 4096 bytes"),
        (worker_wire.parked(view=1, step=1), "no greeting"),
        (b"\x52\x00", "no greeting"),
    ],
)
async def test_garbage_instead_of_a_greeting_closes_that_link_only(agent: Agent, packet: bytes, reason: str) -> None:
    healthy = await welcomed(agent)
    with raw(agent) as peer:
        peer.send(packet)
        refused = await agent.next()
        assert isinstance(refused, WorkerRefused)
        assert reason in refused.reason
        assert refused.pid == os.getpid()
        answer = worker_wire.parse(await asyncio.to_thread(peer.recv, PACKET_BYTES_MAX))
        assert isinstance(answer, worker_wire.Refused)
    healthy.parked(view=8, step=1)
    assert isinstance(await agent.next(), WorkerParked)
    healthy.close()


@pytest.mark.parametrize(
    ("packet", "reason"),
    [
        (b"\xff\xff\xff\xff", "are no message"),
        (b"\x00" * (PACKET_BYTES_MAX + 1), "over 4096 bytes"),
        (GREETING, "it sent hello where"),
        (b"\x52\x00", "an empty message"),
    ],
)
async def test_garbage_of_an_admitted_worker_closes_that_link_only(agent: Agent, packet: bytes, reason: str) -> None:
    healthy = await welcomed(agent)
    with raw(agent) as peer:
        peer.send(GREETING)
        assert isinstance(await agent.next(), WorkerHello)
        peer.send(packet)
        gone = await agent.next()
        assert isinstance(gone, WorkerGone)
        assert gone.worker == "w-2"
        assert reason in gone.reason
    healthy.parked(view=8, step=1)
    assert isinstance(await agent.next(), WorkerParked)
    healthy.close()


async def test_silent_connection_is_refused_after_its_deadline(folder: str) -> None:
    agent = Agent(folder, hello_timeout_s=0.05)
    await agent.server.start()
    with raw(agent):
        refused = await agent.next()
        assert isinstance(refused, WorkerRefused)
        assert refused.reason == "no greeting came within 0.05 s"
    await agent.server.close()


async def test_connection_that_leaves_without_a_greeting_is_reported(agent: Agent) -> None:
    raw(agent).close()
    assert await agent.next() == WorkerRefused(pid=os.getpid(), reason="it left without a greeting")


async def test_connections_beyond_the_bound_are_refused(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_server, "CONNECTIONS_MAX", 1)
    agent = Agent(folder)
    await agent.server.start()
    link = await welcomed(agent)
    with raw(agent) as peer:
        answer = worker_wire.parse(await asyncio.to_thread(peer.recv, PACKET_BYTES_MAX))
        assert answer == worker_wire.Refused("the agent serves 1 connections already")
    link.close()
    await agent.server.close()


async def test_agent_that_dies_ends_every_wait_of_the_worker(folder: str) -> None:
    agent = Agent(folder)
    await agent.server.start()
    link = await welcomed(agent)
    waiting = asyncio.create_task(asyncio.to_thread(link.wait_resume, view=8, timeout_s=BOUND_S))
    await agent.server.close()
    with pytest.raises(PeerError, match="closed the link"):
        await waiting
    with pytest.raises(PeerError):
        link.parked(view=8, step=1)
    link.close()


@pytest.mark.parametrize("packet", [b"\xff", b"", b"\x00" * (PACKET_BYTES_MAX + 1), b"\x1a\x00", b"\x2a\x00"])
async def test_foreign_agent_is_a_peer_error(folder: str, packet: bytes) -> None:
    path = f"{folder}/foreign.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen(1)
        link = WorkerLink(path)
        link.hello(worker=ME, pid=1)
        peer, _ = listener.accept()
        with peer:
            peer.send(packet)
            with pytest.raises(PeerError):
                await asyncio.to_thread(link.welcome, timeout_s=BOUND_S)
    link.close()


async def test_silent_agent_is_a_peer_error(folder: str) -> None:
    path = f"{folder}/silent.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen(1)
        link = WorkerLink(path)
        with pytest.raises(PeerError, match="did not answer within"):
            link.welcome(timeout_s=0.05)
    link.close()


def test_missing_agent_is_a_peer_error(folder: str) -> None:
    with pytest.raises(PeerError, match="cannot connect"):
        WorkerLink(f"{folder}/nobody.sock")


async def test_link_stays_away_from_low_descriptors_and_is_closed_on_exec(agent: Agent) -> None:
    link = await welcomed(agent)
    fd = link._socket.fileno()
    assert fd >= FD_MIN
    assert not os.get_inheritable(fd)
    link.close()


async def test_file_of_the_script_under_our_number_is_never_written(agent: Agent, folder: str) -> None:
    link = await welcomed(agent)
    number = link._socket.fileno()
    precious = os.open(f"{folder}/precious", os.O_RDWR | os.O_CREAT)
    os.dup2(precious, number)
    with pytest.raises(PeerError, match="the script closed the link"):
        link.parked(view=8, step=1)
    link.close()
    os.write(number, b"still the script's")
    os.close(number)
    assert os.pread(precious, 100, 0) == b"still the script's"
    os.close(precious)


async def test_socket_is_private_and_needs_a_private_folder(agent: Agent, folder: str) -> None:
    assert stat.S_IMODE(os.stat(agent.path).st_mode) == 0o600
    os.mkdir(f"{folder}/open")
    os.chmod(f"{folder}/open", 0o755)
    with pytest.raises(UserError, match="chmod 700"):
        await Agent(f"{folder}/open").server.start()


async def test_socket_of_a_dead_agent_is_replaced_and_of_a_live_one_is_not(folder: str) -> None:
    agent = Agent(folder)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        dead.bind(agent.path)
    await agent.server.start()
    with pytest.raises(UserError, match="another agent"):
        await Agent(folder).server.start()
    assert isinstance(await agent.next(), WorkerRefused)  # the other's question whether anyone listens
    link = await welcomed(agent)
    link.close()
    await agent.server.close()


async def test_unusable_paths_are_user_errors(folder: str) -> None:
    with pytest.raises(UserError, match="shorter run directory"):
        await Agent(f"{folder}/{'x' * 100}").server.start()
    with pytest.raises(UserError, match="cannot listen"):
        await Agent(f"{folder}/missing").server.start()
    os.close(os.open(f"{folder}/agent.sock", os.O_CREAT))
    with pytest.raises(UserError, match="is no socket"):
        await Agent(folder).server.start()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
async def test_process_of_another_user_is_refused(agent: Agent, folder: str) -> None:
    os.chmod(folder, 0o711)
    os.chmod(agent.path, 0o666)
    code = (
        "import os, socket, sys\nos.setuid(65534)\n"
        "s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\ns.connect(sys.argv[1])\n"
        "s.settimeout(20)\nsys.stdout.buffer.write(s.recv(4096))"
    )
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-S", "-E", "-c", code, agent.path],
        stdout=subprocess.PIPE,
        timeout=BOUND_S,
        check=True,
    )
    answer = worker_wire.parse(done.stdout)
    assert isinstance(answer, worker_wire.Refused)
    assert "user 65534 may not talk" in answer.reason


async def test_generated_messages_of_the_agent_fit_in_a_packet(agent: Agent) -> None:
    """The longest refusal, in the widest characters."""
    reason = "\U0001f600" * worker_server.REASON_CHARS_MAX
    message = worker_pb2.AgentMessage(refused=worker_pb2.Refused(reason=reason))
    assert message.ByteSize() <= PACKET_BYTES_MAX
