"""The two operations that the whole Riemannian family needs, over tiles of rows.

    gram(x, y)    sum over rows of x_row^T y_row, per expert      -> (slots, R, R)
    rmul(x, p)    each row of x times its expert's matrix         -> rows

Both walk over a tile in chunks of experts that fit a core's cache (on an accelerator, in chunks that fill it), one
batched product a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsmoelora.optim.tiles import Tile

# A chunk's product is a temporary of the chunk's size. On an accelerator 16 MiB: the factors on q and v of a 7B model
# (20 experts of rank 4) take 11 products for `a` and 11 for `b`, each of more memory traffic than a launch costs; 2^20
# numbers would take 43, and 2^26 a temporary of 160 MiB.
_CPU_CHUNK, _ACCELERATOR_CHUNK = 1 << 16, 1 << 22


def chunk_size(tensor: Tensor) -> int:
    """Numbers worked on at once on the device of `tensor`."""
    return _CPU_CHUNK if tensor.device.type == "cpu" else _ACCELERATOR_CHUNK


def add_gram(out: Tensor, tile: Tile, x: Tensor, y: Tensor) -> None:
    """Add `x_row^T y_row` of every row of the tile to its slot.

    Args:
        out: (slots, R, R) fp32
        tile: which rows
        x, y: flat shards
    """
    products = []
    for x_rows, y_rows in zip(tile.chunks(x, chunk_size(x)), tile.chunks(y, chunk_size(x)), strict=True):
        x_BXR, y_BXR = _batch(x_rows), _batch(y_rows)
        products.append(torch.bmm(x_BXR.mT, y_BXR))
    out.index_add_(0, tile.slots, torch.cat(products))


def rmul_(grad: Tensor, tile: Tile, times: Tensor, factor: Tensor, minus: Tensor | None) -> Tensor:
    """`grad <- grad times - factor minus` for every row of the tile, in place.

    Args:
        grad, factor: flat shards
        tile: which rows
        times: (slots, R, R)
        minus: (slots, R, R), or None for zero

    Returns:
        the sum of the squares of what was written (scalar)
    """
    size = chunk_size(grad)
    rows = list(tile.chunks(grad, size))
    lengths = [len(chunk) * chunk.shape[1] for chunk in rows]
    times_of_chunk = times[tile.slots].split(lengths)
    minus_of_chunk = None if minus is None else minus[tile.slots].split(lengths)
    factors = None if minus is None else list(tile.chunks(factor, size))
    squares = []
    for index, chunk in enumerate(rows):
        result = torch.bmm(_batch(chunk), times_of_chunk[index])
        if minus_of_chunk is not None and factors is not None:
            result.baddbmm_(_batch(factors[index]), minus_of_chunk[index], alpha=-1)
        chunk.copy_(result.view_as(chunk))
        squares.append(torch.linalg.vector_norm(result))
    return torch.stack(squares).square().sum()


def _batch(rows: Tensor) -> Tensor:
    """(layers, experts, rows, R) -> (layers * experts, rows, R), copied only where layers do not lie side by side."""
    return rows.reshape(-1, *rows.shape[2:])
