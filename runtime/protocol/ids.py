"""Names of things. Ids are opaque strings; counters only grow.

Invariants:
1. A node or worker incarnation id is never reused (tests/unit/test_ids.py).
2. Job ids and node names are safe inside an etcd key, a file name and a metric label (tests/unit/test_ids.py).
"""

import re
from typing import NewType

from elastic_run.runtime.protocol.errors import UserError

JobId = NewType("JobId", str)
NodeId = NewType("NodeId", str)  # the node's name: may come back with another incarnation
Incarnation = NewType("Incarnation", str)  # one life of an agent or a worker
ViewNumber = NewType("ViewNumber", int)  # only grows; 0 means "no view yet"
LogicalRank = NewType("LogicalRank", int)
FencingToken = NewType("FencingToken", int)  # create revision of the leader's key

PROTOCOL_VERSION = 1
"""Version of every message and record. A peer of another version is refused; there is no translation."""

NAME_LENGTH_MAX = 128
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def check_name(value: str, *, what: str) -> str:
    """Return `value` when it can be a job id or node name; raise UserError saying what is allowed otherwise."""
    if len(value) <= NAME_LENGTH_MAX and _NAME.fullmatch(value):
        return value
    raise UserError(
        f"{what} {value[:NAME_LENGTH_MAX]!r} is not usable: "
        f"take 1 to {NAME_LENGTH_MAX} letters, digits, '.', '_' or '-', beginning with a letter or digit"
    )
