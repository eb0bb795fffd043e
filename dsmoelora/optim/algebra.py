"""The two operations that the whole Riemannian family needs, over tiles of rows.

    gram(x, y)    sum over rows of x_row^T y_row, per expert      -> (slots, R, R)
    rmul(x, p)    each row of x times its expert's matrix         -> rows

Both work on blocks of rows small enough for a cache, in batched products; R is far too small for one matrix product
over all rows to be fast.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsmoelora.optim.tiles import Tile

# Numbers worked on at once: what fits a core's cache, or what keeps a GPU busy.
_CPU_CHUNK, _ACCELERATOR_CHUNK = 1 << 17, 1 << 26
_MAX_BLOCK_ROWS, _MIN_BLOCK_ROWS = 256, 32


def chunk_size(tensor: Tensor) -> int:
    """Numbers worked on at once on the device of `tensor`."""
    return _CPU_CHUNK if tensor.device.type == "cpu" else _ACCELERATOR_CHUNK


def block_rows(num_rows: int) -> int:
    """Rows of a block: the largest divisor of `num_rows` that fits, or a fixed size that leaves a remainder."""
    for size in range(min(num_rows, _MAX_BLOCK_ROWS), _MIN_BLOCK_ROWS - 1, -1):
        if num_rows % size == 0:
            return size
    return min(num_rows, _MAX_BLOCK_ROWS)


def add_gram(out: Tensor, tile: Tile, x: Tensor, y: Tensor) -> None:
    """Add `x_row^T y_row` of every row of the tile to its slot.

    Args:
        out: (slots, R, R) fp32
        tile: which rows
        x, y: flat shards
    """
    size = block_rows(tile.num_rows)
    whole = tile.num_rows // size * size
    x_view, y_view = tile.view(x), tile.view(y)
    for layers, slots in tile.chunks(chunk_size(x)):
        for rows, length in ((slice(0, whole), size), (slice(whole, None), tile.num_rows - whole)):
            if length:
                x_BLR = x_view[layers, :, rows].reshape(-1, length, tile.rank)
                y_BLR = x_BLR if x is y else y_view[layers, :, rows].reshape(-1, length, tile.rank)
                products = torch.bmm(x_BLR.mT, y_BLR).view(len(slots), -1, tile.rank, tile.rank)
                out.index_add_(0, slots, products.sum(1))


def rmul_(grad: Tensor, tile: Tile, times: Tensor, factor: Tensor, minus: Tensor | None) -> None:
    """`grad <- grad times - factor minus` for every row of the tile, in place.

    Args:
        grad, factor: flat shards
        tile: which rows
        times: (slots, R, R)
        minus: (slots, R, R), or None for zero
    """
    grad_view, factor_view = tile.view(grad), tile.view(factor)
    for layers, slots in tile.chunks(chunk_size(grad)):
        rows = grad_view[layers]
        result = torch.bmm(rows.reshape(-1, tile.num_rows, tile.rank), times[slots])
        if minus is not None:
            result.baddbmm_(factor_view[layers].reshape(-1, tile.num_rows, tile.rank), minus[slots], alpha=-1)
        rows.copy_(result.view_as(rows))
