"""Rounding of blocks of columns on a GPU, for the encoder: all steps of a block in one launch.

`aaac_ao/encode/rounding.py` has the same steps in PyTorch, where every column takes a handful of launches. Here a warp
goes through the columns of a few rows in turn. What the columns before (and in descent, all others) have lost stays in
registers as a tile [COLUMNS, ROWS], and what they ask of a column is one weighted sum over that tile.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .rounded_blocks import MOST_COLUMNS, check_parts

#: Pairs of a scale and a book that are tried side by side. Times the rows of a program these are the lanes of its warp,
#: or half of them where groups are so large that registers run short.
TRIALS = 8
#: Largest offset in a tensor.
MAX_OFFSET = 2**31 - 1


@triton.jit
def _weighted_sum(weights_ptr, index, wanted, tile):
    """Sum over the rows of `tile` [n, lanes], each times its weight; those not wanted have none."""
    weights = tl.load(weights_ptr + index, mask=wanted, other=0.0)
    return tl.sum(weights[:, None] * tile, axis=0)


@triton.jit
def _put(tile, index, i, values):
    """`tile` [n, lanes] with `values` [lanes] as its row i."""
    # the mask changes nothing, but without it the counters of loops, and all comparisons, are widened to 64 bits
    return tl.where((index == (i & 0xFFFF))[:, None], values[None, :], tile)


@triton.jit
def _middles(books_ptr, book):
    """Middles between the entries of books [lanes], and infinity: [16, lanes]."""
    index = tl.arange(0, 16)
    inner = index < 15
    first = tl.load(books_ptr + index) + tl.load(books_ptr + 1 + index, mask=inner, other=float("inf"))
    second = tl.load(books_ptr + 16 + index) + tl.load(books_ptr + 17 + index, mask=inner, other=float("inf"))
    return tl.where((book == 1)[None, :], second[:, None], first[:, None]) / 2


@triton.jit
def _nearest(x, books_ptr, book, middles):
    """Codes of the entries nearest to x [lanes] in their books, and the entries; ties go to the lower one."""
    code = tl.sum((x[None, :] > middles).to(tl.int32), axis=0)
    return code, tl.load(books_ptr + 16 * book + code)


@triton.jit
def _reciprocal(scale):
    """1 / scale, and 0 for zero and subnormal scales."""
    normal = scale >= 1.1754943508222875e-38
    return tl.where(normal, 1.0 / tl.where(normal, scale, 1.0), 0.0)


@triton.jit
def _choose(
    left_ptr, factor_ptr, books_ptr, candidates_ptr, first, size, N, B, groups, count,
    ROWS: tl.constexpr, TRIALS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The candidate and the book, [ROWS] each, with which feedback inside a group leaves the least error.

    Every lane has a row, a candidate and a book of its own. `left_ptr` has what the group is to be rounded to.
    """
    lane, inside = tl.arange(0, TRIALS * ROWS), tl.arange(0, GROUP)
    row = tl.program_id(0) * ROWS + lane % ROWS
    book = lane // ROWS % 2
    middles = _middles(books_ptr, book)
    least = tl.full([ROWS], float("inf"), tl.float32)
    best = tl.zeros([ROWS], tl.int32)
    for tried in range(0, count, TRIALS // 2):
        candidate = tried + lane // (2 * ROWS)
        known = (row < N) & (candidate < count)
        scale = tl.load(candidates_ptr + candidate * groups * N + row, mask=known, other=0.0)
        inverse = _reciprocal(scale)
        fed = tl.zeros([GROUP, TRIALS * ROWS], tl.float32)
        cost = tl.zeros([TRIALS * ROWS], tl.float32)
        for i in range(size):
            weights_ptr = factor_ptr + (first + i) * B + first
            x = tl.load(left_ptr + (first + i) * N + row, mask=row < N, other=0.0)
            x -= _weighted_sum(weights_ptr, inside, inside < i, fed)
            _, entry = _nearest(x * inverse, books_ptr, book, middles)
            error = (x - entry * scale) * (1.0 / tl.load(weights_ptr + i))
            cost += error * error
            fed = _put(fed, inside, i, error)
        # a cost that is no number never wins
        cost = tl.where((candidate < count) & (cost < float("inf")), cost, float("inf"))
        lower, trial = tl.min(tl.reshape(cost, [TRIALS, ROWS]), axis=0, return_indices=True)
        best = tl.where(lower < least, 2 * tried + trial, best)
        least = tl.minimum(lower, least)
    return best // 2, best % 2


#: Arguments of any value and alignment: there is one kernel for each pair of tile sizes, which is the one checked.
SIZES = ["N", "B", "groups", "count", "sweeps"]
INPUTS = ["target_ptr", "factor_ptr", "metric_ptr", "root_ptr", "books_ptr", "candidates_ptr"]


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=INPUTS)
def rounding_kernel(
    target_ptr, factor_ptr, metric_ptr, root_ptr, books_ptr, candidates_ptr, ends_ptr,
    codes_ptr, selector_ptr, scales_ptr, errors_ptr, N, B, groups, count, sweeps,
    ROWS: tl.constexpr, TRIALS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """See `round_block`; `factor_ptr` is transposed, so that the weights of a column are contiguous.

    Of what a program stores for others of its lanes, which barriers make visible to them, the errors hold what a group
    is to be rounded to until they get their own values.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    own = rows < N
    fed = tl.zeros([COLUMNS, ROWS], tl.float32)  # errors as feedback passes them on
    lost = tl.zeros([COLUMNS, ROWS], tl.float32)  # target - value
    for group in range(groups):
        first, end = tl.load(ends_ptr + group), tl.load(ends_ptr + group + 1)
        for i in range(first, end):
            x = tl.load(target_ptr + i * N + rows, mask=own, other=0.0)
            x -= _weighted_sum(factor_ptr + i * B, columns, columns < first, fed)
            tl.store(errors_ptr + i * N + rows, x, mask=own)
        tl.debug_barrier()
        group_ptr = candidates_ptr + group * N
        candidate, book = _choose(
            errors_ptr, factor_ptr, books_ptr, group_ptr, first, end - first, N, B, groups, count, ROWS, TRIALS, GROUP
        )
        scale = tl.load(group_ptr + candidate * groups * N + rows, mask=own, other=0.0)
        tl.store(scales_ptr + group * N + rows, scale, mask=own)
        tl.store(selector_ptr + group * N + rows, book.to(tl.uint8), mask=own)
        inverse, middles = _reciprocal(scale), _middles(books_ptr, book)
        for i in range(first, end):
            target = tl.load(target_ptr + i * N + rows, mask=own, other=0.0)
            x = target - _weighted_sum(factor_ptr + i * B, columns, columns < i, fed)
            code, entry = _nearest(x * inverse, books_ptr, book, middles)
            error = (x - entry * scale) * (1.0 / tl.load(factor_ptr + i * B + i))
            fed = _put(fed, columns, i, error)
            lost = _put(lost, columns, i, target - entry * scale)
            tl.store(codes_ptr + i * N + rows, code.to(tl.uint8), mask=own)
    tl.debug_barrier()
    for _ in range(sweeps):
        for group in range(groups):
            scale = tl.load(scales_ptr + group * N + rows, mask=own, other=0.0)
            book = tl.load(selector_ptr + group * N + rows, mask=own, other=0).to(tl.int32)
            inverse, middles = _reciprocal(scale), _middles(books_ptr, book)
            for i in range(tl.load(ends_ptr + group), tl.load(ends_ptr + group + 1)):
                target = tl.load(target_ptr + i * N + rows, mask=own, other=0.0)
                others = _weighted_sum(metric_ptr + i * B, columns, (columns < B) & (columns != i), lost)
                best = target + others * (1.0 / tl.load(metric_ptr + i * B + i))
                code, entry = _nearest(best * inverse, books_ptr, book, middles)
                lost = _put(lost, columns, i, target - entry * scale)
                tl.store(codes_ptr + i * N + rows, code.to(tl.uint8), mask=own)
    for i in range(B):
        error = _weighted_sum(root_ptr + i * B, columns, columns <= i, lost)
        tl.store(errors_ptr + i * N + rows, error, mask=own)


def round_block(
    target: torch.Tensor,
    factor: torch.Tensor,
    metric: torch.Tensor,
    root: torch.Tensor,
    codebooks: torch.Tensor,
    candidates: torch.Tensor,
    sizes: Sequence[int],
    sweeps: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, selectors, scales and errors of a block; see `aaac_ao.encode.rounding.round_block`.

    Args:
        target: [B, N] fp32, B <= `MOST_COLUMNS`.
        factor: [B, B] fp32, upper.
        metric: [B, B] fp32, symmetric.
        root: [B, B] fp32, lower.
        codebooks: [2, 16] fp32, ascending.
        candidates: [count, groups, N] fp32.
        sizes: columns of every group; their sum is B.
        sweeps: passes of coordinate descent.

    Returns:
        Codes uint8 [B, N], selectors uint8 [groups, N], scales fp32 [groups, N], root @ error fp32 [B, N].

    Raises:
        ValueError: sizes, dtypes or devices that do not fit, or a tensor too large for 32-bit offsets.
    """
    columns, rows = target.shape
    groups = len(sizes)
    parts = {"factor": factor, "metric": metric, "root": root, "codebooks": codebooks, "candidates": candidates}
    check_parts(columns, rows, groups, target.device, target=target, **parts)
    if not 1 <= columns <= MOST_COLUMNS or len(candidates) == 0:
        raise ValueError(f"no block: target {list(target.shape)}, {len(candidates)} candidates")
    if min(sizes) < 1 or sum(sizes) != columns:
        raise ValueError(f"sizes of groups must be positive and add up to {columns}, got {list(sizes)}")
    if max(target.numel(), candidates.numel()) > MAX_OFFSET:
        raise ValueError(f"a block {list(target.shape)} is too large: split its rows")
    codes = torch.empty(columns, rows, dtype=torch.uint8, device=target.device)
    selector = torch.empty(groups, rows, dtype=torch.uint8, device=target.device)
    scale = torch.empty(groups, rows, device=target.device)
    errors = torch.empty(columns, rows, device=target.device)
    if rows:
        inputs = [part.contiguous() for part in (target, factor.t(), metric, root, codebooks, candidates)]
        sizes_of_program = tiles(columns, max(sizes))
        with torch.cuda.device_of(target):  # Triton launches on the current device
            rounding_kernel[(triton.cdiv(rows, sizes_of_program["ROWS"]),)](
                *inputs, _ends(tuple(sizes), target.device), codes, selector, scale, errors,
                rows, columns, groups, len(candidates), sweeps, **sizes_of_program,
            )  # fmt: skip
    return codes, selector, scale, errors


def tiles(columns: int, group_size: int) -> dict[str, int]:
    """The sizes that a program is compiled for: for so many columns, in groups of at most `group_size`."""
    columns, group_size = (max(16, triton.next_power_of_2(size)) for size in (columns, group_size))
    rows = 32 // TRIALS if group_size <= 64 else 16 // TRIALS
    return {"ROWS": rows, "TRIALS": TRIALS, "COLUMNS": columns, "GROUP": group_size, "num_warps": 1}


@functools.lru_cache(maxsize=64)
def _ends(sizes: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """[groups + 1] int32, where groups end; kept, as a copy to the device waits for it."""
    return torch.tensor([0, *sizes]).cumsum(0).to(torch.int32).to(device)
