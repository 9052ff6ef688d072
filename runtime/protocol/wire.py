"""Message dataclasses <-> protobuf, by equal names of messages and fields.

Invariants:
1. Every dataclass of messages.py has a protobuf message with exactly its fields (tests/unit/test_wire.py).
2. from_bytes(to_bytes(m)) == m (tests/property/test_wire_property.py).
3. Bytes that are not such a message, lack a sub-message, or name an unknown enum value raise CodecError.
"""

import dataclasses
import enum
import functools
import re
import types
import typing
from typing import Any, TypeVar

from google.protobuf.message import DecodeError, Message

from elastic_run.runtime.protocol import messages
from elastic_run.runtime.protocol.errors import CodecError
from elastic_run.runtime.protocol.messages import AgentMessage, ControllerMessage
from elastic_run.runtime.protocol.proto import control_pb2

MESSAGE_BYTES_MAX = 16 * 1024 * 1024  # a status report of 10,000 nodes is about 3 MiB

T = TypeVar("T")


def agent_to_bytes(message: AgentMessage) -> bytes:
    return _wrap(control_pb2.AgentMessage(), message)


def agent_from_bytes(data: bytes) -> AgentMessage:
    return typing.cast(AgentMessage, _unwrap(control_pb2.AgentMessage(), data))


def controller_to_bytes(message: ControllerMessage) -> bytes:
    return _wrap(control_pb2.ControllerMessage(), message)


def controller_from_bytes(data: bytes) -> ControllerMessage:
    return typing.cast(ControllerMessage, _unwrap(control_pb2.ControllerMessage(), data))


def to_bytes(message: Any) -> bytes:
    """Serialise a message that travels without an envelope (the status service)."""
    target = getattr(control_pb2, type(message).__name__)()
    _fill(target, message)
    return typing.cast(bytes, target.SerializeToString())


def from_bytes(kind: type[T], data: bytes) -> T:
    return typing.cast(T, _read(kind, _parse(getattr(control_pb2, kind.__name__)(), data)))


def _wrap(envelope: Any, message: Any) -> bytes:
    field = _snake(type(message).__name__)
    body = getattr(envelope, field)
    body.SetInParent()  # a message whose fields are all default must still be said
    _fill(body, message)
    return typing.cast(bytes, envelope.SerializeToString())


def _unwrap(envelope: Any, data: bytes) -> Any:
    field = _parse(envelope, data).WhichOneof("body")
    if field is None:
        raise CodecError(f"{type(envelope).__name__} of {len(data)} bytes has no body this version knows")
    body = getattr(envelope, field)
    return _read(getattr(messages, type(body).__name__), body)


def _parse(target: Any, data: bytes) -> Any:
    try:
        target.ParseFromString(data)
    except DecodeError as error:
        raise CodecError(f"{len(data)} bytes are no {type(target).__name__}: {error}") from None
    return target


@functools.cache
def _snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


_HINTS: dict[type, tuple[tuple[str, Any, bool], ...]] = {}


def _hints(kind: type) -> tuple[tuple[str, Any, bool], ...]:
    """(field, type without Optional, is optional) of a message dataclass."""
    if kind not in _HINTS:
        _HINTS[kind] = tuple(_hint(name, hint) for name, hint in typing.get_type_hints(kind).items())
    return _HINTS[kind]


def _hint(name: str, hint: Any) -> tuple[str, Any, bool]:
    optional = typing.get_origin(hint) in (typing.Union, types.UnionType)
    if optional:
        hint = next(member for member in typing.get_args(hint) if member is not type(None))
    while hasattr(hint, "__supertype__"):  # NewType
        hint = hint.__supertype__
    return name, hint, optional


def _fill(target: Any, source: Any) -> None:
    for name, hint, optional in _hints(type(source)):
        value = getattr(source, name)
        if optional and value is None:
            continue
        if isinstance(value, tuple):
            for item in value:
                _fill(getattr(target, name).add(), item)
        elif dataclasses.is_dataclass(hint):
            getattr(target, name).SetInParent()
            _fill(getattr(target, name), value)
        else:
            setattr(target, name, str(value) if isinstance(value, enum.Enum) else value)


def _read(kind: Any, source: Message) -> Any:
    values: dict[str, Any] = {}
    for name, hint, optional in _hints(kind):
        value = getattr(source, name)
        if optional:
            values[name] = value if source.HasField(name) else None
        elif typing.get_origin(hint) is tuple:
            values[name] = tuple(_read(typing.get_args(hint)[0], item) for item in value)
        elif dataclasses.is_dataclass(hint):
            if not source.HasField(name):
                raise CodecError(f"{kind.__name__} came without its {name}")
            values[name] = _read(hint, value)
        elif isinstance(hint, type) and issubclass(hint, enum.Enum):
            try:
                values[name] = hint(value)
            except ValueError:
                raise CodecError(f"{kind.__name__}.{name} is {value!r}, which this version does not know") from None
        else:
            values[name] = value
    return kind(**values)
