"""grpc without its native log, which would write lines of its own to the stderr that scripts and people read.

grpc reads GRPC_VERBOSITY once, while it is imported; a user who sets it gets what was asked for, and no worker inherits
it from here. What fails comes back as an error and is told by us.
"""

import os

_NAME = "GRPC_VERBOSITY"
_ours = _NAME not in os.environ
if _ours:
    os.environ[_NAME] = "NONE"

import grpc  # noqa: E402
import grpc.aio  # noqa: E402

if _ours:
    del os.environ[_NAME]

__all__ = ["grpc"]
