"""The data plane's errors as a user of torch.distributed expects them.

A script that catches torch's `DistBackendError` (or RuntimeError) catches these; code of ours that catches
`CollectiveError` does too: each class is both.
Not here: wrong arguments, which raise ValueError or TypeError at the call, as everywhere.
"""

from torch.distributed import DistBackendError

from elastic_run.collectives.errors import (
    CollectiveAborted,
    CollectiveError,
    CollectiveMismatch,
    CollectiveTimeout,
)


class BackendError(CollectiveError, DistBackendError):
    """An operation did not give its result."""


class BackendAborted(CollectiveAborted, DistBackendError):
    """A peer was lost, or the group was closed or aborted, while the operation ran."""


class BackendTimeout(CollectiveTimeout, DistBackendError):
    """The operation's, the group's or the waiter's time limit passed."""


class BackendMismatch(CollectiveMismatch, DistBackendError):
    """The members called different operations."""


def as_torch(error: BaseException) -> BaseException:
    """Return `error` as one that torch's users know too; what is not ours is returned as it is."""
    if isinstance(error, DistBackendError) or not isinstance(error, CollectiveError):
        return error
    translated: CollectiveError
    if isinstance(error, CollectiveTimeout):
        # Scripts that were written for gloo look for these words.
        translated = BackendTimeout(f"Timed out waiting: {error.reason}", error.culprit)
    elif isinstance(error, CollectiveAborted):
        translated = BackendAborted(error.reason, error.culprit)
    elif isinstance(error, CollectiveMismatch):
        translated = BackendMismatch(str(error))
    else:
        translated = BackendError(str(error))
    translated.__cause__ = error
    return translated
