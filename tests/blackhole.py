"""TCP links that a test can hold up: bytes wait, as in a partition of the network, and go on when it heals.

Nothing is dropped or reset while a link is held, connections neither open nor close: TCP across a real partition looks
the same from both ends. Needs no privileges and no packet filter.
"""

import asyncio
import os
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

CHUNK_BYTES = 65536
CLIENT = -1  # a client of the cluster, as the end of a link


Gates = tuple[asyncio.Event, asyncio.Event]  # bytes pass while set: from the source to the target, and back


class Links:
    """Who can talk to whom. Ends are numbers of members, or CLIENT; each direction can be held alone."""

    def __init__(self) -> None:
        self._gates: dict[tuple[int, int], asyncio.Event] = {}

    def gates(self, source: int, target: int) -> Gates:
        return self._gate(source, target), self._gate(target, source)

    def cut(self, one: int, other: int) -> None:
        self.mute(one, other)
        self.mute(other, one)

    def mute(self, source: int, target: int) -> None:
        """What `source` sends no longer reaches `target`; the other way still works."""
        self._gate(source, target).clear()

    def heal(self) -> None:
        for gate in self._gates.values():
            gate.set()

    def _gate(self, source: int, target: int) -> asyncio.Event:
        gate = self._gates.get((source, target))
        if gate is None:
            gate = self._gates[source, target] = asyncio.Event()
            gate.set()
        return gate


class Forwarder:
    """Listens on a port of its own and forwards to `target_port` through the gates of `gates_of(source port)`."""

    def __init__(self, target_port: int, gates_of: Callable[[int], Gates | None]) -> None:
        self.port = 0
        self._target_port = target_port
        self._gates_of = gates_of
        self._server: asyncio.Server | None = None
        self._tasks: dict[asyncio.Task[None], None] = {}

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._server.wait_closed()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks[task] = None
        with suppress(asyncio.CancelledError):  # only __aexit__ cancels; the server's callback would log it
            try:
                gates = self._gates_of(writer.get_extra_info("peername")[1])
                if gates is not None:
                    await self._forward(reader, writer, gates)
            finally:
                writer.close()
                del self._tasks[task]

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, gates: Gates) -> None:
        towards, back = gates
        await towards.wait()
        try:
            there, to_there = await asyncio.open_connection("127.0.0.1", self._target_port)
        except OSError:
            return  # the target is down: the source sees its connection close
        try:
            async with asyncio.TaskGroup() as pumps:
                pumps.create_task(_pump(reader, to_there, towards))
                pumps.create_task(_pump(there, writer, back))
        finally:
            to_there.close()


async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter, gate: asyncio.Event) -> None:
    with suppress(ConnectionError):  # either end died: the finally tells the other one
        try:
            while chunk := await source.read(CHUNK_BYTES):
                await gate.wait()
                sink.write(chunk)
                await sink.drain()
        finally:
            sink.close()


class PeerLinks(AsyncExitStack):
    """A forwarder before each member's peer port, and one before its client port; tells members apart by process."""

    def __init__(self, links: Links, pid_of: Callable[[int], int], size: int) -> None:
        super().__init__()
        self.links = links
        self._pid_of = pid_of
        self._size = size

    async def before_peer(self, member: int, target_port: int) -> int:
        """The port to tell the other members."""

        def gates_of(source_port: int) -> Gates | None:
            source = next((other for other in range(self._size) if _owns(self._pid_of(other), source_port)), None)
            return None if source is None else self.links.gates(source, member)

        return (await self.enter_async_context(Forwarder(target_port, gates_of))).port

    async def before_client(self, member: int, target_port: int) -> int:
        """The port to tell clients."""
        gates = self.links.gates(CLIENT, member)
        return (await self.enter_async_context(Forwarder(target_port, lambda _: gates))).port


def _owns(pid: int, local_port: int) -> bool:
    """Whether a process has a TCP socket bound to this local port."""
    wanted = f":{local_port:04X}"
    inodes = [
        f"socket:[{fields[9]}]"
        for fields in (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
        if fields[1].endswith(wanted)
    ]
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):  # closed between the listing and this look
            if os.readlink(entry) in inodes:
                return True
    return False
