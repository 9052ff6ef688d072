"""Configurations, installs and waiting for tests about workers."""

import asyncio
import dataclasses
import sys
from collections.abc import Callable
from typing import Any

from elastic_run.runtime.protocol.config import (
    AgentConfig,
    CommandConfig,
    Entrypoint,
    JobConfig,
    OutputConfig,
    StoreConfig,
)
from elastic_run.runtime.protocol.ids import JobId, NodeId, ViewNumber
from elastic_run.runtime.protocol.messages import Install

WAIT_S = 30.0
POLL_S = 0.01
OUTPUT = OutputConfig(
    log_dir=None, redirects="0", tee="0", local_ranks_filter=None, stdout_filters=(), stderr_filters=()
)


def script_command(target: str, *args: str) -> CommandConfig:
    """`elastic-run target args`: python, through the bootstrap."""
    return CommandConfig(entrypoint=Entrypoint.SCRIPT, target=target, args=args, python=sys.executable)


def program_command(target: str, *args: str) -> CommandConfig:
    """`elastic-run --no-python target args`."""
    return CommandConfig(entrypoint=Entrypoint.PROGRAM, target=target, args=args, python=sys.executable)


def agent_config(command: CommandConfig, *, run_dir: str = "/run/x", nproc: int = 1, **changes: Any) -> AgentConfig:
    output = dataclasses.replace(OUTPUT, **{k: changes.pop(k) for k in list(changes) if hasattr(OUTPUT, k)})
    return AgentConfig(
        job=JobConfig(job_id=JobId("job7"), nodes_min=1, nodes_max=2, max_restarts=3),
        store=StoreConfig(endpoints=("127.0.0.1:1",), user="root", password="hunter2"),
        node=NodeId("n0"),
        node_rank=None,
        address="127.0.0.1",
        nproc=nproc,
        role="default",
        command=command,
        output=output,
        run_dir=run_dir,
        **changes,
    )


def install(*, nproc: int = 1, group_rank: int = 0, groups: int = 1, view: int = 1, port: int = 29500) -> Install:
    return Install(
        view=ViewNumber(view),
        reason="test",
        group_rank=group_rank,
        group_world_size=groups,
        first_rank=group_rank * nproc,
        world_size=groups * nproc,
        master_addr="127.0.0.1",
        master_port=port,
        restart_count=2,
    )


async def eventually(condition: Callable[[], bool]) -> None:
    """Return once `condition` holds; fail when it does not within WAIT_S."""
    for _ in range(int(WAIT_S / POLL_S)):
        if condition():
            return
        await asyncio.sleep(POLL_S)
    raise AssertionError(f"did not come true within {WAIT_S:g} s")
