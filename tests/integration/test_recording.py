"""What the collectives of a process do is on record for others to read: while it runs, hangs, and after SIGKILL."""

import contextlib
import os
import signal
from pathlib import Path

import attached_worker
import mesh_workers
import pytest
import torch
from mesh_workers import Crew, Site, until

from elastic_run.collectives.errors import CollectiveAborted, CollectiveMismatch
from elastic_run.collectives.options import MeshOptions
from elastic_run.collectives.recording import SWEEP_S
from elastic_run.collectives.reduction import Reduction
from elastic_run.runtime.edge.operations import OperationRecord, Operations, TransferRecord
from elastic_run.runtime.edge.operations_codes import State
from elastic_run.runtime.edge.telemetry import TelemetryFile

SMALL, LARGE = 100, 400_000


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where workers started from now on leave their files, by process id."""
    monkeypatch.setenv("ELASTIC_RUN_TELEMETRY", str(tmp_path / "w.%p"))
    return tmp_path


def read(files: Path, pid: int) -> Operations:
    file = TelemetryFile(str(files / f"w.{pid}"), read_only=True)
    try:
        return file.read_operations()
    finally:
        file.close()


def transfers_of(seen: Operations, operation: OperationRecord) -> dict[str, TransferRecord]:
    return {seen.peer_name(record.peer): record for record in seen.transfers if record.operation == operation.number}


def one_of_each(site: Site) -> None:
    group = site.install(3)
    size = group.size
    group.all_reduce([torch.ones(SMALL, dtype=torch.bfloat16)], Reduction.MAX).wait(30)
    group.all_reduce([torch.ones(LARGE)]).wait(30)
    group.broadcast([torch.ones(LARGE)], 1).wait(30)
    group.all_gather(torch.empty(size * SMALL), torch.ones(SMALL)).wait(30)
    group.reduce_scatter(torch.empty(SMALL), torch.ones(size * SMALL), Reduction.AVG).wait(30)
    if group.rank == 0:
        group.send(torch.ones(LARGE), 1, tag=7).wait(30)
    elif group.rank == 1:
        group.receive(torch.empty(LARGE), None, tag=7).wait(30)
    site.mesh.group("pair", [2, 0]).barrier().wait(30) if group.rank != 1 else None
    group.barrier().wait(30)
    site.tell("done")
    site.hear()


@pytest.mark.parametrize("shared_memory", [True, False], ids=["shared memory", "tcp"])
def test_every_operation_is_recorded_with_what_it_was_and_moved(files: Path, shared_memory: bool) -> None:
    with Crew(3, one_of_each, MeshOptions(shared_memory=shared_memory)) as crew:
        for rank in range(3):
            crew.hear(rank)
        seen = read(files, crew.pid(0))
        receiver = read(files, crew.pid(1))
        for rank in range(3):
            crew.tell(rank, "end")
        crew.results()
    shown = [
        (record.kind, record.reduction, record.dtype, record.bytes, record.view, seen.group_name(record.group))
        for record in seen.operations
    ]
    assert shown == [
        ("all_reduce", "max", "bfloat16", 2 * SMALL, 3, "world"),
        ("all_reduce", "sum", "float32", 4 * LARGE, 3, "world"),
        ("broadcast", "none", "float32", 4 * LARGE, 3, "world"),
        ("all_gather", "none", "float32", 4 * SMALL, 3, "world"),
        ("reduce_scatter", "avg", "float32", 12 * SMALL, 3, "world"),
        ("send", "none", "float32", 4 * LARGE, 3, "world"),
        ("barrier", "none", "none", 0, 3, "pair"),
        ("barrier", "none", "none", 0, 3, "world"),
    ]
    assert [record.sequence for record in seen.operations if record.kind not in ("send", "barrier")] == list(range(5))
    for record in seen.operations:
        assert record.state is State.DONE and record.culprit is None
        moments = [record.enter_ns, record.first_sent_ns or record.enter_ns, record.progress_ns, record.done_ns]
        assert moments == sorted(moments)
        assert record.members == (2 if seen.group_name(record.group) == "pair" else 3)
    small, large, broadcast, *_, send, pair, _barrier = seen.operations
    assert small.algorithm == "exchange"
    moved = transfers_of(seen, small)
    assert {name: (record.sent_bytes, record.received_bytes) for name, record in moved.items()} == {
        "w1": (2 * SMALL, 2 * SMALL),
        "w2": (2 * SMALL, 2 * SMALL),
    }
    assert sum(record.received_bytes for record in transfers_of(seen, broadcast).values()) == 4 * LARGE
    assert seen.peer_name(broadcast.partner) == "w1"
    assert transfers_of(seen, large) and large.first_received_ns and large.first_sent_ns
    assert transfers_of(seen, send)["w1"].sent_bytes == 4 * LARGE
    assert (send.tag, seen.peer_name(send.partner)) == (7, "w1")
    assert set(transfers_of(seen, pair)) == {"w2"}
    received = next(record for record in receiver.operations if record.kind == "receive")
    assert received.partner is None and transfers_of(receiver, received)["w0"].received_bytes == 4 * LARGE


def stand_still(site: Site) -> None:
    group = site.install()
    group.barrier().wait(30)
    site.tell("ready")
    if site.rank == 2:
        site.hear()
    with contextlib.suppress(CollectiveAborted):
        group.all_reduce([torch.ones(LARGE)]).wait()
    site.tell(site.rank)


@pytest.mark.parametrize("shared_memory", [True, False], ids=["shared memory", "tcp"])
def test_the_file_of_a_killed_worker_says_what_it_was_doing_and_whom_it_waited_for(
    files: Path, shared_memory: bool
) -> None:
    with Crew(3, stand_still, MeshOptions(shared_memory=shared_memory)) as crew:
        for rank in range(3):
            crew.hear(rank)
        pid = crew.pid(0)

        def waits_for_w2() -> bool:
            under_way = read(files, pid).under_way()
            waits = transfers_of(read(files, pid), under_way[0]) if under_way else {}
            return "w2" in waits and waits["w2"].receive_blocked_ns > 3e9 * SWEEP_S

        until(waits_for_w2)
        crew.signal(0, signal.SIGKILL)
        assert crew.hear(1) == 1  # its own operation ends, for w0 is gone
        seen, other = read(files, pid), read(files, crew.pid(1))
    (hung,) = seen.under_way()
    assert (hung.kind, hung.state, hung.bytes, hung.done_ns) == ("all_reduce", State.STARTED, 4 * LARGE, 0)
    waits = transfers_of(seen, hung)
    assert waits["w2"].received_bytes == 0
    assert waits["w2"].receive_blocked_ns > waits["w1"].receive_blocked_ns
    aborted = other.operations[-1]
    assert (aborted.kind, aborted.state) == ("all_reduce", State.ABORTED)
    assert other.peer_name(aborted.culprit) == "w0"


def test_a_member_that_means_another_operation_leaves_a_failed_one(files: Path) -> None:
    def disagree(site: Site) -> None:
        group = site.install()
        with pytest.raises((CollectiveMismatch, CollectiveAborted)):
            group.all_reduce([torch.ones(SMALL + site.rank)]).wait(30)
        site.tell("done")
        site.hear()

    with Crew(2, disagree) as crew:
        states = set()
        for rank in range(2):
            crew.hear(rank)
            states |= {record.state for record in read(files, crew.pid(rank)).operations}
            crew.tell(rank, "end")
    assert State.FAILED in states and states <= {State.FAILED, State.ABORTED}


def test_nothing_is_recorded_where_nobody_could_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ELASTIC_RUN_TELEMETRY", raising=False)
    with mesh_workers.meshes(1) as (mesh,):
        assert mesh.recorder is None


def test_a_forked_child_writes_nothing_into_its_parents_file(files: Path) -> None:
    def fork(site: Site) -> int:
        group = site.install()
        group.barrier().wait(30)
        before = read(files, os.getpid()).operations_begun
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                group.barrier().wait(1)
            os._exit(0)
        os.waitpid(child, 0)
        return read(files, os.getpid()).operations_begun - before

    assert mesh_workers.run(1, fork) == [0]


SCRIPT = """
import torch
from elastic_run.collectives.endpoint import DataView
from elastic_run.collectives.mesh import Mesh

mesh = Mesh("w0", bytes(32))
mesh.install(DataView(number=5, members=(mesh.endpoint,))).all_reduce([torch.ones(10)]).wait()
mesh.close()
"""


async def test_under_an_agent_the_workers_own_file_has_the_records(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    async with attached_worker.seat() as seat:
        process = await attached_worker.start([attached_worker.BOOTSTRAP, "script.py"], str(tmp_path), seat.environment)
        ended = await attached_worker.finish(process)
        assert (ended.code, ended.err) == (0, "")
        (record,) = seat.telemetry.read_operations().operations
    assert (record.kind, record.view, record.state, record.bytes) == ("all_reduce", 5, State.DONE, 40)
