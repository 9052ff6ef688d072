"""Errors of the data plane, below `ElasticError`.

    CollectiveError          an operation did not give its result
    ├── CollectiveAborted    a peer was lost, a view ended: expected, never logged as an error
    │   └── CollectiveTimeout  nobody said why, but the operation's time is over
    └── CollectiveMismatch   members disagree on what the operation is: names both sites

A wrong argument raises ValueError or TypeError at the call, before anything is sent.
"""

from typing import Self

from elastic_run.runtime.protocol.errors import ElasticError


class CollectiveError(ElasticError):
    """An operation did not give its result. Its input is unchanged."""

    def copy(self) -> Self:
        """Return an equal error that was not raised yet."""
        twin = type(self).__new__(type(self), *self.args)
        twin.__dict__.update(self.__dict__)
        return twin


class CollectiveAborted(CollectiveError):
    """The operation was interrupted: its input is byte-identical, its output undefined."""

    def __init__(self, reason: str, culprit: str | None = None) -> None:
        super().__init__(f"collective aborted: {reason}" + (f" (culprit: {culprit})" if culprit else ""))
        self.reason = reason
        self.culprit = culprit
        """Worker id of whoever is to blame; None: nobody, a newer view ended the operation."""


class CollectiveTimeout(CollectiveAborted):
    """The operation's time limit passed. The culprit is the peer that was waited for."""


class CollectiveMismatch(CollectiveError):
    """Members called different operations, sizes, types or algorithms at the same place of a group's sequence."""
