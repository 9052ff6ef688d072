"""What a worker sees, against what torchrun shows the same script."""

import asyncio
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from worker_setup import agent_config, install

from elastic_run.agent.output import LogDirectory
from elastic_run.agent.workers import Surroundings, WorkerGroup
from elastic_run.runtime.edge.process import adopted_children
from elastic_run.runtime.edge.worker_server import WorkerServer
from elastic_run.runtime.protocol.config import CommandConfig, Entrypoint
from elastic_run.runtime.protocol.ids import ViewNumber

LIMIT_S = 120.0
NPROC = 2
ARGS = ("--device=cuda:${local_rank}", "$$HOME", "${other}", "-m", "plain")
SHOW = """
import json, os, sys
facts = {"env": dict(os.environ), "argv": sys.argv, "path": sys.path, "name": __name__, "flags": list(sys.flags)}
with open(f"{os.environ['OUT']}-{os.environ['RANK']}", "w") as file:
    json.dump(facts, file)
"""
OUR_NAMES = ("elastic_run", "agent", "runtime", "bootstrap", "script_main")
STANDARD_NAMES = (
    "socket",
    "asyncio",
    "dataclasses",
    "ctypes",
    "mmap",
    "subprocess",
    "faulthandler",
    "runpy",
    "traceback",
)
DIFFERENT_BY_NATURE = {
    "MASTER_ADDR": "torchrun's host name or localhost; ours as the view says",
    "MASTER_PORT": "any free one",
    "TORCHELASTIC_RUN_ID": "random for a standalone torchrun",
    "TORCHELASTIC_RESTART_COUNT": "set by the test's view",
    "TORCHELASTIC_ERROR_FILE": "each its own directory",
    "TORCHELASTIC_USE_AGENT_STORE": "no agent of ours holds a TCPStore",
    "OUT": "of this test",
    "KINETO_LOG_LEVEL": "set by importing torch in torchrun itself",
}


@pytest.fixture
def here() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(dir="/tmp", prefix="ere"))
    (path / "show.py").write_text(SHOW)
    for name in OUR_NAMES:
        set_trap(path, name)
    yield path
    shutil.rmtree(path)


def set_trap(directory: Path, name: str) -> None:
    """A file of the user's that must not be imported in place of the real module."""
    (directory / f"{name}.py").write_text("raise RuntimeError('shadowed')")


async def under_torchrun(here: Path, arguments: list[str], out: str) -> list[dict[str, Any]]:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc-per-node={NPROC}",
        "--max-restarts=3",
        *arguments,
    ]
    environment = {**os.environ, "OUT": f"{here}/{out}"}
    process = await asyncio.create_subprocess_exec(*command, cwd=here, env=environment, stderr=asyncio.subprocess.PIPE)
    _, stderr = await asyncio.wait_for(process.communicate(), LIMIT_S)
    assert process.returncode == 0, stderr.decode()
    return facts(here, out)


async def under_us(
    here: Path, command: CommandConfig, out: str, monkeypatch: pytest.MonkeyPatch
) -> list[dict[str, Any]]:
    monkeypatch.chdir(here)
    bystanders = frozenset(adopted_children(()))
    config = agent_config(command, run_dir=str(here), nproc=NPROC)
    server = WorkerServer(f"{here}/a.sock", lambda hello: ViewNumber(1), lambda event: None)
    await server.start()
    exits: list[Any] = []
    surroundings = Surroundings(
        agent_socket=f"{here}/a.sock",
        environment={**os.environ, "OUT": f"{here}/{out}", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
        logs=LogDirectory(config.output, config.job.job_id, config.run_dir),
        report=exits.append,
        say=print,
        bystanders=lambda: bystanders,
    )
    group = WorkerGroup(config, install(nproc=NPROC), surroundings)
    assert await group.start() is None
    await asyncio.wait_for(asyncio.gather(*(worker.process.wait() for worker in group.workers)), LIMIT_S)
    await group.stop(0.0)
    await server.close()
    assert [ended.exit.code for ended in exits] == [0] * NPROC
    return facts(here, out)


def facts(here: Path, out: str) -> list[dict[str, Any]]:
    return [json.loads((here / f"{out}-{rank}").read_text()) for rank in range(NPROC)]


@pytest.mark.slow
@pytest.mark.parametrize("entrypoint", [Entrypoint.SCRIPT, Entrypoint.MODULE])
async def test_a_script_cannot_tell_us_from_torchrun(
    here: Path, entrypoint: Entrypoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = "show.py" if entrypoint is Entrypoint.SCRIPT else "show"
    flags = [] if entrypoint is Entrypoint.SCRIPT else ["-m"]
    command = CommandConfig(entrypoint=entrypoint, target=target, args=ARGS, python=sys.executable)
    theirs = await under_torchrun(here, [*flags, target, *ARGS], "theirs")
    ours = await under_us(here, command, "ours", monkeypatch)
    for their, our in zip(theirs, ours, strict=True):
        assert our["env"].keys() == their["env"].keys()
        different = {name for name, value in their["env"].items() if our["env"][name] != value}
        assert different <= DIFFERENT_BY_NATURE.keys()
        for same in ("argv", "path", "name", "flags"):
            assert our[same] == their[same]


async def test_the_working_directory_shadows_nothing_of_the_bootstraps(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in STANDARD_NAMES:
        set_trap(here, name)
    command = CommandConfig(entrypoint=Entrypoint.SCRIPT, target="show.py", args=(), python=sys.executable)
    for shown in await under_us(here, command, "ours", monkeypatch):
        assert shown["path"][0] == str(here)
