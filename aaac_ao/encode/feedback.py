"""Second-order rounding: codes that minimise the layer's output error sum_n (w_n - q_n)^T H (w_n - q_n).

Scales, selectors and books are fixed beforehand, so that groups stay contiguous whatever the order of the columns
(GPTQ, arXiv 2210.17323, with static groups). First the feedback of rounding errors to the columns that are still to be
rounded, in the order of falling importance; then coordinate descent on single codes with the exact H.
"""

from __future__ import annotations

import logging

import torch

from aaac_ao.encode.scales import reciprocal

logger = logging.getLogger(__name__)

#: Columns that are rounded one by one before the others hear of it in one matrix product.
BLOCK_COLUMNS = 128
#: Share of the mean diagonal added to the diagonal of H, raised tenfold each time the factorisation fails.
DAMPING = 0.01
#: Passes of coordinate descent over all columns.
SWEEPS = 2


class SecondOrderRounding:
    """Chooses codes of rows of one layer, with what depends on its inputs alone computed once.

    Args:
        hessian: [K, K] fp32, E[x x^T] of the layer's inputs.
        codebooks: [2, 16] fp32, ascending.
        group_size: columns per group.

    Raises:
        ValueError: H cannot be factorised, however much it is damped.
    """

    def __init__(self, hessian: torch.Tensor, codebooks: torch.Tensor, group_size: int) -> None:
        self.hessian, self.codebooks, self.group_size = hessian, codebooks, group_size
        self.damped = damp(hessian, DAMPING)
        self.order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
        self.factor = inverse_factor(self.damped[self.order][:, self.order])

    def __call__(
        self, weight: torch.Tensor, scale: torch.Tensor, selector: torch.Tensor, codes: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """New codes where they lower a row's error.

        Args:
            weight: [rows, K] fp32.
            scale: [rows, groups] fp32 >= 0.
            selector: [rows, groups] bool, the book of every group.
            codes: [rows, K] uint8, what to improve on.

        Returns:
            Codes [rows, K] uint8 and the sum of the rows' errors, fp64 0-D.
        """
        grid = _Grid(scale, selector, self.codebooks, self.group_size)
        start = codes.long()
        improved = _descend(weight, self.damped, grid, _feedback(weight, self.order, self.factor, grid))
        errors = [row_errors(weight, grid.values(candidate), self.hessian) for candidate in (start, improved)]
        better = errors[1] < errors[0]
        chosen = torch.where(better[:, None], improved, start).to(torch.uint8)
        return chosen, torch.where(better, errors[1], errors[0]).sum()


def row_errors(weight: torch.Tensor, quantised: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """(w_n - q_n)^T H (w_n - q_n) of every row, fp64 [rows]."""
    error = weight - quantised
    return ((error @ hessian).double() * error.double()).sum(1)


def damp(hessian: torch.Tensor, share: float) -> torch.Tensor:
    """H plus `share` of its mean diagonal on the diagonal; the identity for a layer that saw only zeros."""
    diagonal = hessian.diagonal()
    mean = diagonal.mean()
    added = torch.where(mean > 0, share * mean, torch.ones_like(mean))
    return hessian + torch.diag_embed(added.expand_as(diagonal))


class _Grid:
    """The values that every weight can take: its group's scale times the entries of its group's book."""

    def __init__(self, scale: torch.Tensor, selector: torch.Tensor, codebooks: torch.Tensor, group_size: int) -> None:
        self.scale, self.inverse, self.book = scale, reciprocal(scale), selector.long()
        self.entries, self.midpoints = codebooks, (codebooks[:, 1:] + codebooks[:, :-1]) / 2
        self.group_size = group_size

    def nearest(self, w: torch.Tensor, column: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and values [N] nearest to w [N] in a column of the weight."""
        group = column // self.group_size
        book = self.book[:, group]
        u = w * self.inverse[:, group]
        code = torch.searchsorted(self.midpoints[book], u[:, None]).squeeze(1)
        return code, self.entries[book, code] * self.scale[:, group]

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """[N, K] values of codes [N, K]."""
        group = torch.arange(codes.shape[1], device=codes.device) // self.group_size
        return self.entries[self.book[:, group], codes] * self.scale[:, group]


def _feedback(weight: torch.Tensor, order: torch.Tensor, factor: torch.Tensor, grid: _Grid) -> torch.Tensor:
    """Round columns in `order`; what is lost is made up for by the columns that follow."""
    left, codes, columns = weight[:, order].clone(), torch.empty_like(weight, dtype=torch.int64), order.tolist()
    for start in range(0, len(columns), BLOCK_COLUMNS):
        block = slice(start, start + BLOCK_COLUMNS)
        w, u = left[:, block].clone(), factor[block, block]
        errors = torch.empty_like(w)
        for i, column in enumerate(columns[block]):
            codes[:, column], value = grid.nearest(w[:, i], column)
            errors[:, i] = (w[:, i] - value) / u[i, i]
            w[:, i + 1 :] -= errors[:, i : i + 1] * u[i, i + 1 :]
        left[:, block.stop :] -= errors @ factor[block, block.stop :]
    return codes


def inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    """Upper Cholesky factor of the inverse; in fp64 and with more damping where fp32 is not enough."""
    for attempt in range(5):
        matrix = hessian if attempt == 0 else damp(hessian, DAMPING * 10.0 ** (attempt - 2))
        for dtype in (torch.float32, torch.float64):
            lower, failed = torch.linalg.cholesky_ex(matrix.to(dtype))
            if not bool(failed):
                upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not bool(failed) and bool(torch.isfinite(upper).all()):
                return upper.float()
        logger.warning("a Hessian of %d inputs could not be factorised: damping it more", len(hessian))
    raise ValueError(f"the Hessian of {len(hessian)} inputs cannot be factorised; check the calibration batches")


def _descend(weight: torch.Tensor, hessian: torch.Tensor, grid: _Grid, codes: torch.Tensor) -> torch.Tensor:
    """Set every code to its best value with all others fixed, column after column, `SWEEPS` times."""
    values = grid.values(codes)
    gradient = (values - weight) @ hessian  # half of it
    for _ in range(SWEEPS):
        for start in range(0, weight.shape[1], BLOCK_COLUMNS):
            block = slice(start, start + BLOCK_COLUMNS)
            own, near = gradient[:, block].clone(), hessian[block, block]
            moves = torch.zeros_like(own)
            for i in range(own.shape[1]):
                old = values[:, start + i]
                codes[:, start + i], new = grid.nearest(old - own[:, i] / near[i, i], start + i)
                moves[:, i] = new - old
                own += moves[:, i : i + 1] * near[i]
                values[:, start + i] = new
            gradient += moves @ hessian[block]
    return codes
