"""Counts finished optimizer steps into the telemetry file, through torch's public hooks common to all optimizers.

Changes: one global pre and one global post hook, registered when `torch.optim.optimizer` is imported. Counted are the
steps of the first optimizer that steps, so one training step of a script with several optimizers counts once; when that
one is gone, the next that steps takes its place. An optimizer whose `step` calls the `step` of a parent class counts
twice.
Does nothing without elastic-run: nobody registers it.
Invariants (tests/integration/test_safe_point.py): 1. the count is the number of finished steps of that optimizer; 2.
the callback runs after the step's effects, in the thread that stepped.
Not here: where the marks go (edge/telemetry_writer.py); what happens between steps (safe_point.py).
"""

import time
import weakref
from collections.abc import Callable
from types import ModuleType

from elastic_run.runtime.edge.notice import notice
from elastic_run.runtime.edge.telemetry_layout import Phase
from elastic_run.runtime.edge.telemetry_writer import TelemetryWriter


class StepCounter:
    """Counts into one telemetry file, and calls `after_step` with each new count."""

    def __init__(self, telemetry: TelemetryWriter, after_step: Callable[[int], None]) -> None:
        self._telemetry = telemetry
        self._after_step = after_step
        self._counted: Callable[[], object] | None = None  # weak: the script decides how long its optimizer lives
        self._start_ns = 0

    def install(self, module: ModuleType) -> None:
        """Register with `torch.optim.optimizer`."""
        try:
            register_before = module.register_optimizer_step_pre_hook
            register_after = module.register_optimizer_step_post_hook
        except AttributeError as error:
            notice(f"this torch has no optimizer hooks ({error}): steps are not counted, stops are not graceful")
            return
        register_before(self._before)
        register_after(self._after)

    def _before(self, optimizer: object, _args: object, _kwargs: object) -> None:
        if self._counted is None or self._counted() is None:
            if self._counted is None:
                self._telemetry.set_phase(Phase.RUNNING)
            self._counted = weakref.ref(optimizer)
        if self._counted() is optimizer:
            self._start_ns = time.monotonic_ns()

    def _after(self, optimizer: object, _args: object, _kwargs: object) -> None:
        if self._counted is not None and self._counted() is optimizer:
            self._after_step(self._telemetry.record_step(self._start_ns, time.monotonic_ns()))
