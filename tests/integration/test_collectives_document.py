"""What docs/collectives.md says about the library is so: its programs run, its numbers are the code's."""

import os
import re
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import elastic_run.collectives
from elastic_run.collectives import handshake, wire
from elastic_run.collectives.guarded_socket import HANDSHAKE_TIMEOUT_S
from elastic_run.collectives.mesh import STRANGE_PEERS_MAX, STRANGERS_MAX
from elastic_run.collectives.messages import EAGER_BYTES_MAX, UNEXPECTED_BYTES_MAX

TEXT = (Path(str(elastic_run.collectives.__file__)).resolve().parent.parent / "docs" / "collectives.md").read_text(
    encoding="utf-8"
)
PROGRAMS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
WAIT_S = 120.0


def free_ports(count: int) -> list[int]:
    socks = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [sock.getsockname()[1] for sock in socks]
    for sock in socks:
        sock.close()
    return ports


def run(program: str, arguments: list[list[str]]) -> list[str]:
    """Run the program once per list of arguments, all at the same time; return what each printed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "program.py")
        path.write_text(program, encoding="utf-8")
        processes = [
            subprocess.Popen(
                [sys.executable, str(path), *words],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            for words in arguments
        ]
        try:
            answers = [process.communicate(timeout=WAIT_S) for process in processes]
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                    process.communicate()
    assert [process.returncode for process in processes] == [0] * len(processes), answers
    return [out.strip() for out, _ in answers]


def test_the_program_with_a_list_of_addresses_runs_as_printed() -> None:
    program = PROGRAMS[0]
    for said, port in zip(("7001", "7002"), free_ports(2), strict=True):
        assert program.count(said) == 1
        program = program.replace(said, str(port))
    assert run(program, [["a"], ["b"]]) == ["0 3.0", "1 3.0"]


def test_the_program_with_a_store_runs_as_printed() -> None:
    (port,) = free_ports(1)
    answers = run(PROGRAMS[1], [[str(rank), "3", str(port)] for rank in range(3)])
    assert answers == [f"{rank} [0.0, 1.0, 2.0]" for rank in range(3)]


def test_every_program_of_the_document_was_run() -> None:
    assert len(PROGRAMS) == 2


def table(first_column: str) -> list[list[str]]:
    """Return the rows of the table whose head begins with `first_column`."""
    lines = TEXT[TEXT.index(f"\n| {first_column} |") + 1 :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").replace("\\|", "/").split("|")] for line in lines]


def test_the_frames_head_is_the_codes() -> None:
    rows = table("byte")
    sizes = {"u8": 1, "u16": 2, "u32": 4, "u64": 8}
    at = 0
    for byte, kind, _ in rows:
        assert int(byte) == at
        at += sizes[kind]
    assert at == wire.HEADER_BYTES
    values = {"slot": 3, "view": 5, "group": 7, "check": 11, "sequence": 13, "total": 500, "offset": 17, "length": 19}
    packed = wire.pack(wire.Header(wire.Kind.DATA, **values))
    for byte, kind, field in rows:
        name = field.split(":")[0].split(",")[0]
        if name in values:
            assert int.from_bytes(packed[int(byte) : int(byte) + sizes[kind]], "little") == values[name]
    assert packed[0:2] == wire.MAGIC.to_bytes(2, "little") and f"`{wire.MAGIC:x}`" in rows[0][2]
    assert (packed[2], packed[3]) == (wire.VERSION, wire.Kind.DATA)


def test_the_kinds_of_frames_are_the_codes() -> None:
    assert {int(number): name for number, name, *_ in table("kind")} == {int(kind): kind.name for kind in wire.Kind}


def test_the_handshakes_sizes_are_the_codes() -> None:
    sizes = [int(size) for _, size, _ in table("who")]
    assert sizes == [handshake.HELLO_BYTES, handshake.CHALLENGE_BYTES, handshake.PROOF_BYTES]


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ("connections that have not proved themselves", STRANGERS_MAX),
        ("time for a handshake", f"{HANDSHAKE_TIMEOUT_S:g} s"),
        ("connections of one peer", handshake.LANES_MAX),
        ("proved workers that are in no view", STRANGE_PEERS_MAX),
        ("payload of one DATA frame", f"{wire.PAYLOAD_BYTES_MAX >> 20} MiB"),
        ("payload of any other frame", f"{wire.TEXT_BYTES_MAX >> 10} KiB"),
        ("one message", f"{wire.MESSAGE_BYTES_MAX >> 40} TiB"),
    ],
)
def test_the_bounds_are_the_codes(words: str, value: object) -> None:
    assert [row[1] for row in table("bound") if row[0] == words] == [str(value)]


def test_the_limits_of_small_messages_are_the_codes() -> None:
    assert f"up to {EAGER_BYTES_MAX >> 10} KiB" in TEXT
    assert f"more than {UNEXPECTED_BYTES_MAX >> 20} MiB" in TEXT
