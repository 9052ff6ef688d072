"""The private directory of one run on one machine, and how local tools find it.

Every launcher has an entry `<root>/<8 hex digits>/job.json`, normally in the run directory itself. With --run-dir that
directory lies elsewhere and outlives the run; the entry then only points to it.

Invariants (tests/unit/test_rundir.py):
1. Root and run directories are real directories of this user with mode 0700; anything else is refused, not repaired.
2. An entry appears whole, with its record, and is swept only when the launcher it names is gone (pid and start time).
3. Paths stay short enough for unix sockets inside.
Not here: what the agent puts inside.
"""

import os
import shutil
import stat
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from elastic_run.runtime.edge.files import read_bounded, write_private
from elastic_run.runtime.edge.process import start_time_ticks
from elastic_run.runtime.protocol.codec import DOCUMENT_BYTES_MAX, decode, encode
from elastic_run.runtime.protocol.errors import CodecError, UserError, VersionMismatch
from elastic_run.runtime.protocol.ids import JobId

RUN_DIR_BYTES_MAX = 64
"""A unix socket's path has at most 107 bytes; this leaves 43 for the names inside."""
ENTRIES_MAX = 10_000
_RECORD = "job.json"
_UNFINISHED = ".new-"


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalJob:
    """A job with a launcher on this machine."""

    job_id: JobId
    launcher_pid: int
    launcher_start_ticks: int
    """Clock ticks since boot; with the pid it names the launcher for good."""
    run_dir: str
    endpoints: tuple[str, ...]
    """Of the store; empty while it is being started."""

    @property
    def alive(self) -> bool:
        return start_time_ticks(self.launcher_pid) == self.launcher_start_ticks


class RunDir:
    """This launcher's run directory; made by `create_run_dir`."""

    def __init__(self, entry: Path, job: LocalJob) -> None:
        self.path = Path(job.run_dir)
        self.entry = entry
        self._job = job

    @property
    def kept(self) -> bool:
        """Whether the directory outlives the run."""
        return self.path != self.entry

    def publish(self, endpoints: tuple[str, ...]) -> None:
        """Tell local tools where the job's store is."""
        self._job = replace(self._job, endpoints=endpoints)
        write_private(self.entry / _RECORD, encode(self._job))

    def remove(self) -> None:
        """Remove the entry, and the directory unless it is kept."""
        shutil.rmtree(self.entry, ignore_errors=True)


def default_root(environ: Mapping[str, str]) -> Path:
    """Return the directory that holds this user's entries."""
    if own := environ.get("ELASTIC_RUN_DIR"):
        return Path(own).absolute()
    if session := environ.get("XDG_RUNTIME_DIR"):
        return Path(session).absolute() / "elastic-run"
    return Path(f"/tmp/elastic-run-{os.getuid()}")


def create_run_dir(root: Path, *, job_id: JobId, kept_in: Path | None) -> RunDir:
    """Make and register a run directory, in `kept_in` if given. Raises UserError when the place is not fit."""
    _private_directory(root)
    sweep(root)
    name = os.urandom(4).hex()
    entry = root / name
    path = entry if kept_in is None else kept_in.absolute() / name
    if len(os.fsencode(path)) > RUN_DIR_BYTES_MAX:
        raise UserError(
            f"{path.parent} is too long a path for sockets inside; "
            f"set ELASTIC_RUN_DIR or --run-dir to one of at most {RUN_DIR_BYTES_MAX - len(name) - 1} bytes"
        )
    own_pid = os.getpid()
    job = LocalJob(
        job_id=job_id,
        launcher_pid=own_pid,
        launcher_start_ticks=start_time_ticks(own_pid) or 0,
        run_dir=str(path),
        endpoints=(),
    )
    unfinished = root / f"{_UNFINISHED}{name}"
    try:
        if kept_in is not None:
            kept_in.mkdir(parents=True, exist_ok=True)
            path.mkdir(mode=0o700)
        unfinished.mkdir(mode=0o700)
        write_private(unfinished / _RECORD, encode(job))
        unfinished.rename(entry)
    except OSError as error:
        raise UserError(f"cannot make the run directory {path}: {error.strerror}") from None
    return RunDir(entry, job)


def local_jobs(root: Path) -> list[LocalJob]:
    """Return the jobs whose launchers are running, oldest first."""
    jobs = (job for _, job in _entries(root) if job.alive)
    return sorted(jobs, key=lambda job: (job.launcher_start_ticks, job.launcher_pid))


def sweep(root: Path) -> int:
    """Remove what dead launchers left behind; return how many entries that were. Directories given by users stay."""
    dead = [entry for entry, job in _entries(root) if not job.alive]
    for entry in dead:
        shutil.rmtree(entry, ignore_errors=True)
    return len(dead)


def remove_abandoned(run_dir: Path) -> None:
    """Remove a run directory whose launcher is gone; one that a user gave (it is no entry) stays."""
    if (run_dir / _RECORD).is_file():
        shutil.rmtree(run_dir, ignore_errors=True)


def _entries(root: Path) -> list[tuple[Path, LocalJob]]:
    """Readable entries; those of other versions and unfinished ones are left to their owners."""
    try:
        names = sorted(os.listdir(root))[:ENTRIES_MAX]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"cannot read {root}: {error.strerror}; set ELASTIC_RUN_DIR to a directory of yours") from None
    found: list[tuple[Path, LocalJob]] = []
    for name in names:
        record = root / name / _RECORD
        if name.startswith(_UNFINISHED) or not record.is_file():
            continue
        try:
            found.append((root / name, decode(LocalJob, read_bounded(record, DOCUMENT_BYTES_MAX), where=str(record))))
        except (CodecError, VersionMismatch, UserError):
            continue
    return found


def _private_directory(path: Path) -> None:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.lstat()
    except OSError as error:
        raise UserError(f"cannot make {path}: {error.strerror}; set ELASTIC_RUN_DIR to a directory of yours") from None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise UserError(
            f"{path} is not a private directory of this user; remove it, or chmod 700 it, or set ELASTIC_RUN_DIR"
        )
