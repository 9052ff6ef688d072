"""One line of ours on the worker's stderr, which the script owns: it may be closed, replaced or None, and nothing
fails.

Not here: the agent's log; errors of the script itself, which Python prints.
"""

import sys


def notice(text: str) -> None:
    """Say `text` on stderr, or nowhere when the script has no usable one."""
    stream = sys.stderr
    if stream is None:
        return
    try:
        stream.write(f"elastic-run: {text}\n")
        stream.flush()
    except (OSError, ValueError):  # closed, or its reader is gone: there is no other place to say it
        return
