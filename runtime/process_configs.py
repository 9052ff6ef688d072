"""Builds what agent and controller are told from what was asked for and what was found. Pure.

Not here: writing these down for them (launcher.py).
"""

from pathlib import PurePath

from elastic_run.runtime.launch_config import EmbeddedStore, LaunchConfig
from elastic_run.runtime.preflight import LOOPBACK, Prepared
from elastic_run.runtime.protocol.config import AgentConfig, ControllerConfig, JobConfig, StoreConfig


def job_config(config: LaunchConfig) -> JobConfig:
    """What all nodes of the job agree on."""
    return JobConfig(
        job_id=config.job_id,
        nodes_min=config.nodes_min,
        nodes_max=config.nodes_max,
        max_restarts=config.max_restarts,
        last_call_s=config.last_call_s,
        join_timeout_s=config.join_timeout_s,
    )


def agent_config(config: LaunchConfig, prepared: Prepared, store: StoreConfig, run_dir: str) -> AgentConfig:
    """What this node's agent is told."""
    return AgentConfig(
        job=job_config(config),
        store=store,
        node=prepared.node,
        node_rank=config.node_rank,
        address=prepared.address,
        nproc=prepared.nproc,
        role=config.role,
        command=config.command,
        output=config.output,
        run_dir=run_dir,
        shutdown_timeout_s=config.shutdown_timeout_s,
        signals=config.signals,
        virtual_local_rank=config.virtual_local_rank,
        cpus=prepared.cpus,
        metrics_port=config.metrics_port,
    )


def controller_config(config: LaunchConfig, prepared: Prepared, store: StoreConfig, run_dir: str) -> ControllerConfig:
    """What this node's controller candidate is told. Its metrics are on the port after the agent's."""
    alone = isinstance(config.store, EmbeddedStore)
    return ControllerConfig(
        job=job_config(config),
        store=store,
        candidate=f"{prepared.node}-{PurePath(run_dir).name}",
        host=LOOPBACK if alone else prepared.address,
        port=0,
        run_dir=run_dir,
        metrics_port=config.metrics_port + 1 if config.metrics_port else config.metrics_port,
    )


def worker_environment(environ: dict[str, str], nproc: int) -> tuple[dict[str, str], str | None]:
    """Return the environment handed down, and a line about what was added to it."""
    if "OMP_NUM_THREADS" in environ or nproc <= 1:
        return environ, None
    line = (
        f"OMP_NUM_THREADS=1 for each of the {nproc} workers, so that they share the processors; set it to change that"
    )
    return environ | {"OMP_NUM_THREADS": "1"}, line
