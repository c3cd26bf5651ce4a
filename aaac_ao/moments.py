"""Second moments of the inputs of layers: sums over input vectors, which add up over batches, runs and machines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from aaac_ao.blocks import hooks, input_of
from aaac_ao.encode import Statistics

if TYPE_CHECKING:
    from aaac_ao.fisher import Importance

#: fp32 copies of inputs are made for about this many numbers at a time.
_CHUNK_NUMBERS = 1 << 20


def in_chunks(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Input vectors [tokens, K] in parts of which fp32 copies are small."""
    return x.split(max(1, _CHUNK_NUMBERS // x.shape[1]))


def roots_in_chunks(weights: torch.Tensor | None, x: torch.Tensor) -> Sequence[torch.Tensor | None]:
    """What to multiply those parts of x with, [tokens, 1], so that products of two vectors have weights [tokens]."""
    parts = in_chunks(x)
    if weights is None:
        return [None] * len(parts)
    return weights.to(x.device).sqrt()[:, None].split([len(part) for part in parts])


@dataclass(frozen=True)
class InputSums:
    """Sums over the input vectors x of one or more layers that read the same input.

    Attributes:
        squares: fp32 [K], the sum of x_j^2.
        tokens: int64 0-D, the number of input vectors.
        hessian: fp32 [K, K], the sum of x x^T, or None where only the diagonal is wanted.
    """

    squares: torch.Tensor
    tokens: torch.Tensor
    hessian: torch.Tensor | None

    @classmethod
    def zeros(cls, in_features: int, device: torch.device | str, full: bool) -> InputSums:
        """Sums over nothing yet; `full` includes the Hessian."""
        hessian = torch.zeros(in_features, in_features, device=device) if full else None
        tokens = torch.zeros((), dtype=torch.int64, device=device)
        return cls(torch.zeros(in_features, device=device), tokens, hessian)

    @torch.no_grad()
    def add(self, x: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Add the input vectors x [..., K]; nothing is read back from the device.

        Args:
            x: of any float dtype.
            weights: [tokens] fp32 >= 0, how often each of them counts; they still count as one token each.
        """
        x = x.detach().reshape(-1, x.shape[-1])
        self.tokens.add_(len(x))
        for part, roots in zip(in_chunks(x), roots_in_chunks(weights, x), strict=True):
            part = part.float() if roots is None else part.float() * roots
            self.squares.add_(torch.linalg.vector_norm(part, dim=0).square_())
            if self.hessian is not None:
                self.hessian.addmm_(part.t(), part)

    def statistics(self, in_place: bool = False) -> Statistics:
        """The means; `in_place` turns the sums into them, which saves a second matrix.

        Raises:
            ValueError: no input was seen.
        """
        tokens = int(self.tokens)
        if tokens == 0:
            raise ValueError(
                "0 batches seen: run calibration batches through the model between 'prepare' and 'convert'"
            )
        hessian = self.hessian
        if hessian is not None:
            hessian = hessian.div_(tokens) if in_place else hessian / tokens
        return Statistics(self.squares / tokens, tokens, hessian)


def gather(
    layers: Mapping[str, nn.Module],
    stages: list[list[str]],
    full: bool,
    run: Callable[[], object],
    importance: Importance | None = None,
) -> list[tuple[list[str], InputSums]]:
    """What the layers of each stage see during `run`, which goes through all batches in order."""
    sums, weights = {}, {}
    for stage in stages:
        first = layers[stage[0]]
        sums[first] = InputSums.zeros(first.in_features, first.weight.device, full)
        weights[first] = iter((importance and importance.token_weights(stage)) or ())
    add = lambda module, args, kwargs: sums[module].add(input_of(args, kwargs), next(weights[module], None))  # noqa: E731
    with hooks(module.register_forward_pre_hook(add, with_kwargs=True) for module in sums):
        run()
    return list(zip(stages, sums.values(), strict=True))


def means(gathered: list[tuple[list[str], InputSums]]) -> dict[str, Statistics]:
    """Statistics by layer, one object for each stage; without layers that saw nothing."""
    found: dict[str, Statistics] = {}
    for stage, sums in gathered:
        if int(sums.tokens):
            found.update(dict.fromkeys(stage, sums.statistics(in_place=True)))
    return found
