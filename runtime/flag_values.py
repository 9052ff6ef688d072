"""Reads the values of flags: pure functions from text to what it means, with torchrun's rules.

Invariants:
1. A refusal is a UserError whose one line names flag and value and says what to write (tests/unit/test_flags.py).
Not here: the flags themselves, and which of them go together (flags.py); what asks this machine (preflight.py).
"""

import re
import signal

from elastic_run.runtime.protocol.errors import UserError

ETCD_PORT = 2379
ETCD_SCHEME = "etcd://"
PORT_MAX = 65535
NODES_MAX = 100_000
PROCS_MAX = 4096
"""Workers of one node; far above any machine, to catch a slipped key before it makes that many processes."""

_STREAMS = re.compile(r"[0-3]|\d+:[0-3](,\d+:[0-3])*")
_HOST = re.compile(r"[\w.:-]+")
_TRUE = ("1", "true", "t", "yes", "y")
_FALSE = ("0", "false", "f", "no", "n")


def parse_nnodes(text: str) -> tuple[int, int]:
    """Return (MIN, MAX) of `N` or `MIN:MAX`."""
    parts = text.split(":")
    if len(parts) > 2 or not all(part.strip().isdecimal() for part in parts):
        raise UserError(f"--nnodes={text}: write a number of nodes, or MIN:MAX")
    nodes_min, nodes_max = int(parts[0]), int(parts[-1])
    if not 1 <= nodes_min <= nodes_max:
        raise UserError(f"--nnodes={text}: MIN must be at least 1 and not above MAX")
    if nodes_max > NODES_MAX:
        raise UserError(f"--nnodes={text}: at most {NODES_MAX} nodes")
    return nodes_min, nodes_max


def parse_nproc(text: str) -> int | str:
    """Return the number of workers per node, or the word for what is to be counted on this machine."""
    if re.fullmatch(r"[A-Za-z]\w*", text):
        return text
    if not re.fullmatch(r"[+-]?\d+", text):
        raise UserError(f"--nproc-per-node={text}: write a number, or auto, cpu, gpu or xpu")
    return check_nproc(int(text))


def check_nproc(count: int) -> int:
    """Return `count` when a node can have that many workers."""
    if not 1 <= count <= PROCS_MAX:
        raise UserError(f"--nproc-per-node: {count} workers on a node are not possible, take 1 to {PROCS_MAX}")
    return count


def parse_rdzv_conf(text: str) -> dict[str, str]:
    """Return the pairs of `KEY=VALUE,KEY=VALUE`."""
    pairs: dict[str, str] = {}
    for item in text.split(",") if text.strip() else ():
        key, equals, value = (part.strip() for part in item.partition("="))
        if not key or not equals or not value:
            raise UserError(f"--rdzv-conf: write KEY=VALUE[,KEY=VALUE...]; the item {key!r} has no key or no value")
        pairs[key] = value
    return pairs


def parse_bool(text: str, *, what: str) -> bool:
    """Return the truth of torchrun's words for it."""
    if text.lower() in _TRUE:
        return True
    if text.lower() in _FALSE:
        return False
    raise UserError(f"{what}={text}: write true or false")


def parse_seconds(text: str, *, what: str) -> float:
    """Return a time that is not negative."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise UserError(f"{what}={text}: write a number of seconds, 0 or more")
    return seconds


def parse_local_ranks(text: str) -> tuple[int, ...] | None:
    """Return the listed local ranks, sorted; None when there is no list."""
    if not text:
        return None
    items = text.split(",")
    if not all(item.strip().isdecimal() for item in items):
        raise UserError(f"--local-ranks-filter={text}: write local ranks separated by commas, such as 0,1,2")
    return tuple(sorted({int(item) for item in items}))


def check_streams(text: str, *, what: str) -> str:
    """Return `text` when it is a value for --redirects or --tee."""
    if not _STREAMS.fullmatch(text):
        raise UserError(
            f"{what}={text}: write 0 (none), 1 (stdout), 2 (stderr) or 3 (both), or LOCAL_RANK:N,LOCAL_RANK:N..."
        )
    return text


def parse_signals(text: str) -> tuple[str, ...]:
    """Return the names of the listed signals, in order, each once."""
    names = dict.fromkeys(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        if name not in signal.Signals.__members__:
            raise UserError(f"--signals-to-handle={text}: {name} is no signal; write names such as SIGTERM,SIGUSR1")
        if name in ("SIGKILL", "SIGSTOP"):
            raise UserError(f"--signals-to-handle={text}: no process can handle {name}; leave it out")
    return tuple(names)


def parse_endpoint(text: str, *, default_port: int, what: str) -> tuple[str, int]:
    """Return host and port of `HOST`, `HOST:PORT`, `[IPV6]` or `[IPV6]:PORT`."""
    text = text.strip()
    if text.startswith("[") and text.endswith("]"):
        host, port_text = text, ""
    else:
        host, _, port_text = text.rpartition(":") if ":" in text else (text, "", "")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    if not _HOST.fullmatch(host) or (port_text and not port_text.isdecimal()):
        raise UserError(f"{what}={text}: write HOST:PORT")
    port = int(port_text) if port_text else default_port
    if port > PORT_MAX:
        raise UserError(f"{what}={text}: a port is at most {PORT_MAX}")
    return host, port


def parse_etcd_endpoints(text: str) -> tuple[str, ...]:
    """Return the `HOST:PORT` of each member in `[etcd://]HOST[:PORT],...`, in order, each once."""
    members = text.removeprefix(ETCD_SCHEME).rstrip("/").split(",")
    pairs = (
        parse_endpoint(member.strip().removeprefix(ETCD_SCHEME), default_port=ETCD_PORT, what="--rdzv-endpoint")
        for member in members
    )
    return tuple(dict.fromkeys(join_endpoint(host, port) for host, port in pairs))


def join_endpoint(host: str, port: int) -> str:
    """Return `HOST:PORT`, with the brackets an IPv6 address needs."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
