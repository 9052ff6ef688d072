"""Tensors seen as plain bytes, without a copy.

A view from `bytes_of` keeps its tensor's memory alive. Only contiguous CPU tensors have one.
"""

import ctypes
import functools

import torch


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the writable bytes of a contiguous CPU tensor of any dtype."""
    nbytes = tensor.numel() * tensor.element_size()
    if not nbytes:
        return memoryview(bytearray(0))  # a new one: buffers are told apart by what they are views of
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError(
            f"only contiguous CPU tensors can be sent in place, not {tensor.device} {tuple(tensor.stride())}"
        )
    block = _bytes_type(nbytes).from_address(tensor.data_ptr())
    block.keep = tensor  # type: ignore[attr-defined]  # ctypes objects take attributes; this one owns the memory
    return memoryview(block).cast("B")


def tensor_of(buffer: memoryview) -> torch.Tensor:
    """Return writable bytes as a tensor of uint8, without a copy."""
    return torch.frombuffer(buffer, dtype=torch.uint8)


def copy(target: memoryview, source: memoryview) -> None:
    """Copy bytes of equal length; other threads of the interpreter run meanwhile."""
    if len(source):
        tensor_of(target).copy_(tensor_of(source))


@functools.lru_cache(maxsize=1024)
def _bytes_type(nbytes: int) -> type[ctypes.Array[ctypes.c_ubyte]]:
    """Kept, because to make such a type costs 80 us and leaves a cycle for the garbage collector."""
    return ctypes.c_ubyte * nbytes
