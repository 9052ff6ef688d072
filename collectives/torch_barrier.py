"""`monitored_barrier` through the store: says who did not come, also when the data plane is what hangs.

Rank 0 waits for the others' keys, one after the other, and writes the verdict that the others wait for. Keys lie under
`monitored/<n>/`; n counts the barriers of this group. Rank 0 deletes those of the barrier before.
"""

import time
from datetime import timedelta

from torch._C._distributed_c10d import Store

from elastic_run.collectives.torch_errors import BackendAborted, BackendTimeout
from elastic_run.collectives.torch_store import came

PASSED = "passed"
GRACE_S = 5.0
"""Rank 0's verdict comes at its own time limit; the others wait this much longer for it than for anything else."""


class MonitoredBarrier:
    """The barriers of one group, in turn."""

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self._store = store
        self._rank = rank
        self._size = size
        self._turn = 0

    def pass_through(self, timeout: timedelta, *, wait_all_ranks: bool) -> None:
        """Return when everyone came. Raises BackendTimeout with the rank, or all ranks, that did not."""
        self._turn += 1
        if self._rank == 0:
            self._judge(timeout, wait_all_ranks=wait_all_ranks)
        else:
            self._report(timeout)

    def _judge(self, timeout: timedelta, *, wait_all_ranks: bool) -> None:
        deadline = time.monotonic() + timeout.total_seconds()
        failed: list[int] = []
        for rank in range(1, self._size):
            if not came(self._store, [self._key(str(rank))], deadline - time.monotonic()):
                failed.append(rank)
                if not wait_all_ranks:
                    break
        if not failed:
            self._store.set(self._key("verdict"), PASSED)
            self._forget(self._turn - 1)  # everyone came here, so everyone has read it
            return
        limit_ms = round(timeout.total_seconds() * 1000)
        # The words are those of torch's own barrier: scripts look for them.
        named = f"Rank{'s' if len(failed) > 1 else ''} {', '.join(map(str, failed))}"
        text = f"[Rank 0]: {named} failed to pass monitoredBarrier in {limit_ms} ms"
        self._store.set(self._key("verdict"), text)
        raise BackendTimeout(text, f"rank{failed[0]}")

    def _report(self, timeout: timedelta) -> None:
        self._store.set(self._key(str(self._rank)), PASSED)
        if not came(self._store, [self._key("verdict")], timeout.total_seconds() + GRACE_S):
            limit_ms = round(timeout.total_seconds() * 1000)
            raise BackendTimeout(
                f"[Rank {self._rank}]: Rank 0 did not answer in monitoredBarrier in {limit_ms} ms", "rank0"
            )
        verdict = self._store.get(self._key("verdict")).decode()
        if verdict != PASSED:
            raise BackendAborted(
                f"[Rank {self._rank}]: Rank {self._rank} successfully reached monitoredBarrier, but received errors "
                f"while waiting for send/recv from rank 0: {verdict}",
                "rank0",
            )

    def _key(self, name: str) -> str:
        return f"monitored/{self._turn}/{name}"

    def _forget(self, turn: int) -> None:
        for name in ("verdict", *map(str, range(1, self._size))):
            self._store.delete_key(f"monitored/{turn}/{name}")
