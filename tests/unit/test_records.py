"""What is accepted under a job's prefix."""

import pytest

from elastic_run.runtime.protocol import codec
from elastic_run.runtime.protocol.config import JobConfig
from elastic_run.runtime.protocol.errors import StoreCorrupt, VersionMismatch
from elastic_run.runtime.protocol.ids import Incarnation, JobId, NodeId, ViewNumber
from elastic_run.runtime.protocol.records import (
    CURRENT_KEY,
    SPEC_KEY,
    CurrentView,
    JobSpec,
    NodeRecord,
    decode_job,
    node_key,
)

JOB = JobId("j")
SPEC = JobSpec(job=JobConfig(job_id=JobId("j"), nodes_min=1, nodes_max=2, max_restarts=0), token="t")
NODE = NodeRecord(node=NodeId("a"), incarnation=Incarnation("i"), address="x", nproc=1)


def test_a_whole_job_is_read_back() -> None:
    records = decode_job(
        JOB,
        [
            (SPEC_KEY, codec.encode(SPEC)),
            (node_key(NodeId("a")), codec.encode(NODE)),
            (CURRENT_KEY, codec.encode(CurrentView(number=ViewNumber(4)))),
        ],
    )
    assert records.spec == SPEC
    assert records.nodes == (NODE,)
    assert records.current == CurrentView(number=ViewNumber(4))
    assert records.result is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (SPEC_KEY, b"not json"),
        (SPEC_KEY, codec.encode(NODE)),
        ("somebody-elses", b"{}"),
        ("nodes/b", codec.encode(NODE)),
        ("views/3", codec.encode(NODE)),
    ],
)
def test_corrupt_or_foreign_keys_are_named_in_one_sentence(key: str, value: bytes) -> None:
    with pytest.raises(StoreCorrupt) as caught:
        decode_job(JOB, [(key, value)])
    assert f"/elastic/j/{key}" in str(caught.value)
    assert "Nothing was changed" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_version_is_refused_as_such() -> None:
    with pytest.raises(VersionMismatch, match="version 2, this program speaks 1"):
        decode_job(JOB, [(SPEC_KEY, codec.encode(SPEC).replace(b'"protocol":1', b'"protocol":2'))])
