"""How far the outputs of layers have drifted from those of the original model, as far as their inputs can tell."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from aaac_ao.moments import in_chunks, roots_in_chunks

#: fp32 copies of weights are made of about this many at a time.
_CHUNK_WEIGHTS = 1 << 18


class OutputShifts:
    """How far the outputs y of layers with one input x should move: E[(y' - y) x^T] of each, from sums over tokens.

    y' - y is W (x' - x), with x' the input in the original model, plus the difference of the residual stream that y is
    added to. One sum of (x' - x) x^T serves all layers, unless those of (y' - y) x^T of each are smaller.

    Args:
        layers: by name, with the weights W [N, K] that are to be encoded.
        bases: for some of them, the module whose input is the residual stream.
    """

    def __init__(self, layers: Mapping[str, nn.Module], bases: Mapping[str, nn.Module]) -> None:
        self._layers, self._left = layers, set(layers)
        self._bases = {name: bases[name] for name in layers if name in bases}
        weight = next(iter(layers.values())).weight
        k, outputs = weight.shape[1], sum(layer.out_features for layer in layers.values())
        self._shift = torch.zeros(k, k, device=weight.device) if outputs > k else None
        self._sums = {
            name: torch.zeros(layer.out_features, k, device=weight.device)
            for name, layer in layers.items()
            if self._shift is None or name in self._bases
        }

    @property
    def sites(self) -> set[nn.Module]:
        """The modules whose inputs are residual streams."""
        return set(self._bases.values())

    def add(
        self,
        then: Mapping[nn.Module, list[torch.Tensor]],
        now: Mapping[nn.Module, list[torch.Tensor]],
        weights: torch.Tensor | None = None,
    ) -> None:
        """Add one batch: inputs [..., K] of the first layer, one per call, and of the sites, in both streams.

        `weights`: fp32 [tokens] >= 0, how much tokens count, for layers that are called once; None: all alike.
        """
        first = next(iter(self._layers.values()))
        for x_then, x_now in zip(then[first], now[first], strict=True):
            start, x_then, x_now = 0, x_then.flatten(0, -2), x_now.flatten(0, -2)
            parts = (in_chunks(x_then), in_chunks(x_now), roots_in_chunks(weights, x_now))
            for x0, x, roots in zip(*parts, strict=True):
                tokens, x = slice(start, start + len(x)), x.float()
                difference = x0.to(torch.float32, copy=True).sub_(x)
                if roots is not None:  # one root with either factor of the products below
                    difference, x = difference.mul_(roots), x * roots
                start = tokens.stop
                if self._shift is not None:
                    self._shift.addmm_(difference.t(), x)
                for name, total in self._sums.items():
                    if self._shift is None:
                        weight = self._layers[name].weight.detach()
                        split = max(1, _CHUNK_WEIGHTS // weight.shape[1])
                        for rows, part in zip(weight.split(split), total.split(split), strict=True):
                            part.addmm_((difference @ rows.float().t()).t(), x)
                    if name in self._bases:
                        streams = (part[self._bases[name]][0].flatten(0, -2)[tokens].float() for part in (then, now))
                        drift = next(streams).sub(next(streams))
                        total.addmm_((drift if roots is None else drift.mul_(roots)).t(), x)

    def take(self, name: str, tokens: int) -> torch.Tensor:
        """The [N, K] fp32 matrix of a layer, once, from sums over so many tokens; the sums go with the last layer."""
        total = self._sums.pop(name, None)
        if self._shift is not None:
            shift = self._layers[name].weight.detach().float() @ self._shift
            total = shift if total is None else shift.add_(total)
        self._left.remove(name)
        if not self._left:
            self._shift = None
        return total.div_(tokens)
