"""Every message comes back from its bytes as it was; foreign bytes raise one kind of error."""

import contextlib
import dataclasses
import enum
import types
import typing
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_run.runtime.protocol import messages, wire
from elastic_run.runtime.protocol.errors import CodecError
from elastic_run.runtime.protocol.messages import Hello, StatusReport

KINDS: list[type] = [
    kind for kind in vars(messages).values() if isinstance(kind, type) and dataclasses.is_dataclass(kind)
]
AGENT: list[type] = list(typing.get_args(messages.AgentMessage))
CONTROLLER: list[type] = list(typing.get_args(messages.ControllerMessage))
SIMPLE: dict[Any, st.SearchStrategy[Any]] = {
    str: st.text(st.characters(codec="utf-8"), max_size=12),
    int: st.integers(0, 2**31 - 1),
    float: st.floats(allow_nan=False),
    bool: st.booleans(),
}


def values(hint: Any) -> st.SearchStrategy[Any]:
    while hasattr(hint, "__supertype__"):
        hint = hint.__supertype__
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (bare,) = [arg for arg in typing.get_args(hint) if arg is not type(None)]
        return st.none() | values(bare)
    if typing.get_origin(hint) is tuple:
        return st.lists(values(typing.get_args(hint)[0]), max_size=3).map(tuple)
    if dataclasses.is_dataclass(hint):
        return instances(typing.cast(type, hint))
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return st.sampled_from(hint)
    return SIMPLE[hint]


def instances(kind: type) -> st.SearchStrategy[Any]:
    return st.builds(kind, **{name: values(hint) for name, hint in typing.get_type_hints(kind).items()})


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_message_comes_back_as_it_was(kind: type) -> None:
    @settings(max_examples=40)
    @given(instances(kind))
    def round_trip(message: Any) -> None:
        assert wire.from_bytes(kind, wire.to_bytes(message)) == message

    round_trip()


@given(st.sampled_from(AGENT).flatmap(instances))
def test_an_agents_envelope_keeps_kind_and_content(message: Any) -> None:
    found = wire.agent_from_bytes(wire.agent_to_bytes(message))
    assert type(found) is type(message) and found == message


@given(st.sampled_from(CONTROLLER).flatmap(instances))
def test_a_controllers_envelope_keeps_kind_and_content(message: Any) -> None:
    found = wire.controller_from_bytes(wire.controller_to_bytes(message))
    assert type(found) is type(message) and found == message


@given(st.binary(max_size=80))
def test_foreign_bytes_raise_nothing_but_a_codec_error(data: bytes) -> None:
    for read in (wire.agent_from_bytes, wire.controller_from_bytes):
        with contextlib.suppress(CodecError):
            read(data)
    for kind in (Hello, StatusReport):
        with contextlib.suppress(CodecError):
            wire.from_bytes(kind, data)


@given(instances(Hello), st.data())
def test_a_damaged_hello_is_refused_or_read_never_worse(message: Hello, data: st.DataObject) -> None:
    good = wire.agent_to_bytes(message)
    at = data.draw(st.integers(0, len(good) - 1))
    damaged = good[:at] + data.draw(st.binary(max_size=3)) + good[at + data.draw(st.integers(0, 3)) :]
    with contextlib.suppress(CodecError):
        wire.agent_from_bytes(damaged)
