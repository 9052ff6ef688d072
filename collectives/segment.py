"""One piece of shared memory: a sealed memfd and a mapping of it whose life is that of its tensors.

Memory without a name: nothing of it is in /dev/shm, so nothing is left there however a worker dies.
Invariants:
1. A memfd is sealed against shrinking before anyone sees it, and a received one is refused unless it is: no page
   within the announced size can vanish under a reader (tests/unit/test_arena.py).
2. A mapping is undone when the last tensor or buffer over it is gone, never earlier, and not by `close`: a tensor that
   outlives its segment still reads (tests/unit/test_arena.py). It holds no descriptor.
Fork: a child inherits the mappings and the descriptors (which an exec closes). Both processes then have the same pages,
so the child must leave arena and tensors alone; letting go of them, also at its exit, changes nothing for the parent.
Not here: which bytes of a segment belong to whom (arena.py).
"""

import ctypes
import fcntl
import mmap
import os
import weakref

import torch
from torch import Tensor

from elastic_run.collectives.errors import CollectiveError
from elastic_run.collectives.free_space import FreeSpace
from elastic_run.runtime.protocol.errors import CodecError

HEADER_BYTES = 64
"""Before every region's data: the first word is the region's generation, 0 when the memory is free."""
_LIVING_OFFSET = 8
"""A word of the segment's first header that no region writes: not 0 until the segment is retired."""
SEALS_REQUIRED = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
SEGMENTS_MAX = 64
"""Of one worker, a descriptor each. Segments grow geometrically, so a terabyte needs fewer than 40."""
BACKING_CHUNK_BYTES = 8 << 20
"""Pages are reserved in pieces of half a millisecond: a signal undoes the piece under way, and a profiler's timer that
fires more often than one piece takes would keep a long call from ever ending."""

_MAP_FAILED = ctypes.c_void_p(-1).value
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class Mapping:
    """The pages of a memfd in this process. Raises CollectiveError when the system does not map them.

    Read-only pages are a plain read-only mapping. torch takes them without a warning because ctypes calls every array
    writable; a write to such a tensor ends the process. A private writable mapping would take the write, and from then
    on hide the owner's: wrong sums instead of a crash.
    """

    def __init__(self, fd: int, size_bytes: int, *, writable: bool) -> None:
        access = mmap.PROT_READ | mmap.PROT_WRITE if writable else mmap.PROT_READ
        address = _libc.mmap(None, size_bytes, access, mmap.MAP_SHARED, fd, 0)
        if address in (None, _MAP_FAILED):
            raise CollectiveError(f"cannot map {size_bytes} bytes: {os.strerror(ctypes.get_errno())}")
        self._pages = (ctypes.c_ubyte * size_bytes).from_address(address)
        # Tensors and buffers keep the array alive, the array keeps the mapping. At exit it must not run:
        # a background thread may still read, and the kernel unmaps everything anyway.
        weakref.finalize(self._pages, _libc.munmap, address, size_bytes).atexit = False
        self.size_bytes = size_bytes
        self.bytes = memoryview(self._pages).cast("B")
        self.tensor: Tensor = torch.frombuffer(self._pages, dtype=torch.uint8)

    def generation(self, offset: int) -> int:
        """Return the generation word of the region whose data begins at `offset`: one aligned load."""
        return ctypes.c_uint64.from_buffer(self._pages, offset - HEADER_BYTES).value

    def set_generation(self, offset: int, generation: int) -> None:
        """Overwrite that word: one aligned store."""
        ctypes.c_uint64.from_buffer(self._pages, offset - HEADER_BYTES).value = generation

    @property
    def living(self) -> bool:
        """Whether the owner still uses the segment; only for mappings of a whole segment, by anyone."""
        return ctypes.c_uint64.from_buffer(self._pages, _LIVING_OFFSET).value != 0

    def begin(self) -> None:
        """Mark the segment as in use."""
        ctypes.c_uint64.from_buffer(self._pages, _LIVING_OFFSET).value = 1

    def discard(self) -> None:
        """Mark the segment as retired and give its pages back, though others may still map them: they read zeros.

        Best effort: where the system declines, the pages go with the last mapping.
        """
        ctypes.c_uint64.from_buffer(self._pages, _LIVING_OFFSET).value = 0
        _libc.madvise(ctypes.addressof(self._pages), self.size_bytes, mmap.MADV_REMOVE)


class Segment:
    """A memfd of this worker, mapped for reading and writing. `close` it; tensors over it stay valid."""

    def __init__(self, number: int, size_bytes: int) -> None:
        """Raises CollectiveError when the system gives no descriptor or no address space."""
        self.number = number
        self.size_bytes = size_bytes
        self.free = FreeSpace(size_bytes)
        self.backed_bytes = 0
        """The pages below this byte exist: warm, and sure not to fail at the first touch."""
        try:
            self.fd = os.memfd_create("elastic-collectives", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as error:
            raise CollectiveError(f"cannot make shared memory: {error.strerror}") from None
        try:
            os.ftruncate(self.fd, size_bytes)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, SEALS_REQUIRED | fcntl.F_SEAL_SEAL)
            self.back(mmap.PAGESIZE)
            self.mapping = Mapping(self.fd, size_bytes, writable=True)
            self.mapping.begin()
        except OSError as error:
            os.close(self.fd)
            raise CollectiveError(f"cannot make {size_bytes} bytes of shared memory: {error.strerror}") from None
        except CollectiveError:
            os.close(self.fd)
            raise

    def back(self, stop: int) -> None:
        """Reserve the pages below byte `stop`. Raises CollectiveError when the system has no memory for them.

        Without this a full machine shows itself by SIGBUS in whoever touches the page first.
        """
        while self.backed_bytes < stop:
            nbytes = min(BACKING_CHUNK_BYTES, stop - self.backed_bytes)
            try:
                os.posix_fallocate(self.fd, self.backed_bytes, nbytes)
            except OSError as error:
                raise CollectiveError(f"no memory for {nbytes} bytes of shared memory: {error.strerror}") from None
            self.backed_bytes += nbytes

    def close(self) -> None:
        os.close(self.fd)


def map_received(fd: int, size_bytes: int, *, writable: bool) -> Mapping:
    """Map a memfd that a peer sent, after looking at it. The descriptor stays the caller's.

    Raises CodecError when it is not what was announced, CollectiveError when it cannot be mapped.
    """
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        raise CodecError("the received descriptor is not a memfd") from None
    if seals & SEALS_REQUIRED != SEALS_REQUIRED:
        raise CodecError(f"the received memfd can change its size (seals {seals:#x})")
    if os.fstatvfs(fd).f_bsize != mmap.PAGESIZE:
        raise CodecError("the received memfd has huge pages, which can be missing when they are touched")
    found_bytes = os.fstat(fd).st_size
    if size_bytes < mmap.PAGESIZE:
        raise CodecError(f"{size_bytes} bytes hold no region")
    if found_bytes != size_bytes:
        raise CodecError(f"the received memfd has {found_bytes} bytes, announced were {size_bytes}")
    if writable and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDWR:
        raise CodecError("the received memfd does not allow writing")
    return Mapping(fd, size_bytes, writable=writable)
