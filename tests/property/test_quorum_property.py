"""Quorum against the promises of its docstring, for any candidates."""

import random

from builders import job_config
from hypothesis import given
from hypothesis import strategies as st

from elastic_run.controller.quorum import Candidate, choose, may_form
from elastic_run.runtime.protocol.ids import NodeId

SIZES = st.integers(1, 6)


@st.composite
def candidates(draw: st.DrawFn) -> list[Candidate]:
    count = draw(st.integers(0, 8))
    arrivals = draw(st.permutations(range(count)))
    positions = draw(st.permutations(range(count)))
    return [
        Candidate(
            node=NodeId(f"n{i}"),
            node_rank=draw(st.none() | st.integers(0, 3)),
            arrival=arrivals[i],
            member_position=draw(st.sampled_from((None, positions[i]))),
        )
        for i in range(count)
    ]


@given(candidates(), SIZES)
def test_as_many_as_fit_are_chosen_each_once(found: list[Candidate], nodes_max: int) -> None:
    chosen = choose(found, nodes_max)
    assert len(chosen) == len(set(chosen)) == min(len(found), nodes_max)
    assert set(chosen) <= {c.node for c in found}


@given(candidates(), SIZES)
def test_nobody_new_is_taken_while_a_member_stays_out(found: list[Candidate], nodes_max: int) -> None:
    chosen = choose(found, nodes_max)
    left_out = [c for c in found if c.node not in chosen]
    taken_new = [c for c in found if c.node in chosen and c.member_position is None]
    assert not (taken_new and any(c.member_position is not None for c in left_out))
    assert all(new.arrival < c.arrival for new in taken_new for c in left_out)


@given(candidates(), SIZES)
def test_without_asked_for_ranks_members_keep_their_order_and_newcomers_follow(
    found: list[Candidate], nodes_max: int
) -> None:
    plain = {c.node: c for c in found if c.node_rank is None}
    order = [plain[node] for node in choose(list(plain.values()), nodes_max)]
    keys = [(c.member_position is None, c.member_position or 0, c.arrival) for c in order]
    assert keys == sorted(keys)


@given(candidates(), SIZES, st.randoms(use_true_random=False))
def test_the_choice_does_not_depend_on_the_order_of_asking(
    found: list[Candidate], nodes_max: int, chance: random.Random
) -> None:
    shuffled = list(found)
    chance.shuffle(shuffled)
    assert choose(shuffled, nodes_max) == choose(found, nodes_max)


@given(
    present=st.integers(0, 8),
    low=SIZES,
    spread=st.integers(0, 3),
    waited=st.none() | st.floats(0, 100),
    last_call=st.floats(0, 50),
    ran=st.booleans(),
)
def test_a_view_forms_exactly_when_the_rules_say(
    present: int, low: int, spread: int, waited: float | None, last_call: float, ran: bool
) -> None:
    job = job_config(f"{low}:{low + spread}")
    decision = may_form(
        present=present,
        nodes_min=job.nodes_min,
        nodes_max=job.nodes_max,
        enough_for_s=waited,
        last_call_s=last_call,
        ran_before=ran,
    )
    full, enough = present >= job.nodes_max, present >= job.nodes_min
    assert decision.value is (full or (enough and (ran or (waited or 0.0) >= last_call)))
    assert str(present) in decision.reason or full
