"""Keeps one lease alive and says when it can no longer be trusted.

Invariants (tests/unit/test_lease.py):
1. `held()` is false once the last confirmed time to live has passed on our own clock, whatever the store does.
2. `lost` is set at most once, after `held()` became false, and the lease is never renewed after that.

Not here: what a lease protects (`election.py`, the agent's node record).
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Self

from elastic_run.runtime.edge.store import LeaseId, Store
from elastic_run.runtime.protocol.errors import FenceLost, StoreError

RENEWALS_PER_TTL = 4  # three renewals may fail before the lease does
RETRIES_PER_TTL = 16  # after a failed renewal the next follows sooner


class LeaseKeeper:
    """Renews a lease every quarter of its time to live until stopped or lost; sets `lost` and calls `on_lost` then.

    Use as `async with LeaseKeeper(...)`, or run `run()` in a task of your own. Stopping does not revoke the lease.
    `granted_at_s` is `clock()` from before the grant was asked for.
    """

    def __init__(
        self,
        store: Store,
        lease_id: LeaseId,
        ttl_s: float,
        *,
        granted_at_s: float,
        on_lost: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.lease_id = lease_id
        self.lost = asyncio.Event()
        self.reason = ""
        self._store = store
        self._ttl_s = ttl_s
        self._on_lost = on_lost
        self._clock = clock
        self._sleep = sleep
        self._expires_at_s = granted_at_s + ttl_s
        self._task: asyncio.Task[None] | None = None

    def remaining_s(self) -> float:
        """Seconds for which the lease is certainly ours; 0 when it may be gone."""
        return 0.0 if self.lost.is_set() else max(0.0, self._expires_at_s - self._clock())

    def held(self) -> bool:
        """Whether the lease is certainly ours at this moment."""
        return self.remaining_s() > 0.0

    async def run(self) -> None:
        """Renew until the lease is lost; returns then. Cancel to stop."""
        wait_s = self._ttl_s / RENEWALS_PER_TTL
        last_error = "its process was held up"
        while True:
            await self._sleep(min(wait_s, self.remaining_s()))
            left_s = self.remaining_s()
            if left_s <= 0.0:
                self._lose(f"not renewed within its {self._ttl_s:g} s: {last_error}")
                return
            asked_at_s = self._clock()
            try:
                ttl_s = await self._store.lease_keepalive_once(
                    self.lease_id, deadline_s=min(left_s, self._ttl_s / RENEWALS_PER_TTL)
                )
            except FenceLost as gone:
                self._lose(str(gone))
                return
            except StoreError as error:
                last_error = str(error)
                wait_s = self._ttl_s / RETRIES_PER_TTL
                continue
            last_error = "its process was held up"
            self._expires_at_s = asked_at_s + ttl_s
            wait_s = min(self._ttl_s, ttl_s) / RENEWALS_PER_TTL

    def _lose(self, reason: str) -> None:
        self.reason = f"lease {self.lease_id:x}: {reason}"
        self._expires_at_s = self._clock()
        self.lost.set()
        if self._on_lost is not None:
            self._on_lost(self.reason)

    def start(self) -> None:
        """Run in a task of our own, until `stop`."""
        self._task = asyncio.create_task(self.run(), name=f"lease-{self.lease_id:x}")

    async def stop(self) -> None:
        """Stop renewing. The lease lives on in the store until it expires or is revoked."""
        task, self._task = self._task, None
        if task is None:
            return
        task.cancel()
        await asyncio.wait({task})
        if not task.cancelled():
            task.result()

    async def __aenter__(self) -> Self:
        self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()
