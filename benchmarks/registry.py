"""The list of benchmarks. A new one is a file with a `BENCHMARK`, and a line here."""

from benchmarks import idle, startup, step_overhead
from benchmarks.harness import Benchmark

BENCHMARKS: tuple[Benchmark, ...] = (step_overhead.BENCHMARK, startup.BENCHMARK, idle.BENCHMARK)
