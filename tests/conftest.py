"""What every test may rely on: a current etcd on PATH, no environment of an outer job, usual signals, no deadlines."""

import os
import signal
import sys
from pathlib import Path

import hypothesis

_UNPACKED_ETCD = Path(sys.prefix) / "etcd" / "usr" / "bin"  # tools/set_up.sh
if _UNPACKED_ETCD.is_dir():
    os.environ["PATH"] = f"{_UNPACKED_ETCD}{os.pathsep}{os.environ['PATH']}"

for _name in [name for name in os.environ if name.startswith(("PET_", "ELASTIC_RUN_", "TORCHELASTIC_"))]:
    del os.environ[_name]

# Shells and nohup start programs with some of these ignored, and the programs under test rightly leave them so.
signal.signal(signal.SIGINT, signal.default_int_handler)
for _number in (signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM):
    signal.signal(_number, signal.SIG_DFL)

# The machines are shared: how long an example takes says nothing.
hypothesis.settings.register_profile("shared machine", deadline=None)
hypothesis.settings.load_profile("shared machine")
