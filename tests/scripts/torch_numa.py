"""Asks torch which CPUs it would bind workers to on made-up machines. Usage: torch_numa.py < CASES, a JSON list.

A case has `root` (instead of /sys), `mode`, `allowed` (CPUs), `gpus` (PCI bus of each). Prints a JSON list: for each
GPU the sorted CPUs, or null where torch fails.
"""

import io
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch.numa import binding


def answers(case: dict[str, Any]) -> list[list[int] | None]:
    def moved(path: str) -> str:
        return case["root"] + path.removeprefix("/sys")

    def properties(index: int) -> SimpleNamespace:
        return SimpleNamespace(pci_domain_id=0, pci_bus_id=case["gpus"][index], pci_device_id=0)

    replaced = {
        "open": lambda path: io.StringIO(Path(moved(path)).read_text()),
        "os": SimpleNamespace(
            path=os.path,
            listdir=lambda path: os.listdir(moved(path)),
            sched_getaffinity=lambda _: set(case["allowed"]),
        ),
        "torch": SimpleNamespace(
            cuda=SimpleNamespace(device_count=lambda: len(case["gpus"]), get_device_properties=properties)
        ),
    }
    for name, stand_in in replaced.items():
        setattr(binding, name, stand_in)
    options = binding.NumaOptions(affinity_mode=binding.AffinityMode(case["mode"]))
    result: list[list[int] | None] = []
    for index in range(len(case["gpus"])):
        try:
            found = binding._get_logical_cpus_to_bind_to(gpu_index=index, numa_options=options)
        except (RuntimeError, ValueError, OSError, ZeroDivisionError):
            found = set()
        result.append(sorted(found) or None)  # torch refuses an empty set one call later
    return result


if __name__ == "__main__":
    print(json.dumps([answers(case) for case in json.load(sys.stdin)]))
