"""The run directory: private, short, found by local tools, swept when its launcher is gone."""

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from elastic_run.runtime.edge.files import read_bounded, write_private
from elastic_run.runtime.edge.process import start_time_ticks
from elastic_run.runtime.edge.rundir import LocalJob, create_run_dir, default_root, local_jobs, sweep
from elastic_run.runtime.protocol.codec import encode
from elastic_run.runtime.protocol.errors import UserError
from elastic_run.runtime.protocol.ids import JobId

JOB = JobId("job7")


@pytest.fixture
def root() -> Iterator[Path]:
    parent = Path(tempfile.mkdtemp(dir="/tmp"))
    yield parent / "r"
    shutil.rmtree(parent)


def dead_job(run_dir: str) -> LocalJob:
    gone = subprocess.Popen(["true"])
    gone.wait()
    return LocalJob(job_id=JOB, launcher_pid=gone.pid, launcher_start_ticks=1, run_dir=run_dir, endpoints=())


def test_root_comes_from_the_environment_or_is_this_users_own() -> None:
    assert default_root({"ELASTIC_RUN_DIR": "/a", "XDG_RUNTIME_DIR": "/b"}) == Path("/a")
    assert default_root({"XDG_RUNTIME_DIR": "/b"}) == Path("/b/elastic-run")
    assert default_root({}) == Path(f"/tmp/elastic-run-{os.getuid()}")


def test_directories_and_record_are_private(root: Path) -> None:
    run_dir = create_run_dir(root, job_id=JOB, kept_in=None)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (root, run_dir.path)] == [0o700, 0o700]
    assert stat.S_IMODE((run_dir.path / "job.json").stat().st_mode) == 0o600


def test_a_running_job_is_found_with_its_store_until_it_is_removed(root: Path) -> None:
    assert local_jobs(root) == []
    run_dir = create_run_dir(root, job_id=JOB, kept_in=None)
    run_dir.publish(("127.0.0.1:1",))
    (job,) = local_jobs(root)
    assert (job.job_id, job.endpoints, job.run_dir) == (JOB, ("127.0.0.1:1",), str(run_dir.path))
    assert (job.launcher_pid, job.launcher_start_ticks) == (os.getpid(), start_time_ticks(os.getpid()))
    run_dir.remove()
    assert local_jobs(root) == []
    assert list(root.iterdir()) == []


def test_a_kept_directory_stays_when_its_entry_goes(root: Path) -> None:
    run_dir = create_run_dir(root, job_id=JOB, kept_in=root.parent / "kept")
    assert run_dir.kept
    assert run_dir.path.parent == root.parent / "kept"
    assert local_jobs(root)[0].run_dir == str(run_dir.path)
    run_dir.remove()
    assert run_dir.path.is_dir() and list(root.iterdir()) == []


def test_entries_of_dead_launchers_are_swept_and_others_are_not(root: Path) -> None:
    alive = create_run_dir(root, job_id=JOB, kept_in=None)
    dead = root / "dead"
    reused_pid = root / "reused"
    foreign = root / "foreign"
    for directory in (dead, reused_pid, foreign):
        directory.mkdir()
    write_private(dead / "job.json", encode(dead_job(str(dead))))
    write_private(reused_pid / "job.json", encode(replace(local_jobs(root)[0], launcher_start_ticks=1)))
    write_private(foreign / "job.json", b'{"protocol": 99}')
    assert sweep(root) == 2
    assert sorted(path.name for path in root.iterdir()) == sorted([alive.path.name, "foreign"])


def test_a_root_others_can_enter_is_refused(root: Path) -> None:
    root.mkdir(mode=0o755)
    with pytest.raises(UserError, match="not a private directory"):
        create_run_dir(root, job_id=JOB, kept_in=None)


def test_a_root_that_is_a_link_is_refused(root: Path) -> None:
    target = root.parent / "elsewhere"
    target.mkdir(mode=0o700)
    root.symlink_to(target)
    with pytest.raises(UserError, match="not a private directory"):
        create_run_dir(root, job_id=JOB, kept_in=None)


def test_a_path_too_long_for_sockets_is_refused(root: Path) -> None:
    with pytest.raises(UserError, match="too long a path"):
        create_run_dir(root / ("x" * 80), job_id=JOB, kept_in=None)


def test_a_failed_write_leaves_the_old_content_and_nothing_else(root: Path) -> None:
    root.mkdir()
    file = root / "file"
    write_private(file, b"old")
    code = """
import resource, signal, sys
from pathlib import Path
from elastic_run.runtime.edge.files import write_private
from elastic_run.runtime.protocol.errors import UserError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_private(Path(sys.argv[1]), b"n" * 5000)
except UserError as error:
    sys.exit(str(error))
"""
    failed = subprocess.run([sys.executable, "-c", code, str(file)], stderr=subprocess.PIPE, check=False)
    assert failed.returncode == 1 and b"cannot write" in failed.stderr
    assert file.read_bytes() == b"old"
    assert [path.name for path in root.iterdir()] == ["file"]


def test_reading_is_bounded(root: Path) -> None:
    root.mkdir()
    (root / "big").write_bytes(b"x" * 100)
    assert len(read_bounded(root / "big", 10)) == 11
    with pytest.raises(UserError, match="cannot read"):
        read_bounded(root / "none", 10)
