"""The history of a campaign: everything that was done to the system and seen of it, one entry a line, append-only.

Checkers judge nothing but this. Times are CLOCK_MONOTONIC seconds of the machine, the same for all its processes.

Invariants (tests/unit/test_chaos_checkers.py):
1. What is written is read back as it was; a line that is no entry is refused by its number.
2. An entry is on disk, whole, before `add` returns.
Not here: who sees what (observer.py), what it means (checkers/).
"""

import dataclasses
import json
import os
import types
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from elastic_run.runtime.protocol.errors import CodecError

ENTRIES_MAX = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class CampaignBegan:
    at_s: float
    seed: int
    nodes: int
    save_every: int
    """Steps between two snapshots of the workload."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultBegan:
    at_s: float
    number: int
    victim: str
    action: str
    what: str
    """Whom it hit; empty when there was nobody to hit."""
    node: str
    """Node of the victim; empty when it is not of one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultEnded:
    """The victim was let go or started again; what follows is recovery."""

    at_s: float
    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HealingBegan:
    """No fault comes after this one: everything has to come back."""

    at_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Healed:
    """All nodes were in one view and finished a step of it."""

    at_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeStarted:
    at_s: float
    node: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeEnded:
    at_s: float
    node: str
    code: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaderSeen:
    at_s: float
    candidate: str
    token: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewSeen:
    at_s: float
    number: int
    status: str
    members: tuple[str, ...]
    restart_count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CurrentSeen:
    at_s: float
    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EventSeen:
    at_s: float
    sequence: int
    kind: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultSeen:
    at_s: float
    state: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDone:
    """One optimizer step, as rank 0 of the workload told it."""

    at_s: float
    step: int
    world_size: int
    pid: int
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftBehind:
    """Something that should be gone after the end."""

    at_s: float
    what: str


Entry = (
    CampaignBegan
    | FaultBegan
    | FaultEnded
    | HealingBegan
    | Healed
    | NodeStarted
    | NodeEnded
    | LeaderSeen
    | ViewSeen
    | CurrentSeen
    | EventSeen
    | ResultSeen
    | StepDone
    | LeftBehind
)
_KINDS: dict[str, type[Any]] = {kind.__name__: kind for kind in get_args(Entry)}


class History:
    """Entries in order of being added, mirrored to a file."""

    def __init__(self, path: Path) -> None:
        self._file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600), "ab")
        self.entries: list[Entry] = []

    def add(self, entry: Entry) -> None:
        """Append an entry. Raises OverflowError when the campaign never ends."""
        if len(self.entries) >= ENTRIES_MAX:
            raise OverflowError(f"over {ENTRIES_MAX} entries in one history")
        self.entries.append(entry)
        self._file.write(encode(entry))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def encode(entry: Entry) -> bytes:
    """Return the entry's line."""
    return json.dumps({"entry": type(entry).__name__, **dataclasses.asdict(entry)}).encode() + b"\n"


def decode(lines: Iterable[bytes]) -> list[Entry]:
    """Read entries back. Raises CodecError naming the first line that is none."""
    return [_decode_line(number, line) for number, line in enumerate(lines, 1)]


def _decode_line(number: int, line: bytes) -> Entry:
    try:
        fields = json.loads(line)
        kind = _KINDS[fields.pop("entry")]
        hints = get_type_hints(kind)
        if fields.keys() != hints.keys():
            raise ValueError("other fields")
        entry: Entry = kind(**{name: _typed(hints[name], value) for name, value in fields.items()})
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CodecError(f"line {number} is no entry of a history: {error}") from None
    return entry


def _typed(hint: Any, value: Any) -> Any:
    if isinstance(hint, types.GenericAlias):  # tuple[str, ...]
        return tuple(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise ValueError(f"{value!r} is no {hint.__name__}")
    return value
