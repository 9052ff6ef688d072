"""Just enough of an etcd server to evaluate the transactions the exactly-once writer sends: one dict, no I/O."""

from dataclasses import dataclass, field

from elastic_run.runtime.edge.etcd_proto import rpc_pb2 as rpc


@dataclass
class MiniEtcd:
    """`applied` lists every put in the order it took effect, with its revision; `existing` the keys after it."""

    revision: int = 1
    keys: dict[bytes, rpc.KeyValue] = field(default_factory=dict)
    applied: list[tuple[int, bytes, bytes]] = field(default_factory=list)
    existing: dict[int, frozenset[bytes]] = field(default_factory=dict)

    def txn(self, request: rpc.TxnRequest) -> rpc.TxnResponse:
        before = dict(self.keys)
        revision = self.revision + 1
        response, writes = self._run(request, before, revision)
        if writes:
            self.revision = revision
        response.header.revision = self.revision
        self.existing[self.revision] = frozenset(self.keys)
        return response

    def delete(self, prefix: bytes) -> None:
        self.revision += 1
        for key in [key for key in self.keys if key.startswith(prefix)]:
            del self.keys[key]
        self.existing[self.revision] = frozenset(self.keys)

    def held_at(self, key: bytes, revision: int) -> bool:
        return key in self.existing[revision]

    def _run(
        self, request: rpc.TxnRequest, before: dict[bytes, rpc.KeyValue], revision: int
    ) -> tuple[rpc.TxnResponse, bool]:
        succeeded = all(_holds(compare, before.get(compare.key)) for compare in request.compare)
        response = rpc.TxnResponse(succeeded=succeeded)
        wrote = False
        for operation in request.success if succeeded else request.failure:
            part = response.responses.add()
            match operation.WhichOneof("request"):
                case "request_put":
                    self._put(operation.request_put, revision)
                    part.response_put.SetInParent()
                    wrote = True
                case "request_range":
                    part.response_range.SetInParent()
                    found = self.keys.get(operation.request_range.key)
                    if found is not None:
                        part.response_range.kvs.append(found)
                case "request_txn":
                    inner, inner_wrote = self._run(operation.request_txn, before, revision)
                    part.response_txn.CopyFrom(inner)
                    wrote = wrote or inner_wrote
                case other:
                    raise NotImplementedError(other)
        return response, wrote

    def _put(self, put: rpc.PutRequest, revision: int) -> None:
        old = self.keys.get(put.key)
        self.keys[put.key] = rpc.KeyValue(
            key=put.key,
            value=put.value,
            lease=put.lease,
            create_revision=old.create_revision if old else revision,
            mod_revision=revision,
            version=old.version + 1 if old else 1,
        )
        self.applied.append((revision, put.key, put.value))


def _holds(compare: rpc.Compare, found: rpc.KeyValue | None) -> bool:
    if compare.target == rpc.Compare.VALUE:
        if found is None:
            return False
        order = (found.value > compare.value) - (found.value < compare.value)
    else:
        actual, wanted = {
            rpc.Compare.VERSION: (found.version if found else 0, compare.version),
            rpc.Compare.CREATE: (found.create_revision if found else 0, compare.create_revision),
            rpc.Compare.MOD: (found.mod_revision if found else 0, compare.mod_revision),
        }[compare.target]
        order = (actual > wanted) - (actual < wanted)
    return {
        rpc.Compare.EQUAL: order == 0,
        rpc.Compare.NOT_EQUAL: order != 0,
        rpc.Compare.LESS: order < 0,
        rpc.Compare.GREATER: order > 0,
    }[compare.result]
