"""Keeps one lease alive in virtual time, by the rules of runtime/edge/lease.py."""

from collections.abc import Callable

from simulation.etcd import EtcdClient

from elastic_run.runtime.edge.lease import RENEWALS_PER_TTL, RETRIES_PER_TTL
from elastic_run.runtime.edge.store import LeaseId
from elastic_run.runtime.protocol.errors import FenceLost, StoreError


class Keeper:
    """Renews until stopped or lost; `on_lost` is called at most once, never after `stop`."""

    def __init__(
        self, client: EtcdClient, lease_id: LeaseId, ttl_s: float, granted_at: float, on_lost: Callable[[str], None]
    ) -> None:
        self.lease_id = lease_id
        self._client, self._ttl_s, self._on_lost = client, ttl_s, on_lost
        self._expires_at = granted_at + ttl_s
        self._over = False
        self._wait(ttl_s / RENEWALS_PER_TTL)

    @property
    def held(self) -> bool:
        return not self._over and self._remaining_s() > 0.0

    def stop(self) -> None:
        self._over = True

    def _remaining_s(self) -> float:
        return max(0.0, self._expires_at - self._client.process.clock())

    def _wait(self, wait_s: float) -> None:
        self._client.process.after(min(wait_s, self._remaining_s()), self._renew)

    def _renew(self) -> None:
        if self._over:
            return
        left_s = self._remaining_s()
        if left_s <= 0.0:
            self._lose("not renewed in time")
            return
        asked_at = self._client.process.clock()
        self._client.call(
            lambda: self._client.etcd.renew(self.lease_id),
            lambda answer: self._renewed(answer, asked_at),
            deadline_s=min(left_s, self._ttl_s / RENEWALS_PER_TTL),
        )

    def _renewed(self, answer: float | StoreError, asked_at: float) -> None:
        if self._over:
            return
        if isinstance(answer, FenceLost):
            self._lose(str(answer))
        elif isinstance(answer, StoreError):
            self._wait(self._ttl_s / RETRIES_PER_TTL)
        else:
            self._expires_at = asked_at + answer
            self._wait(self._ttl_s / RENEWALS_PER_TTL)

    def _lose(self, reason: str) -> None:
        self._over = True
        self._on_lost(reason)
