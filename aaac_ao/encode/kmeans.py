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
    mass = _exact_summands(importance * (scale * reciprocal(scale.max())).square()[..., None])
    for _ in range(iterations):
        errors = table.group_errors(bins, importance)
        book = (errors[1] < errors[0]).to(torch.int32)
        owner = (bins + book[..., None] * BINS).view(-1)
        histogram = mass.new_zeros(2 * BINS).index_add_(0, owner, mass).view(2, BINS)
        codebooks = _weighted_means(histogram, table, codebooks)
        table = NearestTable(codebooks, top=1.0)
    return codebooks


def _weighted_means(histogram: torch.Tensor, table: NearestTable, codebooks: torch.Tensor) -> torch.Tensor:
    """Mean of the bins that an entry owns, weighted by their mass; an entry without mass stays where it is."""
    owner = torch.nn.functional.one_hot(table.codes, codebooks.shape[1]).double()  # [2, bins, 16]
    total, moment = torch.stack([histogram, histogram * table.centers], dim=1).matmul(owner).unbind(1)
    means = torch.where(total > 0, moment / total.clamp(min=1e-300), codebooks.double())
    return means.float().sort(dim=1).values


def _exact_summands(mass: torch.Tensor) -> torch.Tensor:
    """Masses scaled and rounded to integers whose sums are exact in fp64: the order of summation cannot matter."""
    mass = mass.reshape(-1).double()
    largest = mass.max().clamp(min=1e-200)
    return (mass * (2.0**52 / (mass.numel() * largest))).round_()
