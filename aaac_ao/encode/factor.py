"""Cholesky factor of the inverse of H, made in place and stored without its zeros: half a matrix, and nothing besides.

With H = R R^T, R upper, the factor is U = R^-1: H^-1 = U^T U.
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


def inverse_factor(
    hessian: torch.Tensor, columns: torch.Tensor, sizes: Sequence[int], share: float = DAMPING
) -> list[torch.Tensor]:
    """Upper Cholesky factor U of the inverse of H, damped by `share`, with rows and columns in an order.

    In fp64, and with more damping, where fp32 is not enough.

    Args:
        hessian: [K, K] fp32.
        columns: [K] int64, the order.
        sizes: rows of every panel; their sum is K.
        share: of the mean diagonal.

    Returns:
        U in panels of rows, each from its first column on that is not zero: [size, K - start] fp32.

    Raises:
        ValueError: H cannot be factorised, however much it is damped.
    """
    for attempt in range(5):
        more = 0.0 if attempt == 0 else DAMPING * 10.0 ** (attempt - 2)
        for dtype in (torch.float32, torch.float64):
            panels = _panels(hessian, columns, sizes, damping(hessian, share + more), dtype)
            diagonals = _factorise(panels)
            if diagonals is not None and _invert(panels, diagonals):
                return [panel.float() for panel in panels]
        logger.warning("a Hessian of %d inputs could not be factorised: damping it more", len(hessian))
    raise ValueError(f"the Hessian of {len(hessian)} inputs cannot be factorised; check the calibration batches")


def inverse_factors(matrices: torch.Tensor) -> torch.Tensor:
    """`inverse_factor` of small matrices [n, B, B] fp32 at once, damped only where that is needed: [n, B, B].

    Raises:
        ValueError: a matrix cannot be factorised, however much it is damped.
    """
    size = matrices.shape[-1]
    lower, failed = torch.linalg.cholesky_ex(matrices.flip(1, 2))
    eye = torch.eye(size, dtype=matrices.dtype, device=matrices.device)
    factors = torch.linalg.solve_triangular(lower.flip(1, 2), eye.expand_as(lower), upper=True).contiguous()
    bad = (failed != 0) | ~torch.isfinite(factors).flatten(1).all(1)
    for index in bad.nonzero().flatten().tolist():
        columns = torch.arange(size, device=matrices.device)
        factors[index] = inverse_factor(matrices[index], columns, [size], share=0.0)[0]
    return factors


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


def _factorise(panels: list[torch.Tensor]) -> list[torch.Tensor] | None:
    """Turn H into R with H = R R^T, from the last rows to the first; the diagonal blocks of R, None if it fails."""
    diagonals: list[torch.Tensor] = []
    for j in reversed(range(len(panels))):
        panel, stop = panels[j], panels[j].shape[1]
        for k in reversed(range(j, len(panels))):
            size = len(panels[k])
            block, behind = panel[:, stop - size : stop], panel[:, stop:]
            block.addmm_(behind, panels[k][:, size:].t(), alpha=-1)
            stop -= size
            if k > j:
                diagonal = diagonals[len(panels) - 1 - k]
                block.copy_(torch.linalg.solve_triangular(diagonal.t(), block, upper=False, left=False))
        lower, failed = torch.linalg.cholesky_ex(block.flip(0, 1))
        if bool(failed):
            return None
        diagonals.append(lower.flip(0, 1))
    return diagonals[::-1]


def _invert(panels: list[torch.Tensor], diagonals: list[torch.Tensor]) -> bool:
    """Turn R into its inverse, from the last rows to the first; whether all of it is finite."""
    finite = []
    for j in reversed(range(len(panels))):
        panel, size = panels[j], len(panels[j])
        eye = torch.eye(size, dtype=panel.dtype, device=panel.device)
        inverse = torch.linalg.solve_triangular(diagonals[j], eye, upper=True)
        behind, stop = panel[:, size:], panel.shape[1] - size
        for last in reversed(range(j + 1, len(panels))):  # from the right: what lies to the left is still needed
            start, at = stop - len(panels[last]), 0
            product = behind.new_zeros(size, stop - start)
            for below in panels[j + 1 : last + 1]:
                product.addmm_(behind[:, at : at + len(below)], below[:, start - at : stop - at])
                at += len(below)
            torch.mm(-inverse, product, out=behind[:, start:stop])
            stop = start
        panel[:, :size] = inverse
        finite.append(torch.stack(panel.aminmax()).isfinite().all())
    return bool(torch.stack(finite).all())
