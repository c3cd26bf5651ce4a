"""Activation-weighted k-means of two books on normalised weights.

Objective and update (method of arXiv 2605.08692; the weight s^2 follows BOF4, arXiv 2505.06653, eq. 6): with u = w / s,
minimise sum_g sum_j h_j s_g^2 (u_gj - C_z(g)[q_gj])^2 over the books C, codes q and one book z(g) per group.
"""

from __future__ import annotations

import torch

from aaac_ao.encode.nearest import BINS, NearestTable
from aaac_ao.encode.scales import reciprocal


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
    bins = table.bins(u)
    mass = _integer_masses(importance * (scale * reciprocal(scale.max())).square()[..., None])
    for _ in range(iterations):
        errors = table.group_errors(bins, importance)
        book = (errors[1] < errors[0]).to(torch.int32)
        owner = (bins + book[..., None] * BINS).view(-1)
        histogram = mass.new_zeros(2 * BINS).index_add_(0, owner, mass).view(2, BINS).long()
        codebooks = _weighted_means(histogram, table, codebooks)
        table = NearestTable(codebooks, top=1.0)
    return codebooks


def _weighted_means(histogram: torch.Tensor, table: NearestTable, codebooks: torch.Tensor) -> torch.Tensor:
    """Mean of the bins that an entry owns, weighted by their mass; an entry without mass stays where it is."""
    zeros = torch.zeros(codebooks.shape, dtype=torch.int64, device=codebooks.device)
    total = zeros.scatter_add(1, table.codes, histogram)
    # bin b has its centre at (2 b + 1 - BINS) half steps: the first moment is a sum of integers too
    half_steps = torch.arange(1 - BINS, BINS, 2, device=codebooks.device)
    moment = zeros.scatter_add(1, table.codes, histogram * half_steps)
    means = moment.double() / total.clamp(min=1) * (table.step / 2)
    return torch.where(total > 0, means, codebooks.double()).float().sort(dim=1).values


def _integer_masses(mass: torch.Tensor) -> torch.Tensor:
    """Masses as integers with a sum below 2^48, exact also in fp64: no order of summation can change a result."""
    mass = mass.reshape(-1).double()
    largest = mass.max().clamp(min=1e-200)
    return (mass * (2.0**48 / (mass.numel() * largest))).round_()
