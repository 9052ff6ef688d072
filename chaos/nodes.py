"""The nodes under test: each an `elastic-run` of its own on this machine, started again whenever it ends too early.

Invariants:
1. Everything that descends from a node carries the campaign's mark in its environment (leftovers.py looks for it).
2. A node starts at most STARTS_MAX times, with a pause in between.
Not here: what is done to them (faults/).
"""

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from elastic_run.chaos.history import History, NodeEnded, NodeStarted
from elastic_run.chaos.scenario import LAST_CALL_S, MAX_RESTARTS, PACE_S, SAVE_EVERY, WORKLOAD, Scenario
from elastic_run.runtime.edge.process import Process, spawn

MARK = "CHAOS_CAMPAIGN"
STARTS_MAX = 500
AWAY_S = 1.5
"""A node that ended comes back after this, as from a quick reboot."""
STOP_S = 20.0
LAUNCHER, AGENT, CONTROLLER = "elastic_run.runtime.cli", "elastic_run.agent.cli", "elastic_run.controller.cli"


class Nodes:
    """All nodes of the job. `run()` keeps them up until the job has ended on each."""

    def __init__(self, scenario: Scenario, directory: Path, endpoints: Sequence[str], history: History) -> None:
        self._scenario, self._directory, self._history = scenario, directory, history
        self._endpoints = tuple(endpoints)
        self._processes: dict[str, Process] = {}
        self.mark = str(directory)
        self.run_root = directory / "r"
        self.temporary = directory / "tmp"
        self.work = directory / "work"
        for path in (self.run_root, self.temporary, self.work):
            path.mkdir(mode=0o700)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"n{i + 1}" for i in range(self._scenario.nodes))

    async def run(self) -> None:
        """Return when every node has ended with exit code 0."""
        async with asyncio.TaskGroup() as group:
            for name in self.names:
                group.create_task(self._keep(name), name=name)

    async def stop(self) -> None:
        """End what still runs."""
        await asyncio.gather(*(process.kill() for process in self._processes.values() if process.exit is None))

    def end_after(self, step: int) -> None:
        """Let the workload end after that step."""
        path = self.work / "last.new"
        path.write_text(str(step))
        path.replace(self.work / "last")

    def launchers(self) -> list[tuple[str, psutil.Process]]:
        return [(name, p) for name, p in self._up() if p.is_running()]

    def agents(self) -> list[tuple[str, psutil.Process]]:
        return [(name, child) for name, p in self._up() for child in children(p, AGENT)]

    def controllers(self) -> list[tuple[str, psutil.Process]]:
        return [(name, child) for name, p in self._up() for child in children(p, CONTROLLER)]

    def workers(self) -> list[tuple[str, psutil.Process]]:
        return [(name, worker) for name, agent in self.agents() for worker in children(agent, WORKLOAD.name)]

    def _up(self) -> list[tuple[str, psutil.Process]]:
        found = []
        for name, process in sorted(self._processes.items()):
            if process.exit is None:
                with contextlib.suppress(psutil.NoSuchProcess):
                    found.append((name, psutil.Process(process.pid)))
        return found

    async def _keep(self, name: str) -> None:
        for life in range(1, STARTS_MAX + 1):
            process = self._processes[name] = self._start(name, life)
            self._history.add(NodeStarted(at_s=time.monotonic(), node=name))
            ended = await process.wait()
            code = ended.code if ended.code is not None else -(ended.signal or 0)
            self._history.add(NodeEnded(at_s=time.monotonic(), node=name, code=code))
            if code == 0:
                return
            await asyncio.sleep(AWAY_S)
        raise OverflowError(f"node {name} ended {STARTS_MAX} times; its output is in {self._directory}")

    def _start(self, name: str, life: int) -> Process:
        scenario = self._scenario
        argv = [sys.executable, "-P", "-m", LAUNCHER]
        argv += [f"--nnodes=1:{scenario.nodes}", "--nproc-per-node=1", f"--max-restarts={MAX_RESTARTS}"]
        argv += [f"--rdzv-endpoint=etcd://{','.join(self._endpoints)}", f"--rdzv-id={scenario.job_id}"]
        argv += [f"--node-name={name}", "--local-addr=127.0.0.1", f"--last-call={LAST_CALL_S}"]
        argv += [str(WORKLOAD), str(self.work), str(SAVE_EVERY), str(PACE_S)]
        log = os.open(self._directory / f"{name}.{life}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            environ = {
                **os.environ,
                MARK: self.mark,
                "ELASTIC_RUN_DIR": str(self.run_root),
                "TMPDIR": str(self.temporary),
                "OMP_NUM_THREADS": "1",
            }
            return spawn(argv, env=environ, stdout=log, stderr=log)
        finally:
            os.close(log)


def children(parent: psutil.Process, having: str) -> list[psutil.Process]:
    """Children with an argument that ends with, or is, this; those that end meanwhile are left out."""
    found = []
    with contextlib.suppress(psutil.Error):
        for child in parent.children():
            with contextlib.suppress(psutil.Error):
                if any(argument.endswith(having) for argument in child.cmdline()):
                    found.append(child)
    return found
