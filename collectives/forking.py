"""What a forked child inherits of meshes: nothing but descriptors, which it closes without a word to anybody.

Not here: what a mesh lets go of then (mesh.py).
"""

import os
import weakref
from typing import Protocol


class Abandonable(Protocol):
    def abandon(self) -> None:
        """In a forked child: let go of the descriptors, say nothing to anybody."""


_LIVING: "weakref.WeakSet[Abandonable]" = weakref.WeakSet()


def watch(thing: Abandonable) -> None:
    """Have it abandoned in every child that this process forks."""
    _LIVING.add(thing)


def ended(thing: Abandonable) -> None:
    """It has nothing left to let go of."""
    _LIVING.discard(thing)


def _abandon_all() -> None:
    for thing in list(_LIVING):
        thing.abandon()
    _LIVING.clear()


os.register_at_fork(after_in_child=_abandon_all)
