"""What the numbers in the records of operations stand for. On file: a member's value, never given to another meaning.

Not here: where they lie (operations_layout.py). A reader shows values it does not know as they are (operations.py).
"""

import enum


class Kind(enum.IntEnum):
    """What a group does together."""

    OTHER = 0
    ALL_REDUCE = 1
    REDUCE = 2
    BROADCAST = 3
    ALL_GATHER = 4
    REDUCE_SCATTER = 5
    ALL_TO_ALL = 6
    GATHER = 7
    SCATTER = 8
    SEND = 9
    RECEIVE = 10
    BARRIER = 11


class Reduction(enum.IntEnum):
    NONE = 0
    SUM = 1
    AVG = 2
    MIN = 3
    MAX = 4
    PRODUCT = 5
    BAND = 6
    BOR = 7
    BXOR = 8


class Dtype(enum.IntEnum):
    """Names as torch has them."""

    NONE = 0
    OTHER = 1
    MIXED = 2
    FLOAT64 = 3
    FLOAT32 = 4
    FLOAT16 = 5
    BFLOAT16 = 6
    INT64 = 7
    INT32 = 8
    INT16 = 9
    INT8 = 10
    UINT64 = 11
    UINT32 = 12
    UINT16 = 13
    UINT8 = 14
    BOOL = 15
    COMPLEX128 = 16
    COMPLEX64 = 17
    COMPLEX32 = 18
    FLOAT8_E4M3FN = 19
    FLOAT8_E4M3FNUZ = 20
    FLOAT8_E5M2 = 21
    FLOAT8_E5M2FNUZ = 22
    FLOAT8_E8M0FNU = 23
    FLOAT4_E2M1FN_X2 = 24


class Algorithm(enum.IntEnum):
    OTHER = 0
    DIRECT = 1
    EXCHANGE = 2
    PAIRWISE = 3
    RING = 4
    SHARED = 5
    HIERARCHICAL = 6
    TREE_EXACT = 7
    Q8 = 8
    SHARED_ONCE = 9
    STREAMED = 10
    PIPED = 11


class State(enum.IntEnum):
    """How an operation stands."""

    UNKNOWN = 0
    """Never on file: the second half of the record was being written."""
    STARTED = 1
    DONE = 2
    ABORTED = 3
    """A peer was lost, a view ended, or time ran out; the culprit is its peer."""
    FAILED = 4
    """Otherwise without a result: members disagreed on what the operation is."""


_DTYPES = {dtype.name.lower(): dtype for dtype in Dtype}


def dtype_code(name: str) -> Dtype:
    """Return the code of torch's dtype of this name, as "float32"; OTHER for one that has no code of its own."""
    return _DTYPES.get(name, Dtype.OTHER)
