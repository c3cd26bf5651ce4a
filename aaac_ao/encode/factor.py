"""Upper Cholesky factor of H, made in place and stored without its zeros: half a matrix, and nothing besides.

H = R R^T: the error e^T H e of a row is |R^T e|^2, of which every part depends on its own column and those before it.
GPTQ works with the inverse of R; what it does can be done without (LDLQ, arXiv 2307.13304), which saves half the work.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

logger = logging.getLogger(__name__)

#: Share of the mean diagonal added to the diagonal of H, raised tenfold each time the factorisation fails.
DAMPING = 0.01


def damping(hessian: torch.Tensor, share: float) -> torch.Tensor:
    """What to add to the diagonal: `share` of its mean, or 1 for a layer that saw only zeros; fp32 0-D."""
    mean = hessian.diagonal().mean()
    return torch.where(mean > 0, share * mean, torch.ones_like(mean))


def upper_factor(
    hessian: torch.Tensor, columns: torch.Tensor, sizes: Sequence[int], share: float = DAMPING
) -> list[torch.Tensor]:
    """Upper factor R of H = R R^T, damped by `share`, with rows and columns in an order.

    In fp64, and with more damping, where fp32 is not enough.

    Args:
        hessian: [K, K] fp32.
        columns: [K] int64, the order.
        sizes: rows of every panel; their sum is K.
        share: of the mean diagonal.

    Returns:
        R in panels of rows, each from its first column on that is not zero: [size, K - start] fp32.

    Raises:
        ValueError: H cannot be factorised, however much it is damped.
    """
    for attempt in range(5):
        more = 0.0 if attempt == 0 else DAMPING * 10.0 ** (attempt - 2)
        for dtype in (torch.float32, torch.float64):
            panels = _panels(hessian, columns, sizes, damping(hessian, share + more), dtype)
            if _factorise(panels):
                return [panel.float() for panel in panels]
        logger.warning("a Hessian of %d inputs could not be factorised: damping it more", len(hessian))
    raise ValueError(f"the Hessian of {len(hessian)} inputs cannot be factorised; check the calibration batches")


def upper_factors(matrices: torch.Tensor) -> torch.Tensor:
    """`upper_factor` of small matrices [n, B, B] fp32 at once, damped only where that is needed: [n, B, B].

    Raises:
        ValueError: a matrix cannot be factorised, however much it is damped.
    """
    size = matrices.shape[-1]
    lower, failed = torch.linalg.cholesky_ex(matrices.flip(1, 2))
    factors = lower.flip(1, 2)
    bad = (failed != 0) | ~_invertible(factors)
    for index in bad.nonzero().flatten().tolist():
        columns = torch.arange(size, device=matrices.device)
        factors[index] = upper_factor(matrices[index], columns, [size], share=0.0)[0]
    return factors


def times_inverse(x: torch.Tensor, factor: list[torch.Tensor]) -> None:
    """Turn X [N, K] into X H^-1, from the panels of `upper_factor`."""
    stop = x.shape[1]
    for panel in reversed(factor):  # X R^-T
        size = len(panel)
        block = x[:, stop - size : stop].addmm_(x[:, stop:], panel[:, size:].t(), alpha=-1)
        block.copy_(torch.linalg.solve_triangular(panel[:, :size].t(), block, upper=False, left=False))
        stop -= size
    for panel in factor:  # times R^-1
        size = len(panel)
        block = x[:, stop : stop + size]
        block.copy_(torch.linalg.solve_triangular(panel[:, :size], block, upper=True, left=False))
        stop += size
        x[:, stop:].addmm_(block, panel[:, size:], alpha=-1)


def _panels(
    hessian: torch.Tensor, columns: torch.Tensor, sizes: Sequence[int], more: torch.Tensor, dtype: torch.dtype
) -> list[torch.Tensor]:
    """The upper half of H, in order, with `more` on the diagonal."""
    panels, start = [], 0
    for rows in columns.split(list(sizes)):
        panels.append(hessian[rows[:, None], columns[start:]].to(dtype))
        panels[-1].diagonal().add_(more)
        start += len(rows)
    return panels


def _factorise(panels: list[torch.Tensor]) -> bool:
    """Turn H into R with H = R R^T, from the last rows to the first; whether it can be."""
    finite = []
    for j in reversed(range(len(panels))):
        panel, stop = panels[j], panels[j].shape[1]
        for other in reversed(panels[j:]):
            size = len(other)
            block = panel[:, stop - size : stop].addmm_(panel[:, stop:], other[:, size:].t(), alpha=-1)
            stop -= size
            if other is not panel:
                block.copy_(torch.linalg.solve_triangular(other[:, :size].t(), block, upper=False, left=False))
        lower, failed = torch.linalg.cholesky_ex(block.flip(0, 1))
        if bool(failed):
            return False
        finite.append(_invertible(block.copy_(lower.flip(0, 1))) & torch.stack(panel.aminmax()).isfinite().all())
    return bool(torch.stack(finite).all())


def _invertible(factors: torch.Tensor) -> torch.Tensor:
    """Whether an upper factor [..., B, B] is finite, and what it is divided by, too."""
    diagonals = factors.diagonal(dim1=-2, dim2=-1)
    return diagonals.reciprocal().isfinite().all(-1) & factors.isfinite().flatten(-2).all(-1)
