"""The list of benchmarks. A new one is a file with a `BENCHMARK`, and a line here."""

from benchmarks import allreduce, collective_faults, crossover, idle, startup, step_overhead, telemetry_record
from benchmarks.harness import Benchmark

BENCHMARKS: tuple[Benchmark, ...] = (
    step_overhead.BENCHMARK,
    startup.BENCHMARK,
    idle.BENCHMARK,
    allreduce.BENCHMARK,
    crossover.BENCHMARK,
    collective_faults.BENCHMARK,
    telemetry_record.BENCHMARK,
)
