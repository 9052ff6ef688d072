"""Where the live status line gets its numbers: one small call a second to the leading controller.

The leader is looked up in the store, and again when it does not answer. grpc is loaded with the first question, in a
thread, after the children were started: it delays none of them, and a launcher without the line never loads it.

Invariants (tests/integration/test_live_status.py):
1. One connection is kept and reused; a failure costs one error of our tree, which the line shows as stale.
Not here: drawing (status_line.py).
"""

import asyncio
import contextlib
import importlib
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from elastic_run.runtime.edge import store_access
from elastic_run.runtime.launch_config import LaunchConfig
from elastic_run.runtime.protocol import codec
from elastic_run.runtime.protocol.config import StoreConfig
from elastic_run.runtime.protocol.errors import ElasticError, PeerError
from elastic_run.runtime.protocol.messages import StatusReport
from elastic_run.runtime.protocol.records import LEADER_KEY, LeaderRecord, namespace
from elastic_run.runtime.status_line import Fetch, StatusSnapshot

if TYPE_CHECKING:
    from elastic_run.runtime.edge.rpc import Channel
    from elastic_run.runtime.edge.store import Store

ASK_INTERVAL_S = 1.0
ASK_DEADLINE_S = 0.7
"""A lookup and a question fit into the time the line gives a fetch."""


@contextlib.asynccontextmanager
async def live_status(store: StoreConfig, config: LaunchConfig) -> AsyncIterator[Fetch]:
    """Yield the line's source; its connections end with the block."""
    source = _LeaderStatus(store, config)
    try:
        yield source.fetch
    finally:
        await source.close()


def snapshot(report: StatusReport) -> StatusSnapshot:
    """Return what the line shows of a report; a job whose steps nobody counts has none."""
    return StatusSnapshot(
        nodes=sum(node.in_view for node in report.nodes),
        nodes_max=report.nodes_max,
        workers=sum(node.state.workers_alive for node in report.nodes if node.in_view),
        view=report.view,
        step=report.step or None,
        step_rate_hz=report.step_rate_hz or None,
        last_event=report.last_event,
    )


class _LeaderStatus:
    def __init__(self, store: StoreConfig, config: LaunchConfig) -> None:
        self._store_config = store
        self._namespace = namespace(config.job_id)
        self._store: Store | None = None
        self._leader: tuple[str, Channel] | None = None
        self._last: StatusSnapshot | None = None
        self._asked_at_s = 0.0

    async def fetch(self) -> StatusSnapshot:
        """Return the newest snapshot, at most ASK_INTERVAL_S old. Raises ElasticError."""
        if self._last is not None and time.monotonic() - self._asked_at_s < ASK_INTERVAL_S:
            return self._last
        self._last = None
        rpc = await asyncio.to_thread(importlib.import_module, "elastic_run.runtime.edge.rpc")
        address, channel = self._leader or await self._find_leader()
        try:
            report: StatusReport = await rpc.ask_status(channel, address, deadline_s=ASK_DEADLINE_S)
        except ElasticError:
            await self._leave()
            raise
        self._last, self._asked_at_s = snapshot(report), time.monotonic()
        return self._last

    async def close(self) -> None:
        await self._leave()
        if self._store is not None:
            await self._store.close()

    async def _find_leader(self) -> "tuple[str, Channel]":
        from elastic_run.runtime.edge import rpc

        if self._store is None:
            self._store = store_access.open_store(self._store_config, self._namespace)
        found = await self._store.get(LEADER_KEY, deadline_s=ASK_DEADLINE_S)
        if found is None:
            raise PeerError("no controller leads")
        address = codec.decode(LeaderRecord, found.value, where=LEADER_KEY).address
        self._leader = (address, rpc.open_channel(address))
        return self._leader

    async def _leave(self) -> None:
        leader, self._leader = self._leader, None
        if leader is not None:
            await leader[1].close(None)
