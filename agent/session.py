"""The agent's one stream to the leading controller: dials whoever leads, says hello, comes back after every break.

Invariants (tests/integration/test_agent_session.py):
1. What is told while no stream is open is dropped; the hello of the next stream carries the whole state instead.
2. Dialling backs off from RETRY_S_MIN to RETRY_S_MAX with jitter and never gives up: training needs no controller.
Not here: who leads (presence.py tells), what messages mean (core.py).
"""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from typing import Any

from elastic_run.runtime.edge import rpc
from elastic_run.runtime.edge.tasks import cancel_all
from elastic_run.runtime.protocol import wire
from elastic_run.runtime.protocol.errors import CodecError, PeerRefused, StoreError, VersionMismatch
from elastic_run.runtime.protocol.messages import AgentMessage, ControllerMessage, Hello, Refused

RETRY_S_MIN = 0.05
RETRY_S_MAX = 1.0
CONNECT_DEADLINE_S = 3.0
QUEUED_MAX = 256

log = logging.getLogger("elastic_run.agent")


class ControllerSession:
    def __init__(
        self,
        *,
        read_token: Callable[[], Awaitable[str | None]],
        hello: Callable[[str], Hello],
        on_message: Callable[[ControllerMessage], None],
        on_lost: Callable[[str], None],
    ) -> None:
        self._read_token, self._hello = read_token, hello
        self._on_message, self._on_lost = on_message, on_lost
        self._address: str | None = None
        self._moved = asyncio.Event()
        self._queue: asyncio.Queue[AgentMessage] | None = None
        self._drained = asyncio.Event()
        self._heard = False

    def leader_is(self, address: str) -> None:
        """The store names a leader; an open stream to somebody else is left at once."""
        if address != self._address:
            self._address = address
            self._moved.set()

    def tell(self, message: AgentMessage) -> None:
        """Queue a message for the open stream; without one, or when it does not take messages, drop it."""
        if self._queue is not None and not self._queue.full():
            self._drained.clear()
            self._queue.put_nowait(message)

    async def flush(self, timeout_s: float) -> None:
        """Wait until what was told is written, or no stream is left, or the time is over."""
        if self._queue is None:
            return
        try:
            await asyncio.wait_for(self._drained.wait(), timeout_s)
        except TimeoutError:
            log.info("the last words to the controller were not taken within %g s", timeout_s)

    async def run(self) -> None:
        """Keep a stream open until cancelled."""
        retry_s = RETRY_S_MIN
        while True:
            if self._address is None:
                await self._moved.wait()
            address = self._address
            self._moved.clear()  # from here on it means: another one than this
            if address is None:
                continue
            heard, reason = await self._one_stream(address)
            if heard:
                retry_s = RETRY_S_MIN
                self._on_lost(reason)
            log.info("no stream to the controller at %s: %s", address, reason)
            try:
                # not wait_for, which drops a cancellation that comes with the event: this loop would never end
                async with asyncio.timeout(retry_s * random.uniform(0.5, 1.0)):
                    await self._moved.wait()
                retry_s = RETRY_S_MIN
            except TimeoutError:
                retry_s = min(RETRY_S_MAX, 2 * retry_s)

    async def _one_stream(self, address: str) -> tuple[bool, str]:
        """Return whether the controller ever answered, and why the stream ended."""
        self._heard = False
        try:
            token = await self._read_token()
            if token is None:
                return False, "the job has no spec yet"
            async with rpc.open_channel(address) as channel:
                call = rpc.session_call(channel)
                try:
                    reason = await self._converse(call, token)
                finally:
                    call.cancel()
        except rpc.RpcError as error:
            problem = rpc.translate(error, address)
            if isinstance(problem, PeerRefused):
                self._on_message(Refused(reason=str(problem)))
            reason = str(problem)
        except TimeoutError:
            reason = f"no connection within {CONNECT_DEADLINE_S:g} s"
        except VersionMismatch as error:  # the job's spec was written by another version of this program
            reason = str(error)
            self._on_message(Refused(reason=reason))
        except (CodecError, StoreError) as error:
            reason = str(error)
        except asyncio.InvalidStateError:  # grpc: the call ended under a write
            reason = "the stream broke"
        return self._heard, reason

    async def _converse(self, call: Any, token: str) -> str:
        """Say hello, then pump both ways until the stream ends or somebody else leads; return why."""
        await asyncio.wait_for(call.wait_for_connection(), CONNECT_DEADLINE_S)
        queue: asyncio.Queue[AgentMessage] = asyncio.Queue(QUEUED_MAX)
        hello, self._queue = self._hello(token), queue  # one moment: what follows the hello's state is in the queue
        tasks: list[asyncio.Task[str]] = []
        try:
            await call.write(wire.agent_to_bytes(hello))
            tasks = [
                asyncio.create_task(self._listen(call)),
                asyncio.create_task(self._pump(call, queue)),
                asyncio.create_task(self._until_moved()),
            ]
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return done.pop().result()
        finally:
            self._queue = None
            self._drained.set()
            await cancel_all(tasks)

    async def _until_moved(self) -> str:
        await self._moved.wait()
        return "another controller leads"

    async def _listen(self, call: Any) -> str:
        while True:
            data: object = await call.read()  # bytes, or grpc's end-of-file mark
            if not isinstance(data, bytes):
                return await call.details() or "the controller closed the stream"
            message = wire.controller_from_bytes(data)
            self._heard = self._heard or not isinstance(message, Refused)  # who is refused has to back off
            self._on_message(message)

    async def _pump(self, call: Any, queue: asyncio.Queue[AgentMessage]) -> str:
        while True:
            message = await queue.get()
            await call.write(wire.agent_to_bytes(message))
            if queue.empty():
                self._drained.set()
