"""Follows the nodes' leased records in the store and tells which appeared and which went.

Invariant: every record known at the start or seen since is reported gone once it is, also when it went in a gap of the
watch that a new listing repairs (tests/unit/test_node_leases.py).
Not here: what a lost lease means (suspicion.py).
"""

import logging
from collections.abc import AsyncIterable, Callable, Iterable

from elastic_run.runtime.edge.store import EventKind, Snapshot, WatchBatch
from elastic_run.runtime.protocol import codec
from elastic_run.runtime.protocol.errors import CodecError, VersionMismatch
from elastic_run.runtime.protocol.records import NODES_PREFIX, NodeRecord, node_key

log = logging.getLogger("elastic_run.controller")


class NodeLeases:
    def __init__(
        self,
        known: Iterable[NodeRecord],
        *,
        on_seen: Callable[[NodeRecord], None],
        on_gone: Callable[[NodeRecord], None],
    ) -> None:
        """`known` is what the new leader found when its term began."""
        self._known = {node_key(record.node): record for record in known}
        self._on_seen, self._on_gone = on_seen, on_gone

    async def follow(self, changes: AsyncIterable[Snapshot | WatchBatch]) -> None:
        """Report until the changes end; keys other than nodes' are passed over."""
        async for change in changes:
            self.take(change)

    def take(self, change: Snapshot | WatchBatch) -> None:
        """Report what one change means."""
        if isinstance(change, Snapshot):
            self._compare({kv.key: kv.value for kv in change.items if kv.key.startswith(NODES_PREFIX)})
            return
        for event in change.events:
            if not event.kv.key.startswith(NODES_PREFIX):
                continue
            if event.kind is EventKind.PUT:
                self._seen(event.kv.key, event.kv.value)
            else:
                self._gone(event.kv.key)

    def _compare(self, found: dict[str, bytes]) -> None:
        for key in [key for key in self._known if key not in found]:
            self._gone(key)
        for key, value in found.items():
            self._seen(key, value)

    def _seen(self, key: str, value: bytes) -> None:
        try:
            record = codec.decode(NodeRecord, value, where=key)
        except (CodecError, VersionMismatch) as error:
            log.error("a node's record is not ours and is left alone: %s", error)
            return
        self._known[key] = record
        self._on_seen(record)

    def _gone(self, key: str) -> None:
        record = self._known.pop(key, None)
        if record is not None:
            self._on_gone(record)
