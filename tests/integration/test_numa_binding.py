"""--numa-binding on real workers, and against torch's own answers for made-up machines."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from launching import BOUND_S, SCRIPTS, Bench
from sysfs_tree import machine, write

from elastic_run.runtime.affinity import Binding, BindingMode, plan_binding
from elastic_run.runtime.numa_binding import bind_workers, read_nodes, read_pci_node
from elastic_run.runtime.protocol.errors import UserError

CASES = 200
SEED = 20
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture
def bench() -> Iterator[Bench]:
    with Bench() as made:
        yield made


def shown(out: str) -> list[tuple[int, ...]]:
    """CPUs by local rank."""
    rows = sorted(line.split() for line in out.splitlines())
    return [tuple(map(int, cpus.split(","))) for _, cpus in rows]


@pytest.mark.parametrize("program", [False, True])
def test_workers_run_on_the_planned_cpus(bench: Bench, program: bool) -> None:
    try:
        mode, plan = BindingMode.EXCLUSIVE, bind_workers(BindingMode.EXCLUSIVE, 2, NO_GPU)
    except UserError:  # a machine of one core
        mode, plan = BindingMode.NODE, bind_workers(BindingMode.NODE, 2, NO_GPU)
    target = ["--no-python", sys.executable] if program else []
    run = bench.run(f"--numa-binding={mode}", *target, SCRIPTS / "show_cpus.py", **NO_GPU)
    assert run.end() == 0, run.err
    assert shown(run.out) == list(plan.cpus)
    assert f"elastic-run: --numa-binding={mode}: " in run.err and "CPUs of worker 0: " in run.err
    bench.assert_nothing_left()


def test_workers_stay_within_the_launchers_own_cpus(bench: Bench) -> None:
    mine = max(os.sched_getaffinity(0))
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {mine})
    try:
        run = bench.run("--numa-binding=node", SCRIPTS / "show_cpus.py", **NO_GPU)
    finally:
        os.sched_setaffinity(0, before)
    assert run.end() == 0, run.err
    assert shown(run.out) == [(mine,), (mine,)]


def test_what_cannot_be_bound_is_one_line_before_anything_starts(bench: Bench) -> None:
    run = bench.run("--nproc-per-node=4000", "--numa-binding=exclusive", SCRIPTS / "show_cpus.py", **NO_GPU)
    assert run.end() == 2
    assert run.err.count("\n") == 1 and "--numa-binding=exclusive: NUMA node" in run.err, run.err
    assert "physical cores that may be used here" in run.err
    assert not bench.root.exists()
    bench.assert_nothing_left()


def made_up(root: Path, chance: random.Random) -> dict[str, Any]:
    """One machine with GPUs, some of its CPUs not for us."""
    places = machine(
        sockets=chance.randint(1, 2),
        nodes=chance.randint(1, 3),
        cores=chance.randint(1, 7),
        threads=chance.randint(1, 2),
        cores_per_cache=chance.randint(1, 4),
    )
    nodes = max(place.node for place in places) + 1
    buses = list(range(1, 1 + chance.randint(1, 5)))
    write(root, places, gpus={f"0000:{bus:02x}:00.0": chance.randrange(-1, nodes) for bus in buses})
    spared = chance.choice([0.0, 0.0, 0.3])
    allowed = [place.number for place in places if chance.random() >= spared]
    return {"root": str(root), "mode": chance.choice(list(BindingMode)), "allowed": allowed, "gpus": buses}


def test_torch_would_take_the_same_cpus(tmp_path: Path) -> None:
    chance = random.Random(SEED)
    cases = [made_up(tmp_path / str(number), chance) for number in range(CASES)]
    asked = subprocess.run(
        [sys.executable, SCRIPTS / "torch_numa.py"],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        timeout=2 * BOUND_S,
        check=False,
    )
    assert asked.returncode == 0, asked.stderr
    agreed = 0
    for case, theirs in zip(cases, json.loads(asked.stdout), strict=True):
        root = Path(case["root"])
        plan = plan_binding(
            BindingMode(case["mode"]),
            read_nodes(root),
            allowed=frozenset(case["allowed"]),
            gpu_nodes=[read_pci_node(root, f"0000:{bus:02x}:00.0") for bus in case["gpus"]],
            nproc=len(case["gpus"]),
        )
        if None in theirs:  # torch fails worker by worker; only its socket mode does so where CPUs could be had
            assert not isinstance(plan, Binding) or case["mode"] == BindingMode.SOCKET, case
        else:
            assert isinstance(plan, Binding), (case, plan)
            assert [list(cpus) for cpus in plan.cpus] == theirs, case
            agreed += 1
    assert agreed > CASES / 3
