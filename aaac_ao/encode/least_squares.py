"""Books and group scales that fit given codes best under the full H: least squares in 32 and in one unknown.

As in `feedback`, weights and codes are laid out [K, N].
"""

from __future__ import annotations

import torch

from aaac_ao.encode.grid import Grid
from aaac_ao.formats import ScaleFormat

#: Books are fitted on about this many weights (rows taken evenly): 32 numbers do not need more.
SAMPLE_WEIGHTS = 1 << 16
#: 32 copies are made of about this many weights at a time.
_CHUNK_WEIGHTS = 1 << 14
#: Weight of staying at the old entry, relative to the mean diagonal of the normal equations.
_RIDGE = 1e-6


def fit_books(weight: torch.Tensor, hessian: torch.Tensor, grid: Grid, codes: torch.Tensor) -> torch.Tensor:
    """The books [2, 16] fp32 that are best for given codes; entries that no weight uses stay where they are.

    With P [K, 32] holding the scale of every weight of a row in the column of its entry, the row's error is
    (P c - w)^T H (P c - w), which is least for the c with sum P^T H P c = sum P^T H w.

    Args:
        weight: [K, N] fp32; about `SAMPLE_WEIGHTS` weights.
        hessian: [K, K].
        grid: scales, selectors and books.
        codes: [K, N].
    """
    index, scale = grid.index(codes), grid.column_scales(len(weight))
    error = hessian @ (grid.values(codes) - weight)
    normal, downhill = (torch.zeros(32, n, dtype=torch.float64, device=weight.device) for n in (32, 1))
    rows = max(1, _CHUNK_WEIGHTS // len(weight))
    for own, used, pull in zip(*(part.split(rows, dim=1) for part in (scale, index, error)), strict=True):
        placed = torch.zeros(*own.shape, 32, device=weight.device)
        placed.scatter_(2, used[..., None], own[..., None])
        pulled = (hessian @ placed.view(len(weight), -1)).view(-1, 32)
        placed = placed.view(-1, 32)
        normal += placed.t() @ pulled
        downhill -= placed.t() @ pull.reshape(-1, 1)
    ridge = (_RIDGE * normal.diagonal().mean()).clamp(min=torch.finfo(torch.float32).tiny)
    move = torch.linalg.solve(normal + torch.diag_embed(ridge.expand(32)), downhill)
    return (grid.codebooks.double() + move.view(2, 16)).float()


def fit_scales(
    entries: torch.Tensor,
    scale: torch.Tensor,
    pull: torch.Tensor,
    metric: torch.Tensor,
    group_size: int,
    fmt: ScaleFormat,
    per_tensor_scale: torch.Tensor | None,
) -> torch.Tensor:
    """Scales of a block of columns, one group after the other set to its best storable value where that helps.

    Args:
        entries: [B, N] fp32, the entries of the books that the codes stand for.
        scale: [groups, N] fp32, the scales to start from.
        pull: [B, N] fp32, half the gradient of the error by the values, all columns of the weight considered.
        metric: [B, B] fp32, the block on the diagonal of H.
        group_size: columns per group; the last may have fewer.
        fmt: format that the scales are rounded to.
        per_tensor_scale: of the format.

    Returns:
        [groups, N] fp32.
    """
    scale, pull = scale.clone(), pull.clone()
    for group, first in enumerate(range(0, len(entries), group_size)):
        part = slice(first, first + group_size)
        v, own = entries[part], scale[group]
        slope, curvature = (pull[part] * v).sum(0), (metric[part, part] @ v * v).sum(0)
        best = own - slope / curvature.clamp(min=1e-30)
        best = torch.where(best > 0, fmt.round(best.clamp(min=0), per_tensor_scale), own)
        move = best - own
        helps = (move * torch.add(move * curvature, slope, alpha=2) < 0) & (own > 0)
        pull.addmm_(metric[:, part], torch.where(helps, move, 0.0) * v)
        scale[group] = torch.where(helps, best, own)
    return scale
