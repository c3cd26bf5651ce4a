"""Second-order rounding: books, scales and codes for the full H = E[x x^T] of a layer's inputs.

1. The weight is corrected for inputs that differ from the original model's, where that is known.
2. Books and scales come from the first-order encoder, with an importance between H's diagonal and what the feedback
   leaves of it.
3. Codes, scales and the choice of books by feedback (`feedback`).

That is all for `round_once`, which learns books on fewer weights and tries fewer scales. `refine` goes on:

4. Block coordinate descent.
5. Books by least squares (`least_squares`), then more descent with finer steps of the scales, before and after
   annealing of the codes (`annealing`).

Wherever descent comes by, it first fits the scales of a block to its codes.

With a metric of the outputs, rows are gone through in small chunks that hear of each other's errors (`rows`), which
takes time anyway: `round_once` tries more scales then, and anneals inside blocks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from typing import TYPE_CHECKING

import torch

from aaac_ao.encode.annealing import anneal
from aaac_ao.encode.factor import DAMPING, damping, times_inverse, upper_factor
from aaac_ao.encode.feedback import Candidates, Order, block_metrics, descend, errors_by_factor, feedback, row_errors
from aaac_ao.encode.grid import Grid
from aaac_ao.encode.least_squares import SAMPLE_WEIGHTS, fit_books, fit_scales
from aaac_ao.encode.rounding import Metric
from aaac_ao.encode.rows import CoupledRows, OutputMetric, Rows, output_error
from aaac_ao.heap import hand_back_memory
from aaac_ao.packing import ceil_div

if TYPE_CHECKING:
    from aaac_ao.config import AAACConfig
    from aaac_ao.encode.encode import Encoding

#: Share of the measured difference of inputs that the weight is corrected for; all of it would fit noise.
CORRECTION = 0.7
#: Scales tried on each side of a group's own, and how far apart bf16 scales are, in turn; E4M3 has its own steps.
FEEDBACK_SCALES, DESCENT_SCALES, LAST_SCALES = (4, 0.03), (3, 0.03), (3, 0.01)
#: The same for the only feedback of `round_once`: around `ONCE_CENTER` times the scale of round-to-nearest, or around a
#: searched scale.
ONCE_SCALES, ONCE_CENTER = (2, 0.06), 0.96
#: Its sweeps of annealing in a block where rows are coupled.
COUPLED_SWEEPS = 128
#: Inputs of which this share is news, on average, as channels are gone through, are nearly independent: little is made
#: up for by feedback.
INDEPENDENT = 0.8
#: Passes of the last descent, each of which gains less than the one before.
LAST_PASSES = 3
#: Rows are worked on in chunks of about this many weights, which bounds the memory beyond H and its factor;
#: accelerators, where every launch costs, take 32 times as many.
CHUNK_WEIGHTS, ONCE_CHUNK_WEIGHTS = 1 << 19, 1 << 20
#: Columns whose codes are replaced at a time; a multiple of every group.
_CHUNK_COLUMNS = 128


class SecondOrder:
    """What depends on the inputs of a layer alone, computed once for all layers that share them.

    Holds half a matrix besides H until `forget_factor`, and again if it is asked for. While a weight is worked on, H's
    diagonal is changed for some of the time.

    Args:
        hessian: [K, K] fp32, E[x x^T].
        group_size: columns per group, which are rounded together.

    Attributes:
        importance: [K] weights of the input channels for the first-order encoder: the geometric mean of the variance
            of a channel and of the part of it that channels rounded later cannot make up for.
        news: 0-D, these parts as a share of all variances.

    Raises:
        ValueError: H cannot be factorised, however much it is damped.
    """

    def __init__(self, hessian: torch.Tensor, group_size: int) -> None:
        self.hessian = hessian
        self.order = Order.of_importance(hessian.diagonal(), group_size)
        self.group_size, self._factor, self._panel_metrics = group_size, [], []
        self.damping = damping(hessian, DAMPING)
        remaining = torch.empty_like(hessian.diagonal())
        remaining[self.order.columns] = torch.cat([panel.diagonal() for panel in self.factor]).square()
        variances = hessian.diagonal() + self.damping
        self.importance, self.news = (remaining * variances).sqrt(), remaining.sum() / variances.sum()

    @property
    def factor(self) -> list[torch.Tensor]:
        """The upper factor R of H = R R^T, both in `order`, in panels; see `upper_factor`."""
        if not self._factor:
            hand_back_memory()
            self._factor += upper_factor(self.hessian, self.order.columns, self.order.blocks())
            hand_back_memory()
        return self._factor

    @property
    def panel_metrics(self) -> list[Metric]:
        """What feedback needs of the panels, besides."""
        if not self._panel_metrics:
            self._panel_metrics += [Metric.of_panel(panel) for panel in self.factor]
        return self._panel_metrics

    def forget_factor(self) -> None:
        """Free the panels of the factor, and their metrics, until they are needed again."""
        self._factor.clear()
        self._panel_metrics.clear()
        hand_back_memory()

    @cached_property
    def metrics(self) -> list[Metric]:
        """What descent needs of the blocks on the diagonal of H."""
        with self._damped():
            return block_metrics(self.hessian, self.group_size)

    @contextmanager
    def _damped(self) -> Iterator[torch.Tensor]:
        """H with its damping, in place: a copy would be as large as H."""
        diagonal = self.hessian.diagonal()
        kept = diagonal.clone()
        try:
            diagonal.add_(self.damping)
            yield self.hessian
        finally:
            diagonal.copy_(kept)

    def target(self, weight: torch.Tensor, output_shift: torch.Tensor | None) -> torch.Tensor:
        """The weight [N, K] that gives the wanted outputs y' from the inputs x, as far as it can; w itself or fp32.

        The least-squares solution is w + E[(y' - w x) x^T] H^-1; the correction is taken by `CORRECTION`
        (quantisation error propagation, arXiv 2504.09629).

        Args:
            weight: [N, K] of any float dtype.
            output_shift: [N, K] fp32, E[(y' - w x) x^T], or None if the outputs are as wanted; becomes the result.
        """
        if output_shift is None:
            return weight
        for rows in _rows(weight).chunks():
            move = output_shift[rows][:, self.order.columns]
            times_inverse(move, self.factor)
            output_shift[rows] = weight[rows]
            output_shift[rows].index_add_(1, self.order.columns, move, alpha=CORRECTION)
        return output_shift

    def refine(
        self,
        weight: torch.Tensor,
        start: Encoding,
        config: AAACConfig,
        output_metric: OutputMetric | None = None,
        final: bool = False,
    ) -> tuple[Encoding | None, torch.Tensor]:
        """Improve on an encoding under the full H.

        Args:
            weight: [N, K] of any float dtype, the target.
            start: an encoding of it, which is overwritten.
            config: settings; learned books are fitted anew, scales if `scale_search` is on.
            output_metric: of the outputs; without one all matter alike.
            final: no other weight will need the factor: it is freed before H is worked with.

        Returns:
            A better encoding, or None, and the error of the start, fp64 0-D, both errors under H and the metric.
        """
        start, factor = self.with_error(weight, start, config, output_metric), self.factor
        rows = self._rows_in_turn(weight, output_metric)

        refit = partial(fit_scales, fmt=config.scale_format, per_tensor_scale=start.per_tensor_scale)
        refit = refit if config.scale_search else None

        def forward(w: torch.Tensor, grid: Grid, codes: torch.Tensor) -> tuple[Grid, torch.Tensor]:
            hand_back_memory()  # both H and its factor are alive: this is when most is
            around = _candidates(start, config, *FEEDBACK_SCALES)
            # chunks are few without a metric: room for the metrics of all panels is worth more than time
            metrics = map(Metric.of_panel, factor) if output_metric is None else self.panel_metrics
            return feedback(w, self.order, factor, metrics, grid, around)[:2]

        def back(w: torch.Tensor, grid: Grid, codes: torch.Tensor) -> tuple[Grid, torch.Tensor]:
            metrics, around = self.metrics, _candidates(start, config, *DESCENT_SCALES)
            with self._damped() as hessian:
                return descend(w, hessian, grid, codes, around, metrics, refit)

        def last(w: torch.Tensor, grid: Grid, codes: torch.Tensor) -> tuple[Grid, torch.Tensor]:
            metrics, around = self.metrics, _candidates(start, config, *LAST_SCALES)
            with self._damped() as hessian:
                grid, codes = descend(w, hessian, grid, codes, around, metrics, refit, LAST_PASSES)
                codes = anneal(w, hessian, grid, codes)
                return descend(w, hessian, grid, codes, around, metrics, refit)

        # rows that hear of each other's errors are to hear of what is left after both steps
        steps = (forward, back) if output_metric is None else (lambda w, *own: back(w, *forward(w, *own)),)
        rounded = start
        for step in steps:
            _by_rows(rows, rounded, config, step)
            if final:
                self.forget_factor()
        if config.codebooks == "learned":
            rounded = self._with_fitted_books(weight, rounded, config)
        rows.again(lambda some: _values(rounded, some, config))
        for _ in range(rows.passes):
            _by_rows(rows, rounded, config, last)
        rounded = self.with_error(weight, rounded, config, output_metric)
        return rounded if bool(rounded.error < start.error) else None, start.error

    def round_once(
        self, weight: torch.Tensor, start: Encoding, config: AAACConfig, output_metric: OutputMetric | None = None
    ) -> Encoding:
        """Feedback alone, with books as they are: a fraction of the work of `refine`.

        Args:
            weight: [N, K] of any float dtype, the target.
            start: books, and scales around which others are tried; overwritten.
            config: settings.
            output_metric: of the outputs; without one all matter alike.

        Returns:
            An encoding with the error under the damped H, or under H and the metric.
        """
        alone, errors = output_metric is None, []
        around = _candidates(start, config, *(ONCE_SCALES if alone else FEEDBACK_SCALES))
        fixed = (self.order, self.factor, self.panel_metrics)
        hand_back_memory()  # that of learning the books

        def forward(w: torch.Tensor, grid: Grid, codes: torch.Tensor) -> tuple[Grid, torch.Tensor]:
            grid, codes, lost = feedback(w, *fixed, grid, around, 0 if alone else COUPLED_SWEEPS)
            errors.append(lost.double().sum())
            return grid, codes

        _by_rows(self._rows_in_turn(weight, output_metric, ONCE_CHUNK_WEIGHTS), start, config, forward)
        if alone:
            return dataclasses.replace(start, error=torch.stack(errors).sum())
        return self.with_error(weight, start, config, output_metric)

    def _rows_in_turn(self, weight: torch.Tensor, output_metric: OutputMetric | None, chunk: int | None = None) -> Rows:
        """The rows of a weight, in chunks of about so many weights or as a metric couples them."""
        return _rows(weight, chunk) if output_metric is None else CoupledRows(weight, output_metric, self.hessian)

    def with_error(
        self, weight: torch.Tensor, encoding: Encoding, config: AAACConfig, output_metric: OutputMetric | None
    ) -> Encoding:
        """The same encoding of a weight, with its error under H and the metric."""
        pairs = ((weight[rows].float(), _values(encoding, rows, config)) for rows in _rows(weight).chunks())
        if output_metric is None:
            error = torch.stack([row_errors(w.t(), values.t(), self.hessian).sum() for w, values in pairs]).sum()
        else:
            error = output_error(torch.cat([w - values for w, values in pairs]), self.hessian, output_metric)
        return dataclasses.replace(encoding, error=error)

    def with_error_of_once(
        self, weight: torch.Tensor, encoding: Encoding, config: AAACConfig, output_metric: OutputMetric | None
    ) -> Encoding:
        """The same encoding with its error as `round_once` gives it, without a metric from the factor alone."""
        if output_metric is not None:
            return self.with_error(weight, encoding, config, output_metric)
        lost = []
        for rows in _rows(weight, ONCE_CHUNK_WEIGHTS).chunks():
            errors = weight[rows].float().t() - _values(encoding, rows, config).t()
            lost.append(errors_by_factor(errors, self.order, self.factor).double().sum())
        return dataclasses.replace(encoding, error=torch.stack(lost).sum())

    def _with_fitted_books(self, weight: torch.Tensor, encoding: Encoding, config: AAACConfig) -> Encoding:
        """The same choices with books by least squares, as they are stored; its codes are overwritten."""
        sample = slice(None, None, ceil_div(weight.numel(), SAMPLE_WEIGHTS))
        grid = _grid_of(encoding, sample, config)
        with self._damped() as hessian:
            books = fit_books(weight[sample].float().t(), hessian, grid, encoding.codes[sample].t())
        books, order = books.bfloat16().float().sort(dim=1)
        if not bool(torch.isfinite(books).all()):
            return encoding
        rank = order.argsort(dim=1).view(-1).to(torch.uint8)  # where the entries have gone
        for rows in _rows(weight).chunks():
            grid = _grid_of(encoding, rows, config)
            for start in range(0, weight.shape[1], _CHUNK_COLUMNS):  # indices take eight times the memory of codes
                own = encoding.codes[rows, start : start + _CHUNK_COLUMNS]
                own.copy_(rank[grid.index(own.t(), start)].t())
        return dataclasses.replace(encoding, codebooks=books)


def _by_rows(
    rows_in_turn: Rows,
    encoding: Encoding,
    config: AAACConfig,
    step: Callable[[torch.Tensor, Grid, torch.Tensor], tuple[Grid, torch.Tensor]],
) -> None:
    """Apply a step to transposed chunks of rows of an encoding, in place."""
    codes, selector, scale = encoding.codes, encoding.selector, encoding.scale
    for rows in rows_in_turn.chunks():
        w, own = rows_in_turn.target(rows).t().contiguous(), encoding.codes[rows].t().contiguous()
        before = _grid_of(encoding, rows, config)
        grid, new = step(w, before, own)
        lost = [(w - of.values(c)).t() for of, c in ((before, own), (grid, new))] if rows_in_turn.joint else None
        if lost is None or rows_in_turn.better(rows, *lost):
            codes[rows], selector[rows], scale[rows] = new.t(), grid.selector.t().bool(), grid.scale.t()
            rows_in_turn.settle(rows, lambda: grid.values(new).t())  # noqa: B023
        del w, own, lost  # or they would be there together with the next ones


def _candidates(encoding: Encoding, config: AAACConfig, count: int, step: float) -> Candidates:
    """Scales around the present ones; only these where scales are not searched."""
    fmt, pts = config.scale_format, encoding.per_tensor_scale
    return lambda scale: fmt.neighbours(scale, pts, count, step) if config.scale_search else scale[None]


def _rows(weight: torch.Tensor, chunk: int | None = None) -> Rows:
    """The rows of a weight, each for itself, in chunks of about so many weights; `CHUNK_WEIGHTS` if None."""
    chunk = CHUNK_WEIGHTS if chunk is None else chunk
    return Rows(weight, max(1, chunk * (1 if weight.device.type == "cpu" else 32) // weight.shape[1]))


def _grid_of(encoding: Encoding, rows: slice | torch.Tensor, config: AAACConfig) -> Grid:
    scale, selector = (part[rows].t().contiguous() for part in (encoding.scale, encoding.selector.to(torch.uint8)))
    return Grid(scale, selector, encoding.codebooks, config.group_size)


def _values(encoding: Encoding, rows: slice | torch.Tensor, config: AAACConfig) -> torch.Tensor:
    """[rows, K] what these rows are encoded as."""
    return _grid_of(encoding, rows, config).values(encoding.codes[rows].t()).t()
