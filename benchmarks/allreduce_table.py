"""The all-reduce benchmark's result as a table: a line for each case and system. Pure.

`bus GB/s` is 2 (W - 1) / W of the tensor's bytes over the time: what each member has to send and receive at least.
`speed-up` is gloo's time over the system's, from the median of paired ratios.
"""

from collections.abc import Mapping
from typing import Any

from benchmarks.report import target_lines

HEAD = ("workers", "dtype", "size", "system", "n", "median ms", "min", "max", "bus GB/s", "speed-up", "target")
BASELINE = "gloo"


def table(document: Mapping[str, Any]) -> str:
    """All results by case, then the targets on ratios that are not speed-ups, then what was left out."""
    results = document["results"]
    metrics = list(dict.fromkeys(metric for found in results.values() for metric in found))
    rows: list[tuple[str, ...]] = [HEAD]
    for metric in metrics:
        rows += [_row(document, metric, system) for system in results if metric in results[system]]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    others = [target for target in document.get("targets", []) if f": {BASELINE} / " not in target["name"]]
    lines += target_lines({"targets": others})
    lines += [f"left out: {system}: {why}" for system, why in document["conditions"].get("left_out", {}).items()]
    return "\n".join(lines)


def _row(document: Mapping[str, Any], metric: str, system: str) -> tuple[str, ...]:
    workers, _, dtype, size, _ = metric.split("_")
    found = document["results"][system][metric]
    nbytes = document["conditions"]["bytes"][size]
    moved = 2 * (int(workers) - 1) / int(workers) * nbytes
    times = [f"{found[key]:.3f}" for key in ("median", "min", "max")]
    gigabytes_per_s = moved / (found["median"] * 1e-3) / 1e9
    ratio = document["ratios"].get(f"{metric}: {system} / {BASELINE}")
    speed_up = f"{1 / ratio:.2f}" if ratio else ""
    target = _target(document, f"{metric}: {BASELINE} / {system}")
    return (workers, dtype, size, system, str(found["n"]), *times, f"{gigabytes_per_s:.2f}", speed_up, target)


def _target(document: Mapping[str, Any], name: str) -> str:
    for target in document.get("targets", []):
        if target["name"] == name:
            return f">= {target['at_least']:g} {'met' if target['met'] else 'MISSED'}"
    return ""
