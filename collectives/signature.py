"""What an operation is: a number that members compare, and what is recorded of it.

Not here: the comparison (peer.py); the records (recording.py).
"""

import zlib
from typing import NamedTuple

import torch
from torch import Tensor

from elastic_run.collectives.reduction import Reduction
from elastic_run.collectives.selection import Method


class Signature(NamedTuple):
    """One member's description of one operation."""

    name: str
    check: int
    """Equal on all members when they mean the same."""
    nbytes: int = 0
    """Of this member's input; where it only receives, of its output."""
    dtype: torch.dtype | None = None
    reduction: Reduction | None = None
    method: Method | None = None
    partner: int | None = None
    """Rank of the root, or of the other side."""


def sign(
    name: str,
    data: Tensor,
    *more: object,
    reduction: Reduction | None = None,
    method: Method | None = None,
    root: int | None = None,
) -> Signature:
    """Sign an operation for which all members have as many elements as `data`; `more` must be equal on all as well."""
    check = zlib.crc32(f"{name} {data.dtype} {data.numel()} {reduction} {method} {root} {more}".encode())
    return Signature(name, check, data.nbytes, data.dtype, reduction, method, root)


def sign_uneven(name: str, data: Tensor | None = None, partner: int | None = None) -> Signature:
    """Sign an operation whose members may have different sizes, or none."""
    if data is None:
        return Signature(name, zlib.crc32(name.encode()), partner=partner)
    check = zlib.crc32(f"{name} {data.dtype}".encode())
    return Signature(name, check, data.nbytes, data.dtype, partner=partner)


def sign_message(name: str, data: Tensor, partner: int | None) -> Signature:
    """Sign a point-to-point message: the two sides only compare its size."""
    return Signature(name, 0, data.nbytes, data.dtype, partner=partner)
