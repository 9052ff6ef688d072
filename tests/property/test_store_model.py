"""The in-memory store against a model that keeps every past state, and exactly-once against a transport that cheats."""

import asyncio
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from enum import StrEnum

from fake_store import FakeStore
from hypothesis import given, settings
from hypothesis import strategies as st
from mini_etcd import MiniEtcd

from elastic_run.runtime.edge.etcd_proto import rpc_pb2 as rpc
from elastic_run.runtime.edge.etcd_writer import AttemptFailed, OnceWriter, WriteOutcome, WriteRequest
from elastic_run.runtime.edge.store import (
    Compare,
    CompareOp,
    CompareTarget,
    Delete,
    EventKind,
    LeaseId,
    Put,
    Write,
)
from elastic_run.runtime.protocol.errors import StoreError, StoreUnavailable, StoreUncertain

KEYS = ("a", "a/x", "a/y", "b")
VALUES = (b"", b"1", b"2")


# The store model: the whole history as one dict per revision; every answer is read off it by brute force.


@dataclass(frozen=True)
class Cell:
    value: bytes
    created: int
    modified: int
    version: int


State = dict[str, Cell]


@dataclass
class Model:
    states: list[State] = field(default_factory=lambda: [{}, {}])  # index is the revision; etcd starts at 1

    @property
    def now(self) -> State:
        return self.states[-1]

    def txn(self, compares: list[Compare], then: list[Write]) -> bool:
        succeeded = all(self.holds(compare) for compare in compares)
        state = dict(self.now)
        revision = len(self.states)
        for write in then if succeeded else []:
            if isinstance(write, Delete):
                state = {
                    key: cell
                    for key, cell in state.items()
                    if not (key == write.key or (write.prefix and key.startswith(write.key)))
                }
            else:
                old = self.now.get(write.key)
                state[write.key] = Cell(
                    write.value, old.created if old else revision, revision, old.version + 1 if old else 1
                )
        self.states.append(state)
        return succeeded

    def holds(self, compare: Compare) -> bool:
        cell = self.now.get(compare.key)
        actual: int | bytes | None
        match compare.target:
            case CompareTarget.VALUE:
                actual = cell.value if cell else None
            case CompareTarget.VERSION:
                actual = cell.version if cell else 0
            case CompareTarget.CREATE_REVISION:
                actual = cell.created if cell else 0
            case CompareTarget.MOD_REVISION:
                actual = cell.modified if cell else 0
        if actual is None:
            return False
        match compare.op:
            case CompareOp.EQUAL:
                return actual == compare.operand
            case CompareOp.NOT_EQUAL:
                return actual != compare.operand
            case CompareOp.LESS:
                return actual < compare.operand  # type: ignore[operator]
            case CompareOp.GREATER:
                return actual > compare.operand  # type: ignore[operator]

    def changes(self, prefix: str, start: int) -> list[tuple[int, str, bytes | None, bytes | None]]:
        """(revision, key, value or None if deleted, value before) of each difference between neighbouring states."""
        found: list[tuple[int, str, bytes | None, bytes | None]] = []
        for revision in range(max(start, 1), len(self.states)):
            old, new = self.states[revision - 1], self.states[revision]
            for key in sorted({*old, *new}):
                if key.startswith(prefix) and old.get(key) != new.get(key):
                    before, after = old.get(key), new.get(key)
                    found.append((revision, key, after.value if after else None, before.value if before else None))
        return found


keys = st.sampled_from(KEYS)
compares = st.one_of(
    st.builds(
        lambda key, op, operand: Compare(key=key, target=CompareTarget.VALUE, op=op, operand=operand),
        keys,
        st.sampled_from(CompareOp),
        st.sampled_from(VALUES),
    ),
    st.builds(
        lambda key, target, op, operand: Compare(key=key, target=target, op=op, operand=operand),
        keys,
        st.sampled_from([target for target in CompareTarget if target is not CompareTarget.VALUE]),
        st.sampled_from(CompareOp),
        st.integers(0, 12),
    ),
)
puts = st.builds(lambda key, value: Put(key=key, value=value), keys, st.sampled_from(VALUES))
deletes = st.builds(lambda key: Delete(key=key), keys)
# One txn either deletes a whole prefix or touches single keys: etcd refuses to touch a key twice.
writes = st.one_of(
    st.lists(st.one_of(puts, deletes), max_size=3, unique_by=lambda write: write.key),
    st.just([Delete(key="a", prefix=True)]),
)
txns = st.lists(st.tuples(st.lists(compares, max_size=2), writes), max_size=12)


@given(txns, st.sampled_from(["", "a", "a/", "b"]), st.integers(1, 14))
def test_fake_store_agrees_with_a_model_that_keeps_every_state(
    transactions: list[tuple[list[Compare], list[Write]]], prefix: str, start: int
) -> None:
    asyncio.run(_compare_with_model(transactions, prefix, start))


async def _compare_with_model(transactions: list[tuple[list[Compare], list[Write]]], prefix: str, start: int) -> None:
    store, model = FakeStore(), Model()
    for conditions, then in transactions:
        expected = model.txn(conditions, then)
        result = await store.txn(conditions, then, KEYS)
        assert result.succeeded == expected
        assert result.revision == len(model.states) - 1
        if not expected:
            seen = {key: kv and kv.value for key, kv in zip(KEYS, result.current, strict=True)}
            assert seen == {key: model.now[key].value if key in model.now else None for key in KEYS}
    snapshot = await store.list(prefix)
    assert [(kv.key, Cell(kv.value, kv.create_revision, kv.mod_revision, kv.version)) for kv in snapshot.items] == [
        (key, cell) for key, cell in sorted(model.now.items()) if key.startswith(prefix)
    ]
    expected_changes = model.changes(prefix, start)
    got: list[tuple[int, str, bytes | None, bytes | None]] = []
    async with aclosing(store.watch(prefix, start)) as batches:
        while len(got) < len(expected_changes):
            batch = await anext(batches)
            got.extend(
                (
                    event.kv.mod_revision,
                    event.kv.key,
                    event.kv.value if event.kind is EventKind.PUT else None,
                    event.previous.value if event.previous else None,
                )
                for event in sorted(batch.events, key=lambda event: event.kv.key)
            )
    assert got == expected_changes


# Exactly once: each attempt meets a fate drawn by hypothesis; requests that were sent may arrive later, and twice.


class Fate(StrEnum):
    ANSWERED = "answered"
    ANSWERED_AND_REPEATED = "answered, and a copy arrives later"
    NOT_SENT = "not sent"
    LOST = "lost, no answer"
    ANSWER_LOST = "applied, no answer"
    LATE = "arrives later, no answer"
    OUT_OF_TIME = "lost, and the deadline passes"
    LATE_AND_OUT_OF_TIME = "arrives later, and the deadline passes"
    REFUSED = "definitely refused"


class OutOfTime(AttemptFailed):
    """The transport's way to tell its own `pause` that the deadline has passed."""


@dataclass
class Cheat:
    """A transport that treats each attempt as the next in its list says, and any further one well."""

    server: MiniEtcd
    attempts: list["Attempt"]
    late: list[rpc.TxnRequest] = field(default_factory=list)
    leases: int = 0

    async def txn(self, request: rpc.TxnRequest) -> rpc.TxnResponse:
        attempt = self.attempts.pop(0) if self.attempts else Attempt(fate=Fate.ANSWERED)
        for event, index in attempt.before:
            _happen(event, index, self)
        fate = attempt.fate
        match fate:
            case Fate.ANSWERED:
                return self.server.txn(request)
            case Fate.ANSWERED_AND_REPEATED:
                self.late.append(request)
                return self.server.txn(request)
            case Fate.ANSWER_LOST:
                self.server.txn(request)
            case Fate.LATE | Fate.LATE_AND_OUT_OF_TIME:
                self.late.append(request)
            case Fate.REFUSED:
                raise StoreError("refused")
            case Fate.NOT_SENT | Fate.LOST | Fate.OUT_OF_TIME:
                pass
        kind = OutOfTime if fate in (Fate.OUT_OF_TIME, Fate.LATE_AND_OUT_OF_TIME) else AttemptFailed
        raise kind(str(fate), endpoint="cheat", maybe_applied=fate is not Fate.NOT_SENT)

    async def pause(self, failed: AttemptFailed) -> None:
        if isinstance(failed, OutOfTime):
            raise StoreUnavailable("out of time")

    async def grant_marker_lease(self) -> LeaseId:
        self.leases += 1
        return LeaseId(self.leases)

    def deliver(self, index: int) -> None:
        if self.late:
            self.server.txn(self.late.pop(index % len(self.late)))


class Meanwhile(StrEnum):
    LATE_ARRIVAL = "a late request arrives"
    OTHER_WRITE = "another client toggles the key that compares look at"
    MARKERS_DELETED = "somebody deletes all markers"


PREFIX = b"/job/writers/"
TOGGLE = b"/job/toggle"
LOG = b"/job/log"


@dataclass
class Attempt:
    """What becomes of one attempt, and what happens just before it arrives."""

    fate: Fate
    before: list[tuple[Meanwhile, int]] = field(default_factory=list)


@dataclass
class Step:
    """One write of the client: the fates of its attempts, and whether it demands that the toggle be absent."""

    attempts: list[Attempt]
    conditional: bool


steps = st.lists(
    st.builds(
        Step,
        attempts=st.lists(
            st.builds(
                Attempt,
                fate=st.sampled_from(Fate),
                before=st.lists(st.tuples(st.sampled_from(Meanwhile), st.integers(0, 5)), max_size=2),
            ),
            max_size=6,
        ),
        conditional=st.booleans(),
    ),
    max_size=8,
)


def _request(number: int, *, conditional: bool) -> WriteRequest:
    absent = rpc.Compare(key=TOGGLE, target=rpc.Compare.VERSION, result=rpc.Compare.EQUAL, version=0)
    put = rpc.PutRequest(key=LOG, value=b"%d" % number)
    return WriteRequest(
        compares=[absent] if conditional else [],
        then=[rpc.RequestOp(request_put=put)],
        reads=[rpc.RequestOp(request_range=rpc.RangeRequest(key=TOGGLE))],
    )


def _happen(event: Meanwhile, index: int, cheat: Cheat) -> None:
    match event:
        case Meanwhile.LATE_ARRIVAL:
            cheat.deliver(index)
        case Meanwhile.OTHER_WRITE:
            if TOGGLE in cheat.server.keys:
                cheat.server.delete(TOGGLE)
            else:
                put = rpc.PutRequest(key=TOGGLE, value=b"on")
                cheat.server.txn(rpc.TxnRequest(success=[rpc.RequestOp(request_put=put)]))
        case Meanwhile.MARKERS_DELETED:
            cheat.server.delete(PREFIX)


@settings(max_examples=400)
@given(steps)
def test_every_write_happens_exactly_once_whatever_becomes_of_its_attempts(plan: list[Step]) -> None:
    asyncio.run(_write_through_a_cheat(plan))


async def _write_through_a_cheat(plan: list[Step]) -> None:
    server = MiniEtcd()
    cheat = Cheat(server=server, attempts=[])
    writer = OnceWriter(PREFIX)
    outcomes: list[WriteOutcome | StoreError] = []
    for number, step in enumerate(plan):
        cheat.attempts = list(step.attempts)
        begun = server.revision
        try:
            outcome = await writer.write(_request(number, conditional=step.conditional), cheat)
        except StoreError as error:
            outcomes.append(error)
            continue
        outcomes.append(outcome)
        assert begun < outcome.revision <= server.revision, "decided outside of the call"
        assert outcome.succeeded == (not (step.conditional and server.held_at(TOGGLE, outcome.revision)))
        if not outcome.succeeded:
            assert [[kv.value for kv in read.kvs] for read in outcome.reads] == [[b"on"]]
    while cheat.late:
        cheat.deliver(len(cheat.late) - 1)

    log = [(revision, int(value)) for revision, key, value in cheat.server.applied if key == LOG]
    numbers = [number for _, number in log]
    assert numbers == sorted(set(numbers)), "applied twice, or out of order"
    for number, told in enumerate(outcomes):
        if isinstance(told, WriteOutcome):
            assert (number in numbers) == told.succeeded
            if told.succeeded:
                assert (told.revision, number) in log
        elif not isinstance(told, StoreUncertain):
            assert number not in numbers, "reported as not written, but it was"


def test_a_write_whose_marker_vanished_unsent_is_made_with_a_new_marker() -> None:
    async def scenario() -> None:
        cheat = Cheat(server=MiniEtcd(), attempts=[])
        writer = OnceWriter(PREFIX)
        await writer.write(_request(0, conditional=False), cheat)
        cheat.server.delete(PREFIX)
        cheat.attempts = [Attempt(fate=Fate.NOT_SENT)]
        assert (await writer.write(_request(1, conditional=False), cheat)).succeeded
        assert cheat.leases == 2 and writer.marker_lease == 2

    asyncio.run(scenario())


def test_a_write_whose_marker_vanished_unanswered_is_uncertain_and_the_next_one_is_not() -> None:
    async def scenario() -> None:
        cheat = Cheat(server=MiniEtcd(), attempts=[])
        writer = OnceWriter(PREFIX)
        await writer.write(_request(0, conditional=False), cheat)
        cheat.server.delete(PREFIX)
        cheat.attempts = [Attempt(fate=Fate.LATE)]
        outcome: WriteOutcome | None = None
        with suppress(StoreUncertain):
            outcome = await writer.write(_request(1, conditional=False), cheat)
        assert outcome is None
        assert (await writer.write(_request(2, conditional=False), cheat)).succeeded
        cheat.deliver(0)
        assert [value for _, key, value in cheat.server.applied if key == LOG] == [b"0", b"2"]

    asyncio.run(scenario())


def test_a_marker_recreated_by_a_late_request_accepts_no_old_write() -> None:
    async def scenario() -> None:
        repeated = Attempt(fate=Fate.ANSWERED_AND_REPEATED)
        cheat = Cheat(server=MiniEtcd(), attempts=[repeated, repeated])  # the marker's creation, then the write
        assert (await OnceWriter(PREFIX).write(_request(0, conditional=False), cheat)).succeeded
        cheat.server.delete(PREFIX)
        cheat.deliver(0)
        assert any(key.startswith(PREFIX) for key in cheat.server.keys)
        cheat.deliver(0)
        assert [value for _, key, value in cheat.server.applied if key == LOG] == [b"0"]

    asyncio.run(scenario())
