"""Where each worker's stdout and stderr go: torchrun's --redirects, --tee, --log-dir and --local-ranks-filter.

| given                         | the stream goes                                                     |
|---|---|
| nothing                       | straight to the console, no prefix, a terminal stays one            |
| --redirects                   | straight into its file                                              |
| --tee                         | through the agent: as it is into its file, prefixed to the console  |
| a rank not in the filter      | to the file if one is asked for, else to /dev/null                  |
| --log-dir=/dev/null           | straight to the console; the three others then mean nothing         |

Invariants:
1. Every value torchrun takes means the same here, and local ranks above 9 are understood
   (tests/property/test_output_filters.py).
2. No attempt's files are ever overwritten (tests/integration/test_worker_group.py).
Not here: moving the bytes of --tee (relay.py).
"""

import enum
import os
import re
import string
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from elastic_run.runtime.protocol.config import OutputConfig
from elastic_run.runtime.protocol.errors import UserError

PREFIX_TEMPLATE_VARIABLE = "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE"
_BITS = re.compile(r"[0-3]\n?")
_MAPPING = re.compile(r"(\d+:[0-3],)*(\d+:[0-3])\n?")


class Std(enum.IntFlag):
    """Which of a worker's streams."""

    NONE = 0
    OUT = 1
    ERR = 2


class Route(enum.StrEnum):
    """Where one stream goes."""

    CONSOLE = "console"
    FILE = "file"
    TEE = "tee"
    NOWHERE = "nowhere"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRoutes:
    stdout: Route
    stderr: Route


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptFiles:
    """Files of one start of the node's workers; made by `LogDirectory.attempt`."""

    log_dir: str | None
    """None when no stream is to be written to a file."""
    error_dir: str
    errors_kept: bool
    """Whether the error files outlive the job."""

    def stream(self, local_rank: int, name: str) -> str:
        """Return the path of `stdout` or `stderr` of a worker."""
        return f"{self.log_dir}/{local_rank}/{name}.log"

    def filtered(self, name: str) -> str:
        return f"{self.log_dir}/filtered_{name}.log"

    def error(self, local_rank: int) -> str:
        return f"{self.error_dir}/{local_rank}/error.json"


def parse_streams(value: str, nproc: int, *, flag: str) -> tuple[Std, ...]:
    """Return which streams of each local rank a --redirects or --tee value names.

    A rank the mapping leaves out has none; ranks from `nproc` on are ignored. Raises UserError.
    """
    if _BITS.fullmatch(value):
        return (Std(int(value)),) * nproc
    if not _MAPPING.fullmatch(value):
        raise UserError(
            f"{flag}={value!r} is not understood: give 0 (none), 1 (stdout), 2 (stderr) or 3 (both), "
            "for all local ranks or for some, as in 0:3,1:1"
        )
    named = {int(rank): Std(int(bits)) for rank, bits in (item.split(":") for item in value.split(","))}
    return tuple(named.get(local_rank, Std.NONE) for local_rank in range(nproc))


def worker_routes(config: OutputConfig, nproc: int) -> tuple[WorkerRoutes, ...]:
    """Return the routes of every local rank. Raises UserError for a value that is not understood."""
    redirects = parse_streams(config.redirects, nproc, flag="--redirects")
    tee = parse_streams(config.tee, nproc, flag="--tee")
    shown = config.local_ranks_filter
    return tuple(
        WorkerRoutes(
            stdout=_route(config, Std.OUT, redirects[rank], tee[rank], shown=not shown or rank in shown),
            stderr=_route(config, Std.ERR, redirects[rank], tee[rank], shown=not shown or rank in shown),
        )
        for rank in range(nproc)
    )


def line_prefix(role: str, rank: int, local_rank: int, environment: Mapping[str, str]) -> bytes:
    """Return what --tee puts before each line: torchrun's `[default0]:`, or its template from the environment."""
    template = environment.get(PREFIX_TEMPLATE_VARIABLE) or "[${role_name}${local_rank}]:"
    return (
        string.Template(template)
        .safe_substitute(role_name=role, rank=rank, local_rank=local_rank)
        .encode(errors="surrogateescape")
    )


class LogDirectory:
    """The log directory of one agent: `<log dir>/<job>_<random>/attempt_<start>/<local rank>/`.

    Without --log-dir the files lie in a new directory under the system's temporary one, which is kept, and the error
    files in the run directory, which is not.
    """

    def __init__(self, config: OutputConfig, job_id: str, run_dir: str) -> None:
        self._config = config
        self._job_id = job_id
        self._run_dir = run_dir
        self._root: str | None = None
        self._attempts = 0

    def attempt(self, nproc: int) -> AttemptFiles:
        """Make the directories of the next start. Raises OSError when they cannot be made."""
        routes = worker_routes(self._config, nproc)
        name = f"attempt_{self._attempts}"
        kept = self._config.log_dir not in (None, "", os.devnull)
        filed = any(route in (Route.FILE, Route.TEE) for r in routes for route in (r.stdout, r.stderr))
        log_dir = f"{self._logs_root()}/{name}" if kept or filed else None
        error_dir = log_dir if kept and log_dir else f"{self._run_dir}/{name}"
        for directory in {log_dir, error_dir} - {None}:
            for local_rank in range(nproc):
                Path(f"{directory}/{local_rank}").mkdir(mode=0o700, parents=True, exist_ok=True)
        self._attempts += 1
        return AttemptFiles(log_dir=log_dir, error_dir=error_dir, errors_kept=kept)

    def _logs_root(self) -> str:
        if self._root is None:
            base = self._config.log_dir or tempfile.mkdtemp(prefix="elastic_run_")
            Path(base).mkdir(mode=0o700, parents=True, exist_ok=True)
            self._root = tempfile.mkdtemp(prefix=f"{self._job_id}_", dir=Path(base).absolute())
        return self._root


def _route(config: OutputConfig, stream: Std, redirects: Std, tee: Std, *, shown: bool) -> Route:
    if config.log_dir == os.devnull:
        return Route.CONSOLE
    if stream & tee:
        return Route.TEE if shown else Route.FILE
    if stream & redirects:
        return Route.FILE
    return Route.CONSOLE if shown else Route.NOWHERE
