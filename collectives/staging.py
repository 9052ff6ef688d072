"""The host memory one operation of the torch facade works on, and what is copied back when it is done.

The data plane moves CPU tensors, and takes lists as one run of elements. A CPU tensor is handed through as it is, and
so is a list whose tensors lie side by side in memory; everything else gets a host buffer: pinned for an accelerator's
tensors, filled before the operation starts and written back after it ended well.
Invariants: 1. after a failure nothing is written back (tests/unit/test_staging.py);
2. `finish` writes back once, whoever calls it, and whoever called it may use the results (tests/unit/test_staging.py).
"""

import threading
from collections.abc import Sequence

import torch
from torch import Tensor


class Staging:
    """Made per operation: `read`, `write`, `update` and their list forms, then `ready`, the operation, `finish`."""

    __slots__ = ("_always", "_copies", "_devices", "_lock", "_needed")

    def __init__(self, *, always: bool = False) -> None:
        self._always = always
        """Give even CPU tensors a buffer: for tests of this file on machines without an accelerator."""
        self._copies: list[tuple[Tensor, Tensor]] = []  # (the caller's tensor, host memory that has its new content)
        self._devices: set[torch.device] = set()
        self._needed = False
        self._lock = threading.Lock()

    def read(self, tensor: Tensor) -> Tensor:
        """Return host memory with the content of `tensor`."""
        tensor = tensor.detach()
        return tensor if self._direct(tensor) else self._filled(tensor)

    def write(self, tensor: Tensor) -> Tensor:
        """Return host memory that `finish` copies to `tensor`."""
        tensor = tensor.detach()
        return tensor if self._direct(tensor) else self._written(tensor, self._room(tensor))

    def update(self, tensor: Tensor) -> Tensor:
        """Return host memory with the content of `tensor`, to which `finish` copies it back."""
        tensor = tensor.detach()
        return tensor if self._direct(tensor) else self._written(tensor, self._filled(tensor))

    def read_list(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return one run of host memory with the elements of all `tensors`, which have one type and device."""
        flat = side_by_side(tensors)
        if flat is not None:
            return self.read(flat)
        flat = self._flat_room(tensors)
        for tensor, part in zip(tensors, _parts(flat, tensors), strict=True):
            self._fill(part, tensor.detach())
        return flat

    def write_list(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return one run of host memory that `finish` copies to all `tensors`, which have one type and device."""
        flat = side_by_side(tensors)
        if flat is not None:
            return self.write(flat)
        flat = self._flat_room(tensors)
        for tensor, part in zip(tensors, _parts(flat, tensors), strict=True):
            self._written(tensor.detach(), part)
        return flat

    def ready(self) -> None:
        """Return when every buffer has the content that was asked for."""
        self._synchronise()

    def finish(self, *, other_thread: bool = False) -> None:
        """Copy back. From `other_thread` it also waits for the device, whose streams belong to the caller's thread."""
        with self._lock:
            copies, self._copies = self._copies, []
            for tensor, host in copies:
                tensor.copy_(host, non_blocking=True)
                self._note(tensor)
            if other_thread:
                self._synchronise()

    @property
    def needed(self) -> bool:
        """Say whether `finish` has, or had, something to copy."""
        return self._needed

    def _direct(self, tensor: Tensor) -> bool:
        return tensor.device.type == "cpu" and not self._always

    def _filled(self, tensor: Tensor) -> Tensor:
        host = self._room(tensor)
        self._fill(host, tensor)
        return host

    def _fill(self, host: Tensor, tensor: Tensor) -> None:
        host.copy_(tensor, non_blocking=True)
        self._note(tensor)

    def _written(self, tensor: Tensor, host: Tensor) -> Tensor:
        self._copies.append((tensor, host))
        self._needed = True
        return host

    def _room(self, tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type != "cpu")

    def _flat_room(self, tensors: Sequence[Tensor]) -> Tensor:
        first = tensors[0]
        elements = sum(tensor.numel() for tensor in tensors)
        return torch.empty(elements, dtype=first.dtype, pin_memory=first.device.type != "cpu")

    def _note(self, tensor: Tensor) -> None:
        if tensor.device.type != "cpu":
            self._devices.add(tensor.device)

    def _synchronise(self) -> None:
        devices, self._devices = self._devices, set()
        for device in devices:
            torch.accelerator.current_stream(device).synchronize()


def side_by_side(tensors: Sequence[Tensor]) -> Tensor | None:
    """Return the one flat tensor that `tensors` are the consecutive pieces of, or None."""
    pieces = [tensor.detach() for tensor in tensors if tensor.numel()]
    if not pieces:
        return None
    first = pieces[0]
    storage = first.untyped_storage().data_ptr()
    offset = first.storage_offset()
    for piece in pieces:
        if (
            piece.dtype is not first.dtype
            or piece.device != first.device
            or not piece.is_contiguous()
            or piece.untyped_storage().data_ptr() != storage
            or piece.storage_offset() != offset
        ):
            return None
        offset += piece.numel()
    return first.as_strided((offset - first.storage_offset(),), (1,))


def _parts(flat: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
