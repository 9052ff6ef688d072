"""The ring of steps against a plain list, and records torn in every order of stores."""

import itertools
import tempfile
from pathlib import Path

from hypothesis import example, given, settings
from hypothesis import strategies as st

from elastic_run.runtime.edge import telemetry_layout as layout
from elastic_run.runtime.edge.telemetry import TelemetryFile, create
from elastic_run.runtime.edge.telemetry_layout import record_word, seal
from elastic_run.runtime.edge.telemetry_writer import TelemetryWriter

TIMES_NS = st.integers(min_value=0, max_value=2**62)


@given(times=st.lists(st.tuples(TIMES_NS, st.integers(0, 2**40)), max_size=3 * layout.STEP_RECORDS))
@settings(max_examples=50, deadline=None)
def test_ring_holds_the_last_steps_in_order(times: list[tuple[int, int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "t")
        create(path, 0, 1, 1)
        writer = TelemetryWriter(path)
        expected = []
        for start_ns, length_ns in times:
            step = writer.record_step(start_ns, start_ns + length_ns)
            expected.append((step, start_ns, start_ns + length_ns))
        file = TelemetryFile(path)
        found = file.read()
        file.close()
    assert [(r.step, r.start_ns, r.end_ns) for r in found.records] == expected[-layout.STEP_RECORDS :]
    assert found.records_overwritten == max(0, len(times) - layout.STEP_RECORDS)
    assert (found.step, found.records_torn) == (len(times), 0)


@given(
    step=st.integers(layout.STEP_RECORDS + 1, 2**40),
    old=st.tuples(TIMES_NS, TIMES_NS).map(sorted),
    new=st.tuples(TIMES_NS, TIMES_NS).map(sorted),
)
@example(step=257, old=[0, 0], new=[1, 1])
@settings(max_examples=20, deadline=None)
def test_no_mixture_of_an_old_and_a_new_record_passes(step: int, old: list[int], new: list[int]) -> None:
    """Whatever subset of the four stores has arrived: the record is either wholly new or not returned."""
    before = _record(step - layout.STEP_RECORDS, *old)
    after = _record(step, *new)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "t")
        create(path, 0, 1, 1)
        file = TelemetryFile(path)
        words = file._words
        words[layout.STEP] = step
        at = record_word(step)
        for arrived in itertools.product((False, True), repeat=layout.RECORD_WORDS):
            for i, is_new in enumerate(arrived):
                words[at + i] = (after if is_new else before)[i]
            returned = [(r.step, r.start_ns, r.end_ns) for r in file.read().records]
            assert returned in ([], [tuple(after[1:])])
        del words
        file.close()


def _record(step: int, start_ns: int, end_ns: int) -> tuple[int, int, int, int]:
    return seal(step, start_ns, end_ns), step, start_ns, end_ns
