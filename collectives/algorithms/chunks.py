"""How a large operation is cut so that transfer and arithmetic overlap: shares, one per member, and chunks of each.

Every share has the same number of chunks, so members agree on the messages without a word; of short shares some are
empty. Not here: what travels when (pairwise.py, ring.py).
"""

from collections.abc import Sequence

from torch import Tensor

from elastic_run.collectives.native import copy_through
from elastic_run.collectives.partition import slices

ALIGN_BYTES = 64
CHUNK_BYTES_MIN, CHUNK_BYTES_MAX = 256 << 10, 2 << 20
"""Larger: less is in cache when it is reduced; smaller: more messages, each some 50 us of Python on both sides."""
CHUNKS_PER_SHARE = 4
"""Wanted; bounded by the two above."""
BACKUP_BYTES_MIN = 64 << 10
AHEAD = 4
"""Chunks asked for ahead of the one that is reduced: so a member that waits for a processor does not stop the rest."""


def shares_of(numel: int, itemsize: int, parts: int) -> list[slice]:
    """Return what each of `parts` members owns of `numel` elements."""
    return [slice(*bounds) for bounds in slices(numel, parts, _align(itemsize))]


class Chunks:
    """`[share][chunk]` is a slice of the whole."""

    def __init__(self, shares: Sequence[slice], itemsize: int) -> None:
        self.shares = shares
        nbytes = max(share.stop - share.start for share in shares) * itemsize
        chunk_bytes = min(CHUNK_BYTES_MAX, max(CHUNK_BYTES_MIN, nbytes // CHUNKS_PER_SHARE))
        self.count = max(1, -(-nbytes // chunk_bytes))
        """Chunks of every share."""
        self._chunks = [
            [
                slice(share.start + start, share.start + stop)
                for start, stop in slices(share.stop - share.start, self.count, _align(itemsize))
            ]
            for share in shares
        ]
        self.longest = max(chunk.stop - chunk.start for chunks in self._chunks for chunk in chunks)
        """Elements of the longest chunk."""

    def __getitem__(self, share: int) -> list[slice]:
        return self._chunks[share]


class Saved:
    """The original of what an in-place operation overwrites, kept until nothing can fail any more.

    Saving a chunk just before it is received costs one copy, whose source is then in cache when it is overwritten;
    receiving aside and copying at the end costs the same copy with everything out of cache.
    """

    def __init__(self, data: Tensor, backup: Tensor) -> None:
        self._data = data
        self._backup = backup
        self._places: list[slice] = []

    def save(self, place: slice) -> Tensor:
        """Return the part of the data, free to be overwritten."""
        part = self._data[place]
        copy_through(self._backup[place], part, bytes_min=BACKUP_BYTES_MIN)  # read again only when something fails
        self._places.append(place)
        return part

    def restore(self) -> None:
        for place in self._places:
            self._data[place].copy_(self._backup[place])
        self._places.clear()


def _align(itemsize: int) -> int:
    return max(1, ALIGN_BYTES // itemsize)
