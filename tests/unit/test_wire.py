"""The protobuf schema and the message dataclasses say the same."""

import dataclasses
import typing

import pytest

from elastic_run.runtime.protocol import messages, wire
from elastic_run.runtime.protocol.errors import CodecError
from elastic_run.runtime.protocol.ids import ViewNumber
from elastic_run.runtime.protocol.messages import AgentPhase, AgentState, Heartbeat, Leaving, Prepare, Welcome
from elastic_run.runtime.protocol.proto import control_pb2

KINDS = [kind for kind in vars(messages).values() if dataclasses.is_dataclass(kind)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_each_dataclass_has_a_protobuf_message_with_exactly_its_fields(kind: type) -> None:
    descriptor = getattr(control_pb2, kind.__name__).DESCRIPTOR
    assert [field.name for field in descriptor.fields] == [f.name for f in dataclasses.fields(kind)]


def test_every_message_of_both_unions_has_a_place_in_its_envelope() -> None:
    for envelope, union in (("AgentMessage", messages.AgentMessage), ("ControllerMessage", messages.ControllerMessage)):
        fields = getattr(control_pb2, envelope).DESCRIPTOR.fields
        assert {f.message_type.name for f in fields} == {kind.__name__ for kind in typing.get_args(union)}


def test_a_message_of_nothing_but_defaults_still_arrives() -> None:
    welcome = Welcome(message="", current_view=ViewNumber(0))
    assert wire.controller_from_bytes(wire.controller_to_bytes(welcome)) == welcome
    assert wire.agent_from_bytes(wire.agent_to_bytes(Leaving(reason=""))) == Leaving(reason="")


def test_absent_and_zero_are_told_apart() -> None:
    for step in (None, 0, 7):
        message = Prepare(view=ViewNumber(3), reason="r", stop_at_step=step)
        assert wire.controller_from_bytes(wire.controller_to_bytes(message)) == message


@pytest.mark.parametrize("data", [b"", b"\xff" * 9, b"\x12\x00", b"garbage"])
def test_foreign_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(CodecError):
        wire.agent_from_bytes(data)


def test_an_unknown_enum_value_is_refused_by_name() -> None:
    state = AgentState(view=ViewNumber(1), phase=AgentPhase.IDLE)
    data = wire.agent_to_bytes(Heartbeat(state=state)).replace(b"idle", b"odd!")
    with pytest.raises(CodecError, match="'odd!'"):
        wire.agent_from_bytes(data)
