"""What `codec` refuses to write, and what no record may be made of."""

import json
from dataclasses import dataclass

import pytest
from builders import agent_config, job_config, view

from elastic_run.runtime.protocol import codec
from elastic_run.runtime.protocol.config import AgentConfig, JobConfig
from elastic_run.runtime.protocol.errors import CodecError, InvariantViolated, StoreCompacted
from elastic_run.runtime.protocol.view import View


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoSorts:
    field: int | str


@dataclass(frozen=True, slots=True, kw_only=True)
class Selfnamed:
    protocol: int


def changed(record: object, **changes: object) -> bytes:
    return json.dumps({**json.loads(codec.encode(record)), **changes}).encode()


def test_a_record_too_large_for_the_store_is_not_written() -> None:
    with pytest.raises(CodecError, match="over the limit"):
        codec.encode(view(1, reason="x" * (codec.DOCUMENT_BYTES_MAX + 1)))


@pytest.mark.parametrize("thing", [{"a": 1}, JobConfig, "text", None])
def test_only_instances_of_records_are_written(thing: object) -> None:
    with pytest.raises(CodecError, match="is not a record"):
        codec.encode(thing)


def test_a_field_is_of_one_type_or_absent() -> None:
    with pytest.raises(CodecError, match="only Optional unions"):
        codec.decode(TwoSorts, codec.encode(TwoSorts(field=1)), where="k")


def test_a_record_can_not_take_the_documents_own_names() -> None:
    with pytest.raises(InvariantViolated, match="Selfnamed"):
        codec.decode(Selfnamed, changed(job_config()).replace(b"JobConfig", b"Selfnamed"), where="k")


def test_a_nested_record_must_be_an_object() -> None:
    with pytest.raises(CodecError, match="expected an object for JobConfig, found int"):
        codec.decode(AgentConfig, changed(agent_config(), job=7), where="k")


def test_a_whole_number_is_a_duration() -> None:
    assert codec.decode(JobConfig, changed(job_config(), last_call_s=7), where="k").last_call_s == 7.0


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"number": 0}, "view 0"),
        ({"restart_count": -1}, "restart count -1"),
        ({"members": [{"node": "a", "incarnation": "i", "address": "x", "nproc": 0}]}, "brings 0 workers"),
        ({"status": "lost"}, "'lost' is none of"),
    ],
)
def test_an_impossible_view_is_refused_where_it_lies(changes: dict[str, object], says: str) -> None:
    with pytest.raises(CodecError, match=says) as caught:
        codec.decode(View, changed(view(1), **changes), where="/elastic/j/views/1")
    assert str(caught.value).startswith("/elastic/j/views/1")


@pytest.mark.parametrize("changes", [{"max_restarts": -1}, {"last_call_s": -0.1}, {"join_timeout_s": 0}])
def test_impossible_job_settings_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(CodecError, match="must not be negative"):
        codec.decode(JobConfig, changed(job_config(), **changes), where="k")


def test_a_compacted_history_says_from_where_it_goes_on() -> None:
    error = StoreCompacted(42)
    assert error.revision == 42 and "before revision 42" in str(error)
