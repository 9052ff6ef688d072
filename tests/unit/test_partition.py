"""Examples of how a tensor is cut among members."""

import pytest

from elastic_run.collectives.partition import slices


def test_first_parts_are_larger() -> None:
    assert slices(10, 4) == ((0, 3), (3, 6), (6, 8), (8, 10))


def test_parts_start_at_multiples_of_align() -> None:
    assert slices(1000, 3, align=256) == ((0, 256), (256, 512), (512, 1000))


def test_few_elements_leave_the_last_parts_empty() -> None:
    assert slices(2, 4) == ((0, 1), (1, 2), (2, 2), (2, 2))
    assert slices(0, 2) == ((0, 0), (0, 0))


@pytest.mark.parametrize(("numel", "parts", "align"), [(-1, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_impossible_cuts_are_refused(numel: int, parts: int, align: int) -> None:
    with pytest.raises(ValueError, match="cannot cut"):
        slices(numel, parts, align)
