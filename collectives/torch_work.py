"""What an operation of the torch facade returns: torch's `Work` over one or more operations of a group.

Invariants: 1. results are in the caller's tensors before `wait` returns, `is_completed` says True or the future
completes (tests/integration/test_torch_work.py); 2. every wait is bounded, by the group's time limit at the latest.
"""

import threading
import time
from collections.abc import Sequence
from datetime import timedelta

import torch
from torch import Tensor
from torch.distributed import Work

from elastic_run.collectives.operation import Operation
from elastic_run.collectives.staging import Staging
from elastic_run.collectives.torch_errors import as_torch
from elastic_run.collectives.torch_futures import FutureThreads, Promise

Result = Sequence[Tensor] | Sequence[Sequence[Tensor]]

NO_LIMIT = timedelta(0)
"""torch's way to say: wait as long as the operation may take."""


class ElasticWork(Work):
    """Operations under way; done when all are."""

    def __init__(self, parts: Sequence[tuple[Operation, Staging]], result: Result, threads: FutureThreads) -> None:
        super().__init__()
        self.parts = tuple(parts)
        self._result = result
        self._threads = threads
        self._lock = threading.Lock()
        self._promise: Promise | None = None
        self._running = len(self.parts)

    def wait(self, timeout: timedelta = NO_LIMIT) -> bool:
        """Return True with the results in place. Raises an error of torch_errors.py."""
        limit_s = timeout.total_seconds()
        deadline = time.monotonic() + limit_s if limit_s > 0 else None
        for operation, staging in self.parts:
            try:
                operation.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
            except Exception as error:
                raise as_torch(error) from error
            if staging.needed:
                staging.finish()
        return True

    def is_completed(self) -> bool:
        """Say whether it is over, well or not."""
        if not all(operation.done() for operation, _ in self.parts):
            return False
        self._finish()
        return True

    def is_success(self) -> bool:
        """Say whether it is over and gave its results."""
        return self.is_completed() and self.exception() is None

    def exception(self) -> BaseException | None:
        """Return what it failed with, if it has."""
        error = self._error()
        return None if error is None else as_torch(error)

    def get_future(self) -> "torch._C.Future[object]":  # type: ignore[override]  # as torch's own groups do
        """Return a future that completes with `result()`, or fails with a RuntimeError."""
        with self._lock:
            first = self._promise is None
            promise = self._promise = self._promise or Promise()
        if first:
            if not self.parts:
                promise.complete(self._result)
            for operation, _ in self.parts:
                operation.add_done_callback(self._part_done)
        return promise.future

    def result(self) -> list[Tensor]:
        """Return the tensors that have the result."""
        flat: list[Tensor] = []
        for item in self._result:
            flat.extend([item] if isinstance(item, Tensor) else item)
        return flat

    def synchronize(self) -> None:
        """Make the results usable by the current stream."""
        self._finish()

    def block_current_stream(self) -> None:
        """Wait: the data plane is the host's, no stream can wait for it."""
        self.wait()

    def source_rank(self) -> int:
        """Return the rank that a receive was answered by."""
        source = self.parts[0][0].source if self.parts else None
        if source is None:
            raise ValueError("only a receive that is over has a source")
        return source

    _source_rank = source_rank

    def _error(self) -> BaseException | None:
        return next((operation.error for operation, _ in self.parts if operation.error is not None), None)

    def _finish(self, *, other_thread: bool = False) -> None:
        for operation, staging in self.parts:
            if staging.needed and operation.done() and operation.error is None:
                staging.finish(other_thread=other_thread)

    def _part_done(self, _: Operation) -> None:
        with self._lock:
            self._running -= 1
            if self._running:
                return
        self._threads.submit(self._complete)

    def _complete(self) -> None:
        promise = self._promise
        if promise is None:
            return
        error = self._error()
        if error is not None:
            promise.fail(as_torch(error))
            return
        self._finish(other_thread=True)
        promise.complete(self._result)
