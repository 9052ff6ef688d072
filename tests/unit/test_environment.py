"""What a worker is started with."""

import pytest
from worker_setup import agent_config, install, program_command, script_command

from elastic_run.agent.environment import BOOTSTRAP, WorkerPaths, WorkerSeat, worker_command, worker_environment
from elastic_run.runtime.protocol.config import AgentConfig, CommandConfig, Entrypoint
from elastic_run.runtime.protocol.errors import UserError
from elastic_run.runtime.protocol.ids import Incarnation

PATHS = WorkerPaths(agent_socket="/run/x/a.sock", telemetry="/run/x/w1.1.telemetry", error_file="/run/x/error.json")
CONFIG = agent_config(script_command("train.py"), nproc=2)


def environment(config: AgentConfig = CONFIG, *, local_rank: int = 1, **base: str) -> dict[str, str]:
    seat = WorkerSeat(local_rank=local_rank, incarnation=Incarnation("i9"), agent_pid=77)
    return worker_environment(config, install(nproc=2, group_rank=1, groups=2), seat, PATHS, base)


def test_every_torchrun_variable_has_torchruns_meaning() -> None:
    assert environment() == {
        "RANK": "3",
        "LOCAL_RANK": "1",
        "GROUP_RANK": "1",
        "ROLE_RANK": "3",
        "ROLE_NAME": "default",
        "WORLD_SIZE": "4",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_WORLD_SIZE": "2",
        "ROLE_WORLD_SIZE": "4",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
        "TORCHELASTIC_RESTART_COUNT": "2",
        "TORCHELASTIC_MAX_RESTARTS": "3",
        "TORCHELASTIC_RUN_ID": "job7",
        "TORCHELASTIC_USE_AGENT_STORE": "False",
        "TORCHELASTIC_ERROR_FILE": "/run/x/error.json",
        "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        "ELASTIC_RUN_AGENT_SOCKET": "/run/x/a.sock",
        "ELASTIC_RUN_WORKER": "i9",
        "ELASTIC_RUN_TELEMETRY": "/run/x/w1.1.telemetry",
        "ELASTIC_RUN_VIEW": "1",
        "ELASTIC_RUN_AGENT_PID": "77",
    }


def test_the_users_own_variables_pass_and_stale_ranks_do_not() -> None:
    found = environment(
        HOME="/h",
        OMP_NUM_THREADS="4",
        TORCH_NCCL_ASYNC_ERROR_HANDLING="0",
        RANK="9",
        PET_NNODES="2",
        CUDA_VISIBLE_DEVICES="3",
    )
    assert found["HOME"] == "/h" and found["OMP_NUM_THREADS"] == "4" and found["PET_NNODES"] == "2"
    assert found["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "0" and found["RANK"] == "3"
    assert found["CUDA_VISIBLE_DEVICES"] == "3"


def test_another_agents_names_and_what_may_hold_a_password_do_not_pass() -> None:
    found = environment(
        ELASTIC_RUN_WORKER="outer",
        ELASTIC_RUN_WHATEVER="outer",
        ELASTIC_RUN_DIR="/scratch",
        PET_RDZV_CONF="password=hunter2",
        PET_STORE_PASSWORD="hunter2",
    )
    assert found["ELASTIC_RUN_WORKER"] == "i9" and found["ELASTIC_RUN_DIR"] == "/scratch"
    assert "ELASTIC_RUN_WHATEVER" not in found
    assert not [name for name, value in found.items() if "hunter2" in value]


def test_a_program_learns_nothing_of_our_private_names() -> None:
    found = environment(agent_config(program_command("bash"), nproc=2), ELASTIC_RUN_WORKER="outer")
    assert not [name for name in found if name.startswith("ELASTIC_RUN_")]


@pytest.mark.parametrize(("visible", "device"), [(None, "1"), ("4,6", "6"), ("4, GPU-ab ", "GPU-ab")])
def test_virtual_local_rank_gives_each_worker_one_device(visible: str | None, device: str) -> None:
    config = agent_config(script_command("train.py"), nproc=2, virtual_local_rank=True)
    found = environment(config, **({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}))
    assert (found["LOCAL_RANK"], found["CUDA_VISIBLE_DEVICES"]) == ("0", device)


def test_virtual_local_rank_without_enough_devices_is_the_users_error() -> None:
    config = agent_config(script_command("train.py"), nproc=2, virtual_local_rank=True)
    with pytest.raises(UserError, match="worker 1 has no device in CUDA_VISIBLE_DEVICES=0"):
        environment(config, CUDA_VISIBLE_DEVICES="0")


@pytest.mark.parametrize(
    ("entrypoint", "expected"),
    [
        (Entrypoint.SCRIPT, ("py", "-u", BOOTSTRAP, "t1", "a1b", "$x", "${y}")),
        (Entrypoint.MODULE, ("py", "-u", BOOTSTRAP, "-m", "t1", "a1b", "$x", "${y}")),
        (Entrypoint.PROGRAM, ("t${local_rank}", "a1b", "$x", "${y}")),
    ],
)
def test_commands_and_the_local_rank_macro(entrypoint: Entrypoint, expected: tuple[str, ...]) -> None:
    args = ("a${local_rank}b", "$$x", "${y}")
    command = CommandConfig(entrypoint=entrypoint, target="t${local_rank}", args=args, python="py")
    assert worker_command(command, 1) == expected
