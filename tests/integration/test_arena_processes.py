"""Shared memory between real processes: passed as a descriptor, read after its owner's death, never left behind."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from elastic_run.collectives.peer_segments import PeerSegments

REGION_BYTES = 3 << 20
LIMIT_BYTES = 64 << 20
REPLY_S_MAX = 60.0
"""A fresh process imports torch on a busy machine."""

OWNER = """
import json, socket, sys
from elastic_run.collectives.arena import Arena

sock = socket.socket(fileno=int(sys.argv[1]))
arena = Arena(64 << 20)
region = arena.allocate(int(sys.argv[2]))
region.tensor.fill_(1)
arena.hold(region, "reader")

def tell(fds, **fields):
    socket.send_fds(sock, [json.dumps(fields).encode()], fds)

tell([arena.fd_of(region.segment)], segment=region.segment, size=arena.size_of(region.segment), offset=region.offset,
     generation=region.generation)
while order := sock.recv(64).decode():
    if order == "write":
        region.tensor.fill_(2)
    elif order == "give away":
        arena.release_owner(region)
        arena.drop_peer("reader")
        region = arena.allocate(region.nbytes)
        region.tensor.fill_(3)
    tell([], done=order, offset=region.offset)
"""


class Owner:
    """A process with an arena and one region; `close` it."""

    def __init__(self) -> None:
        self.sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.settimeout(REPLY_S_MAX)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", OWNER, str(theirs.fileno()), str(REGION_BYTES)], pass_fds=[theirs.fileno()]
            )

    def hear(self) -> tuple[dict[str, Any], list[int]]:
        message, fds, _, _ = socket.recv_fds(self.sock, 4096, 4)
        return json.loads(message), list(fds)

    def ask(self, order: str) -> None:
        self.sock.send(order.encode())
        assert self.hear()[0]["done"] == order

    def kill(self) -> None:
        self.process.kill()
        assert self.process.wait(REPLY_S_MAX) == -signal.SIGKILL

    def close(self) -> None:
        self.sock.close()
        self.process.kill()
        self.process.wait(REPLY_S_MAX)


def leftovers() -> tuple[int, int]:
    return len(os.listdir("/proc/self/fd")), Path("/proc/self/maps").read_text().count("elastic-collectives")


def ours_in_dev_shm() -> list[str]:
    return [entry.name for entry in os.scandir("/dev/shm") if "elastic-collectives" in entry.name]


def run_script(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=REPLY_S_MAX, check=False
    )


def test_region_is_read_in_another_process_and_after_its_owner_was_killed() -> None:
    before = leftovers()
    owner = Owner()
    reader = PeerSegments(LIMIT_BYTES)
    try:
        said, fds = owner.hear()
        reader.add(said["segment"], fds[0], said["size"])
        place = (said["segment"], said["offset"])
        seen = reader.view(*place, REGION_BYTES)
        assert int(seen.min()) == int(seen.max()) == 1
        owner.ask("write")
        assert int(seen.min()) == int(seen.max()) == 2
        assert reader.check(*place, said["generation"])
        assert ours_in_dev_shm() == []
        owner.kill()
        assert select.select([owner.sock], [], [], REPLY_S_MAX)[0]
        late = reader.view(*place, REGION_BYTES)
        assert int(late.min()) == int(late.max()) == 2
        assert reader.check(*place, said["generation"])
    finally:
        owner.close()
        reader.close()
    assert ours_in_dev_shm() == []
    del seen, late
    assert leftovers() == before


def test_reader_in_another_process_notices_that_the_memory_was_given_away() -> None:
    owner = Owner()
    reader = PeerSegments(LIMIT_BYTES)
    try:
        said, fds = owner.hear()
        reader.add(said["segment"], fds[0], said["size"])
        place = (said["segment"], said["offset"])
        assert reader.check(*place, said["generation"])
        owner.ask("give away")
        assert int(reader.view(*place, 1)[0]) == 3, "the same bytes, now another region's"
        assert not reader.check(*place, said["generation"])
    finally:
        owner.close()
        reader.close()


def test_forked_child_that_collects_and_exits_leaves_the_parents_memory_alone() -> None:
    done = run_script("""
        import gc, os, sys
        from elastic_run.collectives.arena import Arena
        from elastic_run.collectives.peer_segments import PeerSegments
        arena, reader = Arena(16 << 20), PeerSegments(16 << 20)
        region = arena.allocate(1 << 20)
        region.tensor.fill_(5)
        reader.add(region.segment, os.dup(arena.fd_of(region.segment)), arena.size_of(region.segment))
        seen = reader.view(region.segment, region.offset, region.nbytes)
        for tidy in (False, True):
            child = os.fork()
            if child == 0:
                if tidy:
                    del arena, reader, region, seen
                    gc.collect()
                    assert "elastic-collectives" not in open("/proc/self/maps").read()
                sys.exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            assert int(seen.sum()) == int(region.tensor.sum()) == 5 << 20
            assert reader.check(region.segment, region.offset, region.generation)
            arena.validate()
    """)
    assert (done.returncode, done.stderr) == (0, "")


def test_system_without_memory_or_descriptors_is_an_error_that_leaves_nothing() -> None:
    done = run_script("""
        import os, resource
        from elastic_run.collectives.arena import Arena
        from elastic_run.collectives.errors import CollectiveError
        arena = Arena(1 << 40)
        first = arena.allocate(1 << 20)
        before = sorted(os.listdir("/proc/self/fd"))

        def refused(kind, soft, nbytes):
            old = resource.getrlimit(kind)
            resource.setrlimit(kind, (soft, old[1]))
            try:
                arena.allocate(nbytes)
            except CollectiveError as error:
                print(error)
            finally:
                resource.setrlimit(kind, old)

        refused(resource.RLIMIT_FSIZE, 1 << 20, 8 << 20)
        refused(resource.RLIMIT_NOFILE, 3, 8 << 20)
        in_use = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        refused(resource.RLIMIT_AS, in_use + (16 << 20), 64 << 20)
        assert sorted(os.listdir("/proc/self/fd")) == before
        arena.validate()
        assert arena.allocate(8 << 20).segment > first.segment
    """)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    assert "File too large" in lines[0]
    assert "Too many open files" in lines[1]
    assert "Cannot allocate memory" in lines[2]


@pytest.mark.parametrize("writable", [True, False])
def test_write_to_memory_mapped_for_reading_ends_the_writer_and_harms_nobody(writable: bool) -> None:
    done = run_script(f"""
        import os, resource
        from elastic_run.collectives.arena import Arena
        from elastic_run.collectives.peer_segments import PeerSegments
        arena, reader = Arena(16 << 20), PeerSegments(16 << 20)
        region = arena.allocate(1 << 20)
        size_bytes = arena.size_of(region.segment)
        reader.add(region.segment, os.dup(arena.fd_of(region.segment)), size_bytes, writable={writable})
        child = os.fork()
        if child == 0:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            reader.view(region.segment, region.offset, region.nbytes).fill_(1)
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), int(region.tensor.sum()))
    """)
    expected = f"0 {1 << 20}" if writable else f"{-signal.SIGSEGV} 0"
    assert (done.returncode, done.stdout.strip()) == (0, expected)
