"""Writes private files whole or not at all, and reads them back.

Invariants (tests/unit/test_rundir.py):
1. A reader sees the old content or the new one, never a part; a failed write leaves the old one.
2. The file's mode is 0600 from its first moment.
Not here: where files lie (rundir.py), what is in them (protocol/codec.py).
"""

import os
from pathlib import Path

from elastic_run.runtime.protocol.errors import UserError


def write_private(path: Path, content: bytes) -> None:
    """Replace `path` by a file with this content. Raises UserError when the disk is full or the place not writable."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def read_bounded(path: Path, bytes_max: int) -> bytes:
    """Return the content, cut after `bytes_max` + 1 bytes so that a too large file shows as such. Raises UserError."""
    try:
        with path.open("rb") as file:
            return file.read(bytes_max + 1)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
