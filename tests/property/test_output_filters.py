"""Stream flags against torch's own parser; line cutting against a dumb oracle."""

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from worker_setup import agent_config, script_command

from elastic_run.agent import output
from elastic_run.agent.lines import LINE_BYTES_MAX, LineCutter, prefixed
from elastic_run.agent.output import Route, Std, parse_streams, worker_routes
from elastic_run.runtime.protocol.errors import UserError

NPROC = 12
SINGLE_DIGIT_MAPPINGS = st.dictionaries(st.integers(0, 9), st.integers(0, 3), min_size=1, max_size=10).map(
    lambda named: ",".join(f"{rank}:{bits}" for rank, bits in named.items())
)
NEAR_MISSES = st.text(alphabet="0123456789:, \n-", max_size=12)


def torch_streams(value: str) -> tuple[int, ...] | None:
    """What torch makes of a value; None when it refuses."""
    from torch.distributed.elastic.multiprocessing.api import Std as TorchStd
    from torch.distributed.elastic.multiprocessing.api import to_map

    try:
        parsed = TorchStd.from_str(value)
    except ValueError:
        return None
    return tuple(int(bits) for bits in to_map(parsed, NPROC).values())


def our_streams(value: str) -> tuple[int, ...] | None:
    try:
        return tuple(int(bits) for bits in parse_streams(value, NPROC, flag="--tee"))
    except UserError:
        return None


@settings(deadline=None)  # the first example imports torch
@given(st.one_of(st.sampled_from(["0", "1", "2", "3"]), SINGLE_DIGIT_MAPPINGS, NEAR_MISSES))
def test_every_value_torch_takes_means_the_same(value: str) -> None:
    theirs, ours = torch_streams(value), our_streams(value)
    if theirs is not None:
        assert ours == theirs
    elif ours is not None:  # the one thing added: torch's mapping knows single-digit ranks only
        assert any(len(item.split(":")[0]) > 1 for item in value.split(","))


def test_ranks_above_nine_can_be_named() -> None:
    assert parse_streams("11:3,10:1,40:2", NPROC, flag="--tee") == (*[Std.NONE] * 10, Std.OUT, Std.OUT | Std.ERR)


def test_a_value_that_is_not_understood_names_the_flag_and_the_way_out() -> None:
    with pytest.raises(UserError, match=r"--tee='4' is not understood: give 0 \(none\)"):
        parse_streams("4", 1, flag="--tee")


@given(
    redirects=st.integers(0, 3),
    tee=st.integers(0, 3),
    shown=st.one_of(st.none(), st.lists(st.integers(0, 2), max_size=2)),
    log_dir=st.sampled_from([None, "/logs", os.devnull]),
)
def test_routes_are_torchruns(redirects: int, tee: int, shown: list[int] | None, log_dir: str | None) -> None:
    config = agent_config(
        script_command("t.py"),
        redirects=str(redirects),
        tee=str(tee),
        local_ranks_filter=None if shown is None else tuple(shown),
        log_dir=log_dir,
    )
    for rank, routes in enumerate(worker_routes(config.output, 3)):
        for bit, route in ((1, routes.stdout), (2, routes.stderr)):
            filed = bool((redirects | tee) & bit) and log_dir != os.devnull
            visible = not shown or rank in shown or log_dir == os.devnull
            assert (route in (Route.FILE, Route.TEE)) == filed
            assert (route is Route.CONSOLE) == (visible and not filed)
            assert (route is Route.TEE) == (filed and visible and bool(tee & bit))


def test_the_prefix_is_torchruns_and_so_is_its_template() -> None:
    assert output.line_prefix("default", 5, 1, {}) == b"[default1]:"
    template = {output.PREFIX_TEMPLATE_VARIABLE: "<${role_name}|${rank}|${local_rank}|${other}>"}
    assert output.line_prefix("default", 5, 1, template) == b"<default|5|1|${other}>"


@given(st.binary(max_size=400).map(lambda b: b.translate(bytes(b"\r\nab"[i % 4] for i in range(256)))), st.data())
def test_lines_do_not_depend_on_how_the_bytes_arrived(text: bytes, data: st.DataObject) -> None:
    cutter, lines, rest = LineCutter(), [], text
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        lines += cutter.feed(rest[:size])
        rest = rest[size:]
    assert lines + cutter.end() == text.splitlines()
    assert prefixed(b">", lines[:1]) == (b">" + lines[0] + b"\n" if lines else b"")


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 3 * LINE_BYTES_MAX), min_size=1, max_size=4), st.integers(100, 2 * LINE_BYTES_MAX))
def test_long_lines_come_in_pieces_and_lose_nothing(sizes: list[int], chunk_bytes: int) -> None:
    text = b"".join(bytes([97 + i]) * size + b"\n" for i, size in enumerate(sizes))
    cutter, lines = LineCutter(), []
    for start in range(0, len(text), chunk_bytes):
        lines += cutter.feed(text[start : start + chunk_bytes])
    assert b"".join(lines) == text.replace(b"\n", b"")
    assert len(lines) == sum(-(-size // LINE_BYTES_MAX) for size in sizes)
    assert max(map(len, lines)) <= LINE_BYTES_MAX
    assert cutter.end() == []
