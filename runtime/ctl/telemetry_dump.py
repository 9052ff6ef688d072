"""`elastic-ctl telemetry dump FILE`: what one worker did last and what it is in the middle of, by its telemetry file.

Works on the file of a worker that runs, hangs or is dead, here or on the machine it was copied from.
Invariants (tests/integration/test_telemetry_dump.py):
1. Any file at all leads to a dump or to one line of refusal; nothing is written into it.
2. JSON fields are those that docs/telemetry.md lists.
Not here: reading the file (edge/telemetry.py, edge/operations.py); tables (text.py).
"""

import argparse
import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from elastic_run.runtime.ctl.text import UNKNOWN, age, table
from elastic_run.runtime.edge.operations import OperationRecord, Operations, TransferRecord
from elastic_run.runtime.edge.telemetry import NS_PER_S, Telemetry, TelemetryFile
from elastic_run.runtime.protocol.errors import CodecError, UserError

LAST = 20
NS_PER_MS = 1_000_000
NS_PER_US = 1_000
_UNITS = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Dump:
    """One file at one moment."""

    path: str
    telemetry: Telemetry
    operations: Operations
    alive: bool
    """A process of the worker's id runs on this machine."""
    at_ns: int
    """The moment that ages refer to: now when the worker is alive, else the last mark in its file."""


def add_command(commands: Any, run: Callable[[argparse.Namespace], None]) -> None:
    """Add `telemetry dump` to the sub-parsers `commands`."""
    summary = "look into the telemetry file of one worker"
    telemetry = commands.add_parser("telemetry", help=summary, description=summary)
    inner = telemetry.add_subparsers(required=True, metavar="COMMAND")
    summary = "print a worker's steps and collective operations; it may run, hang or be dead"
    dump = inner.add_parser("dump", help=summary, description=summary)
    dump.set_defaults(command=run)
    dump.add_argument("file", metavar="FILE", help="the worker's file: *.telemetry in its agent's run directory")
    dump.add_argument("--json", action="store_true", help="answer in JSON, with field names that stay, and everything")
    dump.add_argument(
        "--last",
        type=_count,
        default=LAST,
        metavar="N",
        help=f"show the N newest steps and operations, and all that are under way (default {LAST})",
    )


def read(path: str, *, now_ns: int) -> Dump:
    """Return what the file says. Raises UserError when it is no telemetry file."""
    try:
        file = TelemetryFile(path, read_only=True)
        try:
            operations = file.read_operations()
            telemetry = file.read()
        finally:
            file.close()
    except CodecError as error:
        raise UserError(f"{error}; give the telemetry file of a worker of this version") from None
    newest_ns = _newest_mark_ns(telemetry, operations)
    alive = telemetry.pid > 0 and os.path.exists(f"/proc/{telemetry.pid}")
    at_ns = now_ns if alive and now_ns >= newest_ns else newest_ns
    return Dump(path=path, telemetry=telemetry, operations=operations, alive=alive, at_ns=at_ns)


def document(dump: Dump) -> dict[str, Any]:
    """Return everything, ready for JSON; an operation's peers and group by name."""
    found = dump.operations
    worker = dataclasses.asdict(dump.telemetry)
    steps = worker.pop("records")
    counts = dataclasses.asdict(found)
    for name in ("operations", "transfers", "peers", "groups"):
        del counts[name]
    return {
        "file": dump.path,
        "alive": dump.alive,
        "at_ns": dump.at_ns,
        "worker": worker,
        "steps": steps,
        "counts": counts,
        "operations": [_operation_document(record, found) for record in found.operations],
        "transfers": [
            {**dataclasses.asdict(record), "peer": found.peer_name(record.peer)} for record in found.transfers
        ],
    }


def readable(dump: Dump, *, last: int) -> str:
    """Return the dump for people: the worker, its newest steps and operations, and the traffic of those under way."""
    found = dump.operations
    under_way = found.under_way()
    newest = found.operations[max(0, len(found.operations) - last) :]
    shown = sorted({record.number: record for record in (*under_way, *newest)}.values(), key=lambda r: r.number)
    open_numbers = {record.number for record in under_way}
    transfers = [record for record in found.transfers if record.operation in open_numbers]
    parts = [_worker(dump), _steps(dump, last), _counts(found, len(under_way))]
    if shown:
        parts.append(_operation_table(shown, found, dump.at_ns))
    if transfers:
        parts.append("traffic of the operations under way\n" + _transfer_table(transfers, found, dump.at_ns))
    return "\n\n".join(parts)


def _count(value: str) -> int:
    if not value.isdecimal():
        raise argparse.ArgumentTypeError(f"{value!r} is no number of records")
    return int(value)


def _newest_mark_ns(telemetry: Telemetry, operations: Operations) -> int:
    marks = [telemetry.change_ns]
    marks += [max(r.enter_ns, r.progress_ns, r.done_ns) for r in operations.operations]
    marks += [record.progress_ns for record in operations.transfers]
    return max(marks)


def _operation_document(record: OperationRecord, found: Operations) -> dict[str, Any]:
    return {
        **dataclasses.asdict(record),
        "state": record.state.name.lower(),
        "group": found.group_name(record.group),
        "partner": found.peer_name(record.partner) or None,
        "culprit": found.peer_name(record.culprit) or None,
    }


def _worker(dump: Dump) -> str:
    told = dump.telemetry
    process = f"process {told.pid}, {'alive' if dump.alive else 'gone'}" if told.pid else "no process has begun"
    place = f"rank {told.rank} of {told.world_size} in view {told.view}" if told.world_size else "without an agent"
    lines = [
        f"worker      {place}; {process}",
        f"phase       {told.phase}, since {_since(told.change_ns, dump.at_ns)}",
        "ages refer  " + ("to now" if dump.alive else "to the last mark in the file: the worker does not run here"),
    ]
    if told.stop_at_step:
        lines.append(f"asked       to stop after step {told.stop_at_step} for view {told.requested_view}")
    return "\n".join(lines)


def _steps(dump: Dump, last: int) -> str:
    told = dump.telemetry
    rate = told.step_rate_per_s()
    head = f"steps       {told.step} finished" + (f", {rate:.3g} a second" if rate else "")
    if told.records_torn:
        head += f", {told.records_torn} torn"
    records = told.records[max(0, len(told.records) - last) :]
    if not records:
        return head
    rows = [
        (str(record.step), _length(record.end_ns - record.start_ns), _since(record.end_ns, dump.at_ns))
        for record in records
    ]
    return f"{head}\n{table(('STEP', 'TOOK', 'ENDED'), rows)}"


def _counts(found: Operations, under_way: int) -> str:
    head = f"operations  {found.operations_begun} recorded, {under_way} under way"
    lost = (
        (found.operations_overwritten, "overwritten"),
        (found.operations_dropped, "without a record"),
        (found.operations_torn, "torn"),
        (found.transfers_torn, "torn transfers"),
        (found.peers_unnamed, "unnamed peers"),
    )
    return ", ".join([head, *(f"{count} {what}" for count, what in lost if count)])


def _operation_table(shown: list[OperationRecord], found: Operations, at_ns: int) -> str:
    head = (
        "NUMBER",
        "STATE",
        "GROUP",
        "SEQ",
        "VIEW",
        "WHAT",
        "SIZE",
        "ENTERED",
        "SENT",
        "RECEIVED",
        "ENDED",
        "CULPRIT",
    )
    rows = [
        (
            str(record.number),
            record.state.name.lower(),
            found.group_name(record.group),
            str(record.sequence),
            str(record.view),
            _what(record, found),
            _size(record.bytes),
            _since(record.enter_ns, at_ns),
            _later(record.first_sent_ns, record.enter_ns),
            _later(record.first_received_ns, record.enter_ns),
            _later(record.done_ns, record.enter_ns),
            found.peer_name(record.culprit) or UNKNOWN,
        )
        for record in shown
    ]
    return table(head, rows)


def _transfer_table(transfers: list[TransferRecord], found: Operations, at_ns: int) -> str:
    head = ("OPERATION", "PEER", "SENT", "RECEIVED", "SEND BLOCKED", "RECEIVE BLOCKED", "LAST PROGRESS")
    rows = [
        (
            str(record.operation),
            found.peer_name(record.peer),
            _size(record.sent_bytes),
            _size(record.received_bytes),
            _length(record.send_blocked_ns),
            _length(record.receive_blocked_ns),
            _since(record.progress_ns, at_ns),
        )
        for record in transfers
    ]
    return table(head, rows)


def _what(record: OperationRecord, found: Operations) -> str:
    """Return "all_reduce sum float32 ring" and the like, without what does not apply."""
    words = [record.kind, record.reduction, record.dtype, record.algorithm]
    kept = [words[0], *(word for word in words[1:] if word not in ("none", "other"))]
    if record.partner is not None:
        kept.append(f"with {found.peer_name(record.partner)}")
    return " ".join(kept)


def _since(then_ns: int, at_ns: int) -> str:
    """Return "3 s ago" and the like, in milliseconds below a second; unknown for what never happened."""
    if not then_ns:
        return UNKNOWN
    passed_ns = at_ns - then_ns
    if NS_PER_MS <= passed_ns < NS_PER_S:
        return f"{passed_ns // NS_PER_MS} ms ago"
    return age(passed_ns / NS_PER_S)


def _later(then_ns: int, enter_ns: int) -> str:
    return f"+{_length(then_ns - enter_ns)}" if then_ns else UNKNOWN


def _length(length_ns: int) -> str:
    if length_ns >= NS_PER_S:
        return f"{length_ns / NS_PER_S:.3g} s"
    if length_ns >= NS_PER_MS:
        return f"{length_ns / NS_PER_MS:.3g} ms"
    return f"{length_ns / NS_PER_US:.3g} us"


def _size(nbytes: int) -> str:
    for unit, name in _UNITS:
        if nbytes >= unit:
            return f"{nbytes / unit:.3g} {name}"
    return f"{nbytes} B"
