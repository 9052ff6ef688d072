"""Tensors of known contents, and the check that a sum of them over all ranks is right in every element.

Contents depend on the rank, the place and a salt, are whole numbers, and their sums over up to `WORKERS_MAX` ranks stay
below 256: exact in every dtype measured, so a result is right or wrong, never close.
"""

import torch

WORKERS_MAX = 5
COLUMNS = 256
COLUMN_PERIOD = 3
ROW_PERIOD = 11
SALT_PERIOD = 7
CHECK_ROWS = 1024


def fill(tensor: torch.Tensor, rank: int, salt: int) -> None:
    """Overwrites a contiguous tensor of a multiple of COLUMNS elements with what `rank` contributes."""
    grid = tensor.view(-1, COLUMNS)
    rows = _rows(grid.shape[0], tensor.dtype) + salt % SALT_PERIOD
    torch.add(rows, _columns(tensor.dtype) * (rank + 1), out=grid)


def is_sum(tensor: torch.Tensor, workers: int, salt: int) -> bool:
    """Whether the tensor holds the sum over the ranks 0..workers-1 of what `fill` wrote."""
    columns = _columns(tensor.dtype) * (workers * (workers + 1) // 2)
    return _holds(tensor, columns, workers=workers, salt=salt)


def is_part(tensor: torch.Tensor, rank: int, salt: int) -> bool:
    """Whether the tensor still holds what `fill` wrote for `rank`."""
    return _holds(tensor, _columns(tensor.dtype) * (rank + 1), workers=1, salt=salt)


def _holds(tensor: torch.Tensor, columns: torch.Tensor, *, workers: int, salt: int) -> bool:
    grid = tensor.view(-1, COLUMNS)
    rows = (_rows(grid.shape[0], tensor.dtype) + salt % SALT_PERIOD) * workers
    return all(
        torch.equal(part, row + columns)
        for part, row in zip(torch.split(grid, CHECK_ROWS), torch.split(rows, CHECK_ROWS), strict=True)
    )


def _columns(dtype: torch.dtype) -> torch.Tensor:
    return (torch.arange(COLUMNS) % COLUMN_PERIOD + 1).to(dtype)


def _rows(count: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.arange(count) % ROW_PERIOD).to(dtype).unsqueeze(1)
