"""Turns the measured series into one JSON document and a table. Pure.

Document: `benchmark` · `machine` · `conditions` · `results` (system -> metric -> n, median, min, max, unit) ·
`ratios` and `differences` ("metric: candidate / baseline" -> median over the rounds of the paired ones) · `targets`
of a benchmark that has some (name, value, bound, met), whose ratios are among `ratios`.
"""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.harness import Benchmark, Series, Target


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
    made: dict[str, Any] = {
        "benchmark": benchmark.name,
        "machine": dict(machine),
        "conditions": dict(conditions),
        "results": results,
        "ratios": ratios,
        "differences": differences,
    }
    if benchmark.targets:
        ratios.update(_ratios_of_targets(benchmark.targets, {one.metric: one for one in series}))
        verdicts = [_verdict(target, results, ratios) for target in benchmark.targets]
        made["targets"] = [verdict for verdict in verdicts if verdict is not None]
    return made


def name_of(target: Target) -> str:
    """As in `ratios`, or for a target on a system's own median "metric: system"."""
    return f"{target.metric}: {target.over}" + (f" / {target.under}" if target.under is not None else "")


def _ratios_of_targets(targets: Sequence[Target], series: Mapping[str, Series]) -> dict[str, float]:
    ratios = {}
    for target in targets:
        values = series[target.metric].values if target.metric in series else {}
        if target.under is not None and target.over in values and target.under in values:
            found = paired_ratios(values[target.over], values[target.under])
            if found:
                ratios[name_of(target)] = median(found)
    return ratios


def _verdict(target: Target, results: Mapping[str, Any], ratios: Mapping[str, float]) -> dict[str, Any] | None:
    """None when what the target speaks of was not measured."""
    value = ratios.get(name_of(target))
    if target.under is None:
        value = results.get(target.over, {}).get(target.metric, {}).get("median")
    if value is None:
        return None
    bounds = {key: bound for key in ("at_least", "at_most") if (bound := getattr(target, key)) is not None}
    return {"name": name_of(target), "value": value, **bounds, "met": target.is_met(value)}


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
    return "\n".join([*lines, *target_lines(document)])


def target_lines(document: Mapping[str, Any]) -> list[str]:
    """One line for each target: its value, its bound, whether it is met."""
    return [
        f"{'met   ' if found['met'] else 'MISSED'}  {found['name']}  =  {found['value']:.4g}"
        + (f"  (at least {found['at_least']:g})" if "at_least" in found else "")
        + (f"  (at most {found['at_most']:g})" if "at_most" in found else "")
        for found in document.get("targets", [])
    ]
