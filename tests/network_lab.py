"""Opens a network laboratory for a test, or skips the test with the reason why this system does not permit one."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from elastic_run.chaos.network.lab import Lab, LabUnavailable


@contextmanager
def lab_or_skip(*hosts: str, seed: int = 0) -> Iterator[Lab]:
    """Yield an open laboratory with these hosts and close it after the test."""
    try:
        lab = Lab(hosts, seed=seed)
    except LabUnavailable as error:
        pytest.skip(str(error))
    with lab:
        yield lab
