"""Strict JSON for frozen dataclasses: the form of every record in etcd and of every process's configuration file.

A document is `{"protocol": 1, "record": "View", ...fields}`. Encoding is canonical (sorted keys, no spaces), so equal
records are equal bytes.

Invariants:
1. decode(kind, encode(x)) == x for every record type (tests/property/test_codec_property.py).
2. Unknown, missing or mistyped fields, foreign kinds, other versions, oversized documents and duplicate keys are
   refused with CodecError or VersionMismatch, never guessed at (tests/unit/test_codec.py).
Not here: what the records mean (records.py, view.py); protobuf messages (proto/).
"""

import dataclasses
import enum
import functools
import json
import types
import typing
from typing import Any, TypeVar

from elastic_run.runtime.protocol.errors import CodecError, InvariantViolated, VersionMismatch
from elastic_run.runtime.protocol.ids import PROTOCOL_VERSION

DOCUMENT_BYTES_MAX = 1024 * 1024  # etcd refuses requests over 1.5 MiB

_HEADER = {"protocol", "record"}

T = TypeVar("T")


def encode(record: object) -> bytes:
    """Return the canonical document of a dataclass instance. Raises CodecError when it is too large for etcd."""
    document = {"protocol": PROTOCOL_VERSION, "record": type(record).__name__, **_plain_fields(record)}
    data = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    if len(data) > DOCUMENT_BYTES_MAX:
        raise CodecError(
            f"{type(record).__name__} encodes to {len(data)} bytes, over the limit of {DOCUMENT_BYTES_MAX}"
        )
    return data


def decode(kind: type[T], data: bytes, *, where: str) -> T:
    """Return the `kind` that `data` documents; `where` names its origin (a key, a file) in the error."""
    if len(data) > DOCUMENT_BYTES_MAX:
        raise CodecError(f"{where}: {len(data)} bytes, over the limit of {DOCUMENT_BYTES_MAX}")
    try:
        document = json.loads(data, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise CodecError(f"{where}: not a JSON document of this program ({error})") from None
    if not isinstance(document, dict):
        raise CodecError(f"{where}: expected a JSON object, found {type(document).__name__}")
    version = document.pop("protocol", None)
    if version is None or type(version) is not int:
        raise CodecError(f"{where}: has no protocol version: not written by this program")
    if version != PROTOCOL_VERSION:
        raise VersionMismatch(
            f"{where}: written with protocol version {version}, this program speaks {PROTOCOL_VERSION}"
        )
    found = document.pop("record", None)
    if found != kind.__name__:
        raise CodecError(f"{where}: expected a {kind.__name__}, found {found!r}")
    return typing.cast(T, _build(kind, document, where))


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice")
    return result


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not allowed")


def _plain_fields(record: object) -> dict[str, Any]:
    if not dataclasses.is_dataclass(record) or isinstance(record, type):
        raise CodecError(f"{type(record).__name__} is not a record")
    return {field.name: _plain(getattr(record, field.name)) for field in dataclasses.fields(record)}


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return _plain_fields(value)


@functools.cache
def _field_types(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    fields = {field.name: hints[field.name] for field in dataclasses.fields(kind)}
    if fields.keys() & _HEADER:
        raise InvariantViolated(f"{kind.__name__} has a field named like the document's own")
    return fields


def _build(kind: Any, value: Any, where: str) -> Any:
    fields = _field_types(kind)
    if not isinstance(value, dict):
        raise CodecError(f"{where}: expected an object for {kind.__name__}, found {type(value).__name__}")
    if unknown := sorted(value.keys() - fields.keys()):
        raise CodecError(f"{where}: unknown field {unknown[0]!r} in {kind.__name__}")
    if missing := sorted(fields.keys() - value.keys()):
        raise CodecError(f"{where}: field {missing[0]!r} of {kind.__name__} is missing")
    try:
        return kind(**{name: _convert(hint, value[name], f"{where}: {name}") for name, hint in fields.items()})
    except (ValueError, TypeError) as error:  # a record's own __post_init__ refused it
        raise CodecError(f"{where}: {error}") from None


def _convert(hint: Any, value: Any, where: str) -> Any:
    while hasattr(hint, "__supertype__"):  # NewType
        hint = hint.__supertype__
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return _convert_optional(hint, value, where)
    if origin is tuple:
        (item_hint, _ellipsis) = typing.get_args(hint)
        if not isinstance(value, list):
            raise CodecError(f"{where}: expected a list, found {type(value).__name__}")
        return tuple(_convert(item_hint, item, f"{where}[{i}]") for i, item in enumerate(value))
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        try:
            return hint(value)
        except ValueError:
            raise CodecError(f"{where}: {value!r} is none of {[member.value for member in hint]}") from None
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is hint:
        return value
    raise CodecError(f"{where}: expected {getattr(hint, '__name__', hint)}, found {type(value).__name__}")


def _convert_optional(hint: Any, value: Any, where: str) -> Any:
    members = [member for member in typing.get_args(hint) if member is not type(None)]
    if len(members) != 1:
        raise CodecError(f"{where}: only Optional unions are records")
    return None if value is None else _convert(members[0], value, where)
