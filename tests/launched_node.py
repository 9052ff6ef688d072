"""Nodes of one job on this machine, each a real `elastic-run`, found and hurt from outside; and the steps they do."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import psutil
from etcd_cluster import EtcdCluster

T = TypeVar("T")
BOUND_S = 60.0
POLL_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One line of the script's: a finished step."""

    step: int
    world_size: int
    pid: int
    at_s: float
    loss: float


@dataclass(kw_only=True)
class Job:
    """What the nodes of one job share. `directory` holds the run directories, outputs and the script's files."""

    directory: Path
    cluster: EtcdCluster
    job_id: str
    script: Path
    flags: tuple[str, ...]
    script_arguments: tuple[str, ...] = ()
    nodes: list["Node"] = field(default_factory=list)

    def start(self, name: str) -> "Node":
        node = Node(job=self, name=name)
        self.nodes.append(node)
        return node

    @property
    def endpoints(self) -> tuple[str, ...]:
        return self.cluster.endpoints

    @property
    def run_root(self) -> Path:
        return self.directory / "run"

    @property
    def steps(self) -> list[Step]:
        path = self.directory / "steps.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [Step(**json.loads(line)) for line in lines if line.endswith("\n")]

    def end_after(self, steps: int) -> None:
        """Let the script end that many steps from now."""
        path = self.directory / "last"
        path.with_suffix(".new").write_text(str(self.steps[-1].step + steps))
        path.with_suffix(".new").replace(path)

    def wait_for_step(self, what: str, fits: Callable[[Step], bool], *, after_s: float) -> Step:
        """The first step done after that moment that fits; with everything said so far if there is none in time."""

        def found() -> Step | None:
            return next((step for step in self.steps if step.at_s > after_s and fits(step)), None)

        return self.wait(what, found)

    def wait(self, what: str, found: Callable[[], T | None]) -> T:
        ends_at_s = time.monotonic() + BOUND_S
        while time.monotonic() < ends_at_s:
            if (value := found()) is not None:
                return value
            time.sleep(POLL_S)
        raise AssertionError(f"no {what} within {BOUND_S:g} s; steps {self.steps[-3:]}{self.outputs()}")

    def outputs(self) -> str:
        return "".join(f"\n--- {node.name}\n{node.output()[-4000:]}" for node in self.nodes)

    def close(self) -> None:
        for node in self.nodes:
            node.close()


class Node:
    """One life of one node."""

    def __init__(self, *, job: Job, name: str) -> None:
        self.name = name
        self.ended: int | None = None
        self._path = job.directory / f"{name}.{len(job.nodes)}.out"
        self._job = job
        argv = [sys.executable, "-P", "-m", "elastic_run.runtime.cli"]
        argv += [f"--rdzv-endpoint=etcd://{','.join(job.endpoints)}", f"--node-name={name}", "--local-addr=127.0.0.1"]
        argv += [f"--rdzv-id={job.job_id}", *job.flags, str(job.script), str(job.directory), *job.script_arguments]
        environ = {**os.environ, "ELASTIC_RUN_DIR": str(job.run_root), "OMP_NUM_THREADS": "1"}
        with self._path.open("wb") as out:
            self.process = subprocess.Popen(argv, env=environ, stdin=subprocess.DEVNULL, stdout=out, stderr=out)

    @property
    def agent(self) -> int | None:
        return self._child("elastic_run.agent.cli")

    @property
    def controller(self) -> int | None:
        return self._child("elastic_run.controller.cli")

    @property
    def workers(self) -> tuple[int, ...]:
        """Pids of what the agent runs, by start; empty while there is none."""
        agent = self.agent
        return () if agent is None else tuple(child.pid for child in _children(agent))

    def kill_agent(self) -> None:
        agent = self.agent
        assert agent is not None
        os.kill(agent, signal.SIGKILL)

    def signal_all(self, number: int) -> None:
        """To agent and workers, as a machine that stops or goes on."""
        agent = self.agent
        assert agent is not None
        for pid in (agent, *self.workers):
            os.kill(pid, number)

    def wait(self) -> int:
        try:
            return self.process.wait(BOUND_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"node {self.name} does not end{self._job.outputs()}") from None

    def output(self) -> str:
        return self._path.read_text(errors="replace")

    def close(self) -> None:
        """End what is left of it, by force."""
        if self.process.poll() is None:
            family = psutil.Process(self.process.pid).children(recursive=True)
            self.process.kill()
            for process in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(family, timeout=BOUND_S)
        self.process.wait()

    def _child(self, module: str) -> int | None:
        for child in _children(self.process.pid):
            with contextlib.suppress(psutil.Error):
                if module in child.cmdline():
                    return child.pid
        return None


def _children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children()
    except psutil.NoSuchProcess:
        return []


@contextlib.contextmanager
def job(
    *,
    directory: Path,
    cluster: EtcdCluster,
    job_id: str,
    script: Path,
    flags: tuple[str, ...],
    script_arguments: tuple[str, ...] = (),
) -> Iterator[Job]:
    """The job; whatever happens, nothing of its nodes runs afterwards."""
    made = Job(
        directory=directory,
        cluster=cluster,
        job_id=job_id,
        script=script,
        flags=flags,
        script_arguments=script_arguments,
    )
    try:
        yield made
    finally:
        made.close()
