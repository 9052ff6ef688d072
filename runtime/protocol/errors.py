"""The one tree of exceptions.

    ElasticError
    ├── UserError            bad flag, bad file, bad configuration: exit 2, one line that says what to do
    ├── PeerError            another process of the job is gone, refuses, or speaks another protocol
    │   ├── PeerRefused
    │   └── VersionMismatch
    ├── StoreError           etcd
    │   ├── StoreUnavailable no endpoint answered within the deadline
    │   ├── StoreDenied      wrong user, password, certificate or permission
    │   ├── StoreCompacted   the revision asked for is gone: list again
    │   ├── StoreCorrupt     a key under our prefix does not decode
    │   ├── StoreUncertain   it cannot be known whether a write was applied
    │   └── FenceLost        the writer no longer holds the lock its token names
    └── CodecError           a message or record that does not decode strictly
    InvariantViolated        our own mistake: stands outside, is never caught

Foreign errors are translated in the one module that touches the foreign library.
"""


class ElasticError(Exception):
    """Base of every error this project raises on purpose."""


class UserError(ElasticError):
    """The user's mistake. The message is one line that says what to do; the process exits with code 2."""


class PeerError(ElasticError):
    """Another process of the job failed us."""


class PeerRefused(PeerError):
    """The peer answered, and declined; the message is its reason."""


class VersionMismatch(PeerError):
    """The peer speaks another protocol version; the message names both."""


class StoreError(ElasticError):
    """Base of everything that can go wrong with etcd."""


class StoreUnavailable(StoreError):
    """No endpoint answered within the deadline."""


class StoreDenied(StoreError):
    """The store refused our credentials or permissions."""


class StoreCompacted(StoreError):
    """The asked revision was compacted away; `revision` is the oldest one that remains."""

    def __init__(self, revision: int) -> None:
        super().__init__(f"history before revision {revision} was compacted; list again and watch from there")
        self.revision = revision


class StoreCorrupt(StoreError):
    """A value under the job's prefix is not what this version writes."""


class StoreUncertain(StoreError):
    """A write may or may not have been applied, and it can no longer be found out."""


class FenceLost(StoreError):
    """The writer's fencing token is no longer the current one."""


class CodecError(ElasticError):
    """A record or message does not decode under the strict rules of `protocol.codec`."""


class InvariantViolated(AssertionError):
    """A promise this code makes to itself was broken. Never caught."""
