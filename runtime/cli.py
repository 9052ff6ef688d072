"""`elastic-run`: reads the command line, looks at the machine, runs the job, and returns its exit code.

This process stays thin: it loads neither torch nor the agent nor the controller, and grpc only for an external store.

Invariants (tests/integration/test_launcher.py):
1. A user's error is one line on stderr and exit code 2; nothing was started.
2. At the end the run directory is gone, unless it was asked for by name.
Not here: supervision (launcher.py), flags (flags.py), checks (preflight.py).
"""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from elastic_run.runtime.edge.files import write_private
from elastic_run.runtime.edge.rundir import RunDir, create_run_dir, default_root
from elastic_run.runtime.embedded_etcd import EmbeddedEtcd
from elastic_run.runtime.flags import read_command_line
from elastic_run.runtime.launch_config import EmbeddedStore, LaunchConfig, StatusMode
from elastic_run.runtime.launcher import EXIT_FAILED, EXIT_SIGNAL_BASE, EXIT_USAGE, Children, Launcher
from elastic_run.runtime.live_status import live_status
from elastic_run.runtime.preflight import Prepared, prepare, wait_for_shared_store
from elastic_run.runtime.process_configs import agent_config, controller_config, worker_environment
from elastic_run.runtime.protocol.codec import encode
from elastic_run.runtime.protocol.config import StoreConfig
from elastic_run.runtime.protocol.errors import ElasticError, InvariantViolated, UserError
from elastic_run.runtime.status_line import Fetch, status_line, terminal_fits

STDERR = 2
# -P: the directory this is called in may hold modules of any name, and must not provide ours.
_MODULE = (sys.executable, "-P", "-m")


@dataclass(frozen=True, slots=True, kw_only=True)
class Programs:
    """What is run as agent and as controller; `--config FILE` is added."""

    agent: tuple[str, ...]
    controller: tuple[str, ...]


PROGRAMS = Programs(agent=(*_MODULE, "elastic_run.agent.cli"), controller=(*_MODULE, "elastic_run.controller.cli"))
FetchFactory = Callable[[StoreConfig, LaunchConfig], contextlib.AbstractAsyncContextManager[Fetch]]
"""Makes the source of the live status once the store is known; the context gives back what it holds."""


def main(argv: Sequence[str] | None = None, *, make_fetch: FetchFactory | None = live_status) -> int:
    """Run the command line and return the exit code."""
    try:
        config = read_command_line(
            sys.argv[1:] if argv is None else argv,
            os.environ,
            python=sys.executable,
            random_id=os.urandom(8).hex(),
        )
        return asyncio.run(run_job(config, dict(os.environ), make_fetch=make_fetch))
    except UserError as error:
        say(str(error))
        return EXIT_USAGE
    except ElasticError as error:
        say(str(error))
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_SIGNAL_BASE + signal.SIGINT


async def run_job(
    config: LaunchConfig,
    environ: dict[str, str],
    *,
    programs: Programs = PROGRAMS,
    make_fetch: FetchFactory | None = None,
) -> int:
    """Run this node's part of the job. Raises ElasticError when it cannot start."""
    if config.status is StatusMode.ON and not os.isatty(STDERR):
        raise UserError("--status=on: stderr is no terminal; take --status=auto")
    root = default_root(environ)
    prepared = await prepare(config, environ, root=root)
    env, omp_notice = worker_environment(environ, prepared.nproc)
    for notice in (*config.notices, *prepared.notices, *filter(None, [omp_notice])):
        say(notice)
    run_dir = create_run_dir(root, job_id=config.job_id, kept_in=Path(config.run_dir) if config.run_dir else None)
    try:
        return await _Job(config, prepared, run_dir, env, programs).run(make_fetch)
    finally:
        run_dir.remove()
        if run_dir.kept:
            say(f"the run directory {run_dir.path} is kept")


class _Job:
    """One run in its run directory."""

    def __init__(
        self, config: LaunchConfig, prepared: Prepared, run_dir: RunDir, env: dict[str, str], programs: Programs
    ) -> None:
        self._config = config
        self._prepared = prepared
        self._run_dir = run_dir
        self._env = env
        self._programs = programs
        self._etcd: EmbeddedEtcd | None = None
        if prepared.etcd is not None:
            self._etcd = EmbeddedEtcd(
                binary=prepared.etcd, directory=run_dir.path, env=env, say=say, listen=prepared.listen
            )

    async def run(self, make_fetch: FetchFactory | None) -> int:
        config = self._config
        async with contextlib.AsyncExitStack() as terminal:

            async def assemble() -> Children:
                store = await self._store()
                self._run_dir.publish(store.endpoints)
                if make_fetch is not None and _status_wanted(config.status):
                    fetch = await terminal.enter_async_context(make_fetch(store, config))
                    await terminal.enter_async_context(status_line(fetch))
                return self._write_children(store)

            launcher = Launcher(
                assemble=assemble,
                store=self._etcd,
                env=self._env,
                say=say,
                drain_s=config.shutdown_timeout_s,
                signals=config.signals,
                sole_controller=isinstance(config.store, EmbeddedStore),
            )
            return await launcher.run()

    async def _store(self) -> StoreConfig:
        """Start the store or wait for it; return how to reach it."""
        if self._etcd is not None:
            await self._etcd.start()  # or another launcher of this machine has: the same endpoint
            return StoreConfig(endpoints=(self._etcd.endpoint,))
        await wait_for_shared_store(self._config)
        if self._prepared.store is None:
            raise InvariantViolated("preflight neither named a store nor asked to start one")
        return self._prepared.store

    def _write_children(self, store: StoreConfig) -> Children:
        directory = self._run_dir.path
        agent_file, controller_file = directory / "agent.json", directory / "controller.json"
        write_private(agent_file, encode(agent_config(self._config, self._prepared, store, str(directory))))
        controller: tuple[str, ...] | None = None
        if self._config.with_controller:
            told = controller_config(self._config, self._prepared, store, str(directory))
            write_private(controller_file, encode(told))
            controller = (*self._programs.controller, "--config", str(controller_file))
        return Children(agent=(*self._programs.agent, "--config", str(agent_file)), controller=controller)


def _status_wanted(mode: StatusMode) -> bool:
    if mode is StatusMode.ON:
        return os.isatty(STDERR)
    return mode is StatusMode.AUTO and terminal_fits(STDERR, os.environ)


def say(text: str) -> None:
    """Write one line to stderr."""
    with contextlib.suppress(OSError):  # nobody listens; that must not end a job
        sys.stderr.write(f"elastic-run: {text}\n")
        sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
