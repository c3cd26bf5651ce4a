"""Rows of a weight whose errors add up or cancel in what the model predicts.

A quadratic error that treats all outputs alike is tr(E H E^T) for the errors E [N, K] of a weight: every row counts for
itself. With the metric M [N, N] of the outputs it is tr(M E H E^T) (Kronecker-factored curvature, arXiv 1503.05671; for
rounding, arXiv 2505.22988), and rows can make up for each other as columns do: rounded one after the other, a row aims
at what the rows before it have lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property

import torch

#: Share of the mean diagonal that is added to the diagonal of M, which is measured on few tokens.
OUTPUT_DAMPING = 0.1
#: Rows that are rounded at a time; only in their targets do they hear of each other. More where there would be more
#: than so many turns: the time of a turn hardly depends on its rows.
COUPLED_ROWS, MOST_TURNS = 4, 64
#: Columns whose errors are weighed at a time.
_CHUNK_COLUMNS = 128


class OutputMetric:
    """How much errors of a layer's outputs matter, and how errors of two of them add up.

    Args:
        matrix: [N, N] fp32, symmetric and positive semidefinite, such as E[g g^T] with g the derivatives of the model's
            loss by the outputs.

    Attributes:
        matrix: the same with a mean diagonal of 1, and damped.

    Raises:
        ValueError: not a square matrix, or NaN or infinite values, or a negative diagonal.
    """

    def __init__(self, matrix: torch.Tensor) -> None:
        if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"an output metric must be [out_features, out_features], got {list(matrix.shape)}")
        diagonal = matrix.diagonal()
        if not bool(torch.isfinite(matrix).all()) or bool((diagonal < 0).any()):
            raise ValueError("an output metric has NaN, infinite or negative values; check the calibration batches")
        mean = diagonal.mean()
        self.matrix = matrix / mean if bool(mean > 0) else torch.eye(len(matrix), device=matrix.device)
        self.matrix.diagonal().add_(OUTPUT_DAMPING)

    @classmethod
    def joined(cls, metrics: list[OutputMetric]) -> OutputMetric:
        """Of layers whose weights are stacked, which are taken to matter alike and not to interact."""
        if len(metrics) == 1:
            return metrics[0]
        joined = torch.block_diag(*[metric.matrix for metric in metrics])
        joined.diagonal().sub_(OUTPUT_DAMPING)  # they are damped already
        return cls(joined)

    def __len__(self) -> int:
        return len(self.matrix)

    @cached_property
    def order(self) -> torch.Tensor:
        """[N] int64, the rows by falling M_nn: what matters most is rounded first, and others make up for it."""
        return torch.argsort(self.matrix.diagonal(), descending=True, stable=True)

    @cached_property
    def lower(self) -> torch.Tensor:
        """[N, N] lower L with M = L^T L, rows and columns in `order`: later rows can make up for earlier ones.

        Raises:
            ValueError: M is not positive semidefinite.
        """
        flipped, failed = torch.linalg.cholesky_ex(self.in_order.flip(0, 1))
        if bool(failed):
            raise ValueError("an output metric is not positive semidefinite")
        return flipped.flip(0, 1).t()

    @cached_property
    def in_order(self) -> torch.Tensor:
        """[N, N] M with rows and columns in `order`."""
        return self.matrix[self.order[:, None], self.order]


class Rows:
    """The rows of a weight in the chunks in which they are rounded, each for itself.

    Args:
        weight: [N, K] of any float dtype, the target.
        count: rows of a chunk.
    """

    #: How often the rows are gone through once more.
    passes = 1
    #: Whether a step that is good for every row may be bad for all of them.
    joint = False

    def __init__(self, weight: torch.Tensor, count: int) -> None:
        self.weight, self.count = weight, count

    def chunks(self) -> Iterator[slice | torch.Tensor]:
        """The rows of every chunk."""
        return (slice(first, first + self.count) for first in range(0, len(self.weight), self.count))

    def target(self, rows: slice | torch.Tensor) -> torch.Tensor:
        """What to round these rows to: [rows, K] fp32."""
        return self.weight[rows].float()

    def settle(self, rows: slice | torch.Tensor, values: Callable[[], torch.Tensor]) -> None:
        """These rows are rounded; `values` gives what to, [rows, K]."""

    def again(self, values: Callable[[slice | torch.Tensor], torch.Tensor]) -> None:
        """The rows will be gone through once more; `values` gives what some of them are now, [rows, K]."""


class CoupledRows(Rows):
    """The same for rows that make up for each other's errors.

    Args:
        weight: [N, K] of any float dtype, the target.
        metric: of the outputs.
        hessian: [K, K] fp32, of the inputs.
    """

    #: The second time, all rows have heard of all others as they are in the end.
    passes = 2

    def __init__(self, weight: torch.Tensor, metric: OutputMetric, hessian: torch.Tensor) -> None:
        super().__init__(weight, max(COUPLED_ROWS, -(-len(weight) // MOST_TURNS)))
        self.metric, self.hessian = metric, hessian
        self._errors = torch.zeros(weight.shape, device=weight.device)  # in the metric's order
        self._rounded = False
        self._place = torch.empty_like(metric.order)
        self._place[metric.order] = torch.arange(len(weight), device=weight.device)

    def chunks(self) -> Iterator[torch.Tensor]:
        """First in order; later rows that lie far apart in it, which are less likely to move together."""
        order = self.metric.order
        if not self._rounded:
            return iter(order.split(self.count))
        step = -(-len(order) // self.count)
        return (order[first::step] for first in range(step))

    def target(self, rows: torch.Tensor) -> torch.Tensor:
        """The best values of these rows, all other rows fixed, or while those behind them are still free."""
        places = self._place[rows]
        if self._rounded:
            own = torch.linalg.cholesky(self.metric.in_order[places[:, None], places])
            pull = self.metric.in_order[places] @ self._errors
            move = torch.cholesky_solve(pull, own) - self._errors[places]
        else:  # |L_cc e_c + L_cb e_b|^2 is what the rows c add to the error of those before them, b
            first, behind = int(places[0]), int(places[-1]) + 1
            lower = self.metric.lower[first:behind]
            pull = lower[:, :first] @ self._errors[:first]
            move = torch.linalg.solve_triangular(lower[:, first:behind], pull, upper=False)
        return self.weight[rows].float() + move

    @property
    def joint(self) -> bool:
        """Once all rows are rounded, they are held against each other."""
        return self._rounded

    def better(self, rows: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> bool:
        """Whether rows lose less together, given what they miss their targets by before and after a step, [rows, K]."""
        places = self._place[rows]
        own = self.metric.in_order[places[:, None], places]
        old, new = (_error_under(own, lost, self.hessian) for lost in (before, after))
        return bool(new < old)

    def settle(self, rows: torch.Tensor, values: Callable[[], torch.Tensor]) -> None:
        """These rows are rounded; rows whose targets are asked for later hear of their errors."""
        self._errors[self._place[rows]] = self.weight[rows].float() - values()

    def again(self, values: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """The rows will be gone through once more, from these values."""
        for rows in self.chunks():
            self.settle(rows, lambda: values(rows))  # noqa: B023
        self._rounded = True


def output_error(error: torch.Tensor, hessian: torch.Tensor, metric: OutputMetric | None) -> torch.Tensor:
    """tr(M E H E^T), fp64 0-D, of errors E [N, K] fp32; without a metric M is the identity."""
    return _error_under(None if metric is None else metric.matrix, error, hessian)


def _error_under(matrix: torch.Tensor | None, error: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64, device=error.device)
    for start in range(0, error.shape[1], _CHUNK_COLUMNS):
        columns = slice(start, start + _CHUNK_COLUMNS)
        own = error[:, columns] if matrix is None else matrix @ error[:, columns]
        total += ((error @ hessian[:, columns]).double() * own.double()).sum()
    return total
