"""The event log: its numbers, its bounds, its place among the actions."""

from builders import view

from elastic_run.controller.actions import Action, Persist, Put, Send
from elastic_run.controller.journal import ENTRIES_PER_EVENT_MAX, MESSAGE_CHARS_MAX, Journal
from elastic_run.runtime.protocol.messages import Refused
from elastic_run.runtime.protocol.records import EVENTS_MAX, EventKind, EventRecord, event_key

SEND = Send(connection=1, message=Refused(reason="r"))


def entry(sequence: int) -> EventRecord:
    return EventRecord(sequence=sequence, at=0.0, kind=EventKind.NODE_LOST, message=f"m{sequence}")


def persist(number: int) -> Persist:
    return Persist(puts=(Put(key=f"views/{number}", record=view(number)),))


def events_of(action: Action) -> list[EventRecord]:
    assert isinstance(action, Persist)
    return [put.record for put in action.puts if isinstance(put.record, EventRecord)]


def test_without_entries_nothing_is_added() -> None:
    actions: list[Action] = [SEND]
    assert Journal().weave(actions) == [SEND]


def test_sequence_numbers_go_on_across_leaders() -> None:
    journal = Journal((entry(6), entry(7)))
    assert journal.last == "m7"
    journal.note(EventKind.NODE_JOINED, "x", node="a")
    journal.note(EventKind.NODE_JOINED, "y")
    (written,) = journal.weave([])
    assert [e.sequence for e in events_of(written)] == [8, 9]


def test_entries_carry_the_wall_clock_of_their_moment() -> None:
    journal = Journal()
    journal.wall = 1234.5
    journal.note(EventKind.VIEW_PROPOSED, "x", view=3)
    (written,) = journal.weave([])
    assert (events_of(written)[0].at, events_of(written)[0].view) == (1234.5, 3)


def test_an_entry_is_written_with_the_last_write_of_its_moment_never_before_what_it_tells() -> None:
    journal = Journal()
    journal.note(EventKind.VIEW_INSTALLED, "installed")
    woven = journal.weave([persist(1), persist(2), SEND])
    assert woven[0] == persist(1)
    assert [e.message for e in events_of(woven[1])] == ["installed"]
    assert woven[2] == SEND


def test_no_message_waits_for_an_entry_alone() -> None:
    journal = Journal()
    journal.note(EventKind.NODE_JOINED, "x")
    woven = journal.weave([SEND])
    assert woven[0] == SEND and events_of(woven[1])


def test_an_entry_is_written_once() -> None:
    journal = Journal()
    journal.note(EventKind.NODE_JOINED, "x")
    assert journal.weave([])
    assert journal.weave([]) == []


def test_an_entry_must_not_exist_and_pushes_the_oldest_out() -> None:
    journal = Journal((entry(EVENTS_MAX),))
    journal.note(EventKind.NODE_JOINED, "x")
    (written,) = journal.weave([])
    assert isinstance(written, Persist)
    assert written.deletes == (event_key(1),)
    assert all(put.create for put in written.puts)


def test_a_rack_that_goes_at_once_fits_one_transaction_without_a_gap() -> None:
    journal = Journal((entry(5 * EVENTS_MAX),))
    for i in range(500):
        journal.note(EventKind.NODE_LOST, f"n{i}")
    (written,) = journal.weave([])
    assert isinstance(written, Persist)
    assert len(written.puts) + len(written.deletes) <= 120
    shortened = events_of(written)
    assert [e.sequence - 5 * EVENTS_MAX for e in shortened] == list(range(1, ENTRIES_PER_EVENT_MAX + 2))
    assert shortened[-1].message == f"and {500 - ENTRIES_PER_EVENT_MAX} more entries of the same moment"
    journal.note(EventKind.NODE_LOST, "next")
    (after,) = journal.weave([])
    assert events_of(after)[0].sequence == shortened[-1].sequence + 1


def test_a_message_is_bounded() -> None:
    journal = Journal()
    journal.note(EventKind.NODE_LOST, "x" * 1_000_000)
    (written,) = journal.weave([])
    assert len(events_of(written)[0].message) == len(journal.last) == MESSAGE_CHARS_MAX
