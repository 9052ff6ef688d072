"""Whole jobs through an etcd that wants TLS, a client certificate, a user and a password."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from etcd_cluster import EtcdCluster, make_tls_files
from launching import SCRIPTS, Bench

pytestmark = pytest.mark.slow
PASSWORD = "correct-horse"


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(dir="/tmp", prefix="elt"))
    yield path
    shutil.rmtree(path)


def test_a_job_runs_and_is_asked_about_over_tls(folder: Path) -> None:
    tls = make_tls_files(folder)
    with EtcdCluster(directory=folder, size=1, tls=tls) as etcd, Bench() as bench:
        where = (f"--rdzv-endpoint=etcd://{etcd.endpoints[0]}", "--rdzv-id=sealed")
        keys = (
            f"--store-ca={tls.ca_file}",
            f"--store-cert={tls.client_cert_file}",
            f"--store-key={tls.client_key_file}",
        )
        refused = bench.run(*where, f"--store-ca={tls.ca_file}", SCRIPTS / "print_env.py")
        assert refused.end() == 2
        assert refused.err.count("\n") == 1, refused.err
        run = bench.run(*where, *keys, SCRIPTS / "print_env.py")
        assert run.end() == 0, run.err
        answer = bench.ctl("events", "--json", *where, *keys)
        kinds = [event["kind"] for event in json.loads(answer.stdout)["events"]]
        assert {"view_installed", "job_ended"} <= set(kinds), answer
        bench.assert_nothing_left()


def test_a_job_runs_as_a_user_whose_password_never_shows(folder: Path) -> None:
    password_file = folder / "password"
    password_file.write_text(f"{PASSWORD}\n")
    wrong_file = folder / "wrong"
    wrong_file.write_text("battery-staple\n")
    with EtcdCluster(directory=folder, size=1) as etcd, Bench() as bench:
        etcd.enable_users("agent", PASSWORD, "/elastic/kept")
        where = (f"--rdzv-endpoint=etcd://{etcd.endpoints[0]}", "--rdzv-id=kept", "--store-user=agent")
        refused = bench.run(*where, f"--store-password-file={wrong_file}", SCRIPTS / "print_env.py")
        assert refused.end() == 2
        assert refused.err.count("\n") == 1, refused.err
        (bench.files / "waiting").mkdir()
        script = (SCRIPTS / "wait_for_go.py", bench.files / "waiting")
        run = bench.run(*where, f"--store-password-file={password_file}", *script)
        bench.await_files("waiting/rank-0.0", "waiting/rank-1.0")
        for pid in bench.processes():
            seen = Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/environ").read_bytes()
            assert PASSWORD.encode() not in seen
        (bench.files / "waiting" / "go").touch()
        assert run.end() == 0, run.err
        assert PASSWORD not in run.err + run.out
        bench.assert_nothing_left()
