"""Annealing of codes on a GPU, for the encoder: a sweep over a block of columns in one launch.

`aaac_ao/encode/annealing.py` has the same steps in PyTorch. As in `rounding`, a warp goes through the columns of a few
rows in turn; how far the columns of the block have moved stays in registers as a tile [COLUMNS, ROWS], and what that
asks of a column is one weighted sum over the tile. All other columns hear of it in one matrix product after the launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .rounded_blocks import MOST_COLUMNS, check_annealing
from .rounding import MAX_OFFSET, _middles, _nearest, _put, _reciprocal, _weighted_sum

#: Rows of a program, which is one warp.
ROWS = 4
#: Arguments of any value and alignment: there is one kernel for each size of the tile, which is the one checked.
SIZES = ["N", "K", "B", "start", "group_size"]
INPUTS = ["values_ptr", "codes_ptr", "pull_ptr", "metric_ptr", "noise_ptr", "scales_ptr", "selector_ptr"]


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=INPUTS)
def annealing_kernel(
    values_ptr, codes_ptr, pull_ptr, metric_ptr, noise_ptr, heat_ptr, books_ptr, scales_ptr, selector_ptr,
    offset_ptr, growth_ptr, moves_ptr, N, K, B, start, group_size, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One sweep over the B columns of a block; `moves_ptr` [B, N] gets how far they moved.

    `metric_ptr` is where the block stands on the diagonal of H [K, K], `noise_ptr` [K] is that of the sweep; the others
    are where the block begins, at the column `start`.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    own = rows < N
    heat = tl.load(heat_ptr + rows, mask=own, other=0.0)
    offset = start + tl.load(offset_ptr + rows, mask=own, other=0)
    growth = tl.load(growth_ptr + rows, mask=own, other=0.0)
    moved = tl.zeros([COLUMNS, ROWS], tl.float32)
    for first in range(0, B, group_size):
        group = first // group_size
        scale = tl.load(scales_ptr + group * N + rows, mask=own, other=0.0)
        book = tl.load(selector_ptr + group * N + rows, mask=own, other=0).to(tl.int32)
        inverse, middles = _reciprocal(scale), _middles(books_ptr, book)
        for i in range(first, min(first + group_size, B)):
            weight = tl.load(metric_ptr + i * K + i)
            pull = tl.load(pull_ptr + i * N + rows, mask=own, other=0.0)
            pull += _weighted_sum(metric_ptr + i * K, columns, columns < B, moved)
            value = tl.load(values_ptr + i * N + rows, mask=own, other=0.0)
            push = tl.load(noise_ptr + (offset + i) % K)
            wanted = value - pull * (1.0 / weight) + heat * push * (1.0 / tl.sqrt(weight))
            code, entry = _nearest(wanted * inverse, books_ptr, book, middles)
            move = entry * scale - value
            growth += move * (2.0 * pull + move * weight)
            moved = _put(moved, columns, i, move)
            tl.store(codes_ptr + i * N + rows, code.to(tl.uint8), mask=own)
            tl.store(values_ptr + i * N + rows, entry * scale, mask=own)
            tl.store(moves_ptr + i * N + rows, move, mask=own)
    tl.store(growth_ptr + rows, growth, mask=own)


def anneal(
    values: torch.Tensor,
    codes: torch.Tensor,
    pull: torch.Tensor,
    metric: torch.Tensor,
    noise: torch.Tensor,
    heat: torch.Tensor,
    codebooks: torch.Tensor,
    scale: torch.Tensor,
    selector: torch.Tensor,
    offset: torch.Tensor,
    group_size: int,
) -> torch.Tensor:
    """By how much the errors of rows grew, [N] fp32; see `aaac_ao.encode.annealing.sweep_columns`.

    Raises:
        ValueError: sizes, dtypes or devices that do not fit, outputs that are not contiguous, groups of more than
            `MOST_COLUMNS` columns, or tensors too large for 32-bit offsets.
    """
    columns, rows = len(metric), len(heat)
    if group_size > MOST_COLUMNS:
        raise ValueError(f"group_size must be at most {MOST_COLUMNS}, got {group_size}")
    parts = {"metric": metric, "noise": noise, "heat": heat, "codebooks": codebooks, "scale": scale}
    parts |= {"values": values, "codes": codes, "pull": pull, "selector": selector, "offset": offset}
    check_annealing(values.device, group_size, **parts)
    at_once = MOST_COLUMNS // group_size * group_size
    if max(rows, columns) * MOST_COLUMNS > MAX_OFFSET:
        raise ValueError(f"a weight of {columns} columns and {rows} rows is too large: split its rows")
    metric, noise, heat, codebooks, scale, selector, offset = (
        part.contiguous() for part in (metric, noise, heat, codebooks, scale, selector, offset % columns)
    )
    growth, moves = torch.zeros_like(heat), torch.empty(min(at_once, columns), rows, device=values.device)
    if rows == 0:
        return growth
    constants = tiles(columns, group_size)
    grid = (triton.cdiv(rows, constants["ROWS"]),)
    with torch.cuda.device_of(values):  # Triton launches on the current device
        for pushes in noise:
            for start in range(0, columns, at_once):
                block = slice(start, min(start + at_once, columns))
                of_block = slice(start // group_size, None)
                moved = moves[: block.stop - start]
                annealing_kernel[grid](
                    values[block], codes[block], pull[block], metric[block, block], pushes, heat, codebooks,
                    scale[of_block], selector[of_block], offset, growth, moved,
                    rows, columns, len(moved), start, group_size, **constants,
                )  # fmt: skip
                pull.addmm_(metric[:, block], moved)
    return growth


def tiles(columns: int, group_size: int) -> dict[str, int]:
    """The sizes that a program is compiled for: for blocks of a weight of so many columns."""
    block = min(MOST_COLUMNS // group_size * group_size, columns)
    return {"ROWS": ROWS, "COLUMNS": max(16, triton.next_power_of_2(block)), "num_warps": 1}
