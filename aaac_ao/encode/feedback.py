"""Codes, scales and books of groups that minimise the layer's output error sum_n (w_n - q_n)^T H (w_n - q_n).

First GPTQ's feedback (arXiv 2210.17323): what rounding loses is made up for by the columns still to be rounded. With
H = R R^T, R upper, the error is |R^T e|^2 for the errors e of all columns: it is made part after part, each of which
belongs to a block of columns and depends on those before it alone.

Groups are visited in the order of falling importance and choose scale and book when their turn comes, on the columns as
the feedback left them. Block coordinate descent goes on from there: every block of columns is rounded anew with all
others fixed.

Everything here is laid out [K, N], transposed against the weight: one input channel of all rows is contiguous.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch

from aaac_ao.encode.annealing import anneal
from aaac_ao.encode.factor import upper_factors
from aaac_ao.encode.grid import CHUNK_COLUMNS, Grid, of_columns
from aaac_ao.encode.rounding import BLOCK_COLUMNS, Metric, Rounded, round_block

#: Columns that descent rounds anew at a time, at least one group of them.
DESCENT_COLUMNS = 64
#: Columns that hear of a block's errors at a time, in bf16.
_PART_COLUMNS = 512
#: A block moves only if that lowers a row's error by more than this share, which is above what rounding in fp32 shows.
_LEAST_GAIN = 1e-5

#: Scales to try, [count, groups, N], around those of some groups, [groups, N].
Candidates = Callable[[torch.Tensor], torch.Tensor]
#: Better scales [groups, N] of a block for its present codes: `least_squares.fit_scales` without the format.
Refit = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]


@dataclass(frozen=True)
class Order:
    """The order in which columns are rounded: group after group.

    Attributes:
        columns: [K] int64.
        groups: the groups in that order.
        sizes: their columns; the last group of a weight may have fewer.
        at_once: groups of a block, which are rounded at a time.
    """

    columns: torch.Tensor
    groups: torch.Tensor
    sizes: list[int]
    at_once: int

    @classmethod
    def of_importance(cls, diagonal: torch.Tensor, group_size: int) -> Order:
        """Groups, and columns inside them, by falling diagonal of H; a group counts by its mean.

        One that is cut short comes last.

        Args:
            diagonal: [K] of H.
            group_size: columns per group, at most `BLOCK_COLUMNS`.
        """
        padding = -len(diagonal) % group_size
        padded = torch.nn.functional.pad(diagonal, (0, padding), value=-1).view(-1, group_size)
        sizes = (padded >= 0).sum(1)
        mean = torch.where(sizes == group_size, padded.mean(1), -1)
        groups = torch.argsort(mean, descending=True, stable=True)
        inside = torch.argsort(padded[groups], dim=1, descending=True, stable=True)
        columns = (groups[:, None] * group_size + inside).view(-1)
        return cls(columns[columns < len(diagonal)], groups, sizes[groups].tolist(), BLOCK_COLUMNS // group_size)

    def blocks(self) -> list[int]:
        """Columns of the blocks."""
        return [sum(self.sizes[first : first + self.at_once]) for first in range(0, len(self.sizes), self.at_once)]


def feedback(
    weight: torch.Tensor,
    order: Order,
    factor: list[torch.Tensor],
    metrics: Iterable[Metric],
    grid: Grid,
    candidates: Candidates,
    sweeps: int = 0,
) -> tuple[Grid, torch.Tensor, torch.Tensor]:
    """Round columns in `order`; what is lost is made up for by the columns that follow.

    Args:
        weight: [K, N] fp32.
        order: of rounding.
        factor: the upper factor R of H, both in that order, in a panel for each of `order.blocks`.
        metrics: of the panels.
        grid: books, and the scales around which candidates lie; its selectors are not looked at.
        candidates: scales to try.
        sweeps: of annealing in every block.

    Returns:
        The grid with the chosen scales and books, codes [K, N] uint8, and the errors of the rows, fp32 [N].
    """
    pull, codes = torch.zeros_like(weight), torch.empty_like(weight, dtype=torch.uint8)  # R^T e, as far as e is known
    scale, selector = torch.empty_like(grid.scale), torch.empty_like(grid.selector)
    lost, at_once, start = weight.new_zeros(weight.shape[1]), order.at_once, 0
    blocks = zip(order.groups.split(at_once), factor, metrics, strict=True)
    for index, (groups, panel, metric) in enumerate(blocks):
        sizes = order.sizes[index * at_once : (index + 1) * at_once]
        stop = start + len(panel)
        columns = order.columns[start:stop]
        own = weight.index_select(0, columns)  # faster than weight[columns]
        target = torch.addmm(own, metric.factor.t(), pull[start:stop]) if start else own
        rounded = round_block(target, metric, sizes, grid.codebooks, candidates(grid.scale[groups]))
        if sweeps:
            rounded = _annealed(target, metric, rounded, grid, sweeps)
        codes[columns] = rounded.codes
        scale[groups], selector[groups] = rounded.scale, rounded.selector
        _pass_on(pull[stop:], panel[:, len(panel) :], own - rounded.values)
        lost += rounded.errors.square().sum(0)
        start = stop
    return Grid(scale, selector, grid.codebooks, grid.group_size), codes, lost


def errors_by_factor(errors: torch.Tensor, order: Order, factor: list[torch.Tensor]) -> torch.Tensor:
    """e_n^T H e_n of every row, fp32 [N], from what its columns are off by, [K, N], as `feedback` adds it up."""
    pull, start = torch.zeros_like(errors), 0
    for panel in factor:
        columns = order.columns[start : start + len(panel)]
        pull[start:].addmm_(panel.t(), errors[columns])
        start += len(panel)
    return pull.square_().sum(0)


def _annealed(target: torch.Tensor, metric: Metric, rounded: Rounded, grid: Grid, sweeps: int) -> Rounded:
    """A block [B, N] with better codes."""
    own = Grid(rounded.scale, rounded.selector, grid.codebooks, grid.group_size)
    codes = anneal(target, metric.matrix, own, rounded.codes, sweeps)
    values = own.values(codes)
    return replace(rounded, codes=codes, errors=metric.root @ (target - values), values=values)


def _pass_on(pull: torch.Tensor, panel: torch.Tensor, errors: torch.Tensor) -> None:
    """Add panel^T @ errors to the pull on columns that follow: most of all work of the feedback."""
    from aaac_ao.kernels.cpu import rounding as compiled

    if not (pull.is_cpu and compiled.has_bfloat16()):
        pull.addmm_(panel.t(), errors)
        return
    # a correction that is 0.4 % off at most loses far less than what is rounded afterwards
    errors = errors.bfloat16()
    # of few shapes, as oneDNN keeps code and memory for each
    for part, columns in zip(pull.split(_PART_COLUMNS), panel.split(_PART_COLUMNS, dim=1), strict=True):
        part.add_(columns.t().bfloat16() @ errors)


def block_metrics(hessian: torch.Tensor, group_size: int) -> list[Metric]:
    """What descent needs of the blocks on the diagonal of H [K, K]."""
    metrics = []
    for _, blocks in itertools.groupby(
        _descent_blocks(len(hessian), group_size), lambda block: block.stop - block.start
    ):
        inner = torch.stack([hessian[block, block] for block in blocks])
        metrics += Metric.of_factor(upper_factors(inner)).split()
    return metrics


def _descent_blocks(columns: int, group_size: int) -> list[slice]:
    width = max(DESCENT_COLUMNS, group_size)
    return [slice(start, min(start + width, columns)) for start in range(0, columns, width)]


def descend(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    grid: Grid,
    codes: torch.Tensor,
    candidates: Candidates,
    metrics: list[Metric] | None = None,
    refit: Refit | None = None,
    passes: int = 1,
) -> tuple[Grid, torch.Tensor]:
    """Round every block of columns anew with all others fixed, and keep what is better, row by row.

    Args:
        weight: [K, N] fp32.
        hessian: [K, K], positive definite.
        grid: scales, selectors and books to start from.
        codes: [K, N] uint8.
        candidates: scales to try.
        metrics: `block_metrics` of H, if they are at hand.
        refit: fits the scales of a block to its codes before it is rounded anew.
        passes: over all blocks.

    Returns:
        The grid with the chosen scales and books, and codes [K, N] uint8.
    """
    size = grid.group_size
    metrics = block_metrics(hessian, size) if metrics is None else metrics
    codes, values = codes.clone(), grid.values(codes)
    grid = Grid(grid.scale.clone(), grid.selector.clone(), grid.codebooks, size)
    pull = hessian @ (values - weight)  # half the gradient
    for left in reversed(range(passes)):
        for block, metric in zip(_descent_blocks(len(weight), size), metrics, strict=True):
            before = values[block].clone()
            _renew(block, hessian[block, block], metric, grid, codes, values, pull[block].clone(), candidates, refit)
            rest = slice(0 if left else block.stop, None)  # in the last pass no block asks for what lies before it
            pull[rest].addmm_(hessian[rest, block], values[block] - before)
    return grid, codes


def _renew(
    block: slice,
    inner: torch.Tensor,
    metric: Metric,
    grid: Grid,
    codes: torch.Tensor,
    values: torch.Tensor,
    pull: torch.Tensor,
    candidates: Candidates,
    refit: Refit | None,
) -> None:
    """Round one block anew, in place in grid, codes and values; `inner` [B, B] of H and `pull` [B, N] are its own."""
    size, value = grid.group_size, values[block]
    groups = slice(block.start // size, -(-block.stop // size))
    sizes = [min(size, block.stop - first) for first in range(block.start, block.stop, size)]
    if refit is not None:
        entries = grid.entries[grid.index(codes[block], block.start)]
        grid.scale[groups] = refit(entries, grid.scale[groups], pull, inner, size)
        fitted = entries * of_columns(grid.scale[groups], len(entries), size)
        pull.addmm_(inner, fitted - value)
        value.copy_(fitted)
    # given the other columns the error is least at value - M^-1 pull, by |U pull|^2 less than where they are
    wanted = metric.factor @ pull
    target = value - metric.factor.t() @ wanted
    rounded = round_block(target, metric, sizes, grid.codebooks, candidates(grid.scale[groups]))
    better = rounded.errors.square().sum(0) < (1 - _LEAST_GAIN) * wanted.square().sum(0)
    news = (rounded.values, rounded.codes, rounded.scale, rounded.selector)
    for kept, new in zip((value, codes[block], grid.scale[groups], grid.selector[groups]), news, strict=True):
        kept.copy_(torch.where(better, new, kept))


def row_errors(weight: torch.Tensor, quantised: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """(w_n - q_n)^T H (w_n - q_n) of every row, fp64 [N], of weights [K, N]."""
    error = weight - quantised
    total = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
    for start in range(0, len(error), CHUNK_COLUMNS):
        block = slice(start, start + CHUNK_COLUMNS)
        pulled = hessian[block, block] @ error[block]
        pulled.addmm_(hessian[block, block.stop :], error[block.stop :], alpha=2)  # H is symmetric
        total += (pulled.double() * error[block].double()).sum(0)
    return total
