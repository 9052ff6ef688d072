"""What one record costs the collectives, in a worker's telemetry file, and what a look at the file costs its reader.

In this process alone, on one file in the benchmark's directory: microseconds of wall time per call, Python's own call
included. An operation of a ring costs one begin, one finish and a transfer for each of its two peers.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.harness import Benchmark, Case, Context
from benchmarks.systems import ELASTIC_RUN
from elastic_run.runtime.edge import telemetry
from elastic_run.runtime.edge.operations_codes import Algorithm, Dtype, Kind, Reduction, State
from elastic_run.runtime.edge.operations_writer import OperationsWriter
from elastic_run.runtime.edge.telemetry import TelemetryFile
from elastic_run.runtime.edge.telemetry_writer import TelemetryWriter

RECORDS = 100_000
RECORDS_QUICK = 10_000
UNDER_WAY = 100
"""Operations in flight at a time: more than a job has, so that each kind of call can be timed by itself."""
LOOKS = 20
NEW = 50
"""Operations since the reader's last look, for what a periodic look costs."""
NS_PER_US = 1e3
NS_PER_MS = 1e6


def record_cost(system: str, context: Context) -> Mapping[str, float]:
    """Mean time of every kind of record, with first touches of the file's pages left out, and of a look."""
    path = str(context.directory / "telemetry")
    telemetry.create(path, 0, 1, 1)
    writer = TelemetryWriter(path).operations()
    peer = writer.peer("w-peer")
    _rounds(writer, peer, RECORDS_QUICK)
    records = RECORDS_QUICK if context.quick else RECORDS
    spent_ns = _rounds(writer, peer, records)
    file = TelemetryFile(path)
    newest = file.read_operations(after=2**63).operations_begun
    looks_ns = {
        "look_at_all_ms": _time_ns(file.read_operations, LOOKS),
        "look_at_new_ms": _time_ns(lambda: file.read_operations(after=newest - NEW), LOOKS),
    }
    file.close()
    costs = {name: ns / records / NS_PER_US for name, ns in spent_ns.items()}
    return costs | {name: ns / LOOKS / NS_PER_MS for name, ns in looks_ns.items()}


def _rounds(writer: OperationsWriter, peer: int, records: int) -> dict[str, int]:
    """Record that many operations, each begun, moved, updated and finished; nanoseconds by kind of record."""
    spent_ns = dict.fromkeys(("begin_us", "transfer_us", "update_us", "finish_us"), 0)
    numbers: list[int] = []

    def begin() -> None:
        numbers.append(
            writer.begin(
                Kind.ALL_REDUCE,
                group=7,
                view=3,
                sequence=123_456,
                enter_ns=time.monotonic_ns(),
                members=4,
                nbytes=1 << 26,
                reduction=Reduction.SUM,
                dtype=Dtype.FLOAT32,
                algorithm=Algorithm.RING,
            )
        )

    def transfer() -> None:
        writer.transfer(
            numbers[0],
            peer,
            sent_bytes=1 << 26,
            received_bytes=1 << 26,
            send_blocked_ns=1_234_567,
            receive_blocked_ns=7_654_321,
            progress_ns=time.monotonic_ns(),
        )

    def update() -> None:
        writer.update(numbers[0], first_sent_ns=time.monotonic_ns(), moved_bytes=1 << 26)

    def finish() -> None:
        now_ns = time.monotonic_ns()
        writer.finish(
            numbers.pop(),
            State.DONE,
            done_ns=now_ns,
            first_sent_ns=now_ns,
            first_received_ns=now_ns,
            progress_ns=now_ns,
            moved_bytes=1 << 27,
        )

    for _ in range(records // UNDER_WAY):
        spent_ns["begin_us"] += _time_ns(begin, UNDER_WAY)
        spent_ns["transfer_us"] += _time_ns(transfer, UNDER_WAY)
        spent_ns["update_us"] += _time_ns(update, UNDER_WAY)
        spent_ns["finish_us"] += _time_ns(finish, UNDER_WAY)
    return spent_ns


def _time_ns(call: Callable[[], object], times: int) -> int:
    started_ns = time.perf_counter_ns()
    for _ in range(times):
        call()
    return time.perf_counter_ns() - started_ns


def conditions(quick: bool) -> dict[str, Any]:
    return {"records": RECORDS_QUICK if quick else RECORDS, "under_way": UNDER_WAY, "new_operations_per_look": NEW}


BENCHMARK = Benchmark(
    name="telemetry_record",
    summary="one record of an operation or transfer in the telemetry file, and one look at it",
    cases=(
        Case(
            name="records",
            systems=(ELASTIC_RUN,),
            units={
                "begin_us": "us",
                "transfer_us": "us",
                "update_us": "us",
                "finish_us": "us",
                "look_at_all_ms": "ms",
                "look_at_new_ms": "ms",
            },
            run=record_cost,
        ),
    ),
    rounds=15,
    rounds_quick=5,
    warm_up_quick=True,
    conditions=conditions,
)
