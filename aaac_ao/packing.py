"""Codes <-> stored bytes: the tile layout of `qdata`.

A tile is 16 rows x 64 columns of 4-bit codes, 512 bytes. Lane `4 g + t` (g = 0..7, t = 0..3) of a warp owns 16
contiguous bytes: words `(c, h)` of 8 consecutive codes each, row `8 h + g`, columns `32 c + 8 t .. + 7`, low nibble
first. This is the fragment order of the tensor cores' m16n8k16 operand A, so a GPU lane loads its own fragments with
one 16-byte load and no weight crosses shared memory.

`qdata` is [ceil(N / 16), ceil(K / 64) * 512]: N-like by K-like, so slices by 16 rows or 64 columns are views.
"""

from __future__ import annotations

import torch

TILE_ROWS = 16
TILE_COLUMNS = 64
TILE_BYTES = TILE_ROWS * TILE_COLUMNS // 2


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def packed_shape(out_features: int, in_features: int) -> tuple[int, int]:
    """Shape of `qdata` for a weight [out_features, in_features]."""
    return ceil_div(out_features, TILE_ROWS), ceil_div(in_features, TILE_COLUMNS) * TILE_BYTES


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Pack codes [N, K] (uint8, 0..15) into `qdata`; ragged edges are filled with code 0.

    Raises:
        ValueError: codes are not a 2-D uint8 tensor.
    """
    if codes.dim() != 2 or codes.dtype != torch.uint8:
        raise ValueError(f"codes must be a 2-D uint8 tensor, got {codes.dim()}-D {codes.dtype}")
    n, k = codes.shape
    rows, row_bytes = packed_shape(n, k)
    columns = row_bytes // TILE_BYTES
    codes = torch.nn.functional.pad(codes, (0, columns * TILE_COLUMNS - k, 0, rows * TILE_ROWS - n))
    # axes of the view: tile row, h, g, tile column, c, t, byte, nibble
    tiles = codes.view(rows, 2, 8, columns, 2, 4, 4, 2).permute(0, 3, 2, 5, 4, 1, 6, 7)
    low, high = tiles.unbind(-1)
    return (low | (high << 4)).reshape(rows, row_bytes)


def unpack(qdata: torch.Tensor, out_features: int, in_features: int) -> torch.Tensor:
    """Exact inverse of `pack`: codes [out_features, in_features], uint8.

    Raises:
        ValueError: `qdata` is not what `pack` returns for this shape.
    """
    rows, row_bytes = packed_shape(out_features, in_features)
    if qdata.dtype != torch.uint8 or tuple(qdata.shape) != (rows, row_bytes):
        raise ValueError(
            f"qdata of a [{out_features}, {in_features}] weight must be uint8 [{rows}, {row_bytes}], "
            f"got {qdata.dtype} {list(qdata.shape)}"
        )
    columns = row_bytes // TILE_BYTES
    # axes of the view: tile row, tile column, g, t, c, h, byte
    lanes = qdata.reshape(rows, columns, 8, 4, 2, 2, 4)
    tiles = torch.stack([lanes & 15, lanes >> 4], dim=-1).permute(0, 5, 2, 1, 4, 3, 6, 7)
    return tiles.reshape(rows * TILE_ROWS, columns * TILE_COLUMNS)[:out_features, :in_features]
