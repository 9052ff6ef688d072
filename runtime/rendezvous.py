"""Decides where the nodes of a job meet: which etcd, who starts it, what the job is called. Pure.

| given                                               | store                                                       |
|-----------------------------------------------------|-------------------------------------------------------------|
| nothing, on one node; --standalone; endpoint port 0 | embedded: this machine alone, random job id by default      |
| etcd://..., or an etcd backend with HOST:PORT,...   | external cluster                                            |
| backend c10d; an endpoint without a backend         | shared: the machine that has the endpoint's host starts it  |
| backend static, --node-rank or --master-*           | shared: node rank 0 starts it at the master's address       |

Invariants (tests/unit/test_flags.py): the table, row by row; a job that nobody can join never waits for other nodes.
Source: the rules of torch.distributed.run. It takes an endpoint without a backend as static; we take c10d, because
static without node ranks cannot work.
Not here: whether the store answers, whose address it is (preflight.py).
"""

from collections.abc import Container
from dataclasses import dataclass
from typing import Protocol

from elastic_run.runtime.flag_values import (
    ETCD_SCHEME,
    PORT_MAX,
    parse_bool,
    parse_endpoint,
    parse_etcd_endpoints,
    parse_nnodes,
    parse_rdzv_conf,
    parse_seconds,
)
from elastic_run.runtime.launch_config import EmbeddedStore, ExternalStore, SharedStore, StoreAccess, StoreChoice
from elastic_run.runtime.protocol.errors import UserError
from elastic_run.runtime.protocol.ids import JobId, check_name

STATIC_PORT = 29500
C10D_PORT = 29400
LAST_CALL_S = 30.0
JOIN_TIMEOUT_S = 600.0
ETCD_BACKENDS = ("etcd", "etcd-v2", "etcdv3")
JOIN_KEYS = ("join_timeout", "timeout")
ACCESS_KEYS = {
    "ca": "ca_cert",
    "cert": "ssl_cert",
    "key": "ssl_cert_key",
    "user": "user",
    "password_file": "password_file",
}
"""Keys of --rdzv-conf for etcd, and torch's older name of each."""
OTHER_KEYS = ("last_call_timeout", "is_host")


class RendezvousOptions(Protocol):
    """The parsed flags read here."""

    nnodes: str
    rdzv_backend: str
    rdzv_endpoint: str
    rdzv_id: str
    rdzv_conf: str
    standalone: bool
    node_rank: int
    master_addr: str
    master_port: int | None
    last_call: str | None
    store_ca: str | None
    store_cert: str | None
    store_key: str | None
    store_user: str | None
    store_password_file: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendezvous:
    """Where and as what the nodes meet."""

    store: StoreChoice
    access: StoreAccess
    job_id: JobId
    nodes_min: int
    nodes_max: int
    node_rank: int | None
    last_call_s: float
    join_timeout_s: float
    notices: tuple[str, ...]


def choose_rendezvous(options: RendezvousOptions, *, given: Container[str], random_id: str) -> Rendezvous:
    """Return where the nodes meet. `given` names the flags that were set; `random_id` is for a job nobody can join."""
    nodes_min, nodes_max = parse_nnodes(options.nnodes)
    conf = parse_rdzv_conf(options.rdzv_conf)
    store = _choose_store(options, given, conf, nodes_max)
    notices = _notices(options, given, conf, store)
    if isinstance(store, EmbeddedStore):
        if nodes_min > 1:
            raise UserError(
                f"--nnodes={options.nnodes}: other nodes cannot join a store of this machine alone; "
                "give --rdzv-endpoint=etcd://HOST:PORT, or HOST:PORT of the node that shall start one"
            )
        if nodes_max > 1:
            notices.append(f"--nnodes={options.nnodes} is taken as 1: no other node can join this store")
        nodes_max = 1
    elif isinstance(store, SharedStore):
        notices.append("the store of this job dies with the node that starts it; use an etcd cluster to survive that")
    keep_id = "rdzv_id" in given and not options.standalone
    job_id = random_id if isinstance(store, EmbeddedStore) and not keep_id else options.rdzv_id
    static = isinstance(store, SharedStore) and "node_rank" in given
    if static and not 0 <= options.node_rank < nodes_max:
        raise UserError(f"--node-rank={options.node_rank}: with --nnodes={options.nnodes} take 0 to {nodes_max - 1}")
    return Rendezvous(
        store=store,
        access=_access(options, conf, external=isinstance(store, ExternalStore)),
        job_id=JobId(check_name(job_id, what="--rdzv-id")),
        nodes_min=nodes_min,
        nodes_max=nodes_max,
        node_rank=options.node_rank if static else None,
        last_call_s=_last_call_s(options, conf),
        join_timeout_s=_join_timeout_s(conf),
        notices=tuple(notices),
    )


def _choose_store(
    options: RendezvousOptions, given: Container[str], conf: dict[str, str], nodes_max: int
) -> StoreChoice:
    backend = _backend(options, given)
    endpoint = options.rdzv_endpoint.strip()
    if options.standalone:
        return EmbeddedStore()
    if backend == "etcd":
        if not endpoint.removeprefix(ETCD_SCHEME):
            raise UserError("--rdzv-backend=etcd needs --rdzv-endpoint=HOST:PORT[,HOST:PORT...] of the cluster")
        return ExternalStore(endpoints=parse_etcd_endpoints(endpoint))
    is_host = parse_bool(conf["is_host"], what="--rdzv-conf is_host") if "is_host" in conf else None
    if backend == "c10d":
        host, port = parse_endpoint(endpoint or "localhost", default_port=C10D_PORT, what="--rdzv-endpoint")
        return SharedStore(host=host, port=port, is_host=is_host) if port else EmbeddedStore()
    if not endpoint and options.master_port is None and nodes_max == 1:
        return EmbeddedStore()
    if endpoint:
        host, port = parse_endpoint(endpoint, default_port=STATIC_PORT, what="--rdzv-endpoint")
    else:
        port = STATIC_PORT if options.master_port is None else options.master_port
        host, _ = parse_endpoint(options.master_addr, default_port=port, what="--master-addr")
    if not 0 < port <= PORT_MAX:
        raise UserError(f"port {port} is none that other nodes can be told; take 1 to {PORT_MAX}")
    return SharedStore(host=host, port=port, is_host=options.node_rank == 0 if is_host is None else is_host)


def _backend(options: RendezvousOptions, given: Container[str]) -> str:
    """Return static, c10d or etcd."""
    if options.rdzv_endpoint.strip().startswith(ETCD_SCHEME) or options.rdzv_backend in ETCD_BACKENDS:
        return "etcd"
    if options.rdzv_backend not in ("static", "c10d"):
        raise UserError(f"--rdzv-backend={options.rdzv_backend} is not known: take etcd, c10d or static")
    if "rdzv_backend" not in given and "node_rank" not in given and options.rdzv_endpoint.strip():
        return "c10d"
    return options.rdzv_backend


def _notices(options: RendezvousOptions, given: Container[str], conf: dict[str, str], store: StoreChoice) -> list[str]:
    if "password" in conf:
        raise UserError(
            "--rdzv-conf password=...: others can read a command line; write it to a file, password_file=FILE"
        )
    known = {*JOIN_KEYS, *OTHER_KEYS, *ACCESS_KEYS, *ACCESS_KEYS.values()}
    notices = [f"--rdzv-conf {key} is ignored: it has no meaning here" for key in conf if key not in known]
    if options.standalone:
        overruled = ("rdzv_backend", "rdzv_endpoint", "rdzv_id")
        notices += [
            f"--{name.replace('_', '-')} is ignored: --standalone is given" for name in overruled if name in given
        ]
    if not isinstance(store, SharedStore):
        idle = ("node_rank", "master_addr")
        notices += [
            f"--{name.replace('_', '-')} is ignored: only the static backend has a use for it"
            for name in idle
            if name in given and not (name == "node_rank" and options.node_rank == 0)
        ]
    return notices


def _access(options: RendezvousOptions, conf: dict[str, str], *, external: bool) -> StoreAccess:
    values = {key: conf.get(key, conf.get(older)) for key, older in ACCESS_KEYS.items()}
    if any((options.store_ca, options.store_cert, options.store_user, *values.values())) and not external:
        raise UserError(
            "--store-* and their keys in --rdzv-conf are for an etcd cluster: give --rdzv-endpoint=etcd://..."
        )
    access = StoreAccess(
        ca_file=options.store_ca or values["ca"],
        cert_file=options.store_cert or values["cert"],
        key_file=options.store_key or values["key"],
        user=options.store_user or values["user"],
        password_file=options.store_password_file or values["password_file"],
    )
    if (access.cert_file is None) != (access.key_file is None):
        raise UserError("--store-cert and --store-key go together: give both or none")
    if (access.user is None) != (access.password_file is None):
        raise UserError("--store-user and --store-password-file go together: give both or none")
    return access


def _last_call_s(options: RendezvousOptions, conf: dict[str, str]) -> float:
    if options.last_call is not None:
        return parse_seconds(options.last_call, what="--last-call")
    if "last_call_timeout" in conf:
        return parse_seconds(conf["last_call_timeout"], what="--rdzv-conf last_call_timeout")
    return LAST_CALL_S


def _join_timeout_s(conf: dict[str, str]) -> float:
    for key in JOIN_KEYS:
        if key in conf:
            seconds = parse_seconds(conf[key], what=f"--rdzv-conf {key}")
            if seconds > 0:
                return seconds
            raise UserError(f"--rdzv-conf {key}={conf[key]}: write a number of seconds above 0")
    return JOIN_TIMEOUT_S
