"""Codes that minimise the layer's output error sum_n (w_n - q_n)^T H (w_n - q_n), with scales and books fixed.

First the feedback of rounding errors to the columns that are still to be rounded, in the order of falling importance
(GPTQ, arXiv 2210.17323, with static groups, so that groups stay contiguous whatever the order); then coordinate descent
on single codes with the exact H.

Everything here is laid out [K, N], transposed against the weight: one input channel of all rows is contiguous.
"""

from __future__ import annotations

import logging

import torch

from aaac_ao.encode.scales import reciprocal

logger = logging.getLogger(__name__)

#: Columns that are rounded one by one before the others hear of it in one matrix product; a multiple of every group.
BLOCK_COLUMNS = 128
#: Share of the mean diagonal added to the diagonal of H, raised tenfold each time the factorisation fails.
DAMPING = 0.01
#: Passes of one coordinate descent over all columns.
SWEEPS = 2
#: Bins of the table that narrows the search for the nearest entry, over this many times the books' largest entry.
_BINS, _RANGE = 4096, 1.25


class Grid:
    """The values that every weight can take: its group's scale times the entries of its group's book.

    Args:
        scale: [N, groups] fp32 >= 0.
        selector: [N, groups] bool, the book of every group.
        codebooks: [2, 16] fp32, ascending.
        group_size: columns per group.
    """

    def __init__(self, scale: torch.Tensor, selector: torch.Tensor, codebooks: torch.Tensor, group_size: int) -> None:
        self.scale, self.group_size = scale.t().contiguous(), group_size
        self.book = selector.t().to(torch.int32).contiguous()
        self.entries = codebooks.reshape(-1)
        midpoints = (codebooks[:, 1:] + codebooks[:, :-1]) / 2
        self._upper = torch.nn.functional.pad(midpoints, (0, 1), value=float("inf")).view(-1)
        step = 2 * _RANGE * codebooks.abs().max().clamp(min=1e-30) / _BINS
        left_edges = (torch.arange(_BINS, device=scale.device) - _BINS // 2) * step
        self._guess = torch.stack([torch.bucketize(left_edges, m) for m in midpoints]).to(torch.int32).view(-1)
        self._inverse = reciprocal(self.scale)
        self._bins_per_unit, self._middle = 1 / step, torch.full((), _BINS / 2, device=scale.device)

    def nearest(self, w: torch.Tensor, column: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes (int32) and values nearest to w [N] in a column of the weight."""
        group = column // self.group_size
        book = self.book[group]
        u = w * self._inverse[group]
        bins = torch.addcmul(self._middle, u, self._bins_per_unit).clamp_(0, _BINS - 1).to(torch.int32)
        index = torch.index_select(self._guess, 0, bins.add_(book, alpha=_BINS)).add_(book, alpha=16)
        index += u > torch.index_select(self._upper, 0, index)  # a bin holds one midpoint at most, or entries as good
        return index - 16 * book, torch.index_select(self.entries, 0, index) * self.scale[group]

    def index(self, codes: torch.Tensor) -> torch.Tensor:
        """Where the entries of codes [K, N] stand among the 32 of both books."""
        return codes.long() + 16 * _of_columns(self.book, len(codes), self.group_size)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """[K, N] values of codes [K, N]."""
        values = torch.empty(codes.shape, device=codes.device)
        for start in range(0, len(codes), BLOCK_COLUMNS):  # indices take four times the memory of values
            block, groups = codes[start : start + BLOCK_COLUMNS], slice(start // self.group_size, None)
            index = block.long() + 16 * _of_columns(self.book[groups], len(block), self.group_size)
            scale = _of_columns(self.scale[groups], len(block), self.group_size)
            torch.mul(self.entries[index], scale, out=values[start : start + BLOCK_COLUMNS])
        return values

    def column_scales(self, columns: int) -> torch.Tensor:
        """[K, N] the scale of every weight."""
        return _of_columns(self.scale, columns, self.group_size)


def _of_columns(of_groups: torch.Tensor, columns: int, group_size: int) -> torch.Tensor:
    groups = -(-columns // group_size)
    return of_groups[:groups].repeat_interleave(group_size, dim=0)[:columns]


def feedback(weight: torch.Tensor, order: torch.Tensor, factor: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Round columns in `order`; what is lost is made up for by the columns that follow.

    Args:
        weight: [K, N] fp32.
        order: [K] the columns in the order of rounding.
        factor: [K, K] upper Cholesky factor of the inverse of H, both in that order.
        grid: the allowed values.

    Returns:
        Codes [K, N] int32.
    """
    left, codes, columns = weight[order], torch.empty_like(weight, dtype=torch.int32), order.tolist()
    diagonal = factor.diagonal().tolist()
    for start in range(0, len(columns), BLOCK_COLUMNS):
        block = slice(start, start + BLOCK_COLUMNS)
        w, u = left[block], factor[block, block]
        errors = torch.empty_like(w)
        for i, column in enumerate(columns[block]):
            codes[column], value = grid.nearest(w[i], column)
            torch.sub(w[i], value, out=errors[i]).div_(diagonal[start + i])
            w[i + 1 :].addr_(u[i, i + 1 :], errors[i], alpha=-1)
        left[block.stop :].addmm_(factor[block, block.stop :].t(), errors, alpha=-1)
    return codes


def descend(weight: torch.Tensor, hessian: torch.Tensor, grid: Grid, codes: torch.Tensor) -> torch.Tensor:
    """Codes [K, N] int32 after setting each to its best value with all others fixed, in `SWEEPS` passes of columns."""
    codes, values = codes.clone(), grid.values(codes)
    gradient = hessian @ (values - weight)  # half of it
    steps = (1 / hessian.diagonal()).tolist()
    for _ in range(SWEEPS):
        for start in range(0, len(weight), BLOCK_COLUMNS):
            block = slice(start, start + BLOCK_COLUMNS)
            own, near = gradient[block].clone(), hessian[block, block]
            moves = torch.empty_like(own)
            for i in range(len(own)):
                old = values[start + i]
                codes[start + i], new = grid.nearest(old.sub(own[i], alpha=steps[start + i]), start + i)
                torch.sub(new, old, out=moves[i])
                own[i + 1 :].addr_(near[i, i + 1 :], moves[i])
                values[start + i] = new
            gradient.addmm_(hessian[:, block], moves)
    return codes


def row_errors(weight: torch.Tensor, quantised: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """(w_n - q_n)^T H (w_n - q_n) of every row, fp64 [N], of weights [K, N]."""
    error = weight - quantised
    pulled, total = hessian @ error, torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
    for start in range(0, len(error), BLOCK_COLUMNS):
        block = slice(start, start + BLOCK_COLUMNS)
        total += (pulled[block].double() * error[block].double()).sum(0)
    return total


def damp(hessian: torch.Tensor, share: float) -> torch.Tensor:
    """H plus `share` of its mean diagonal on the diagonal; the identity for a layer that saw only zeros."""
    damped = hessian.clone()
    mean = hessian.diagonal().mean()
    damped.diagonal().add_(torch.where(mean > 0, share * mean, torch.ones_like(mean)))
    return damped


def inverse_factor(hessian: torch.Tensor, order: torch.Tensor, share: float = DAMPING) -> torch.Tensor:
    """Upper Cholesky factor of the inverse of H, damped by `share`, with rows and columns in `order`.

    In fp64, and with more damping, where fp32 is not enough. Holds no more than two matrices besides H at a time.

    Raises:
        ValueError: H cannot be factorised, however much it is damped.
    """
    for attempt in range(5):
        for dtype in (torch.float32, torch.float64):
            more = 0.0 if attempt == 0 else DAMPING * 10.0 ** (attempt - 2)
            upper = _factor_of_inverse([_permuted(damp(hessian, share + more), order).to(dtype)])
            if upper is not None:
                return upper.float()
        logger.warning("a Hessian of %d inputs could not be factorised: damping it more", len(hessian))
    raise ValueError(f"the Hessian of {len(hessian)} inputs cannot be factorised; check the calibration batches")


def _permuted(matrix: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    return matrix[order[:, None], order]


def _factor_of_inverse(matrices: list[torch.Tensor]) -> torch.Tensor | None:
    """The upper factor for the matrix in the list, which is taken from there and freed early; None if it fails."""
    lower, failed = torch.linalg.cholesky_ex(matrices.pop())
    if bool(failed):
        return None
    inverse = torch.cholesky_inverse(lower)
    del lower
    upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
    return None if bool(failed) or not bool(torch.isfinite(upper).all()) else upper
