"""A real torch script under the bootstrap: its steps are counted, and it parks where it is told and nowhere else."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import attached_worker
import pytest
from attached_worker import BOOTSTRAP, VIEW, WORKER, Seat

from elastic_run.runtime.edge.telemetry_layout import Phase
from elastic_run.runtime.edge.worker_server import WorkerGone, WorkerParked, WorkerRunning
from elastic_run.runtime.protocol.ids import ViewNumber

pytestmark = pytest.mark.slow
NEXT_VIEW = ViewNumber(VIEW + 1)

TRAIN = """
import sys, torch
model = torch.nn.Linear(4, 1)
first, second = torch.optim.SGD(model.parameters(), lr=0.01), torch.optim.Adam(model.parameters())
for step in range(1, int(sys.argv[1]) + 1):
    for optimizer in (first, second):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
    print("done", step, flush=True)
"""


@pytest.fixture
async def seat() -> AsyncIterator[Seat]:
    async with attached_worker.seat() as made:
        yield made


@pytest.fixture
def folder(tmp_path: Path) -> str:
    (tmp_path / "train.py").write_text(TRAIN)
    return str(tmp_path)


async def test_worker_parks_exactly_after_the_asked_step_and_goes_on_when_resumed(seat: Seat, folder: str) -> None:
    seat.telemetry.request_stop(at_step=5, view=NEXT_VIEW)
    process = await attached_worker.start([BOOTSTRAP, "train.py", "9"], folder, seat.environment)
    assert await seat.heard(WorkerParked) == WorkerParked(worker=WORKER, view=NEXT_VIEW, step=5)
    parked = seat.telemetry.read()
    assert (parked.phase, parked.step, parked.parked_at_step, parked.pid) == (Phase.PARKED, 5, 5, process.pid)
    assert seat.server.resume(WORKER, NEXT_VIEW)
    assert await seat.heard(WorkerRunning) == WorkerRunning(worker=WORKER, view=NEXT_VIEW, step=5, unasked=False)
    ended = await attached_worker.finish(process)
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.splitlines() == [f"done {step}" for step in range(1, 10)]
    after = seat.telemetry.read()
    assert (after.phase, after.step, len(after.records)) == (Phase.FINISHED, 9, 9)
    assert isinstance(await seat.heard(WorkerGone), WorkerGone)


async def test_request_that_comes_late_parks_at_the_next_step_end(seat: Seat, folder: str) -> None:
    process = await attached_worker.start([BOOTSTRAP, "train.py", "1000000"], folder, seat.environment)
    assert process.stdout is not None
    while (await process.stdout.readline()) != b"done 20\n":
        pass
    seat.telemetry.request_stop(at_step=3, view=NEXT_VIEW)
    parked = await seat.heard(WorkerParked)
    assert isinstance(parked, WorkerParked)
    assert parked.step >= 20
    assert seat.telemetry.read().step == parked.step
    process.kill()
    await attached_worker.finish(process)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
async def test_parked_worker_can_be_ended_by_signal(seat: Seat, folder: str, sent: signal.Signals) -> None:
    seat.telemetry.request_stop(at_step=2, view=NEXT_VIEW)
    process = await attached_worker.start([BOOTSTRAP, "train.py", "9"], folder, seat.environment)
    await seat.heard(WorkerParked)
    process.send_signal(sent)
    ended = await attached_worker.finish(process)
    assert ended.code == -sent
    assert ended.out.splitlines() == ["done 1"]  # the print of step 2 follows the step
    assert seat.telemetry.read().phase is Phase.PARKED
    assert isinstance(await seat.heard(WorkerGone), WorkerGone)


async def test_signal_handler_of_the_script_runs_while_it_is_parked(seat: Seat, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        "import signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(7))" + TRAIN
    )
    seat.telemetry.request_stop(at_step=2, view=NEXT_VIEW)
    process = await attached_worker.start([BOOTSTRAP, "train.py", "9"], str(tmp_path), seat.environment)
    await seat.heard(WorkerParked)
    process.terminate()
    assert (await attached_worker.finish(process)).code == 7
    assert seat.telemetry.read().phase is Phase.FAILED


async def test_worker_whose_agent_stops_listening_goes_on_and_says_so(seat: Seat, folder: str) -> None:
    seat.telemetry.request_stop(at_step=2, view=NEXT_VIEW)
    process = await attached_worker.start([BOOTSTRAP, "train.py", "4"], folder, seat.environment)
    await seat.heard(WorkerParked)
    await seat.server.close()
    ended = await attached_worker.finish(process)
    assert ended.code == 0
    assert ended.out.splitlines()[-1] == "done 4"
    assert ended.err == "elastic-run: parked after step 2, but the agent closed the link: going on\n"
    await seat.server.start()


SHORT_WAIT = """
from elastic_run.runtime.interceptions import safe_point
init = safe_point.SafePoint.__init__
init.__kwdefaults__["resume_timeout_s"] = 0.05
"""


async def test_worker_nobody_resumes_goes_on_once_its_bound_is_reached(seat: Seat, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SHORT_WAIT + TRAIN)
    seat.telemetry.request_stop(at_step=2, view=NEXT_VIEW)
    ended = await attached_worker.run([BOOTSTRAP, "train.py", "4"], str(tmp_path), seat.environment)
    assert ended.code == 0
    assert ended.out.splitlines()[-1] == "done 4"
    assert ended.err == "elastic-run: parked after step 2, not resumed within 0.05 s: going on\n"
    assert await seat.heard(WorkerRunning) == WorkerRunning(worker=WORKER, view=NEXT_VIEW, step=2, unasked=True)


FORKS = """
import os
import torch
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

def train(steps):
    for _ in range(steps):
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()

train(3)
child = os.fork()
train(5 if child == 0 else 1)
if child == 0:
    print("descriptors", [fd for fd in os.listdir("/proc/self/fd") if int(fd) >= 500], flush=True)
else:
    assert os.waitpid(child, 0)[1] == 0
"""


async def test_forked_child_neither_counts_nor_holds_the_link(seat: Seat, tmp_path: Path) -> None:
    (tmp_path / "forks.py").write_text(FORKS)
    ended = await attached_worker.run([BOOTSTRAP, "forks.py"], str(tmp_path), seat.environment)
    assert (ended.code, ended.out, ended.err) == (0, "descriptors []\n", "")
    found = seat.telemetry.read()
    assert (found.step, found.phase) == (4, Phase.FINISHED)


COMPILED = """
import torch
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

@torch.compile(backend="eager")
def step():
    optimizer.step()

for _ in range(6):
    optimizer.zero_grad()
    model(torch.ones(2, 4)).sum().backward()
    step()
"""


async def test_compiled_optimizer_steps_are_counted(seat: Seat, tmp_path: Path) -> None:
    (tmp_path / "compiled.py").write_text(COMPILED)
    ended = await attached_worker.run([BOOTSTRAP, "compiled.py"], str(tmp_path), seat.environment)
    assert ended.code == 0, ended.err
    assert seat.telemetry.read().step == 6


async def test_hung_worker_can_still_be_read(seat: Seat, folder: str) -> None:
    process = await attached_worker.start([BOOTSTRAP, "train.py", "1000000"], folder, seat.environment)
    assert process.stdout is not None
    while (await process.stdout.readline()) != b"done 10\n":
        pass
    os.kill(process.pid, signal.SIGSTOP)
    hung = seat.telemetry.read()
    assert hung.phase is Phase.RUNNING
    assert hung.step >= 10
    assert hung.step_rate_per_s() is not None
    process.kill()
    await attached_worker.finish(process)
    assert seat.telemetry.read().step >= hung.step  # and after it died


async def test_worker_waits_for_a_silent_agent_and_goes_on_with_its_next_sign_of_life(seat: Seat, folder: str) -> None:
    process = await attached_worker.start([BOOTSTRAP, "train.py", "1000000"], folder, seat.environment)
    assert process.stdout is not None
    assert process.stderr is not None
    while (await process.stdout.readline()) != b"done 20\n":
        pass
    seat.silent = True
    async with asyncio.timeout(attached_worker.BOUND_S):
        drained = asyncio.create_task(process.stdout.read(2**30))
        said = await process.stderr.readline()
    assert b"the agent of this node has been silent for 2 s" in said
    held = seat.telemetry.read()
    assert (held.phase, held.parked_at_step) == (Phase.PARKED, held.step)
    seat.silent = False
    async with asyncio.timeout(attached_worker.BOUND_S):
        while seat.telemetry.read().step == held.step:  # noqa: ASYNC110 - shared memory has no event
            await asyncio.sleep(0)
    process.kill()
    drained.cancel()
    await asyncio.gather(drained, return_exceptions=True)
    await process.wait()
