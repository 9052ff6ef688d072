"""Every cut of a tensor among members is contiguous, complete, aligned and even."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from elastic_run.collectives.partition import slices


@given(numel=st.integers(0, 5000) | st.integers(0, 2**40), parts=st.integers(1, 64), align=st.integers(1, 300))
def test_parts_are_contiguous_aligned_and_even(numel: int, parts: int, align: int) -> None:
    cut = slices(numel, parts, align)
    assert len(cut) == parts and cut[0][0] == 0 and cut[-1][1] == numel
    assert all(stop == start for (_, stop), (start, _) in itertools.pairwise(cut))
    assert all(start % align == 0 for start, _ in cut)
    sizes = [stop - start for start, stop in cut]
    assert min(sizes) >= 0 and max(sizes) - min(sizes) <= align
