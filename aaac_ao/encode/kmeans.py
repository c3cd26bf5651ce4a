"""Activation-weighted k-means of two books on normalised weights.

Objective and update (method of arXiv 2605.08692; the weight s^2 follows BOF4, arXiv 2505.06653, eq. 6): with u = w / s,
minimise sum_g sum_j h_j s_g^2 (u_gj - C_z(g)[q_gj])^2 over the books C, codes q and one book z(g) per group.
"""

from __future__ import annotations

import torch

from aaac_ao.encode.nearest import BINS, NearestTable
from aaac_ao.encode.scales import reciprocal

#: On the CPU, groups choose their books for about this many weights at a time; fp64 copies of more would be large.
_CHUNK_WEIGHTS = 1 << 17


def lloyd(
    u: torch.Tensor, scale: torch.Tensor, importance: torch.Tensor, codebooks: torch.Tensor, iterations: int
) -> torch.Tensor:
    """Alternate between choosing books and codes and moving the entries to their weighted means.

    Args:
        u: [rows, groups, group_size] normalised weights, the largest of a group near 1.
        scale: [rows, groups] the scales that were divided out.
        importance: [groups, group_size] weight of every input channel.
        codebooks: [2, 16] start.
        iterations: number of updates.

    Returns:
        The books [2, 16], each ascending.
    """
    table = NearestTable(codebooks, top=1.0)
    bins, mass = table.bins(u), _integer_masses(importance, scale)
    # what each book owns, by bins: only groups that change their book change it
    book = torch.zeros(u.shape[:2], dtype=torch.bool, device=u.device)
    histogram = torch.zeros(2, BINS, dtype=torch.float64, device=u.device)
    rows = max(1, _CHUNK_WEIGHTS // importance.numel()) if u.device.type == "cpu" else len(u)
    weights = importance.expand(min(rows, len(u)), -1, -1).contiguous()  # once, and not in every iteration
    chunks = list(zip(*(whole.split(rows) for whole in (bins, mass, book)), strict=True))
    for own_bins, own_mass, _ in chunks:
        histogram[0].index_add_(0, own_bins.view(-1), own_mass.view(-1).double())
    for _ in range(iterations):
        for chunk in chunks:
            _choose_again(*chunk, table, weights[: len(chunk[0])], histogram)
        codebooks = _weighted_means(histogram.long(), table, codebooks)
        table = NearestTable(codebooks, top=1.0)
    return codebooks


def _choose_again(
    bins: torch.Tensor,
    mass: torch.Tensor,
    book: torch.Tensor,
    table: NearestTable,
    importance: torch.Tensor,
    histogram: torch.Tensor,
) -> None:
    """Choose the better book for every group of some rows, in place, and move their mass in the histogram."""
    errors = table.group_errors(bins, importance)
    chosen = errors[1] < errors[0]
    changed = chosen != book
    moved = mass[changed].double().mul_(torch.where(chosen[changed], 1, -1)[:, None])
    gained = torch.zeros_like(histogram[0]).index_add_(0, bins[changed].view(-1), moved.view(-1))
    histogram += torch.stack([-gained, gained])
    book.copy_(chosen)


def _weighted_means(histogram: torch.Tensor, table: NearestTable, codebooks: torch.Tensor) -> torch.Tensor:
    """Mean of the bins that an entry owns, weighted by their mass; an entry without mass stays where it is."""
    zeros = torch.zeros(codebooks.shape, dtype=torch.int64, device=codebooks.device)
    total = zeros.scatter_add(1, table.codes, histogram)
    # bin b has its centre at (2 b + 1 - BINS) half steps: the first moment is a sum of integers too
    half_steps = torch.arange(1 - BINS, BINS, 2, device=codebooks.device)
    moment = zeros.scatter_add(1, table.codes, histogram * half_steps)
    means = moment.double() / total.clamp(min=1) * (table.step / 2)
    return torch.where(total > 0, means, codebooks.double()).float().sort(dim=1).values


def _integer_masses(importance: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The mass h s^2 of every weight as whole numbers [rows, groups, group_size] whose sum is below 2^48.

    fp64 adds them exactly, and so no order of summation can show.
    """
    relative = (scale * reciprocal(scale.max())).square()[..., None]
    mass = importance * reciprocal(importance.max()) * relative
    largest = mass.max().clamp(min=1e-20)
    return mass.mul_(2.0**48 / (mass.numel() * largest)).round_()
