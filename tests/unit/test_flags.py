"""The command line: torchrun's surface pinned against torch's own parser, and what each flag comes to."""

import argparse
import json
import subprocess
import sys
from typing import Any

import pytest

from elastic_run.runtime.affinity import BindingMode
from elastic_run.runtime.flag_parser import IGNORED, make_parser, parse_options
from elastic_run.runtime.flag_values import parse_endpoint, parse_etcd_endpoints, parse_rdzv_conf
from elastic_run.runtime.flags import read_command_line
from elastic_run.runtime.launch_config import (
    EmbeddedStore,
    ExternalStore,
    LaunchConfig,
    SharedStore,
    StatusMode,
    StoreChoice,
)
from elastic_run.runtime.protocol.config import Entrypoint
from elastic_run.runtime.protocol.errors import UserError

OWN = {
    "node_name",
    "last_call",
    "no_controller",
    "status",
    "metrics_port",
    "run_dir",
    "store_ca",
    "store_cert",
    "store_key",
    "store_user",
    "store_password_file",
}
ENVIRON = {
    "PET_NNODES": "2:3",
    "PET_NPROC_PER_NODE": "4",
    "PET_RDZV_BACKEND": "c10d",
    "PET_RDZV_ENDPOINT": "host:1",
    "PET_RDZV_ID": "job",
    "PET_RDZV_CONF": "timeout=3",
    "PET_STANDALONE": "1",
    "PET_MAX_RESTARTS": "5",
    "PET_MONITOR_INTERVAL": "2.5",
    "PET_START_METHOD": "fork",
    "PET_ROLE": "r",
    "PET_MODULE": "1",
    "PET_NO_PYTHON": "0",
    "PET_LOG_DIR": "logs",
    "PET_REDIRECTS": "3",
    "PET_TEE": "1",
    "PET_LOCAL_RANKS_FILTER": "0",
    "PET_DUPLICATE_STDOUT_FILTERS": "a,b,,c",
    "PET_NODE_RANK": "1",
    "PET_MASTER_ADDR": "m",
    "PET_MASTER_PORT": "77",
    "PET_LOCAL_ADDR": "l",
    "PET_SIGNALS_TO_HANDLE": "SIGTERM",
    "PET_SHUTDOWN_TIMEOUT": "9",
    "PET_VIRTUAL_LOCAL_RANK": "1",
}
DUMP_TORCH_PARSER = """
import json, os, sys
from torch.distributed.run import get_args_parser
for name in [name for name in os.environ if name.startswith("PET_")]:
    del os.environ[name]
def defaults():
    return vars(get_args_parser().parse_args(["script.py", "--flag-of-script"]))
parser = get_args_parser()
dump = {
    "options": {action.dest: sorted(action.option_strings) for action in parser._actions},
    "takes_value": {action.dest: action.nargs != 0 for action in parser._actions},
    "choices": {action.dest: list(action.choices) for action in parser._actions if action.choices},
    "defaults": defaults(),
}
os.environ.update(json.loads(sys.argv[1]))
print(json.dumps(dump | {"defaults_from_environ": defaults()}))
"""


@pytest.fixture(scope="module")
def torch_parser() -> dict[str, Any]:
    argv = [sys.executable, "-c", DUMP_TORCH_PARSER, json.dumps(ENVIRON)]
    dump: dict[str, Any] = json.loads(subprocess.run(argv, stdout=subprocess.PIPE, check=True).stdout)
    return dump


def read(*argv: str, **environ: str) -> LaunchConfig:
    return read_command_line([*argv, "train.py"], environ, python="/usr/bin/python", random_id="random")


def actions() -> list[argparse.Action]:
    return make_parser({})._actions


def test_every_flag_of_torchrun_is_taken_in_both_spellings(torch_parser: dict[str, Any]) -> None:
    ours = {action.dest: sorted(action.option_strings) for action in actions()}
    assert {dest: ours[dest] for dest in torch_parser["options"]} == torch_parser["options"]
    assert ours.keys() - torch_parser["options"].keys() == OWN


def test_switches_choices_and_defaults_are_those_of_torchrun(torch_parser: dict[str, Any]) -> None:
    takes_value = {action.dest: action.nargs != 0 for action in actions()}
    assert {dest: takes_value[dest] for dest in torch_parser["takes_value"]} == torch_parser["takes_value"]
    choices = {action.dest: list(action.choices) for action in actions() if action.choices}
    assert {dest: choices[dest] for dest in torch_parser["choices"]} == torch_parser["choices"]
    ours = vars(parse_options(["script.py", "--flag-of-script"], {}))
    assert {dest: ours[dest] for dest in torch_parser["defaults"]} == torch_parser["defaults"]


def test_the_environment_gives_the_same_defaults_as_with_torchrun(torch_parser: dict[str, Any]) -> None:
    ours = vars(parse_options(["script.py", "--flag-of-script"], ENVIRON))
    theirs = torch_parser["defaults_from_environ"]
    assert {dest: ours[dest] for dest in theirs} == theirs


def test_the_command_line_goes_before_the_environment() -> None:
    assert read("--max-restarts=1", PET_MAX_RESTARTS="5").max_restarts == 1
    assert read(PET_MAX_RESTARTS="5").max_restarts == 5


def test_arguments_after_the_script_are_the_scripts() -> None:
    argv = ["--nproc_per_node", "2", "train.py", "--nnodes", "7", "-m", "--", "x"]
    config = read_command_line(argv, {}, python="py", random_id="r")
    assert config.command.args == ("--nnodes", "7", "-m", "--", "x")
    assert (config.nproc, config.nodes_max, config.command.entrypoint) == (2, 1, Entrypoint.SCRIPT)


ENDPOINTS: list[tuple[list[str], StoreChoice]] = [
    ([], EmbeddedStore()),
    (["--standalone"], EmbeddedStore()),
    (["--standalone", "--rdzv-endpoint=h:1"], EmbeddedStore()),
    (["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"], EmbeddedStore()),
    (["--rdzv-endpoint=localhost:0"], EmbeddedStore()),
    (["--rdzv-endpoint=etcd://a:2379,b:2380"], ExternalStore(endpoints=("a:2379", "b:2380"))),
    (["--rdzv-endpoint=etcd://a,etcd://b/"], ExternalStore(endpoints=("a:2379", "b:2379"))),
    (["--rdzv-backend=etcd", "--rdzv-endpoint=a,b:7,a"], ExternalStore(endpoints=("a:2379", "b:7"))),
    (["--rdzv-backend=etcd-v2", "--rdzv-endpoint=[::1]:7"], ExternalStore(endpoints=("[::1]:7",))),
    (["--rdzv-backend=etcdv3", "--rdzv-endpoint=[::1]"], ExternalStore(endpoints=("[::1]:2379",))),
    (["--rdzv-backend=c10d", "--rdzv-endpoint=h:5"], SharedStore(host="h", port=5, is_host=None)),
    (["--rdzv-backend=c10d", "--rdzv-endpoint=h"], SharedStore(host="h", port=29400, is_host=None)),
    (["--rdzv-backend=c10d"], SharedStore(host="localhost", port=29400, is_host=None)),
    (["--rdzv-endpoint=h:5"], SharedStore(host="h", port=5, is_host=None)),
    (["--rdzv-endpoint=h:5", "--rdzv-conf=is_host=true"], SharedStore(host="h", port=5, is_host=True)),
    (["--rdzv-endpoint=h:5", "--rdzv-conf=is_host=0"], SharedStore(host="h", port=5, is_host=False)),
    (["--rdzv-backend=static", "--rdzv-endpoint=h:5"], SharedStore(host="h", port=5, is_host=True)),
    (["--nnodes=2", "--rdzv-endpoint=h:5", "--node-rank=1"], SharedStore(host="h", port=5, is_host=False)),
    (["--nnodes=2", "--master-addr=m", "--master-port=5"], SharedStore(host="m", port=5, is_host=True)),
    (["--nnodes=2", "--master-addr=m", "--node_rank=1"], SharedStore(host="m", port=29500, is_host=False)),
    (["--nnodes=2"], SharedStore(host="127.0.0.1", port=29500, is_host=True)),
    (["--master-port=5"], SharedStore(host="127.0.0.1", port=5, is_host=True)),
]


@pytest.mark.parametrize(("argv", "store"), ENDPOINTS)
def test_rendezvous_table(argv: list[str], store: StoreChoice) -> None:
    assert read(*argv).store == store


def test_a_job_nobody_can_join_has_a_random_name_and_one_node() -> None:
    assert read().job_id == "random"
    assert read("--rdzv-id=mine").job_id == "mine"
    standalone = read("--standalone", "--rdzv-id=mine", "--nnodes=1:4")
    assert (standalone.job_id, standalone.nodes_min, standalone.nodes_max) == ("random", 1, 1)
    assert any("--rdzv-id is ignored" in notice for notice in standalone.notices)
    assert any("--nnodes=1:4 is taken as 1" in notice for notice in standalone.notices)


def test_a_job_others_can_join_is_called_none_as_with_torchrun() -> None:
    assert read("--rdzv-endpoint=etcd://a").job_id == "none"


def test_node_rank_counts_only_where_nodes_are_numbered() -> None:
    assert read("--nnodes=2", "--node-rank=1").node_rank == 1
    ignored = read("--rdzv-endpoint=etcd://a", "--node-rank=1")
    assert ignored.node_rank is None
    assert any("--node-rank is ignored" in notice for notice in ignored.notices)


def test_the_store_of_a_node_is_said_to_die_with_it() -> None:
    assert any("dies with the node" in notice for notice in read("--rdzv-endpoint=h:5").notices)
    assert read("--rdzv-endpoint=etcd://a").notices == ()
    assert read().notices == ()


@pytest.mark.parametrize("name", sorted(IGNORED))
def test_flags_without_effect_are_said_to_be_ignored(name: str) -> None:
    value = {"monitor_interval": "1", "start_method": "fork"}.get(name, "x")
    (notice,) = read(f"--{name}={value}").notices
    assert notice == f"--{name.replace('_', '-')} is ignored: {IGNORED[name]}"


def test_store_access_from_flags_and_from_rdzv_conf() -> None:
    flags = ["--store-ca=a", "--store-cert=b", "--store-key=c", "--store-user=d", "--store-password-file=e"]
    conf = "--rdzv-conf=ca=a,cert=b,key=c,user=d,password_file=e"
    old_conf = "--rdzv-conf=ca_cert=a,ssl_cert=b,ssl_cert_key=c,user=d,password_file=e"
    expected = read("--rdzv-endpoint=etcd://x", *flags).access
    assert (expected.ca_file, expected.key_file, expected.password_file) == ("a", "c", "e")
    assert read("--rdzv-endpoint=etcd://x", conf).access == expected
    assert read("--rdzv-endpoint=etcd://x", old_conf).access == expected


def test_rendezvous_times() -> None:
    default = read()
    assert (default.last_call_s, default.join_timeout_s) == (30.0, 600.0)
    given = read("--rdzv-conf=join_timeout=7,last_call_timeout=3,close_timeout=9")
    assert (given.last_call_s, given.join_timeout_s) == (3.0, 7.0)
    assert any("close_timeout is ignored" in notice for notice in given.notices)
    assert read("--rdzv-conf=last_call_timeout=3", "--last-call=1").last_call_s == 1.0
    assert read("--rdzv-conf=timeout=8").join_timeout_s == 8.0


def test_entrypoints() -> None:
    assert read("-m").command.entrypoint is Entrypoint.MODULE
    assert read("--no-python").command.entrypoint is Entrypoint.PROGRAM
    run_path = read("--run-path", "--no-python", PYTHON_EXEC="other").command
    assert (run_path.entrypoint, run_path.python) == (Entrypoint.SCRIPT, "/usr/bin/python")
    assert read(PYTHON_EXEC="other").command.python == "other"


def test_the_other_flags_reach_the_result() -> None:
    config = read(
        "--log-dir=logs",
        "-r=0:1,1:2",
        "-t=3",
        "--local-ranks-filter=1,0",
        "--duplicate-stdout-filters=a,b,,c",
        "--signals-to-handle=SIGTERM,SIGUSR1",
        "--role=r",
        "--virtual-local-rank",
        "--numa-binding=core-complex",
        "--local-addr=l",
        "--node-name=n",
        "--no-controller",
        "--run-dir=d",
        "--metrics-port=9000",
        "--status=off",
        "--nproc-per-node=gpu",
    )
    assert config.output.log_dir == "logs"
    assert (config.output.redirects, config.output.tee) == ("0:1,1:2", "3")
    assert config.output.local_ranks_filter == (0, 1)
    assert config.output.stdout_filters == ("a", "b,c")
    assert config.signals == ("SIGTERM", "SIGUSR1")
    assert (config.role, config.virtual_local_rank, config.local_addr, config.node) == ("r", True, "l", "n")
    assert config.numa_binding is BindingMode.CORE_COMPLEX and read().numa_binding is None
    assert (config.with_controller, config.run_dir, config.metrics_port) == (False, "d", 9000)
    assert (config.status, config.nproc) == (StatusMode.OFF, "gpu")


def test_shutdown_timeout_has_torchruns_three_sources() -> None:
    assert read().shutdown_timeout_s == 30.0
    assert read(TORCH_ELASTIC_SHUTDOWN_TIMEOUT="4").shutdown_timeout_s == 4.0
    assert read("--shutdown-timeout=5", TORCH_ELASTIC_SHUTDOWN_TIMEOUT="4").shutdown_timeout_s == 5.0


@pytest.mark.parametrize(
    ("argv", "what_to_do"),
    [
        (["--nnodes=3:2"], "not above MAX"),
        (["--nnodes=0"], "at least 1"),
        (["--nnodes=1:2:3"], "MIN:MAX"),
        (["--nnodes=x"], "MIN:MAX"),
        (["--nnodes=1000000"], "at most"),
        (["--standalone", "--nnodes=2"], "give --rdzv-endpoint"),
        (["--nproc-per-node=0"], "take 1 to"),
        (["--nproc-per-node=-1"], "take 1 to"),
        (["--nproc-per-node=1.5"], "write a number"),
        (["--max-restarts=-1"], "0 or more"),
        (["--max-restarts=x"], "invalid int value"),
        (["--redirects=4"], "write 0"),
        (["--tee=0:1,1"], "write 0"),
        (["--local-ranks-filter=a"], "local ranks separated by commas"),
        (["--signals-to-handle=SIGNOPE"], "is no signal"),
        (["--signals-to-handle=SIGKILL"], "no process can handle"),
        (["--rdzv-backend=zeus"], "take etcd, c10d or static"),
        (["--rdzv-backend=etcd"], "needs --rdzv-endpoint"),
        (["--rdzv-endpoint=h:x"], "write HOST:PORT"),
        (["--rdzv-endpoint=h:70000"], "at most 65535"),
        (["--rdzv-endpoint=/a b:1"], "write HOST:PORT"),
        (["--rdzv-conf=a"], "KEY=VALUE"),
        (["--rdzv-conf=is_host=maybe", "--rdzv-endpoint=h:1"], "true or false"),
        (["--rdzv-conf=join_timeout=0"], "above 0"),
        (["--last-call=soon"], "number of seconds"),
        (["--rdzv-id=a/b", "--rdzv-endpoint=h:1"], "is not usable"),
        (["--node-name=a b"], "is not usable"),
        (["--nnodes=2", "--node-rank=2"], "take 0 to 1"),
        (["--no-python", "-m"], "exclude each other"),
        (["--metrics-port=65535"], "take 1 to"),
        (["--shutdown-timeout=-1"], "0 or more"),
        (["--store-cert=x", "--rdzv-endpoint=etcd://a"], "go together"),
        (["--store-user=x", "--rdzv-endpoint=etcd://a"], "go together"),
        (["--store-ca=x"], "are for an etcd cluster"),
        (["--no-such-flag"], "unrecognized arguments"),
        (["--status=blue"], "invalid choice"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line_that_says_what_to_do(argv: list[str], what_to_do: str) -> None:
    with pytest.raises(UserError, match=what_to_do) as refused:
        read(*argv)
    assert "\n" not in str(refused.value)


def test_a_missing_script_and_a_bad_variable_are_refused() -> None:
    with pytest.raises(UserError, match="training_script"):
        read_command_line([], {}, python="py", random_id="r")
    with pytest.raises(UserError, match="PET_STANDALONE=x"):
        read(PET_STANDALONE="x")
    with pytest.raises(UserError, match="PET_NUMA_BINDING=x in the environment: write one of node, socket"):
        read(PET_NUMA_BINDING="x")


def test_a_password_on_the_command_line_is_refused_and_not_repeated() -> None:
    with pytest.raises(UserError, match="password_file") as refused:
        read("--rdzv-endpoint=etcd://a", "--rdzv-conf=user=u,password=hunter2")
    assert "hunter2" not in str(refused.value)


def test_values_with_odd_spacing() -> None:
    assert parse_rdzv_conf(" a = 1 , b=x=y ") == {"a": "1", "b": "x=y"}
    assert parse_rdzv_conf("") == {}
    assert parse_etcd_endpoints("etcd://a:1, b:2") == ("a:1", "b:2")
    assert parse_endpoint("[fe80::1]", default_port=5, what="x") == ("fe80::1", 5)


def test_help_names_the_own_group_and_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        read("--help")
    shown = capsys.readouterr().out
    assert "Elasticity" in shown and "128+N" in shown
