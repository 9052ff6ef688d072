"""Which algorithm is taken, from what every member knows."""

from elastic_run.collectives.options import MeshOptions
from elastic_run.collectives.selection import Form, Layout, Method, choose_all_reduce, form_of

OPTIONS = MeshOptions(arena_bytes=256 << 20, scratch_bytes=128 << 20)
MIB = 1 << 20


def chosen(nbytes: int, *hosts: int, widened: bool = False) -> Method:
    return choose_all_reduce(nbytes, Layout(hosts=hosts), OPTIONS, widened=widened)


def test_small_messages_are_exchanged_wherever_members_are() -> None:
    assert chosen(4096, 0, 0, 0, 0) is chosen(4096, 0, 1, 2, 3) is chosen(4096, 0, 0, 1, 1) is Method.EXCHANGE


def test_members_of_one_host_use_its_memory_while_it_suffices() -> None:
    assert chosen(16 * MIB, 0, 0, 0, 0) is Method.SHARED
    assert chosen(100 * MIB, 0, 0, 0, 0) is Method.RING


def test_several_members_on_several_hosts_reduce_within_each_host_first() -> None:
    assert chosen(16 * MIB, 0, 0, 1, 1) is Method.HIERARCHICAL


def test_two_members_without_shared_memory_exchange_what_they_can_keep() -> None:
    assert chosen(64 * MIB, 0, 1) is Method.EXCHANGE
    assert chosen(200 * MIB, 0, 1) is Method.RING


def test_the_ring_takes_large_shares_of_values_whose_partial_results_are_no_larger() -> None:
    assert chosen(16 * MIB, 0, 1, 2, 3) is Method.RING
    assert chosen(16 * MIB, 0, 1, 2, 3, widened=True) is Method.PAIRWISE
    assert chosen(2 * MIB, 0, 1, 2, 3) is Method.PAIRWISE


def test_other_operations_are_direct_when_small_staged_in_memory_or_chunked() -> None:
    assert form_of(4096, Layout(hosts=(0, 0)), OPTIONS) is Form.DIRECT
    assert form_of(MIB, Layout(hosts=(0, 0)), OPTIONS) is Form.STAGED
    assert form_of(MIB, Layout(hosts=(0, 1)), OPTIONS) is Form.CHUNKED
    assert form_of(MIB, Layout(hosts=(0,)), OPTIONS) is Form.DIRECT
