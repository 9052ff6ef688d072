"""The worker's hand-written half of worker.proto against the generated code."""

import contextlib

from hypothesis import given
from hypothesis import strategies as st

from elastic_run.runtime.edge import worker_wire
from elastic_run.runtime.edge.worker_wire import Refused, Resume, Welcome
from elastic_run.runtime.protocol.errors import CodecError
from elastic_run.runtime.protocol.proto import worker_pb2

U64 = st.integers(0, 2**64 - 1)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)


@given(version=st.integers(0, 2**32 - 1), worker=TEXT, pid=U64, view=U64, step=U64, unasked=st.booleans())
def test_what_the_worker_writes_the_generated_code_writes_too(
    version: int, worker: str, pid: int, view: int, step: int, unasked: bool
) -> None:
    pairs = [
        (
            worker_wire.hello(protocol_version=version, worker=worker, pid=pid),
            worker_pb2.WorkerMessage(hello=worker_pb2.Hello(protocol_version=version, worker=worker, pid=pid)),
        ),
        (
            worker_wire.parked(view=view, step=step),
            worker_pb2.WorkerMessage(parked=worker_pb2.Parked(view=view, step=step)),
        ),
        (
            worker_wire.running(view=view, step=step, unasked=unasked),
            worker_pb2.WorkerMessage(running=worker_pb2.Running(view=view, step=step, unasked=unasked)),
        ),
    ]
    for written, message in pairs:
        assert written == message.SerializeToString()
        assert worker_pb2.WorkerMessage.FromString(written) == message


@given(view=U64, reason=TEXT)
def test_what_the_agent_writes_the_worker_reads(view: int, reason: str) -> None:
    welcome = worker_pb2.AgentMessage(welcome=worker_pb2.Welcome(view=view))
    refused = worker_pb2.AgentMessage(refused=worker_pb2.Refused(reason=reason))
    resume = worker_pb2.AgentMessage(resume=worker_pb2.Resume(view=view))
    assert worker_wire.parse(welcome.SerializeToString()) == Welcome(view)
    assert worker_wire.parse(refused.SerializeToString()) == Refused(reason)
    assert worker_wire.parse(resume.SerializeToString()) == Resume(view)


@given(packet=st.binary(max_size=64))
def test_any_bytes_are_a_message_or_a_codec_error(packet: bytes) -> None:
    with contextlib.suppress(CodecError):
        assert isinstance(worker_wire.parse(packet), (Welcome, Refused, Resume))
