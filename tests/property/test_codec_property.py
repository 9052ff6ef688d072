"""Every record type comes back from its document as it was; nothing else comes back at all."""

import dataclasses
import enum
import json
import math
import types
import typing
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from elastic_run.runtime.protocol import codec
from elastic_run.runtime.protocol.config import AgentConfig, ControllerConfig, JobConfig, StoreConfig
from elastic_run.runtime.protocol.errors import CodecError, VersionMismatch
from elastic_run.runtime.protocol.records import CurrentView, EventRecord, JobResult, JobSpec, LeaderRecord, NodeRecord
from elastic_run.runtime.protocol.view import View

KINDS: list[type] = [
    AgentConfig,
    ControllerConfig,
    CurrentView,
    EventRecord,
    JobConfig,
    JobResult,
    JobSpec,
    LeaderRecord,
    NodeRecord,
    StoreConfig,
    View,
]
TEXT = st.text(st.characters(codec="utf-8"), max_size=12)


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a record's field type; the types `codec` knows and no other."""
    while hasattr(hint, "__supertype__"):
        hint = hint.__supertype__
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        (bare,) = [arg for arg in typing.get_args(hint) if arg is not type(None)]
        return st.none() | values(bare)
    if origin is tuple:
        return st.lists(values(typing.get_args(hint)[0]), max_size=3).map(tuple)
    if dataclasses.is_dataclass(hint):
        return records(typing.cast(type, hint))
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return st.sampled_from(hint)
    simple: dict[Any, st.SearchStrategy[Any]] = {
        str: TEXT,
        int: st.integers(-(2**62), 2**62) | st.integers(0, 3),
        float: st.floats(allow_nan=False, allow_infinity=False),
        bool: st.booleans(),
    }
    return simple[hint]


@st.composite
def records(draw: st.DrawFn, kind: type) -> Any:
    """A record; what its own __post_init__ refuses is put right or passed over."""
    hints = typing.get_type_hints(kind)
    fields = {field.name: draw(values(hints[field.name])) for field in dataclasses.fields(kind)}
    if kind is JobConfig:
        fields["nodes_min"], fields["nodes_max"] = sorted((abs(fields["nodes_min"]) + 1, abs(fields["nodes_max"]) + 1))
        fields["max_restarts"], fields["last_call_s"] = abs(fields["max_restarts"]), abs(fields["last_call_s"])
        fields["join_timeout_s"] = abs(fields["join_timeout_s"]) or 1.0
    if "nproc" in fields:
        fields["nproc"] = abs(fields["nproc"]) + 1
    if kind is View:
        fields["number"], fields["restart_count"] = abs(fields["number"]) + 1, abs(fields["restart_count"])
    try:
        return kind(**fields)
    except ValueError:
        assume(False)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_record_comes_back_as_it_was(kind: type) -> None:
    @settings(max_examples=40)
    @given(records(kind))
    def round_trip(record: Any) -> None:
        data = codec.encode(record)
        assert codec.decode(kind, data, where="k") == record
        assert codec.encode(codec.decode(kind, data, where="k")) == data

    round_trip()


@settings(max_examples=60)
@given(st.sampled_from(KINDS), st.sampled_from(KINDS).flatmap(records))
def test_a_document_of_another_record_is_refused(kind: type, other: Any) -> None:
    assume(type(other) is not kind)
    with pytest.raises(CodecError, match=r"^k: "):
        codec.decode(kind, codec.encode(other), where="k")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)


@given(record=records(View), data=st.data())
def test_one_changed_field_is_refused_or_means_the_same(record: View, data: st.DataObject) -> None:
    document = json.loads(codec.encode(record))
    name = data.draw(st.sampled_from(sorted(document)))
    value = data.draw(JSON)
    document[name] = value
    try:
        found = codec.decode(View, json.dumps(document).encode(), where="k")
    except (CodecError, VersionMismatch):
        return
    kept = getattr(found, name, None)
    plain = json.loads(codec.encode(found))[name]
    if isinstance(kept, float) and isinstance(value, int | float):
        assert math.isclose(kept, value)
    else:
        assert plain == value and type(plain) is type(value)


@given(st.binary(max_size=60))
def test_bytes_that_are_no_document_are_refused(data: bytes) -> None:
    with pytest.raises((CodecError, VersionMismatch)):
        codec.decode(CurrentView, data, where="k")
