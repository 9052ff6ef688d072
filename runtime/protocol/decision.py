"""A decision carries its reason: a sentence with numbers, logged when it changes."""

from dataclasses import dataclass
from typing import Generic, TypeVar

T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True, slots=True)
class Decision(Generic[T_co]):
    value: T_co
    reason: str
