"""Logging of the long-running processes: one line an entry on stderr, JSON unless stderr is a terminal.

`ELASTIC_RUN_LOG` sets the level (debug, info, warning, error); what a person at the terminal needs is announced
elsewhere, so the default is warning.
"""

import json
import logging
import os
import sys

from elastic_run.runtime.protocol.errors import UserError

LEVEL_VARIABLE = "ELASTIC_RUN_LOG"
LEVELS = ("debug", "info", "warning", "error")


class _JsonLines(logging.Formatter):
    def __init__(self, context: dict[str, str]) -> None:
        super().__init__()
        self._context = context

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "at": round(record.created, 3),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **self._context,
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry)


class OutageLog:
    """Says once that something is away, and once that it is back, however often it is tried between."""

    def __init__(self, log: logging.Logger, what: str) -> None:
        self._log, self._what = log, what
        self._since: float | None = None

    @property
    def away(self) -> bool:
        return self._since is not None

    def failed(self, now: float, error: Exception) -> None:
        """Take note of a failed try at monotonic time `now`."""
        if self._since is None:
            self._since = now
            self._log.warning("%s is away: %s", self._what, error)

    def worked(self, now: float) -> None:
        """Take note of a try that worked."""
        if self._since is not None:
            self._log.warning("%s is back after %.1f s", self._what, now - self._since)
            self._since = None


def set_up_logging(process: str, **context: str) -> None:
    """Log to stderr; every line names the process and the context. Raises UserError for an unknown level."""
    level = os.environ.get(LEVEL_VARIABLE, "warning").lower()
    if level not in LEVELS:
        raise UserError(f"{LEVEL_VARIABLE}={level} is no level: take one of {', '.join(LEVELS)}")
    handler = logging.StreamHandler(sys.stderr)
    if sys.stderr.isatty():
        handler.setFormatter(logging.Formatter(f"elastic-{process}: %(levelname)s: %(message)s"))
    else:
        handler.setFormatter(_JsonLines({"process": process, **context}))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
