"""docs/telemetry.md is what the code does: every offset, type, code and the worked example."""

import enum
import re
import struct
import sys
from pathlib import Path

import pytest

from elastic_run.runtime.edge import operations_layout as layout
from elastic_run.runtime.edge import telemetry_layout
from elastic_run.runtime.edge.operations import read_operations
from elastic_run.runtime.edge.operations_codes import Algorithm, Dtype, Kind, Reduction, State
from elastic_run.runtime.edge.operations_layout import Fields, offset_of, seal_of, structure
from elastic_run.runtime.edge.operations_writer import OperationsWriter

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "telemetry.md"
TEXT = DOCUMENT.read_text()
TYPES = {"B": "u8", "I": "u32", "Q": "u64"}

Row = tuple[int, str, str]


def rows_after(phrase: str) -> list[list[str]]:
    """The cells of the first table after `phrase`, without its head."""
    lines = TEXT[TEXT.index(phrase) :].splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("|"))
    found = []
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            break
        found.append([cell.strip() for cell in line.strip("|").split("|")])
    return found


def documented(phrase: str) -> list[Row]:
    return [(int(cells[0]), cells[1], cells[2]) for cells in rows_after(phrase)]


def coded(fields: Fields, base: int = 0) -> list[Row]:
    return [(base + offset_of(fields, name), TYPES.get(code, code), name) for name, code in fields]


def words_of(module: object, names: list[str]) -> list[Row]:
    return [(getattr(module, name) * telemetry_layout.WORD_BYTES, "u64", name) for name in names]


@pytest.mark.parametrize(
    ("phrase", "fields", "base"),
    [
        ("### Operations", layout.OPERATION, 0),
        ("The second is written", layout.PROGRESS, layout.HALF_BYTES),
        ("### Transfers", layout.TRANSFER, 0),
        ("### Peers and groups", layout.NAME, 0),
        ("Ring of steps, from", (("seal", "Q"), ("step", "Q"), ("start_ns", "Q"), ("end_ns", "Q")), 0),
    ],
)
def test_documented_records_are_the_coded_ones(phrase: str, fields: Fields, base: int) -> None:
    assert documented(phrase) == coded(fields, base)


@pytest.mark.parametrize(
    ("phrase", "module"),
    [("The worker's words", telemetry_layout), ("The agent's words", telemetry_layout), ("Counters:", layout)],
)
def test_documented_words_lie_where_the_code_has_them(phrase: str, module: object) -> None:
    rows = documented(phrase)
    assert rows == words_of(module, [name for _, _, name in rows])


def test_every_counter_and_word_is_documented() -> None:
    assert [name for name in vars(layout) if name.startswith("C_")] == [name for _, _, name in documented("Counters:")]
    worker = {*range(telemetry_layout.PID, telemetry_layout.PARKED_AT_STEP + 1)}
    assert {at // telemetry_layout.WORD_BYTES for at, _, _ in documented("The worker's words")} == worker
    assert len(documented("Header, from byte 0")) == len(telemetry_layout.HEADER)


def test_documented_phases_are_the_coded_ones() -> None:
    listed = ", ".join(f"{code} {phase}" for code, phase in enumerate(telemetry_layout.PHASES))
    assert f"| {listed} |" in TEXT


def test_documented_sizes_are_the_coded_ones() -> None:
    table = [tuple(map(int, (cells[0], *cells[2:]))) for cells in rows_after("## Operations section")]
    assert [number for row in table for number in row] == list(layout.TABLE)
    assert f"Operations section, from byte {telemetry_layout.STEPS_END_BYTE}\n" in TEXT
    assert f"The section is {layout.SECTION_BYTES} bytes long, the file {telemetry_layout.FILE_BYTES}." in TEXT
    assert f"This is layout {telemetry_layout.LAYOUT}." in TEXT
    ring = f"{telemetry_layout.STEP_RECORDS} records of {telemetry_layout.RECORD_WORDS * 8} bytes"
    assert f"from byte {telemetry_layout.STEPS_WORD * 8}: {ring}" in TEXT


def test_documented_codes_are_the_coded_ones() -> None:
    codes: tuple[type[enum.IntEnum], ...] = (Kind, Reduction, Dtype, Algorithm)
    table = rows_after("### Codes")
    for column, kind in enumerate(codes, start=1):
        listed = {int(cells[0]): cells[column] for cells in table if cells[column]}
        assert listed == {int(code): code.name.lower() for code in kind}
    listed_states = ", ".join(f"{int(s)} {s.name.lower()}" for s in State if s is not State.UNKNOWN)
    assert f"| {listed_states} |" in TEXT


def test_step_seal_is_the_documented_one() -> None:
    factors = [int(number, 16) for number in re.findall(r"0x[0-9A-F]{16}", TEXT)]
    step, start_ns, end_ns = 7, 10**12, 10**12 + 3
    sealed = (step * factors[0] + start_ns * factors[1] + end_ns * factors[2] + factors[3]) % 2**64
    assert telemetry_layout.seal(step, start_ns, end_ns) == sealed


@pytest.mark.skipif(sys.byteorder != "little", reason="the example is of a little-endian machine")
def test_worked_example_is_what_the_writer_writes() -> None:
    block = TEXT[TEXT.index("## Example") :].split("```")[1]
    example = bytes.fromhex("".join("".join(line.split()[1:]) for line in block.strip().splitlines()))
    memory = bytearray(layout.SECTION_BYTES)
    memory[: len(layout.table_bytes())] = layout.table_bytes()
    section = memoryview(memory)
    writer = OperationsWriter(section)
    number = writer.begin(
        Kind.ALL_REDUCE,
        group=7,
        view=3,
        sequence=44,
        enter_ns=10**9,
        members=4,
        nbytes=1 << 20,
        reduction=Reduction.SUM,
        dtype=Dtype.FLOAT32,
        algorithm=Algorithm.RING,
    )
    times = {"first_sent_ns": 10**9 + 20_000, "first_received_ns": 10**9 + 30_000, "progress_ns": 10**9 + 499_000}
    writer.finish(number, State.DONE, done_ns=10**9 + 500_000, moved_bytes=2 * 1_572_864, **times)
    at = layout.OPERATIONS_BYTE
    assert bytes(section[at : at + layout.OPERATION_BYTES]) == example
    memory[at : at + layout.OPERATION_BYTES] = example
    (record,) = read_operations(section, "example").operations
    assert (record.kind, record.sequence, record.state, record.moved_bytes) == ("all_reduce", 44, State.DONE, 3_145_728)


@pytest.mark.parametrize("fields", [layout.OPERATION, layout.PROGRESS, layout.TRANSFER, layout.NAME])
def test_fields_are_aligned_and_records_fill_whole_words(fields: Fields) -> None:
    size = structure(fields).size
    assert size % 8 == 0
    for name, code in fields:
        if not code.endswith("s"):
            assert offset_of(fields, name) % struct.calcsize(f"={code}") == 0
    assert seal_of(bytes(size - layout.SEAL_BYTES)) != 0
