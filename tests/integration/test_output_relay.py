"""--tee against real pipes, files, full disks and broken consoles."""

import asyncio
import fcntl
import hashlib
import os
import resource
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from worker_setup import eventually

from elastic_run.agent import relay
from elastic_run.agent.relay import OutputRelay

FLOOD = str(Path(__file__).parent.parent / "scripts" / "flood.py")
MEGABYTE = 1_000_000
MEMORY_GROWTH_BYTES_MAX = 24 * MEGABYTE
LIMIT_S = 60.0


class Said(list[str]):
    """Collects what the user is told."""


@pytest.fixture
def said() -> Said:
    return Said()


@pytest.fixture
async def output(said: Said) -> AsyncIterator[OutputRelay]:
    result = OutputRelay(said.append)
    yield result
    await result.finish()


def teed(output: OutputRelay, path: Path, console_fd: int, prefix: bytes = b"[default0]:") -> int:
    return output.open(path=str(path), console=output.console(console_fd), prefix=prefix, filtered=None)


async def run_flood(megabytes: int, write_fd: int) -> int:
    process = await asyncio.create_subprocess_exec(sys.executable, FLOOD, str(megabytes), stdout=write_fd)
    os.close(write_fd)
    return await asyncio.wait_for(process.wait(), LIMIT_S)


def flood_digest(megabytes: int, prefix: bytes = b"") -> str:
    digest = hashlib.sha256()
    for number in range(megabytes * MEGABYTE // 100):
        digest.update(prefix + b"%010d %s\n" % (number, b"x" * 88))
    return digest.hexdigest()


def new_peak_bytes() -> int:
    """Forget the largest size this process ever had; return the present one."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@pytest.mark.slow
async def test_a_hundred_megabytes_pass_without_a_byte_lost_or_memory_growing(
    output: OutputRelay, said: Said, tmp_path: Path
) -> None:
    console = os.open(tmp_path / "console", os.O_WRONLY | os.O_CREAT, 0o600)
    before_bytes = new_peak_bytes()
    assert await run_flood(100, teed(output, tmp_path / "stdout.log", console)) == 0
    await output.finish()
    grown_bytes = peak_bytes() - before_bytes
    os.close(console)
    assert grown_bytes < MEMORY_GROWTH_BYTES_MAX
    assert file_digest(tmp_path / "stdout.log") == flood_digest(100)
    assert file_digest(tmp_path / "console") == flood_digest(100, b"[default0]:")
    assert said == []


async def test_any_bytes_reach_the_file_as_they_are_and_the_console_by_lines(
    output: OutputRelay, tmp_path: Path, said: Said
) -> None:
    console = os.open(tmp_path / "console", os.O_WRONLY | os.O_CREAT, 0o600)
    write_fd = teed(output, tmp_path / "stdout.log", console, b">")
    text = b"\x00\xff one\r\ntwo\rthree\n\n\x1b[1mlast without an end"
    os.write(write_fd, text)
    os.close(write_fd)
    await output.finish()
    os.close(console)
    assert (tmp_path / "stdout.log").read_bytes() == text
    assert (tmp_path / "stdout.log").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "console").read_bytes() == (b">\x00\xff one\n>two\n>three\n>\n>\x1b[1mlast without an end\n")
    assert said == []


async def test_lines_of_several_workers_never_mix(output: OutputRelay, tmp_path: Path) -> None:
    console = os.open(tmp_path / "console", os.O_WRONLY | os.O_CREAT, 0o600)
    prefixes = [b"[default%d]:" % rank for rank in range(3)]
    pipes = [teed(output, tmp_path / f"{i}.log", console, prefix) for i, prefix in enumerate(prefixes)]
    await asyncio.gather(*(run_flood(2, pipe) for pipe in pipes))
    await output.finish()
    os.close(console)
    lines = (tmp_path / "console").read_bytes().splitlines()
    for prefix in prefixes:
        mine = [int(line[len(prefix) : len(prefix) + 10]) for line in lines if line.startswith(prefix)]
        assert mine == list(range(2 * MEGABYTE // 100))
    assert len(lines) == 3 * 2 * MEGABYTE // 100


async def test_a_full_disk_is_said_once_and_the_console_goes_on(
    output: OutputRelay, said: Said, tmp_path: Path
) -> None:
    console = os.open(tmp_path / "console", os.O_WRONLY | os.O_CREAT, 0o600)
    write_fd = output.open(path="/dev/full", console=output.console(console), prefix=b"", filtered=None)
    assert await run_flood(2, write_fd) == 0
    await output.finish()
    os.close(console)
    assert file_digest(tmp_path / "console") == flood_digest(2)
    assert said == [
        "output cannot be written to /dev/full: No space left on device; the job goes on without it",
        "2000000 bytes of output could not be written to /dev/full",
    ]


async def test_a_file_that_may_not_grow_keeps_what_fits(output: OutputRelay, said: Said, tmp_path: Path) -> None:
    console = os.open("/dev/null", os.O_WRONLY)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    write_fd = teed(output, tmp_path / "stdout.log", console, b"")
    resource.setrlimit(resource.RLIMIT_FSIZE, (MEGABYTE, hard))
    try:
        assert await run_flood(2, write_fd) == 0
        await output.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        os.close(console)
    assert file_digest(tmp_path / "stdout.log") == flood_digest(1)
    assert [line.split(":")[0] for line in said] == [
        f"output cannot be written to {tmp_path / 'stdout.log'}",
        f"1000000 bytes of output could not be written to {tmp_path / 'stdout.log'}",
    ]


async def test_a_console_that_hung_up_does_not_stop_the_file(output: OutputRelay, said: Said, tmp_path: Path) -> None:
    read_fd, console = os.pipe()
    os.close(read_fd)
    assert await run_flood(2, teed(output, tmp_path / "stdout.log", console)) == 0
    await output.finish()
    os.close(console)
    assert file_digest(tmp_path / "stdout.log") == flood_digest(2)
    assert said[0] == "output cannot be written to the console: Broken pipe; the job goes on without it"
    assert len(said) == 2


@pytest.mark.parametrize("blocking", [True, False])
async def test_a_console_nobody_reads_holds_the_worker_back_and_the_loop_not(
    output: OutputRelay, said: Said, tmp_path: Path, blocking: bool
) -> None:
    loop = asyncio.get_running_loop()
    read_fd, console = os.pipe()
    os.set_blocking(console, blocking)
    fcntl.fcntl(console, fcntl.F_SETPIPE_SZ, 4096)
    flood = asyncio.ensure_future(run_flood(2, teed(output, tmp_path / "stdout.log", console, b"")))
    log = tmp_path / "stdout.log"
    # The first chunk is in the file, its console write is stuck.
    await eventually(lambda: log.stat().st_size >= relay.CHUNK_BYTES // 2)
    held_bytes = relay.PIPE_BYTES + 2 * relay.CHUNK_BYTES
    seen = hashlib.sha256()
    first = await loop.run_in_executor(None, os.read, read_fd, 1)
    assert not flood.done() and log.stat().st_size <= held_bytes
    seen.update(first)
    remaining = 2 * MEGABYTE - 1
    while remaining:
        data = await loop.run_in_executor(None, os.read, read_fd, 1 << 16)
        seen.update(data)
        remaining -= len(data)
    assert await flood == 0
    await output.finish()
    os.close(console)
    os.close(read_fd)
    assert seen.hexdigest() == flood_digest(2) and said == []


async def test_a_pipe_held_open_by_a_stranger_is_given_up(
    output: OutputRelay, said: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay, "DRAIN_IDLE_S", 0.1)
    console = os.open("/dev/null", os.O_WRONLY)
    write_fd = teed(output, tmp_path / "stdout.log", console)
    os.write(write_fd, b"written before\n")
    await output.finish()
    os.close(write_fd)
    os.close(console)
    assert (tmp_path / "stdout.log").read_bytes() == b"written before\n"
    assert said == ["1 output streams did not end; the rest of them is lost"]


async def test_lines_that_match_are_collected_from_all_ranks(output: OutputRelay, tmp_path: Path) -> None:
    console = os.open("/dev/null", os.O_WRONLY)
    filtered = output.filtered_file(str(tmp_path / "filtered_stdout.log"), ["loss", "épée"])
    for rank in range(2):
        path, prefix = str(tmp_path / f"{rank}.log"), b"[default%d]:" % rank
        fd = output.open(path=path, console=output.console(console), prefix=prefix, filtered=filtered)
        os.write(fd, f"loss {rank}\nnothing\nune épée\n".encode())
        os.close(fd)
    await output.finish()
    os.close(console)
    lines = (tmp_path / "filtered_stdout.log").read_text().splitlines()
    assert sorted(lines) == [
        "[default0]:loss 0",
        "[default0]:une épée",
        "[default1]:loss 1",
        "[default1]:une épée",
    ]


async def test_finish_leaves_no_descriptor_and_no_thread(tmp_path: Path, said: Said) -> None:
    before = sorted(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
    console = os.open("/dev/null", os.O_WRONLY)
    output = OutputRelay(said.append)
    await run_flood(1, teed(output, tmp_path / "stdout.log", console))
    await output.finish()
    await output.finish()
    os.close(console)
    assert sorted(os.listdir("/proc/self/fd")) == before[0]
    # The thread has done its last job; the kernel takes it off its list a moment later.
    await eventually(lambda: len(os.listdir("/proc/self/task")) <= before[1])
