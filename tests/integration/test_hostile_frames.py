"""Whatever comes in at a worker's ports: its link closes, the process lives, nothing grows, honest members go on."""

import os
import random
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import hostile_peer as hostile
import pytest
import torch
from hostile_peer import WORLD, HostileMember, Shot, data_frame, frame, memfd, region_frame
from mesh_workers import SECRET, Crew, Site, until

import elastic_run.collectives
from elastic_run.collectives import handshake, wire
from elastic_run.collectives.endpoint import DataView, Endpoint
from elastic_run.collectives.errors import CollectiveAborted, CollectiveMismatch
from elastic_run.collectives.group import Group
from elastic_run.collectives.mesh import STRANGERS_MAX
from elastic_run.collectives.messages import EAGER_BYTES_MAX, UNEXPECTED_BYTES_MAX
from elastic_run.collectives.wire import POINT_TO_POINT, Header, Kind, RegionRef

SEEDS = range(4)
GROWTH_BYTES_MAX = 24 << 20
NUMEL = {"messages": 2000, "shared memory": 300_000}


# The honest side ------------------------------------------------------------------------------------------------------


def honest(site: Site) -> None:
    """Do what the test says, until it says end."""
    view = 0
    while True:
        match site.hear():
            case "end":
                return
            case "count":
                site.tell((len(os.listdir("/proc/self/fd")), _resident_bytes(), len(site.mesh._peers)))
            case ("install", others):
                view += 1
                members = (*site.endpoints, *(Endpoint.from_text(text) for text in others))
                group = site.mesh.install(DataView(number=view, members=members))
                site.tell(view)
            case ("work", numel):
                site.tell(_work(group, numel))


def _work(group: Group, numel: int) -> tuple[str, str | None, bool]:
    """All-reduce; return how it ended, who is blamed, and whether the value is what it must then be."""
    before = torch.arange(numel) % 13 + group.rank
    value = before.clone()
    try:
        group.all_reduce([value], timeout_s=20).wait()
    except (CollectiveAborted, CollectiveMismatch) as error:
        culprit = error.culprit if isinstance(error, CollectiveAborted) else str(error)
        return type(error).__name__, culprit, torch.equal(value, before)
    wanted = torch.arange(numel) % 13 * group.size + sum(range(group.size))
    return "done", None, torch.equal(value, wanted)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096


def ask(crew: Crew, question: object) -> list[object]:
    """Ask every worker the same; return the answers."""
    for rank in range(len(crew.processes)):
        crew.tell(rank, question)
    return [crew.hear(rank) for rank in range(len(crew.processes))]


def descriptors(crew: Crew, rank: int = 0) -> int:
    crew.tell(rank, "count")
    return int(crew.hear(rank)[0])


def assert_unharmed(
    crew: Crew, before: Sequence[tuple[int, int, int]], growth_bytes_max: int = GROWTH_BYTES_MAX
) -> None:
    """The workers still reduce, and have let go of everything that came from outside."""
    for numel in NUMEL.values():
        assert ask(crew, ("work", numel)) == [("done", None, True)] * len(crew.processes)
    for rank, (count, resident, peers) in enumerate(before):
        until(lambda rank=rank, count=count: descriptors(crew, rank) <= count)
        crew.tell(rank, "count")
        _, resident_now, peers_now = crew.hear(rank)
        assert peers_now == peers
        assert resident_now - resident < growth_bytes_max


@pytest.fixture
def crew() -> Iterator[Crew]:
    """Two workers in view 1 that have worked together."""
    with Crew(2, honest) as crew:
        ask(crew, ("install", []))
        for numel in NUMEL.values():
            ask(crew, ("work", numel))
        yield crew


@pytest.fixture
def before(crew: Crew) -> list[tuple[int, int, int]]:
    return ask(crew, "count")  # type: ignore[return-value]


# What is thrown at it -------------------------------------------------------------------------------------------------


def random_frame(rng: random.Random, kind: Kind, view: int) -> bytes:
    """A frame whose head passes the first look, with nonsense in it; now and then one that does not pass."""
    length = {Kind.DATA: rng.choice([0, 1, 100, 30_000]), Kind.ABORT: 20, Kind.BYE: 20}.get(kind, 0)
    if kind in (Kind.STAGED, Kind.RELEASE, Kind.SEGMENT):
        length = wire.REGION_BYTES
    offset = rng.choice([0, 0, 1, 1 << 40])
    header = Header(
        kind,
        view=rng.choice([view, view, 0, view + 1, (1 << 64) - 1]),
        group=rng.choice([WORLD, 1, rng.getrandbits(32)]),
        sequence=rng.choice([0, 1, 2, rng.getrandbits(64)]),
        slot=rng.choice([0, 1, POINT_TO_POINT, POINT_TO_POINT | 5, rng.getrandbits(32)]),
        check=rng.getrandbits(32),
        total=rng.choice([length, offset + length, 1 << 45, 1 << 50]),
        offset=offset,
        length=length,
    )
    payload = rng.choice([rng.randbytes(length), b"a\0b".ljust(length, b"x")[:length]])
    if length == wire.REGION_BYTES and rng.random() < 0.8:
        offset, nbytes = rng.choice([0, 64, 1 << 40]), rng.choice([0, 100, 1 << 40])
        payload = wire.pack_region(RegionRef(rng.choice([1, 2]), offset, rng.getrandbits(62), nbytes))
    packed = bytearray(frame(header, payload, rng.choice([wire.VALID, wire.VOID, b"!"]) if kind is Kind.DATA else b""))
    if rng.random() < 0.05:
        packed[rng.randrange(len(packed))] ^= 1 << rng.randrange(8)
    return bytes(packed)


def random_shots(rng: random.Random, view: int, count: int) -> Iterator[Shot]:
    kinds = list(Kind)
    for _ in range(count):
        data = random_frame(rng, rng.choice(kinds), view)
        if rng.random() < 0.1:
            with open(os.devnull, "rb") as file:
                yield data, (file.fileno(),) * rng.choice([1, 3])
        else:
            yield data, ()
    yield random_frame(rng, Kind.DATA, view)[: rng.randrange(1, 56)], ()


def knocks(rng: random.Random) -> list[bytes]:
    """What strangers say instead of a handshake."""
    greeting = hostile.greeting("evil", "w0")
    return [
        b"",
        b"GET / HTTP/1.1\r\nHost: w0\r\n\r\n",
        rng.randbytes(rng.randrange(1, 20_000)),
        bytes(1 << 20),
        greeting[: rng.randrange(1, len(greeting))],
        greeting + rng.randbytes(handshake.PROOF_BYTES),
        greeting + bytes(1 << 20),
        hostile.greeting("w1", "w0") + rng.randbytes(handshake.PROOF_BYTES),
        greeting.replace(b"ELDP", b"ELDQ"),
        struct.pack("<4sHH32sBB128s128s", b"ELDP", 1, 0, bytes(32), 255, 255, b"\xff" * 128, b"\xff" * 128),
    ]


# Strangers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unix", [False, True], ids=["tcp", "unix"])
def test_who_does_not_know_the_secret_gets_nowhere(crew: Crew, before: list[tuple[int, int, int]], unix: bool) -> None:
    rng = random.Random(1)
    for _ in range(5):
        for words in knocks(rng):
            sock = hostile.connect(crew.endpoints[0], unix=unix)
            with sock:
                hostile.shoot(sock, [(words, ())])
                if words:
                    hostile.finish(sock)
                    assert hostile.closed(sock)
    assert_unharmed(crew, before)


def test_a_recorded_greeting_and_proof_are_refused_the_second_time(
    crew: Crew, before: list[tuple[int, int, int]]
) -> None:
    hello = hostile.greeting("evil", "w0")
    with hostile.connect(crew.endpoints[0], unix=False) as sock:
        sock.sendall(hello)
        proof = handshake.proof(SECRET, hello, hostile.read(sock, handshake.CHALLENGE_BYTES))
        sock.sendall(proof)
    with hostile.connect(crew.endpoints[0], unix=False) as sock:
        sock.sendall(hello + proof)
        hostile.read(sock, handshake.CHALLENGE_BYTES)
        assert hostile.closed(sock)
    assert_unharmed(crew, before)


def test_a_greeting_meant_for_another_worker_is_refused(crew: Crew, before: list[tuple[int, int, int]]) -> None:
    with hostile.connect(crew.endpoints[0], unix=False) as sock:
        hostile.prove(sock, hostile.greeting("evil", "w1"), SECRET)
        assert hostile.closed(sock)
    with hostile.connect(crew.endpoints[0], unix=False) as sock:
        hostile.prove(sock, hostile.greeting("w0", "w0"), SECRET)
        assert hostile.closed(sock)
    assert_unharmed(crew, before)


def test_who_only_stands_in_the_door_keeps_nobody_out_and_is_sent_away(crew: Crew) -> None:
    """More connections than have room: silent ones, and some that say their greeting byte by byte."""
    before = ask(crew, "count")
    hello = hostile.greeting("evil", "w0")
    idle = [hostile.connect(crew.endpoints[0], unix=False) for _ in range(3 * STRANGERS_MAX)]
    try:
        for sock in idle[::2]:
            sock.sendall(hello[:7])
        with hostile.dial(crew.endpoints[0], SECRET, "late") as late:
            late.sendall(frame(Header(Kind.VIEW, view=1)))
        for numel in NUMEL.values():
            assert ask(crew, ("work", numel)) == [("done", None, True)] * 2
        assert all(hostile.closed(sock) for sock in idle)
    finally:
        for sock in idle:
            sock.close()
    assert_unharmed(crew, before)  # type: ignore[arg-type]


# With the secret, but in no view --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("unix", [False, True], ids=["tcp", "unix"])
def test_frames_of_a_worker_that_is_in_no_view_change_nothing(
    crew: Crew, before: list[tuple[int, int, int]], seed: int, unix: bool
) -> None:
    rng = random.Random(seed)
    for turn in range(40):
        with hostile.dial(crew.endpoints[turn % 2], SECRET, f"evil{turn % 7}", unix=unix) as sock:
            hostile.shoot(sock, random_shots(rng, 1, 50))
    assert_unharmed(crew, before)


def floods(view: int) -> dict[str, Callable[[int], bytes]]:
    small = bytes(EAGER_BYTES_MAX)
    text = wire.pack_text("w1", "because I say so")
    return {
        "DATA": lambda i: data_frame(Header(Kind.DATA, view, i + 1, i, 0, 0, len(small), 0, len(small)), small),
        "empty DATA": lambda i: data_frame(Header(Kind.DATA, view, i + 1, i), b""),
        "tagged DATA": lambda i: data_frame(Header(Kind.DATA, view, WORLD, i, POINT_TO_POINT | i), b""),
        "GRANT": lambda i: frame(Header(Kind.GRANT, view, WORLD, 1000 + i)),
        "OFFER": lambda i: frame(Header(Kind.OFFER, view, i + 1, i, POINT_TO_POINT | i, total=1 << 30)),
        "ABORT": lambda i: frame(Header(Kind.ABORT, view, i + 1, length=len(text)), text),
        "RELEASE": lambda i: region_frame(Kind.RELEASE, RegionRef(1, 64, i, 10), view=view),
        "VIEW": lambda i: frame(Header(Kind.VIEW, view=i % 2)),
        "stale STAGED": lambda i: region_frame(Kind.STAGED, RegionRef(1, 64, i, 10), view=view + 1, total=10),
        "BYE": lambda i: frame(Header(Kind.BYE, view, length=len(text)), text),
    }


FLOOD_FRAMES = 200_000


@pytest.mark.parametrize("name", list(floods(1)))
def test_floods_of_a_worker_that_is_in_no_view_are_forgotten(
    crew: Crew, before: list[tuple[int, int, int]], name: str
) -> None:
    make = floods(1)[name]
    count = 3000 if name == "DATA" else FLOOD_FRAMES
    with hostile.dial(crew.endpoints[0], SECRET) as sock:
        for start in range(0, count, 1000):
            hostile.shoot(sock, [(b"".join(make(i) for i in range(start, start + 1000)), ())])
        ask(crew, ("work", NUMEL["messages"]))
        _, resident, _ = ask(crew, "count")[0]  # type: ignore[misc]
        assert resident - before[0][1] < GROWTH_BYTES_MAX
    assert_unharmed(crew, before)


def test_connections_of_one_worker_are_counted(crew: Crew, before: list[tuple[int, int, int]]) -> None:
    socks = [hostile.dial(crew.endpoints[0], SECRET)]
    try:
        socks += [hostile.dial(crew.endpoints[0], SECRET, lane=1) for _ in range(handshake.LANES_MAX + 5)]
        assert hostile.closed(socks[-1])
    finally:
        for sock in socks:
            sock.close()
    assert_unharmed(crew, before)


# A member that turns --------------------------------------------------------------------------------------------------


def shared(fd_size: int, region: RegionRef, said: Header, **how: int) -> Callable[[Header], list[Shot]]:
    """Announce a segment, then show a region of it as the peer's part of the operation."""

    def shots(heard: Header) -> list[Shot]:
        fd = memfd(fd_size, **how)
        segment = region_frame(Kind.SEGMENT, RegionRef(1, 0, 0, said.total or fd_size), view=heard.view)
        total = said.offset or heard.total
        piece = RegionRef(region.segment, region.offset, region.generation, region.nbytes or total)
        staged = region_frame(Kind.STAGED, piece, **_place(heard), check=heard.check, total=said.length or piece.nbytes)
        return [(segment, (fd,)), (staged, ())]

    return shots


def _place(heard: Header) -> dict[str, int]:
    return {"view": heard.view, "group": heard.group, "sequence": heard.sequence, "slot": heard.slot}


def _segment_with(fd: int, said: int, heard: Header) -> list[Shot]:
    return [(region_frame(Kind.SEGMENT, RegionRef(1, 0, 0, said), view=heard.view), (fd,))]


def _file(_heard: Header) -> list[Shot]:
    fd = os.open(os.devnull, os.O_RDWR)
    return _segment_with(fd, 1 << 20, _heard)


BIG = 4 << 20
NOTHING = Header(Kind.STAGED)
SHARED_LIES: dict[str, Callable[[Header], list[Shot]]] = {
    "region of no segment": lambda heard: [(wire.pack(heard) + wire.pack_region(RegionRef(7, 64, 1, heard.total)), ())],
    "segment without descriptor": lambda heard: [
        (region_frame(Kind.SEGMENT, RegionRef(1, 0, 0, BIG), view=heard.view), ())
    ],
    "descriptors nobody announced": lambda heard: [(frame(Header(Kind.VIEW, view=heard.view)), (1,) * 60)] * 3,
    "a descriptor that is no memfd": _file,
    "memfd without seals": lambda heard: _segment_with(memfd(BIG, seals=0), BIG, heard),
    "memfd smaller than said": lambda heard: _segment_with(memfd(4096), BIG, heard),
    "memfd larger than said": lambda heard: _segment_with(memfd(BIG), 4096, heard),
    "memfd of a few bytes": lambda heard: _segment_with(memfd(8), 8, heard),
    "memfd of huge pages": lambda heard: _segment_with(memfd(BIG, flags=os.MFD_HUGETLB), BIG, heard),
    "segment beyond the limit": lambda heard: _segment_with(memfd(1 << 40), 1 << 40, heard),
    "segment twice": lambda heard: [shot for _ in range(2) for shot in _segment_with(memfd(BIG), BIG, heard)],
    "region behind the end": shared(4096, RegionRef(1, 64, 1, 0), NOTHING),
    "region far behind the end": shared(BIG, RegionRef(1, 1 << 50, 1, 0), NOTHING),
    "region before its header": shared(BIG, RegionRef(1, 0, 1, 0), NOTHING),
    "region at an odd place": shared(BIG, RegionRef(1, 65, 1, 0), NOTHING),
    "region of another generation": shared(BIG, RegionRef(1, 64, 12345, 0), NOTHING),
    "region of other size than said": shared(BIG, RegionRef(1, 64, 1, 64), Header(Kind.STAGED, length=128)),
}
DATA_LIES: dict[str, Callable[[Header], list[Shot]]] = {
    "garbage": lambda heard: [(b"\xff" * 100, ())],
    "half a frame": lambda heard: [(wire.pack(heard._replace(offset=0))[:20], ())],
    "half a payload": lambda heard: [(wire.pack(heard._replace(length=heard.total)) + bytes(10), ())],
    "no closing byte": lambda heard: [(wire.pack(heard) + bytes(heard.length) + b"!", ())],
    "more than the message": lambda heard: [(data_frame(heard._replace(length=64), bytes(64)), ())] * 1000,
    "large message unasked": lambda heard: [
        (data_frame(heard._replace(sequence=99, total=1 << 30, length=8), bytes(8)), ())
    ],
    "the same twice": lambda heard: [(data_frame(heard._replace(sequence=99), bytes(heard.length)), ())] * 2,
    "piece of a small tagged message": lambda heard: [
        (data_frame(heard._replace(slot=POINT_TO_POINT, length=8), bytes(8)), ())
    ],
    "tagged message twice": lambda heard: (
        [(data_frame(heard._replace(slot=POINT_TO_POINT), bytes(heard.length)), ())] * 2
    ),
    "offer of an untagged message": lambda heard: [(frame(heard._replace(kind=Kind.OFFER, length=0)), ())],
    "text that is none": lambda heard: [(frame(heard._replace(kind=Kind.ABORT, length=3), b"\0\0\0"), ())],
    "release of what others hold": lambda heard: [(frame(heard._replace(kind=Kind.RELEASE, length=3), b"abc"), ())],
    "grants for nothing": lambda heard: [
        (b"".join(frame(heard._replace(kind=Kind.GRANT, sequence=i, length=0)) for i in range(70_000)), ())
    ],
    "small messages without end": lambda heard: [
        (data_frame(heard._replace(sequence=100 + i), bytes(heard.length)), ())
        for i in range(UNEXPECTED_BYTES_MAX // heard.length + 2)
    ],
    "empty messages without end": lambda heard: [
        (b"".join(data_frame(heard._replace(group=j, sequence=i, total=0, length=0), b"") for j in range(1, 1001)), ())
        for i in range(150)
    ],
    "tags without end": lambda heard: [
        (
            b"".join(
                data_frame(heard._replace(slot=POINT_TO_POINT | j + 1000 * i, sequence=1, total=0, length=0), b"")
                for j in range(1000)
            ),
            (),
        )
        for i in range(150)
    ],
}


def turns(crew: Crew, evil: HostileMember, numel: int, lie: Callable[[Header], list[Shot]]) -> None:
    """One view with the hostile member, in which it lies to w0; then one without it, in which all is well."""
    view = ask(crew, ("install", [evil.endpoint.to_text()]))[0]
    assert isinstance(view, int)
    line = evil.join(crew.endpoints, view)[0]
    for rank in range(2):
        crew.tell(rank, ("work", numel))
    heard = evil.hear("w0", Kind.DATA if numel == NUMEL["messages"] else Kind.STAGED)
    shots = lie(heard)
    hostile.shoot(line, shots)
    for descriptor in {fd for _, fds in shots for fd in fds if fd > 2}:
        os.close(descriptor)
    hostile.finish(line)  # whoever waits for the rest of it sees that there is none
    answers = [crew.hear(rank) for rank in range(2)]
    assert [answer[::2] for answer in answers] == [("CollectiveAborted", True)] * 2, answers
    assert [answer[1] for answer in answers] == ["evil", "evil"]
    evil.hang_up()
    ask(crew, ("install", []))


def test_a_member_that_lies_about_shared_memory_is_named_and_left_out(
    crew: Crew, before: list[tuple[int, int, int]]
) -> None:
    with HostileMember(SECRET) as evil:
        for name, lie in SHARED_LIES.items():
            try:
                turns(crew, evil, NUMEL["shared memory"], lie)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from error
    assert_unharmed(crew, before)


def test_a_member_that_lies_in_messages_is_named_and_left_out(crew: Crew, before: list[tuple[int, int, int]]) -> None:
    """What it makes others keep is bounded, and the allocator's rest of it serves the next such attempt."""
    with HostileMember(SECRET, local=False) as evil:
        for name, lie in DATA_LIES.items():
            try:
                turns(crew, evil, NUMEL["messages"], lie)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from error
        assert_unharmed(crew, before, UNEXPECTED_BYTES_MAX + GROWTH_BYTES_MAX)
        again: list[tuple[int, int, int]] = ask(crew, "count")  # type: ignore[assignment]
        for name, lie in DATA_LIES.items():
            if name.endswith("without end"):
                turns(crew, evil, NUMEL["messages"], lie)
    assert_unharmed(crew, again)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_member_that_sends_nonsense_ends_its_views_only(
    crew: Crew, before: list[tuple[int, int, int]], seed: int
) -> None:
    rng = random.Random(seed)
    with HostileMember(SECRET) as evil:
        for _ in range(10):
            view = ask(crew, ("install", [evil.endpoint.to_text()]))[0]
            assert isinstance(view, int)
            lines = evil.join(crew.endpoints, view)
            for rank in range(2):
                crew.tell(rank, ("work", NUMEL["messages"]))
            hostile.shoot(lines[0], random_shots(rng, view, 100))
            evil.hang_up()
            answers = [crew.hear(rank) for rank in range(2)]
            assert all(answer[0] in ("CollectiveAborted", "CollectiveMismatch") and answer[2] for answer in answers)
            ask(crew, ("install", []))
    assert_unharmed(crew, before)


def test_an_operation_of_another_kind_is_a_mismatch_that_names_its_sender(crew: Crew) -> None:
    with HostileMember(SECRET, local=False) as evil:
        view = ask(crew, ("install", [evil.endpoint.to_text()]))[0]
        assert isinstance(view, int)
        line = evil.join(crew.endpoints, view)[0]
        for rank in range(2):
            crew.tell(rank, ("work", NUMEL["messages"]))
        heard = evil.hear("w0", Kind.DATA)
        hostile.shoot(line, [(data_frame(heard._replace(check=zlib.crc32(b"other")), bytes(heard.length)), ())])
        ended, who, unchanged = crew.hear(0)
        assert (ended, unchanged) == ("CollectiveMismatch", True)
        assert "evil sent another operation" in who
        assert crew.hear(1)[::2] == ("CollectiveAborted", True)


# The source -----------------------------------------------------------------------------------------------------------


def test_nothing_in_the_data_plane_can_unpickle() -> None:
    """Neither pickle and its kin, nor what uses them: torch.load, multiprocessing, shelve."""
    words = ("pickle", "marshal", "shelve", "torch.load", "multiprocessing", "eval(", "exec(", "__reduce__", "dill")
    found = [
        f"{path.name}: {word}"
        for path in Path(str(elastic_run.collectives.__file__)).parent.rglob("*.py")
        if not path.name.startswith("torch_")  # the facade: object collectives are torch's own, above our bytes
        for word in words
        if word in path.read_text(encoding="utf-8")
    ]
    assert found == []
