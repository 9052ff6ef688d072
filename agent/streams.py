"""Opens what one start of the node's workers writes to: log files, pipes to the console, error files.

Invariants:
1. No descriptor outlives opened(), no file finish() (tests/integration/test_worker_group.py).
Not here: the rules (output.py); moving bytes (relay.py).
"""

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping

from elastic_run.agent.output import LogDirectory, Route, line_prefix, worker_routes
from elastic_run.agent.relay import FilteredFile, OutputRelay, open_private
from elastic_run.runtime.protocol.config import AgentConfig

CONSOLES = {"stdout": 1, "stderr": 2}


class AttemptStreams:
    """The streams of one start. Raises OSError and UserError on construction when they cannot be made."""

    def __init__(
        self, config: AgentConfig, logs: LogDirectory, environment: Mapping[str, str], say: Callable[[str], None]
    ) -> None:
        self._config = config
        self._environment = environment
        self._routes = worker_routes(config.output, config.nproc)
        self._files = logs.attempt(config.nproc)
        self._relay = OutputRelay(say)
        self._filtered: dict[str, FilteredFile] = {}

    @contextlib.contextmanager
    def opened(self, local_rank: int, rank: int) -> Iterator[tuple[int | None, int | None]]:
        """Yield stdout and stderr of a worker, as `spawn` takes them, open until the block ends. Raises OSError."""
        with contextlib.ExitStack() as stack:
            stdout = self._open(local_rank, rank, "stdout", self._routes[local_rank].stdout, stack)
            stderr = self._open(local_rank, rank, "stderr", self._routes[local_rank].stderr, stack)
            yield stdout, stderr

    def error_path(self, local_rank: int) -> str:
        return self._files.error(local_rank)

    @property
    def errors_kept(self) -> bool:
        """Whether the error files outlive the job."""
        return self._files.errors_kept

    async def finish(self) -> None:
        """Pass on what was written so far and close everything; all workers must be gone. May be called again."""
        await self._relay.finish()

    def _open(self, local_rank: int, rank: int, name: str, route: Route, stack: contextlib.ExitStack) -> int | None:
        if route is Route.CONSOLE:
            return None
        if route is Route.NOWHERE:
            return subprocess.DEVNULL
        path = self._files.stream(local_rank, name)
        if route is Route.FILE:
            fd = open_private(path)
        else:
            fd = self._relay.open(
                path=path,
                console=self._relay.console(CONSOLES[name]),
                prefix=line_prefix(self._config.role, rank, local_rank, self._environment),
                filtered=self._filtered_file(name),
            )
        stack.callback(os.close, fd)
        return fd

    def _filtered_file(self, name: str) -> FilteredFile | None:
        output = self._config.output
        needles = output.stdout_filters if name == "stdout" else output.stderr_filters
        if needles and name not in self._filtered:
            self._filtered[name] = self._relay.filtered_file(self._files.filtered(name), needles)
        return self._filtered.get(name)
