"""Second-order rounding: books, scales and codes for the full H = E[x x^T] of a layer's inputs.

1. The weight is corrected for inputs that differ from the original model's, where that is known.
2. Books and scales come from the first-order encoder, with an importance between H's diagonal and what the feedback
   leaves of it.
3. Codes by error feedback, then coordinate descent (`feedback`).
4. Books and scales by least squares (`least_squares`), codes by coordinate descent again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from aaac_ao.encode.feedback import DAMPING, Grid, damp, descend, feedback, inverse_factor, row_errors
from aaac_ao.encode.least_squares import SAMPLE_WEIGHTS, BookFit, fit_scales
from aaac_ao.packing import ceil_div

if TYPE_CHECKING:
    from aaac_ao.config import AAACConfig
    from aaac_ao.encode.encode import Encoding

#: Share of the measured difference of inputs that the weight is corrected for; all of it would fit noise.
CORRECTION = 0.7
#: Rows are worked on in chunks of about this many weights.
CHUNK_WEIGHTS = 1 << 23


class SecondOrder:
    """What depends on the inputs of a layer alone, computed once for all layers that share them.

    Args:
        hessian: [K, K] fp32, E[x x^T].

    Attributes:
        importance: [K] weights of the input channels for the first-order encoder: the geometric mean of the variance
            of a channel and of the part of it that channels rounded later cannot make up for.

    Raises:
        ValueError: H cannot be factorised, however much it is damped.
    """

    def __init__(self, hessian: torch.Tensor) -> None:
        self.hessian = hessian
        self.order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
        self.factor = inverse_factor(hessian, self.order)
        self.damped = damp(hessian, DAMPING)
        remaining = torch.empty_like(self.factor.diagonal())
        remaining[self.order] = self.factor.diagonal().square().reciprocal()
        self.importance = (remaining * self.damped.diagonal()).sqrt()

    def target(self, weight: torch.Tensor, output_shift: torch.Tensor | None) -> torch.Tensor:
        """The weight [N, K] in fp32 that gives the wanted outputs y' from the inputs x, as far as it can.

        The least-squares solution is w + E[(y' - w x) x^T] H^-1; the correction is taken by `CORRECTION`
        (quantisation error propagation, arXiv 2504.09629).

        Args:
            weight: [N, K] of any float dtype.
            output_shift: [N, K] fp32, E[(y' - w x) x^T], or None if the outputs are as wanted.
        """
        weight = weight.float()
        if output_shift is None:
            return weight
        # with columns in `order`, H^-1 = U^T U
        corrected = weight.clone()
        for rows in _chunks(weight):
            move = CORRECTION * (output_shift[rows][:, self.order] @ self.factor.t() @ self.factor)
            corrected[rows].index_add_(1, self.order, move)
        return corrected

    def refine(self, weight: torch.Tensor, start: Encoding, config: AAACConfig) -> tuple[Encoding, torch.Tensor]:
        """Improve on an encoding under the full H.

        Args:
            weight: [N, K] fp32, the target.
            start: an encoding of it.
            config: settings; learned books are fitted anew, scales if `scale_search` is on.

        Returns:
            An encoding that is nowhere worse, with its error under H, and the error of the start, fp64 0-D.
        """
        codes, before, error = self._first_codes(weight, start, config.group_size)
        encoding = dataclasses.replace(start, codes=codes, error=error)
        if config.codebooks == "learned":
            fitted = self._fitted(weight, encoding, config)
            if bool(fitted.error < encoding.error):
                encoding = fitted
        return encoding, before

    def _first_codes(
        self, weight: torch.Tensor, start: Encoding, group_size: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes by feedback and descent, row by row where they are better; errors of the start and of the result."""
        chosen, errors = [], []
        for rows in _chunks(weight):
            w, grid, old = weight[rows].t(), _grid_of(start, rows, group_size), start.codes[rows].t().int()
            new = descend(w, self.damped, grid, feedback(w, self.order, self.factor, grid))
            both = torch.stack([row_errors(w, grid.values(codes), self.hessian) for codes in (old, new)])
            chosen.append(torch.where(both[1] < both[0], new, old).t().to(torch.uint8))
            errors.append(torch.stack([both[0].sum(), both.amin(0).sum()]))
        before, after = torch.stack(errors).sum(0)
        return torch.cat(chosen), before, after

    def _fitted(self, weight: torch.Tensor, encoding: Encoding, config: AAACConfig) -> Encoding:
        """Books by least squares, then scales, then codes for the books as stored."""
        size, fmt = config.group_size, config.scale_format
        fit = BookFit(self.damped, encoding.codebooks)
        for rows in _chunks(weight):
            grid = _grid_of(encoding, rows, size)
            fit.add(weight[rows].t(), encoding.codes[rows].t(), grid, ceil_div(weight.numel(), SAMPLE_WEIGHTS))
        books, order = fit.solve().bfloat16().float().sort(dim=1)
        if not bool(torch.isfinite(books).all()):
            return encoding
        rank = order.argsort(dim=1).view(-1).int()  # where the entries have gone
        parts = []
        for rows in _chunks(weight):
            w, selector = weight[rows].t(), encoding.selector[rows]
            index = _grid_of(encoding, rows, size).index(encoding.codes[rows].t())
            codes, scale = rank[index], encoding.scale[rows]
            if config.scale_search:
                grid = Grid(scale, selector, books, size)
                scale = fit_scales(w, self.damped, grid, codes, fmt, encoding.per_tensor_scale)
            grid = Grid(scale, selector, books, size)
            codes = descend(w, self.damped, grid, codes)
            error = row_errors(w, grid.values(codes), self.hessian).sum()
            parts.append((codes.t().to(torch.uint8), scale, error))
        codes, scales, errors = zip(*parts, strict=True)
        return dataclasses.replace(
            encoding, codes=torch.cat(codes), scale=torch.cat(scales), codebooks=books, error=torch.stack(errors).sum()
        )


def _chunks(weight: torch.Tensor) -> Iterator[slice]:
    rows = max(1, CHUNK_WEIGHTS // weight.shape[1])
    return (slice(first, first + rows) for first in range(0, len(weight), rows))


def _grid_of(encoding: Encoding, rows: slice, group_size: int) -> Grid:
    return Grid(encoding.scale[rows], encoding.selector[rows], encoding.codebooks, group_size)
