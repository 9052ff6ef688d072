"""Streams among real processes: beside other ways, beside each other, with members that lack kernels, die or stop."""

import os
import signal
import time
from collections.abc import Sequence

import pytest
import torch
from disagreeing import MOST, disagree
from mesh_workers import Crew, Site, run

from elastic_run.collectives import native
from elastic_run.collectives.dyadic import blocks_of
from elastic_run.collectives.errors import CollectiveAborted
from elastic_run.collectives.reduction import Reduction
from elastic_run.collectives.selection import STREAM_BYTES_MIN, Method

pytestmark = pytest.mark.skipif(native.kernels is None, reason="the kernels are not built here: no compiler")
LARGE = (16 << 20) // 4


def drawn(rank: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * numel + rank)
    if dtype.is_floating_point:
        return torch.randn(numel, generator=generator).to(dtype)
    return torch.randint(-(1 << 30), 1 << 30, (numel,), generator=generator).to(dtype)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def every_type(site: Site) -> None:
    group = site.install()
    for dtype in sorted(native.TYPES, key=str):
        for numel in (1, 77, 40_000, 1_000_003):
            for reduction in (Reduction.SUM, Reduction.AVG) if dtype.is_floating_point else (Reduction.SUM,):
                streamed = drawn(site.rank, numel, dtype)
                other = streamed.clone()
                group.all_reduce([streamed], reduction, method=Method.STREAMED).wait(30)
                group.all_reduce([other], reduction, method=Method.SHARED).wait(30)
                assert same(streamed, other), (dtype, numel, reduction)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_bits_are_those_of_the_other_way(size: int) -> None:
    run(size, every_type)


@pytest.mark.parametrize("lacking", [(0,), (1, 2), (0, 1, 2)])
def test_where_one_lacks_the_kernels_all_go_another_way(lacking: Sequence[int]) -> None:
    def program(site: Site) -> None:
        if site.rank in lacking:
            native.kernels = None
        group = site.install()
        for numel in (100_000, 40_000):
            data = drawn(site.rank, numel, torch.float32)
            exact = data.clone()
            group.all_reduce([data]).wait(30)
            parts = [drawn(rank, numel, torch.float32) for rank in range(3)]
            assert same(data, parts[0] + parts[1] + parts[2])
            (block,) = blocks_of(range(site.rank, site.rank + 1), 3)
            group.all_reduce_exact(exact, {block: exact}, 3).wait(30)
            assert same(exact, (parts[0] + parts[1]) + parts[2])

    run(3, program)


def test_streams_of_two_groups_begun_in_different_orders_end() -> None:
    def program(site: Site) -> None:
        one = site.install()
        two = site.mesh.group("two", [2, 1, 0])
        operations = []
        for number in range(6):
            pair = [one, two] if (site.rank + number) % 2 else [two, one]
            for group in pair:
                data = torch.full((300_000 + number,), float(site.rank + 1))
                operations.append((group.all_reduce([data]), data))
        small = torch.ones(10)
        one.all_reduce([small]).wait(30)
        for operation, data in operations:
            operation.wait(30)
            assert torch.equal(data, torch.full_like(data, 6.0))
        assert site.mesh.groups_streaming == 0

    run(3, program)


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGSTOP])
def test_a_member_lost_in_the_middle_leaves_the_input_as_it_was(stop: signal.Signals) -> None:
    """The last one dies, or stops and is then given up, while the others stream; those then go on without it."""

    def program(site: Site) -> float:
        group = site.install()
        data = drawn(site.rank, LARGE, torch.float32)
        before = data.clone()
        group.barrier().wait(30)
        rounds = 0
        site.tell("ready")
        while True:
            operation = group.all_reduce([data], Reduction.AVG)
            try:
                while not operation.finished:
                    if site.pipe.poll(0.001):
                        assert site.hear() == "give up"
                        site.mesh.abort("w2", "stopped")
                operation.wait(30)
            except CollectiveAborted as aborted:
                culprit = aborted.culprit
                break
            rounds += 1
            before = data.clone()
        assert culprit == "w2"
        assert same(data, before), "an interrupted operation has not touched its input"
        group = site.install(2, [0, 1])
        ones = torch.ones(LARGE)
        group.all_reduce([ones]).wait(30)
        assert torch.equal(ones, torch.full_like(ones, 2.0))
        return rounds

    with Crew(3, program) as crew:
        for rank in range(3):
            assert crew.hear(rank) == "ready"
        time.sleep(0.3)  # so that they are in the middle of something
        os.kill(crew.pid(2), stop)
        if stop is signal.SIGSTOP:
            time.sleep(0.2)
            for rank in (0, 1):
                crew.tell(rank, "give up")
        assert crew.result(0) > 0
        assert crew.result(1) > 0


def test_a_stopped_member_that_goes_on_hears_that_it_is_out() -> None:
    """It was in the middle of a stream, and the others have long used the memory for something else."""

    def program(site: Site) -> str:
        group = site.install()
        data = drawn(site.rank, LARGE, torch.float32)
        group.barrier().wait(30)
        site.tell("ready")
        try:
            while not site.pipe.poll():
                before = data.clone()
                operation = group.all_reduce([data], Reduction.AVG)
                while not operation.finished and not site.pipe.poll(0.001):
                    pass
                if not operation.finished:
                    site.mesh.interrupt("another view comes")
                operation.wait(30)
        except CollectiveAborted:
            assert same(data, before)
            if site.rank == 2:
                return "out"
        if site.pipe.poll():
            site.hear()
        group = site.install(2, [0, 1])
        for _ in range(10):
            ones = torch.ones(LARGE)
            group.all_reduce([ones]).wait(30)
            assert torch.equal(ones, torch.full_like(ones, 2.0))
        site.tell("done")
        site.hear()
        return "in"

    with Crew(3, program) as crew:
        for rank in range(3):
            assert crew.hear(rank) == "ready"
        time.sleep(0.3)  # so that they are in the middle of something
        os.kill(crew.pid(2), signal.SIGSTOP)
        for rank in (0, 1):
            crew.tell(rank, "move on")
        for rank in (0, 1):
            assert crew.hear(rank) == "done"
        os.kill(crew.pid(2), signal.SIGCONT)
        assert crew.result(2) == "out"
        for rank in (0, 1):
            crew.tell(rank, "end")
            assert crew.result(rank) == "in"


def test_the_default_for_large_values_on_one_host() -> None:
    def program(site: Site) -> None:
        group = site.install()
        seen = []
        original = native.kernels.stream  # type: ignore[union-attr]

        class Watched:
            def __getattr__(self, name: str) -> object:
                if name == "stream":
                    seen.append(name)
                    return original
                return getattr(kernels, name)

        kernels, native.kernels = native.kernels, Watched()  # type: ignore[assignment]
        small, large = torch.ones(STREAM_BYTES_MIN // 4 - 1), torch.ones(STREAM_BYTES_MIN // 4)
        group.all_reduce([small]).wait(30)
        assert not seen
        group.all_reduce([large]).wait(30)
        assert len(seen) == 1
        group.all_reduce([large], Reduction.MAX).wait(30)
        assert len(seen) == 1
        with pytest.raises(ValueError, match="streamed takes no max"):
            group.all_reduce([large], Reduction.MAX, method=Method.STREAMED)

    run(2, program)


def test_nothing_and_what_lies_askew_can_be_streamed() -> None:
    def program(site: Site) -> None:
        group = site.install()
        group.all_reduce([torch.empty(0)], method=Method.STREAMED).wait(30)
        whole = torch.ones(100_001)
        group.all_reduce([whole[1:]], Reduction.AVG).wait(30)
        group.all_reduce([whole[1:]]).wait(30)
        assert torch.equal(whole, torch.tensor([1.0] + [3.0] * 100_000))

    run(3, program)


@pytest.mark.parametrize("most", sorted(MOST))
def test_a_member_that_means_something_else_is_told(most: str) -> None:
    disagree(most)


def test_when_time_runs_out_the_one_that_stood_still_is_named() -> None:
    def program(site: Site) -> str | None:
        group = site.install()
        data = drawn(site.rank, LARGE, torch.float32)
        group.barrier().wait(30)
        site.tell("ready")
        while True:
            before = data.clone()
            try:
                group.all_reduce([data], Reduction.AVG, timeout_s=1.0).wait(30)
            except CollectiveAborted as aborted:
                assert same(data, before)
                return aborted.culprit

    with Crew(3, program) as crew:
        for rank in range(3):
            assert crew.hear(rank) == "ready"
        time.sleep(0.3)  # so that they are in the middle of something
        os.kill(crew.pid(2), signal.SIGSTOP)
        assert [crew.result(rank) for rank in (0, 1)] == ["w2", "w2"]
