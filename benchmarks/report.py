"""Turns the measured series into one JSON document and a table. Pure.

Document: `benchmark` · `machine` · `conditions` · `results` (system -> metric -> n, median, min, max, unit) ·
`ratios` and `differences` ("metric: candidate / baseline" -> median over the rounds of the paired ones).
"""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.harness import Benchmark, Series


def document(
    benchmark: Benchmark, *, series: Sequence[Series], machine: Mapping[str, Any], conditions: Mapping[str, Any]
) -> dict[str, Any]:
    """The whole result of one run, ready for JSON."""
    results: dict[str, dict[str, Any]] = {}
    ratios: dict[str, float] = {}
    differences: dict[str, float] = {}
    for one in series:
        baseline = next(iter(one.values))
        for system, values in one.values.items():
            results.setdefault(system, {})[one.metric] = {**summary(values), "unit": one.unit}
            if system == baseline:
                continue
            pairs = list(zip(values, one.values[baseline], strict=True))
            found = paired_ratios(values, one.values[baseline])
            if found:
                ratios[f"{one.metric}: {system} / {baseline}"] = median(found)
            differences[f"{one.metric}: {system} - {baseline}"] = median(ours - theirs for ours, theirs in pairs)
    return {
        "benchmark": benchmark.name,
        "machine": dict(machine),
        "conditions": dict(conditions),
        "results": results,
        "ratios": ratios,
        "differences": differences,
    }


def paired_ratios(candidate: Sequence[float], baseline: Sequence[float]) -> list[float]:
    """candidate / baseline of each round; none where the baseline is zero. Raises ValueError on unequal lengths."""
    return [ours / theirs for ours, theirs in zip(candidate, baseline, strict=True) if theirs != 0]


def summary(values: Sequence[float]) -> dict[str, float | int]:
    """n, median, min and max. Raises ValueError when there is no value."""
    if not values:
        raise ValueError("a summary needs at least one value")
    return {"n": len(values), "median": median(values), "min": min(values), "max": max(values)}


def table(document: Mapping[str, Any]) -> str:
    """The document's results, ratios and differences as aligned text."""
    rows = [("metric", "system", "n", "median", "min", "max", "unit")]
    rows += sorted(
        (metric, system, str(found["n"]), *(f"{found[key]:.4g}" for key in ("median", "min", "max")), found["unit"])
        for system, metrics in document["results"].items()
        for metric, found in metrics.items()
    )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    lines += [f"{name}  =  {value:.4f} (median of paired ratios)" for name, value in document["ratios"].items()]
    lines += [f"{name}  =  {value:+.4f}" for name, value in document["differences"].items()]
    return "\n".join(lines)
