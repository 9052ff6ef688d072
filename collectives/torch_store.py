"""Waiting for keys of a torch Store, whatever kind of store it is.

Invariants: 1. every wait is bounded: stores take a time below a millisecond for no limit at all
(tests/integration/test_torch_backend.py).
"""

from collections.abc import Sequence
from datetime import timedelta

from torch._C._distributed_c10d import Store
from torch.distributed import DistNetworkError, DistStoreError

from elastic_run.collectives.torch_errors import BackendError

SHORTEST_WAIT_S = 0.001


def came(store: Store, keys: Sequence[str], timeout_s: float) -> bool:
    """Say whether all `keys` were there within `timeout_s`. Raises BackendError when the store itself is gone."""
    try:
        if timeout_s < SHORTEST_WAIT_S:
            return bool(store.check(list(keys)))
        store.wait(list(keys), timedelta(seconds=timeout_s))
    except DistStoreError:
        return False
    except DistNetworkError as error:
        raise BackendError(f"the store of the process group is gone: {error}") from error
    except RuntimeError as error:
        if "timeout" in str(error).lower():  # what a FileStore says
            return False
        raise
    return True
