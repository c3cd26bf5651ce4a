"""Joint search of a group's scale and its book."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from aaac_ao.encode.nearest import RANGE, NearestTable


def reciprocal(scale: torch.Tensor) -> torch.Tensor:
    """1 / scale, and 0 where that could overflow (0 and subnormal scales): such a group normalises to zeros."""
    return torch.where(scale >= torch.finfo(scale.dtype).tiny, 1 / scale, torch.zeros_like(scale))


def search_scales(
    groups: torch.Tensor,
    importance: torch.Tensor,
    candidates: Sequence[torch.Tensor],
    table: NearestTable,
    top: float,
) -> torch.Tensor:
    """The candidate scale of every group with the least weighted error under the better of the two books.

    Args:
        groups: [rows, groups, group_size] fp32 weights.
        importance: [groups, group_size] weight of every input channel.
        candidates: storable scales [rows, groups], tried in turn; the first wins ties.
        table: the pair of books.
        top: magnitude onto which a group's largest weight is mapped.

    Returns:
        [rows, groups] the best candidates.
    """
    amax = groups.abs().amax(-1)
    unit = reciprocal(amax)
    best_error, best_scale = torch.full_like(amax, float("inf")), candidates[0]
    for scale in candidates:
        bins = table.bins(groups * reciprocal(scale)[..., None])
        # relative to the group's magnitude, because the square of a scale may leave the range of fp32
        error = table.group_errors(bins, importance).amin(0) * (scale * unit).square()
        # beyond the table's range errors would be understated
        better = (error < best_error) & (amax <= RANGE * top * scale)
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
    return best_scale
