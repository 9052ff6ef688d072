"""Finds the job a command is about: the one on this machine, or the one that --rdzv-endpoint and --rdzv-id name.

The store of a local job, with its TLS files and password, is read from the private configuration of its agent.

Not here: talking to it (client.py).
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from elastic_run.runtime.edge import store_access
from elastic_run.runtime.edge.files import read_bounded
from elastic_run.runtime.edge.rundir import LocalJob, default_root, local_jobs
from elastic_run.runtime.flag_values import parse_etcd_endpoints
from elastic_run.runtime.protocol import codec
from elastic_run.runtime.protocol.config import AgentConfig, StoreConfig
from elastic_run.runtime.protocol.errors import CodecError, PeerError, StoreUnavailable, UserError
from elastic_run.runtime.protocol.ids import JobId, check_name

AGENT_CONFIG = "agent.json"
CONFIG_BYTES_MAX = 4 * 1024 * 1024
SHOWN_MAX = 8
ELSEWHERE = "for another job, or one that is over, give --rdzv-endpoint=etcd://HOST:PORT and --rdzv-id=ID"


class NoSuchJob(PeerError):
    """There is no job to ask about."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The job to ask about, and how to reach its store."""

    job_id: JobId
    store: StoreConfig
    local: LocalJob | None
    """Its launcher on this machine, if it was found through that."""

    @property
    def certainly_over(self) -> bool:
        """The launcher it was found through is gone, and with it a store that it kept."""
        return self.local is not None and not self.local.alive


def find_job(args: argparse.Namespace, environ: Mapping[str, str]) -> Target:
    """Return the job. Raises UserError when the flags fit several or no job could be meant, NoSuchJob for none."""
    wanted = JobId(check_name(args.rdzv_id, what="--rdzv-id")) if args.rdzv_id else None
    if args.rdzv_endpoint:
        if wanted is None:
            raise UserError("--rdzv-endpoint needs --rdzv-id=ID: the job's name in that store")
        args.rdzv_endpoint = ",".join(parse_etcd_endpoints(args.rdzv_endpoint))
        return Target(job_id=wanted, store=store_access.from_flags(args), local=None)
    if any((args.store_ca, args.store_cert, args.store_key, args.store_user, args.store_password_file)):
        raise UserError("--store-* are for a store that is named: give --rdzv-endpoint=etcd://HOST:PORT too")
    return _local(local_jobs(default_root(environ)), wanted)


def _local(jobs: Sequence[LocalJob], wanted: JobId | None) -> Target:
    found = [job for job in jobs if wanted is None or job.job_id == wanted]
    if not found:
        which = f"job {wanted}" if wanted else "job"
        raise NoSuchJob(f"no {which} of this user runs on this machine; {ELSEWHERE}")
    distinct = list({(job.job_id, job.endpoints): job for job in found}.values())  # nodes of one job are one job
    if len(distinct) > 1:
        shown = ", ".join(f"{job.job_id} (process {job.launcher_pid})" for job in distinct[:SHOWN_MAX])
        more = f" and {len(distinct) - SHOWN_MAX} more" if len(distinct) > SHOWN_MAX else ""
        one = "--rdzv-id=ID" if len({job.job_id for job in distinct}) > 1 else "--rdzv-endpoint and --rdzv-id"
        raise UserError(f"several jobs run on this machine: {shown}{more}; choose one by {one}")
    job = distinct[0]
    if not job.endpoints:
        raise StoreUnavailable(f"job {job.job_id} is still starting its store; ask again in a moment")
    return Target(job_id=job.job_id, store=_store_of(job), local=job)


def _store_of(job: LocalJob) -> StoreConfig:
    """The agent's way to the store; before there is an agent, the endpoints alone."""
    path = Path(job.run_dir) / AGENT_CONFIG
    if not path.exists():
        return StoreConfig(endpoints=job.endpoints)
    try:
        return codec.decode(AgentConfig, read_bounded(path, CONFIG_BYTES_MAX), where=str(path)).store
    except CodecError as error:
        raise UserError(f"{error}; {ELSEWHERE}") from None
