"""What every test may rely on: a current etcd on PATH, and no environment of an outer job."""

import os
import sys
from pathlib import Path

_UNPACKED_ETCD = Path(sys.prefix) / "etcd" / "usr" / "bin"  # tools/set_up.sh
if _UNPACKED_ETCD.is_dir():
    os.environ["PATH"] = f"{_UNPACKED_ETCD}{os.pathsep}{os.environ['PATH']}"

for _name in [name for name in os.environ if name.startswith(("PET_", "ELASTIC_RUN_", "TORCHELASTIC_"))]:
    del os.environ[_name]
