"""Writes the uncaught exception of the script where torch elastic's `record` would: TORCHELASTIC_ERROR_FILE, same JSON.

Invariants (tests/integration/test_bootstrap.py):
1. A file that the script's own `record` wrote is left alone.
2. The file is whole or absent; that it could not be written is said, and changes nothing else.
3. Only a plain file is ever replaced.
Not here: reading it (agent/failure.py).
"""

import os
import stat
from contextlib import suppress

from elastic_run.runtime.edge.notice import notice

MESSAGE_CHARS_MAX = 16 * 1024
CALLSTACK_CHARS_MAX = 256 * 1024
_CUT = "\n... (cut) ...\n"


def write_error_file(path: str, error: BaseException) -> None:
    """Record `error` at `path` unless something is recorded there already."""
    try:
        if not _recorded(path):
            _write_whole(path, _document(error))
    except Exception as problem:  # noqa: BLE001 - formatting runs the script's code; its own error must come out unchanged
        notice(f"could not write the error file {path}: {type(problem).__name__}: {problem}")


def _recorded(path: str) -> bool:
    """True when the script recorded its error itself. Raises OSError when `path` is anything but a plain file."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return False
    if not stat.S_ISREG(status.st_mode):  # the rename below would put a file in the place of a device such as /dev/null
        raise OSError("it is no plain file")
    return status.st_size > 0


def _document(error: BaseException) -> bytes:
    # Loaded only on failure; most runs never need them.
    import json
    import time
    import traceback

    try:
        text = str(error)
    except Exception:  # noqa: BLE001 - whatever the script's __str__ raises
        text = "<no text: its __str__ failed>"
    callstack = "".join(traceback.format_exception(error))
    message = {
        "message": _bounded(f"{type(error).__name__}: {text}", MESSAGE_CHARS_MAX),
        "extraInfo": {
            "py_callstack": _bounded(callstack, CALLSTACK_CHARS_MAX),
            "timestamp": str(int(time.time())),
        },
    }
    return json.dumps({"message": message}).encode()


def _bounded(text: str, chars_max: int) -> str:
    """Keep both ends: the first lines say where it came from, the last ones what it was."""
    if len(text) <= chars_max:
        return text
    half = (chars_max - len(_CUT)) // 2
    return text[:half] + _CUT + text[-half:]


def _write_whole(path: str, data: bytes) -> None:
    partial = f"{path}.{os.getpid()}"
    fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
        os.replace(partial, path)
    except OSError:
        with suppress(OSError):
            os.unlink(partial)
        raise
