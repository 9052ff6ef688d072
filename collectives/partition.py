"""How many elements of a tensor each member owns.

Invariants (tests/property/test_partition_property.py):
1. The parts are contiguous, in rank order, cover everything, and differ by at most `align` elements.
2. Every part starts at a multiple of `align`.
Not here: how a part is cut into frames for the wire (wire.py).
"""

import itertools


def slices(numel: int, parts: int, align: int = 1) -> tuple[tuple[int, int], ...]:
    """Return (start, stop) of each of `parts` parts, in elements. Few elements leave the last parts empty."""
    if numel < 0 or parts < 1 or align < 1:
        raise ValueError(f"cannot cut {numel} elements in {parts} parts aligned to {align}")
    units, rest = divmod(numel, align)
    base, larger = divmod(units, parts)
    bounds = [align * (base * part + min(part, larger)) for part in range(parts + 1)]
    # The rest goes to the end, where a part has `base` units: no part grows past base + 1.
    bounds[-1] += rest
    return tuple(itertools.pairwise(bounds))
