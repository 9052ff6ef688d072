"""Temporary memory of operations that is used again: fresh pages cost several times a copy into warm ones.

What is given back is kept up to a bound, the latest first in line, because it is the likeliest to be in cache.
Not here: memory that peers see (arena.py). Engine thread only.
"""

import ctypes
from mmap import MADV_HUGEPAGE

import torch
from torch import Tensor

GRAIN_BYTES = 1 << 16
"""Blocks are multiples of it, so that blocks of similar operations fit each other."""
WASTE_MAX = 4
"""A block serves a request when it is at most so many times as large: a small one must not hold the largest."""
BLOCKS_MAX = 256
"""Bounds the search."""
HUGE_PAGE_BYTES = 2 << 20
"""Fresh memory of 256 MiB costs 115 ms of CPU in small pages, 34 ms in huge ones."""
_libc = ctypes.CDLL(None)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class ScratchPool:
    """Blocks that nobody uses, `limit_bytes` of them together at most."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._blocks: list[Tensor] = []  # the latest at the end
        self.kept_bytes = 0

    def take(self, nbytes: int) -> Tensor:
        """Return a block of at least `nbytes`, uint8, with whatever is in it."""
        for index in range(len(self._blocks) - 1, -1, -1):
            if nbytes <= len(self._blocks[index]) <= WASTE_MAX * max(nbytes, GRAIN_BYTES):
                block = self._blocks.pop(index)
                self.kept_bytes -= len(block)
                return block
        block = torch.empty(-(-max(nbytes, 1) // GRAIN_BYTES) * GRAIN_BYTES, dtype=torch.uint8)
        _want_huge_pages(block)
        return block

    def give(self, block: Tensor) -> None:
        """Take a block back; the ones longest unused go when there are too many."""
        self._blocks.append(block)
        self.kept_bytes += len(block)
        while self.kept_bytes > self._limit_bytes or len(self._blocks) > BLOCKS_MAX:
            self.kept_bytes -= len(self._blocks.pop(0))

    def clear(self) -> None:
        self._blocks.clear()
        self.kept_bytes = 0


def _want_huge_pages(block: Tensor) -> None:
    """Ask for fewer, larger pages; a system that has none to give stays with small ones."""
    start = -(-block.data_ptr() // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    nbytes = (block.data_ptr() + len(block) - start) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
    if nbytes > 0:
        _libc.madvise(start, nbytes, MADV_HUGEPAGE)
