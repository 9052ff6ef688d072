"""The schedule of faults is a pure function of the seed, within its bounds."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from elastic_run.chaos.schedule import (
    CONTROLLER_ENDS_MAX,
    CONTROLLER_WINDOW_S,
    KINDS,
    STORE_REST_S,
    Action,
    TimedFault,
    Victim,
    make_schedule,
)

OF_STORE = (Victim.ETCD_MEMBER, Victim.ETCD_LEADER, Victim.ETCD_ALL)
OF_CONTROLLERS = (Victim.LEADER, Victim.FOLLOWER)
SEEDS = st.integers(min_value=0, max_value=10**9)
SECONDS = st.floats(min_value=0.1, max_value=900.0)
PINNED = [
    (Victim.NODE, Action.PAUSE, 3.818, 2.305, 55642),
    (Victim.LEADER, Action.PAUSE, 4.524, 3.61, 29260),
    (Victim.WORKER, Action.KILL, 12.833, 0.0, 28977),
    (Victim.WORKER, Action.TERM, 13.496, 0.0, 37959),
    (Victim.LEADER, Action.KILL, 15.463, 0.0, 40433),
    (Victim.FOLLOWER, Action.KILL, 21.875, 0.0, 24624),
    (Victim.AGENT, Action.PAUSE, 23.678, 4.608, 8229),
    (Victim.ETCD_MEMBER, Action.KILL, 26.154, 3.476, 65066),
]


def ends_of_controllers(faults: tuple[TimedFault, ...]) -> list[TimedFault]:
    return [f for f in faults if f.victim in OF_CONTROLLERS and f.action is not Action.PAUSE]


@given(SEEDS, SECONDS)
def test_same_seed_gives_the_same_faults(seed: int, seconds: float) -> None:
    assert make_schedule(seed, seconds=seconds) == make_schedule(seed, seconds=seconds)


def test_other_seed_gives_other_faults() -> None:
    assert len({make_schedule(seed, seconds=120.0) for seed in range(20)}) == 20


def test_schedule_of_a_seed_never_changes() -> None:
    """A seed in a track record must bring back what it brought then."""
    found = [(f.victim, f.action, round(f.at_s, 3), round(f.lasts_s, 3), f.lot) for f in make_schedule(7, seconds=30.0)]
    assert found == PINNED


@given(SEEDS, SECONDS)
def test_faults_lie_within_the_campaign_in_order(seed: int, seconds: float) -> None:
    faults = make_schedule(seed, seconds=seconds)
    assert [fault.number for fault in faults] == list(range(1, len(faults) + 1))
    assert all(fault.at_s >= 0.0 and fault.at_s + fault.lasts_s <= seconds + 1e-9 for fault in faults)
    assert all(before.at_s < after.at_s for before, after in itertools.pairwise(faults))


@given(SEEDS, SECONDS)
def test_one_fault_of_the_store_at_a_time(seed: int, seconds: float) -> None:
    faults = [fault for fault in make_schedule(seed, seconds=seconds) if fault.victim in OF_STORE]
    assert all(a.at_s + a.lasts_s + STORE_REST_S <= b.at_s for a, b in itertools.pairwise(faults))


@given(SEEDS, SECONDS)
def test_controllers_do_not_end_more_often_than_a_launcher_starts_them(seed: int, seconds: float) -> None:
    ends = ends_of_controllers(make_schedule(seed, seconds=seconds))
    for first, one_too_many in zip(ends, ends[CONTROLLER_ENDS_MAX:], strict=False):
        assert one_too_many.at_s - first.at_s >= CONTROLLER_WINDOW_S


@given(SEEDS)
def test_no_kind_comes_twice_before_each_came_once(seed: int) -> None:
    kinds = [(fault.victim, fault.action) for fault in make_schedule(seed, seconds=900.0)]
    for begin in range(0, len(kinds) - len(KINDS) + 1, len(KINDS)):
        assert len(set(kinds[begin : begin + len(KINDS)])) == len(KINDS)
