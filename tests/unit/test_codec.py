"""Strictness of the JSON codec."""

import dataclasses
import json

import pytest

from elastic_run.runtime.protocol import codec
from elastic_run.runtime.protocol.config import JobConfig
from elastic_run.runtime.protocol.errors import CodecError, VersionMismatch
from elastic_run.runtime.protocol.ids import PROTOCOL_VERSION, JobId

JOB = JobConfig(job_id=JobId("j"), nodes_min=1, nodes_max=2, max_restarts=0)


def document(**changes: object) -> bytes:
    fields = {**json.loads(codec.encode(JOB)), **changes}
    return json.dumps({k: v for k, v in fields.items() if v is not ...}).encode()


def test_equal_records_are_equal_bytes() -> None:
    assert codec.encode(JOB) == codec.encode(dataclasses.replace(JOB))
    assert codec.decode(JobConfig, codec.encode(JOB), where="x") == JOB


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "not a JSON"),
        (b"\xff\xfe", "not a JSON"),
        (b"[]", "expected a JSON object"),
        (b"{}", "no protocol version"),
        (b'{"protocol":true}', "no protocol version"),
        (b'{"protocol":1,"protocol":1}', "twice"),
        (b"[" * 100_000, "not a JSON"),
        (document(record="View"), "expected a JobConfig"),
        (document(surprise=1), "unknown field 'surprise'"),
        (document(nodes_min=...), "field 'nodes_min' of JobConfig is missing"),
        (document(nodes_min="1"), "nodes_min: expected int, found str"),
        (document(nodes_min=True), "nodes_min: expected int, found bool"),
        (document(nodes_min=3), "not a range"),
        (document(last_call_s=float("nan")), "NaN is not allowed"),
        (b"x" * (codec.DOCUMENT_BYTES_MAX + 1), "over the limit"),
    ],
)
def test_anything_else_is_refused_and_the_place_is_named(data: bytes, says: str) -> None:
    with pytest.raises(CodecError, match=says) as caught:
        codec.decode(JobConfig, data, where="/elastic/j/spec")
    assert str(caught.value).startswith("/elastic/j/spec: ")


def test_another_protocol_version_is_refused_naming_both() -> None:
    with pytest.raises(VersionMismatch, match=f"version 99, this program speaks {PROTOCOL_VERSION}"):
        codec.decode(JobConfig, document(protocol=99), where="k")
