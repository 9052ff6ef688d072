"""The controller's gRPC endpoint: agents' streams and the status service.

Invariants (tests/integration/test_controller_server.py):
1. Streams are bounded in number, in queued messages and in message size; the first message must be a hello, in time.
2. A controller that does not lead turns every call away; agents then ask the store who does.
Not here: what the messages mean (core.py); the order of things (driver.py).
"""

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

from elastic_run.runtime.edge import rpc
from elastic_run.runtime.edge.quiet_grpc import grpc
from elastic_run.runtime.protocol import wire
from elastic_run.runtime.protocol.errors import CodecError, InvariantViolated, UserError
from elastic_run.runtime.protocol.messages import AgentMessage, ControllerMessage, Hello, StatusReport

STREAMS_MAX = 20_000
QUEUED_MAX = 64  # messages waiting for one agent; a slower one is cut off and comes back with its state
HELLO_DEADLINE_S = 5.0
STOP_GRACE_S = 0.5


class _Closed:
    """Last entry of a stream's queue."""


class AgentServer:
    """Serves agents while `leading`; every happening is posted to the driver."""

    def __init__(
        self,
        *,
        on_connected: Callable[[int, Hello], None],
        on_spoke: Callable[[int, AgentMessage], None],
        on_disconnected: Callable[[int, str], None],
        report: Callable[[], StatusReport | None],
    ) -> None:
        self._on_connected, self._on_spoke, self._on_disconnected = on_connected, on_spoke, on_disconnected
        self._report = report
        self._numbers = itertools.count(1)
        self._queues: dict[int, asyncio.Queue[ControllerMessage | _Closed]] = {}
        self._server = grpc.aio.server(options=rpc.SERVER_OPTIONS)
        self._server.add_generic_rpc_handlers((rpc.handlers(self._session, self._status),))
        self.leading = False

    async def start(self, host: str, port: int) -> int:
        """Listen; return the port. Raises UserError when the address can not be had."""
        try:
            bound = self._server.add_insecure_port(f"{host}:{port}")
        except RuntimeError as error:
            raise UserError(f"can not listen on {host}:{port}: {error}; choose another port or address") from None
        await self._server.start()
        return bound

    async def stop(self) -> None:
        self.close_all()
        await self._server.stop(STOP_GRACE_S)

    @property
    def open_streams(self) -> int:
        return len(self._queues)

    def send(self, connection: int, message: ControllerMessage) -> None:
        """Queue a message; a stream that does not take its messages is cut off."""
        queue = self._queues.get(connection)
        if queue is None:
            return
        if queue.full():
            self.close(connection)
        else:
            queue.put_nowait(message)

    def close(self, connection: int) -> None:
        """End a stream after what is queued; a full queue is dropped."""
        queue = self._queues.pop(connection, None)
        if queue is None:
            return
        while queue.full():
            queue.get_nowait()
        queue.put_nowait(_Closed())

    def close_all(self) -> None:
        for connection in tuple(self._queues):
            self.close(connection)

    async def _session(self, _: Any, context: rpc.Context) -> None:
        await self._turn_away_unless_leading(context)
        hello = await self._read_hello(context)
        await self._turn_away_unless_leading(context)  # a term that ended meanwhile would never answer on this stream
        connection = next(self._numbers)
        queue: asyncio.Queue[ControllerMessage | _Closed] = asyncio.Queue(QUEUED_MAX)
        self._queues[connection] = queue
        self._on_connected(connection, hello)
        reader = asyncio.create_task(self._read(connection, context), name=f"agent-{hello.node}")
        reason = "the controller closed it"
        try:
            writer = asyncio.create_task(self._write(queue, context))
            done, _pending = await asyncio.wait((reader, writer), return_when=asyncio.FIRST_COMPLETED)
            writer.cancel()
            if reader in done:
                reason = reader.result()
        finally:
            reader.cancel()
            self._queues.pop(connection, None)
            self._on_disconnected(connection, reason)

    async def _turn_away_unless_leading(self, context: rpc.Context) -> None:
        if not self.leading or len(self._queues) >= STREAMS_MAX:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "this controller does not lead")

    async def _read_hello(self, context: rpc.Context) -> Hello:
        problem = "the first message must be a hello"
        try:
            data = await asyncio.wait_for(context.read(), HELLO_DEADLINE_S)
            hello = wire.agent_from_bytes(data if isinstance(data, bytes) else b"")
            if isinstance(hello, Hello):
                return hello
        except TimeoutError:  # held up, not wrong: it is to come again
            await context.abort(grpc.StatusCode.UNAVAILABLE, f"no hello within {HELLO_DEADLINE_S:g} s")
        except CodecError as error:
            problem = f"not an agent of this version: {error}"
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, problem)
        raise InvariantViolated("an aborted call went on")

    async def _read(self, connection: int, context: rpc.Context) -> str:
        while True:
            data: object = await context.read()  # bytes, or grpc's end-of-file mark
            if not isinstance(data, bytes):
                return "the agent closed it"
            try:
                self._on_spoke(connection, wire.agent_from_bytes(data))
            except CodecError as error:
                return f"it sent something unreadable: {error}"

    async def _write(self, queue: asyncio.Queue[ControllerMessage | _Closed], context: rpc.Context) -> None:
        while True:
            message = await queue.get()
            if isinstance(message, _Closed):
                return
            await context.write(wire.controller_to_bytes(message))

    async def _status(self, _: bytes, context: rpc.Context) -> bytes:
        report = self._report()
        if report is None:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "this controller does not lead")
        return wire.to_bytes(report)
