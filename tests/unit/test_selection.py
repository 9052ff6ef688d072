"""Which algorithm is taken, from what every member knows."""

import itertools

import pytest
import torch

from elastic_run.collectives import native
from elastic_run.collectives.options import MeshOptions
from elastic_run.collectives.reduction import Reduction
from elastic_run.collectives.selection import (
    COMPILED,
    ONE_HOST,
    PIPE_MEMBERS_MAX,
    Form,
    Layout,
    Method,
    choose_all_reduce,
    form_of,
)

OPTIONS = MeshOptions(arena_bytes=256 << 20, scratch_bytes=128 << 20)
KIB, MIB = 1 << 10, 1 << 20
ARENA_SHARE = OPTIONS.arena_bytes // 4
TOGETHER = {members: (0,) * members for members in (1, 2, 3, 4, 8, 9, 64, 65)}
"""Members of one host."""
APART = {members: tuple(range(members)) for members in (2, 3, 4, 8, 9)}
"""Members with a host each."""
MIXED = ((0, 0, 1), (0, 1, 0, 1), (0, 0, 0, 0, 1, 1, 1, 1))


def chosen(nbytes: int, hosts: tuple[int, ...], *, widened: bool = False, streamable: bool = False) -> Method:
    return choose_all_reduce(nbytes, Layout(hosts=hosts), OPTIONS, widened=widened, streamable=streamable)


COMPILED_TABLE = [
    # What compiled kernels know: bytes, hosts, method.
    (0, TOGETHER[4], Method.EXCHANGE),
    (16 * KIB, TOGETHER[4], Method.EXCHANGE),
    (16 * KIB + 1, TOGETHER[4], Method.SHARED_ONCE),
    (128 * KIB - 1, TOGETHER[4], Method.SHARED_ONCE),
    (128 * KIB, TOGETHER[2], Method.STREAMED),
    (128 * KIB, TOGETHER[9], Method.STREAMED),
    (128 * KIB, TOGETHER[65], Method.STREAMED),
    (ARENA_SHARE + 1, TOGETHER[4], Method.STREAMED),
    (1024 * MIB, TOGETHER[8], Method.STREAMED),
    (128 * KIB, TOGETHER[1], Method.SHARED_ONCE),
    (16 * KIB, APART[8], Method.EXCHANGE),
    (16 * KIB + 1, APART[8], Method.PAIRWISE),
    (128 * KIB - 1, APART[4], Method.PAIRWISE),
    (128 * KIB - 1, APART[2], Method.EXCHANGE),
    (128 * KIB, APART[2], Method.PIPED),
    (128 * KIB, APART[8], Method.PIPED),
    (1024 * MIB, APART[2], Method.PIPED),
    (1024 * MIB, APART[8], Method.PIPED),
    (128 * KIB, APART[9], Method.PAIRWISE),
    (9 * MIB - 1, APART[9], Method.PAIRWISE),
    (9 * MIB, APART[9], Method.RING),
    (16 * KIB, MIXED[0], Method.EXCHANGE),
    (128 * KIB, MIXED[0], Method.HIERARCHICAL),
    (ARENA_SHARE, MIXED[2], Method.HIERARCHICAL),
    (ARENA_SHARE + 1, MIXED[2], Method.RING),
]


@pytest.mark.parametrize(("nbytes", "hosts", "method"), COMPILED_TABLE)
def test_what_compiled_kernels_know_is_streamed_or_piped_from_128_kib(
    nbytes: int, hosts: tuple[int, ...], method: Method
) -> None:
    assert chosen(nbytes, hosts, streamable=True) is method


OTHER_TABLE = [
    # What they do not know, of types whose partial results are no larger.
    (16 * KIB, TOGETHER[4], Method.EXCHANGE),
    (2 * MIB, TOGETHER[4], Method.SHARED_ONCE),  # all together 8 MiB
    (2 * MIB + 1, TOGETHER[4], Method.SHARED),
    (ARENA_SHARE, TOGETHER[2], Method.SHARED_ONCE),
    (ARENA_SHARE, TOGETHER[8], Method.SHARED),
    (ARENA_SHARE + 1, TOGETHER[8], Method.RING),
    (OPTIONS.scratch_bytes, TOGETHER[2], Method.EXCHANGE),
    (OPTIONS.scratch_bytes + 1, TOGETHER[2], Method.RING),
    (16 * KIB + 1, APART[2], Method.EXCHANGE),
    (OPTIONS.scratch_bytes, APART[2], Method.EXCHANGE),
    (OPTIONS.scratch_bytes + 1, APART[2], Method.RING),
    (16 * KIB + 1, APART[3], Method.PAIRWISE),
    (3 * MIB - 1, APART[3], Method.PAIRWISE),
    (3 * MIB, APART[3], Method.RING),
    (8 * MIB - 1, APART[8], Method.PAIRWISE),
    (8 * MIB, APART[8], Method.RING),
    (16 * KIB + 1, MIXED[1], Method.HIERARCHICAL),
    (ARENA_SHARE, MIXED[1], Method.HIERARCHICAL),
    (ARENA_SHARE + 1, MIXED[1], Method.RING),
]


@pytest.mark.parametrize(("nbytes", "hosts", "method"), OTHER_TABLE)
def test_anything_else_goes_by_size_and_layout(nbytes: int, hosts: tuple[int, ...], method: Method) -> None:
    assert chosen(nbytes, hosts) is method
    # The ring would send partial results, which take more room than values here.
    assert chosen(nbytes, hosts, widened=True) is (Method.PAIRWISE if method is Method.RING else method)


def test_no_method_is_chosen_where_it_cannot_work() -> None:
    sizes = [0, 16 * KIB, 128 * KIB - 1, 128 * KIB, MIB, 16 * MIB, ARENA_SHARE, ARENA_SHARE + 1, 1024 * MIB]
    layouts = [hosts for hosts in (*TOGETHER.values(), *APART.values(), *MIXED) if len(hosts) > 1]
    for nbytes, hosts, widened, streamable in itertools.product(sizes, layouts, (False, True), (False, True)):
        method = chosen(nbytes, hosts, widened=widened, streamable=streamable)
        layout = Layout(hosts=hosts)
        story = (method, nbytes, hosts, widened, streamable)
        assert streamable or method not in COMPILED, story
        assert layout.one_host or method not in ONE_HOST, story
        assert len(hosts) <= PIPE_MEMBERS_MAX or method is not Method.PIPED, story
        assert layout.one_each or method is not Method.PIPED, story
        assert not layout.one_each or method is not Method.HIERARCHICAL, story
        assert not widened or method is not Method.RING, story


def test_memory_given_to_the_mesh_moves_the_borders() -> None:
    def with_arena(nbytes: int) -> Method:
        options = MeshOptions(arena_bytes=4 * MIB)
        return choose_all_reduce(nbytes, Layout(hosts=(0, 0, 1)), options, widened=False, streamable=True)

    assert with_arena(MIB) is Method.HIERARCHICAL
    assert with_arena(MIB + 1) is Method.PAIRWISE


def test_which_values_the_kernels_know_does_not_depend_on_their_being_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "kernels", None)
    known = {
        (dtype, reduction)
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int32, torch.int64, torch.int8)
        for reduction in Reduction
        if native.streamable(dtype, reduction)
    }
    floats = itertools.product((torch.float32, torch.float64, torch.bfloat16), (Reduction.SUM, Reduction.AVG))
    assert known == {*floats, (torch.int32, Reduction.SUM), (torch.int64, Reduction.SUM)}


@pytest.mark.parametrize(
    ("nbytes", "hosts", "form"),
    [
        (64 * KIB, TOGETHER[2], Form.DIRECT),
        (64 * KIB + 1, TOGETHER[2], Form.STAGED),
        (ARENA_SHARE, TOGETHER[8], Form.STAGED),
        (ARENA_SHARE + 1, TOGETHER[8], Form.CHUNKED),
        (64 * KIB, APART[2], Form.DIRECT),
        (64 * KIB + 1, APART[2], Form.CHUNKED),
        (MIB, MIXED[0], Form.CHUNKED),
        (1024 * MIB, TOGETHER[1], Form.DIRECT),
    ],
)
def test_other_operations_are_direct_when_small_staged_in_memory_or_chunked(
    nbytes: int, hosts: tuple[int, ...], form: Form
) -> None:
    assert form_of(nbytes, Layout(hosts=hosts), OPTIONS) is form
