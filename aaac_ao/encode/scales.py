"""Joint search of a group's scale and its book.

Scales are tried relative to a unit of the group, so that one bin and one lookup per weight serve for all of them: a row
of the table holds the weight's squared distance to its nearest entry under every scale and book. Books and scales are
those of a `top` of 1, whatever the units of a book.
"""

from __future__ import annotations

import torch

from aaac_ao.encode.nearest import BINS, bin_centers, bins_of, weighted_sums
from aaac_ao.formats import ScaleFormat

#: bf16 scales are tried from 0.625 to 1.2 of the largest magnitude; 1 is one of them.
BF16_RATIOS = tuple(0.625 + 0.01875 * step for step in range(32))
#: E4M3 scales are tried in the three octaves around it, which are 24 codes.
E4M3_RATIOS = tuple((1 + eighth / 8) * octave for octave in (0.25, 0.5, 1.0) for eighth in range(8))
#: No scale below this share of the largest magnitude is tried: it would clip too much where nothing was observed.
LEAST_SHARE = 0.62
#: Few channels of a group matter if it is less than this share, as counted by the inverse of the sum of their squared
#: shares. With more, a search of its scale before feedback lessens the error by about 1 %.
FEW_CHANNELS = 0.2
#: The largest share by which rounding to bf16 moves a scale; E4M3 scales are tried as they are stored.
BF16_ROUNDING = 2.0**-8
#: More than all rounding in fp32 can do, as a share of the unit and of an error.
FP32_ROUNDING = 1e-5


def reciprocal(scale: torch.Tensor) -> torch.Tensor:
    """1 / scale, and 0 where that could overflow (0 and subnormal scales): such a group normalises to zeros."""
    return torch.where(scale >= torch.finfo(scale.dtype).tiny, 1 / scale, torch.zeros_like(scale))


class ScaleTable:
    """Squared distances of weights to the nearest entry of books under all scales tried, in units of the group.

    Args:
        codebooks: [books, 16], each ascending, in units of their `top`.
        fmt: format of the scales.
        lower_bounds: tabulate the least distance that any rounding of weight and scale allows.
    """

    def __init__(self, codebooks: torch.Tensor, fmt: ScaleFormat, lower_bounds: bool = False) -> None:
        self.fmt, self.books = fmt, len(codebooks)
        ratios = E4M3_RATIOS if fmt.has_per_tensor_scale else BF16_RATIOS
        self.ratios = torch.tensor(ratios, dtype=torch.float32, device=codebooks.device)
        entries = self.ratios[:, None, None] * codebooks  # [ratios, books, 16]
        # an entry owns the bins whose centres lie between the midpoints on its sides
        midpoints = (entries[..., 1:] + entries[..., :-1]) / 2
        ends = torch.nn.functional.pad((midpoints * (BINS / 2) + BINS / 2).round_().clamp_(0, BINS), (1, 0))
        owned = torch.diff(ends, append=torch.full_like(ends[..., :1], BINS)).long()
        nearest = torch.cat([_repeated(*part) for part in zip(entries.split(8), owned.split(8), strict=True)])
        centers = bin_centers(1.0, codebooks.device)
        distances = nearest.view(-1, BINS).sub_(centers).abs_()
        if lower_bounds:
            scale_rounding = 0.0 if fmt.has_per_tensor_scale else BF16_ROUNDING
            # a weight is up to half a bin off, and a scale that is off by a share does what the weight off by it would
            reach = 1 / BINS + FP32_ROUNDING
            distances -= reach + 1.01 * scale_rounding * (centers.abs() + reach)
            distances.clamp_(min=0).mul_(1 - scale_rounding - FP32_ROUNDING)
        self.squared = distances.square_().t().contiguous()

    def group_errors(self, groups: torch.Tensor, importance: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
        """Weighted errors [rows, groups, ratios, books], in squared units of each group."""
        bins = bins_of(groups * reciprocal(unit)[..., None], 1.0)
        return weighted_sums(bins, importance, self.squared).unflatten(-1, (-1, self.books))


def _repeated(entries: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Every entry [ratios, books, 16] as often as it is counted, `BINS` times for each book; takes int64 indices."""
    return torch.repeat_interleave(entries.flatten(), counts.flatten(), output_size=counts[..., 0].numel() * BINS)


def search_scales(
    groups: torch.Tensor, importance: torch.Tensor, table: ScaleTable, per_tensor_scale: torch.Tensor | None
) -> torch.Tensor:
    """For every group the scale, of those tried, with the least weighted error under the better of two books.

    Args:
        groups: [rows, groups, group_size] fp32 weights.
        importance: [groups, group_size] weight of every input channel.
        table: the pair of books.
        per_tensor_scale: the one of books whose `top` is 1.

    Returns:
        [rows, groups] scales for books whose `top` is 1, still to be rounded. Groups whose scales are not all normal
        numbers of the format keep their largest magnitude, which is round-to-nearest's scale.
    """
    amax = groups.abs().amax(-1)
    unit, searchable = _units(amax, table, per_tensor_scale)
    errors = torch.minimum(*table.group_errors(groups, importance, unit).unbind(-1))
    largest = torch.finfo(table.fmt.scale_dtype).max * (1 if per_tensor_scale is None else per_tensor_scale)
    bounds = [(bound * reciprocal(unit))[..., None] for bound in (LEAST_SHARE * amax, largest * (1 + FP32_ROUNDING))]
    errors.add_(torch.clamp(table.ratios, *bounds).sub_(table.ratios).abs_(), alpha=1e38)
    best = torch.index_select(table.ratios, 0, errors.min(-1).indices.view(-1)).view(unit.shape)
    return torch.where(searchable, unit * best, amax)


def few_matter(importance: torch.Tensor) -> torch.Tensor:
    """[groups] bool, where so few channels [groups, group_size] matter that a scale may suit their weights."""
    share = importance / importance.sum(1, keepdim=True)
    return share.square().sum(1) * share.shape[1] * FEW_CHANNELS > 1


def least_errors(
    groups: torch.Tensor, importance: torch.Tensor, table: ScaleTable, per_tensor_scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The least errors under each book that any scale of `search_scales` can have, from a table of lower bounds.

    Returns:
        Errors [rows, groups, books] in squared units of each group, and the units [rows, groups]; a unit is 0 where
        nothing is searched and so nothing is known.
    """
    unit, searchable = _units(groups.abs().amax(-1), table, per_tensor_scale)
    errors = table.group_errors(groups, importance, unit)
    while errors.shape[2] % 2 == 0:  # faster than one reduction over so few numbers
        errors = torch.minimum(*errors.chunk(2, dim=2))
    return errors.amin(2), torch.where(searchable, unit, torch.zeros_like(unit))


def _units(
    amax: torch.Tensor, table: ScaleTable, per_tensor_scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The unit of every group, at least its largest magnitude, and whether all scales down to the least are normal.

    E4M3 scales are the same eighths of every power of two times the per-tensor scale, which is the unit there.
    """
    smallest = torch.finfo(table.fmt.scale_dtype).tiny
    if per_tensor_scale is None:
        return amax, amax * table.ratios[0] >= smallest
    exponent = torch.frexp(amax / per_tensor_scale).exponent
    unit = torch.ldexp((amax > 0).float(), exponent) * per_tensor_scale
    return unit, torch.isfinite(unit) & (unit * table.ratios[0] >= smallest * per_tensor_scale)
