"""What a worker is started with: its command line and its environment, torchrun's variables with torchrun's meanings.

Invariants (tests/unit/test_environment.py):
1. Every variable torchrun sets is set, with the same value for the same placement, but for the two named below.
2. Nothing of another job's agent, and no password of ours, reaches a worker.
Source: torch 2.13 `LocalElasticAgent._start_workers`. Two differences: TORCHELASTIC_USE_AGENT_STORE is always "False",
for rank 0's worker hosts the TCPStore (no agent imports torch); roles are not counted across nodes, a job has one.
Not here: the private names' other side (runtime/bootstrap.py); where output goes (output.py).
"""

import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import assert_never

from elastic_run.runtime.protocol.config import AgentConfig, CommandConfig, Entrypoint
from elastic_run.runtime.protocol.errors import UserError
from elastic_run.runtime.protocol.ids import Incarnation
from elastic_run.runtime.protocol.messages import Install

AGENT_SOCKET = "ELASTIC_RUN_AGENT_SOCKET"
WORKER = "ELASTIC_RUN_WORKER"
TELEMETRY = "ELASTIC_RUN_TELEMETRY"
VIEW = "ELASTIC_RUN_VIEW"
AGENT_PID = "ELASTIC_RUN_AGENT_PID"

BOOTSTRAP = str(Path(__file__).parent.parent / "runtime" / "bootstrap.py")

_OWN_PREFIX = "ELASTIC_RUN_"
_OWN_KEPT = frozenset(
    {"ELASTIC_RUN_DIR"}
)  # the user's choice of a directory: a launcher started by a script needs it too
_MAY_HOLD_SECRETS = ("PET_RDZV_CONF", "PET_STORE_")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerPaths:
    """Files of one worker."""

    agent_socket: str
    telemetry: str
    error_file: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSeat:
    """Which worker of the node, in which of its lives, and whose child."""

    local_rank: int
    incarnation: Incarnation
    agent_pid: int


def worker_command(command: CommandConfig, local_rank: int) -> tuple[str, ...]:
    """Return the worker's argv, with `${local_rank}` replaced wherever torchrun replaces it.

    The bootstrap is started by its path: `-m` would search the working directory first, where a file of the user's may
    shadow the standard library or this package, and `-P` would show in the script's own sys.flags.
    """
    start = (command.python, "-u", BOOTSTRAP)
    match command.entrypoint:
        case Entrypoint.SCRIPT:
            return (*start, *_substituted((command.target, *command.args), local_rank))
        case Entrypoint.MODULE:
            return (*start, "-m", *_substituted((command.target, *command.args), local_rank))
        case Entrypoint.PROGRAM:
            return (command.target, *_substituted(command.args, local_rank))
        case _:
            assert_never(command.entrypoint)


def worker_environment(
    config: AgentConfig, install: Install, seat: WorkerSeat, paths: WorkerPaths, base: Mapping[str, str]
) -> dict[str, str]:
    """Return the worker's whole environment; `base` is the agent's own.

    Raises UserError when --virtual-local-rank finds fewer visible devices than workers.
    """
    environment = {name: value for name, value in base.items() if _inherited(name)}
    rank, world_size = str(install.first_rank + seat.local_rank), str(install.world_size)
    environment |= {
        "RANK": rank,
        "ROLE_RANK": rank,
        "ROLE_NAME": config.role,
        "LOCAL_RANK": str(seat.local_rank),
        "GROUP_RANK": str(install.group_rank),
        "WORLD_SIZE": world_size,
        "ROLE_WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": str(config.nproc),
        "GROUP_WORLD_SIZE": str(install.group_world_size),
        "MASTER_ADDR": install.master_addr,
        "MASTER_PORT": str(install.master_port),
        "TORCHELASTIC_RESTART_COUNT": str(install.restart_count),
        "TORCHELASTIC_MAX_RESTARTS": str(config.job.max_restarts),
        "TORCHELASTIC_RUN_ID": config.job.job_id,
        "TORCHELASTIC_USE_AGENT_STORE": "False",
        "TORCHELASTIC_ERROR_FILE": paths.error_file,
        "TORCHELASTIC_SIGNALS_TO_HANDLE": ",".join(config.signals),
    }
    environment.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    if config.virtual_local_rank:
        environment |= {"LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": _visible_device(seat.local_rank, base)}
    if config.command.entrypoint is not Entrypoint.PROGRAM:  # nothing but the bootstrap knows what to do with these
        environment |= {
            AGENT_SOCKET: paths.agent_socket,
            WORKER: seat.incarnation,
            TELEMETRY: paths.telemetry,
            VIEW: str(install.view),
            AGENT_PID: str(seat.agent_pid),
        }
    return environment


def _inherited(name: str) -> bool:
    """torchrun hands its own PET_ variables down and so do we, but for those in which a password may stand."""
    if name.startswith(_OWN_PREFIX):
        return name in _OWN_KEPT
    return not name.startswith(_MAY_HOLD_SECRETS)


def _substituted(args: tuple[str, ...], local_rank: int) -> tuple[str, ...]:
    return tuple(string.Template(arg).safe_substitute(local_rank=local_rank) for arg in args)


def _visible_device(local_rank: int, base: Mapping[str, str]) -> str:
    visible = base.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return str(local_rank)
    devices = visible.split(",")
    if local_rank >= len(devices):
        raise UserError(
            f"--virtual-local-rank: worker {local_rank} has no device in CUDA_VISIBLE_DEVICES={visible}; "
            f"name more devices there, or lower --nproc-per-node to {len(devices)}"
        )
    return devices[local_rank].strip()
