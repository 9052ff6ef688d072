"""One flat, contiguous run of elements for tensors of any shape and stride.

A single contiguous tensor is used where it lies; several, or strided ones, are packed into a copy, and the result is
unpacked only at the end: an interrupted operation has not touched them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class Flat:
    """`data` is one-dimensional; `unpack` brings it back into the tensors it came from."""

    def __init__(self, tensors: Sequence[Tensor], *, read: bool = True) -> None:
        """`read=False`: the tensors are only written. Raises ValueError for mixed or unusable tensors."""
        if not tensors:
            raise ValueError("an operation needs at least one tensor")
        check(tensors)
        self._tensors = tensors
        self._packed = len(tensors) > 1 or not tensors[0].is_contiguous()
        if not self._packed:
            self.data = tensors[0].detach().view(-1)
        elif read:
            self.data = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
        else:
            self.data = tensors[0].new_empty(sum(tensor.numel() for tensor in tensors))

    def unpack(self) -> None:
        if not self._packed:
            return
        start = 0
        for tensor in self._tensors:
            stop = start + tensor.numel()
            tensor.detach().copy_(self.data[start:stop].view(tensor.shape))
            start = stop


def check(tensors: Sequence[Tensor]) -> None:
    """Raise ValueError unless all are dense CPU tensors of one dtype."""
    first = tensors[0]
    for tensor in tensors:
        if tensor.device.type != "cpu" or tensor.layout is not torch.strided:
            raise ValueError(f"a {tensor.layout} tensor on {tensor.device}: bring it to a dense CPU tensor first")
        if tensor.dtype != first.dtype:
            raise ValueError(f"one operation, two types: {first.dtype} and {tensor.dtype}")
