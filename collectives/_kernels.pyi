"""The compiled kernels (kernels.c): addresses and lengths are the caller's word."""

def copy(target: int, source: int, nbytes: int, /) -> None: ...
def sum(out: int, parts: tuple[int, ...], length: int, type: int, divisor: float, /) -> None: ...
def stream(
    rank: int,
    regions: tuple[tuple[int, int], ...],
    source: int,
    target: int,
    undo: int,
    nbytes: int,
    type: int,
    chunk: int,
    slots: int,
    header: int,
    steps: bytes,
    divisor: float,
    /,
) -> object: ...
def prepare(region: int, /) -> None: ...
def able(region: int, /) -> bool: ...
def advance(stream: object, fd: int, limit_ns: int, /) -> int: ...
def progress(stream: object, rank: int, /) -> tuple[int, int, int, int, int]: ...
def restore(stream: object, /) -> None: ...
def pump(
    rank: int,
    descriptors: tuple[tuple[int, int], ...],
    source: int,
    target: int,
    undo: int,
    nbytes: int,
    type: int,
    piece: int,
    window: int,
    memory: int,
    memory_bytes: int,
    steps: bytes,
    divisor: float,
    /,
) -> object: ...
def pump_advance(pump: object, fd: int, limit_ns: int, /) -> tuple[int, int]: ...
def pump_progress(pump: object, rank: int, /) -> tuple[int, int, int, int, int, int]: ...
def pump_restore(pump: object, /) -> None: ...
