"""Which CPUs workers are bound to, on machines described by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_run.runtime.affinity import Binding, BindingMode, Cpu, NumaNode, Refusal, format_cpus, plan_binding

EVERY = frozenset(range(4096))


def node(number: int, cpus: range, *, threads: int = 1, package: int | None = 0, per_cache: int = 4) -> NumaNode:
    """CPUs in a row; siblings next to each other."""
    found = tuple(
        Cpu(
            number=cpu,
            core=cpu - cpu % threads,
            package=package,
            cache=cpus[(cpu - cpus[0]) // per_cache * per_cache],
        )
        for cpu in cpus
    )
    return NumaNode(number=number, cpus=found)


TWO_SOCKETS = (
    node(0, range(8), threads=2, package=0),
    node(1, range(8, 16), threads=2, package=0),
    node(2, range(16, 24), threads=2, package=1),
    node(3, range(24, 32), threads=2, package=1),
)


def planned(
    mode: str, nodes: tuple[NumaNode, ...], gpu_nodes: list[int | None], nproc: int, **more: object
) -> list[str]:
    allowed = more.get("allowed", EVERY)
    assert isinstance(allowed, frozenset)
    plan = plan_binding(BindingMode(mode), nodes, allowed=allowed, gpu_nodes=gpu_nodes, nproc=nproc)
    assert isinstance(plan, Binding), plan
    return [format_cpus(cpus) for cpus in plan.cpus]


def refused(mode: str, nodes: tuple[NumaNode, ...], gpu_nodes: list[int | None], nproc: int, **more: object) -> str:
    allowed = more.get("allowed", EVERY)
    assert isinstance(allowed, frozenset)
    plan = plan_binding(BindingMode(mode), nodes, allowed=allowed, gpu_nodes=gpu_nodes, nproc=nproc)
    assert isinstance(plan, Refusal), plan
    assert "\n" not in plan.reason
    return plan.reason


@pytest.mark.parametrize(
    ("mode", "gpu_nodes", "expected"),
    [
        ("node", [3, 0], ["24-31", "0-7"]),
        ("socket", [3, 0], ["16-31", "0-15"]),
        ("exclusive", [3, 0], ["24-31", "0-7"]),
        ("exclusive", [1, 1], ["8-11", "12-15"]),
        ("exclusive", [1, 1, 1], ["8-11", "12-13", "14-15"]),
        ("core-complex", [1, 1, 1], ["8-11", "12-15", "8-11"]),
    ],
)
def test_workers_are_bound_near_their_gpus(mode: str, gpu_nodes: list[int | None], expected: list[str]) -> None:
    assert planned(mode, TWO_SOCKETS, gpu_nodes, len(gpu_nodes)) == expected


def test_a_node_is_divided_among_all_its_gpus_also_those_without_a_worker() -> None:
    assert planned("exclusive", TWO_SOCKETS, [0, 0], 1) == ["0-3"]


def test_without_gpus_workers_take_the_nodes_in_turn_and_it_is_said() -> None:
    assert planned("node", TWO_SOCKETS, [], 5) == ["0-7", "8-15", "16-23", "24-31", "0-7"]
    assert planned("exclusive", TWO_SOCKETS, [], 5) == ["0-3", "8-15", "16-23", "24-31", "4-7"]
    plan = plan_binding(BindingMode.NODE, TWO_SOCKETS, allowed=EVERY, gpu_nodes=[], nproc=2)
    assert plan.reason == "there is no GPU, so the workers take the NUMA nodes (0-1) in turn"


def test_nodes_without_usable_cpus_are_passed_over_without_gpus() -> None:
    nodes = (NumaNode(number=0, cpus=()), *TWO_SOCKETS[1:])
    assert planned("node", nodes, [], 2, allowed=frozenset({9, 30})) == ["9", "30"]
    assert planned("socket", nodes, [], 1) == ["8-15"]


def test_only_allowed_cpus_are_given_out() -> None:
    assert planned("socket", TWO_SOCKETS, [0], 1, allowed=frozenset({3, 9, 20})) == ["3,9"]
    assert planned("exclusive", TWO_SOCKETS, [0, 0], 2, allowed=frozenset({1, 2, 3})) == ["1", "2-3"]
    assert planned("core-complex", TWO_SOCKETS, [0, 0], 2, allowed=frozenset({1, 5, 6})) == ["5-6", "1"]


def test_a_gpu_whose_node_the_firmware_does_not_say_is_on_the_first() -> None:
    assert planned("node", TWO_SOCKETS, [-1], 1) == ["0-7"]
    assert planned("node", TWO_SOCKETS[1:2], [None], 1) == ["8-15"]
    assert "GPU 0 is" in refused("node", TWO_SOCKETS, [None], 1)


@pytest.mark.parametrize(
    ("mode", "gpu_nodes", "nproc", "allowed", "says"),
    [
        ("node", [0], 2, EVERY, "worker 1 has no GPU to be near to, 1 can be seen"),
        ("node", [7], 1, EVERY, "NUMA node 7, of which nothing is known"),
        ("node", [0], 1, frozenset({9}), "worker 0 belongs on NUMA node 0"),
        ("socket", [0], 1, frozenset({20}), "worker 0 belongs on socket 0"),
        ("node", [], 1, frozenset(), "no NUMA node with CPUs that may be used"),
        ("exclusive", [0] * 5, 5, EVERY, "has 4 physical cores that may be used here, and 5 workers or GPUs share it"),
        ("exclusive", [], 3, frozenset({0, 1}), "has 1 physical cores"),
    ],
)
def test_what_cannot_be_is_refused_with_a_reason(
    mode: str, gpu_nodes: list[int | None], nproc: int, allowed: frozenset[int], says: str
) -> None:
    assert says in refused(mode, TWO_SOCKETS, gpu_nodes, nproc, allowed=allowed)


def test_what_a_mode_needs_and_the_kernel_does_not_tell_is_a_refusal() -> None:
    bare = (NumaNode(number=0, cpus=tuple(Cpu(number=n, core=n, package=None, cache=None) for n in range(4))),)
    assert planned("node", bare, [], 1) == ["0-3"]
    assert planned("exclusive", bare, [], 2) == ["0-1", "2-3"]
    assert "share a socket" in refused("socket", bare, [], 1)
    assert "which caches" in refused("core-complex", bare, [], 1)


@given(
    st.sampled_from(BindingMode),
    st.sets(st.integers(0, 31)),
    st.lists(st.integers(-1, 4), max_size=6),
    st.integers(1, 8),
)
def test_workers_get_usable_cpus_and_exclusive_ones_share_no_core(
    mode: BindingMode, allowed: set[int], gpu_nodes: list[int | None], nproc: int
) -> None:
    plan = plan_binding(mode, TWO_SOCKETS, allowed=allowed, gpu_nodes=gpu_nodes, nproc=nproc)
    if isinstance(plan, Refusal):
        assert plan.reason
        return
    assert len(plan.cpus) == nproc
    assert all(cpus and set(cpus) <= allowed and list(cpus) == sorted(set(cpus)) for cpus in plan.cpus)
    if mode is BindingMode.EXCLUSIVE:
        cores = [{cpu // 2 for cpu in cpus} for cpus in plan.cpus]
        assert sum(map(len, cores)) == len(set[int]().union(*cores))


@pytest.mark.parametrize(("numbers", "text"), [([], ""), ([4], "4"), ([0, 1, 2, 8, 10, 11], "0-2,8,10-11")])
def test_cpus_are_written_as_the_kernel_does(numbers: list[int], text: str) -> None:
    assert format_cpus(numbers) == text
