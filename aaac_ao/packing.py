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
    """Return a / b, rounded up."""
    return -(-a // b)


def packed_shape(out_features: int, in_features: int) -> tuple[int, int]:
    """Shape of `qdata` for a weight [out_features, in_features]."""
    return ceil_div(out_features, TILE_ROWS), ceil_div(in_features, TILE_COLUMNS) * TILE_BYTES


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Pack codes [N, K] (uint8, 0..15) into `qdata`; ragged edges are filled with code 0.

    Raises:
        ValueError: codes are not a 2-D uint8 tensor, or one is above 15.
    """
    if codes.dim() != 2 or codes.dtype != torch.uint8:
        raise ValueError(f"codes must be a 2-D uint8 tensor, got {codes.dim()}-D {codes.dtype}")
    if codes.numel() and int(codes.max()) > 15:
        raise ValueError(f"codes must be 0..15, got {int(codes.max())}")
    n, k = codes.shape
    rows, row_bytes = packed_shape(n, k)
    columns = row_bytes // TILE_BYTES
    codes = torch.nn.functional.pad(codes, (0, columns * TILE_COLUMNS - k, 0, rows * TILE_ROWS - n))
    natural = (codes[:, 0::2] | (codes[:, 1::2] << 4)).contiguous().view(torch.int32)
    words = natural.view(rows, 2, 8, columns, 2, 4).permute(0, 3, 2, 5, 4, 1)
    return words.reshape(rows, row_bytes // 4).view(torch.uint8)


def natural_bytes(qdata: torch.Tensor) -> torch.Tensor:
    """The stored bytes in row-major order: [16 * tile rows, 32 * tile columns] uint8, two codes each, low nibble first.

    Only whole words of 8 codes move, so this costs an eighth of a permutation of codes.
    """
    rows, columns = qdata.shape[0], qdata.shape[1] // TILE_BYTES
    # axes of the view: tile row, tile column, g, t, c, h
    words = qdata.view(torch.int32).view(rows, columns, 8, 4, 2, 2).permute(0, 5, 2, 1, 4, 3)
    return words.reshape(rows * TILE_ROWS, columns * 8).view(torch.uint8)


def bytes_of_rows(qdata: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Like `natural_bytes`, for the rows listed in `rows` (1-D int64): [len(rows), 32 * tile columns]."""
    words = qdata.view(torch.int32).view(qdata.shape[0], -1, 8, 4, 2, 2)
    tile, h, g = rows // TILE_ROWS, rows % TILE_ROWS // 8, rows % 8
    # [len(rows), tile column, t, c] -> c before t
    return words[tile, :, g, :, :, h].permute(0, 1, 3, 2).flatten(1).view(torch.uint8)


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
    pairs = natural_bytes(qdata)
    codes = torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(1)
    return codes[:out_features, :in_features]
