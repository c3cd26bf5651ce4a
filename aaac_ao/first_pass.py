"""What the first pass over the data finds out about the layers: who shares an input, and who got a bad one or none."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from aaac_ao.blocks import input_of


class LayerRecord:
    """Forward pre-hooks that look at the inputs of layers and keep none of them.

    Attributes:
        stages: names of layers in the order of their first call; consecutive layers that read the same tensor, as q, k
            and v do, form one stage.
        repeated: names of layers that are called more than once for a batch.
        tokens: how many input vectors each layer saw.
    """

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        self.names = {module: name for name, module in layers.items()}
        self.stages: list[list[str]] = []
        self.repeated: set[str] = set()
        self.tokens: dict[str, int] = dict.fromkeys(layers, 0)
        self._finite: dict[str, list[tuple[int, torch.Tensor]]] = {name: [] for name in layers}
        self._last: tuple[torch.Tensor, int] | None = None
        self._batch = -1

    def handles(self) -> list:
        """Register the hooks."""
        return [module.register_forward_pre_hook(self.before, with_kwargs=True) for module in self.names]

    def start_batch(self) -> None:
        """Begin with the next batch."""
        self._batch += 1
        self._last, self._called = None, set()

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Look at one input."""
        name, x = self.names[module], input_of(args, kwargs)
        if name in self._called:
            self.repeated.add(name)
        self._called.add(name)
        if not self._finite[name]:
            if self._last is not None and x is self._last[0] and x._version == self._last[1]:
                self.stages[-1].append(name)
            else:
                self.stages.append([name])
        self._last = (x, x._version)
        self.tokens[name] += x.numel() // x.shape[-1]
        finite = torch.isfinite(torch.linalg.vector_norm(x, dtype=torch.float32).square())
        self._finite[name].append((self._batch, finite))

    def unreached(self) -> list[str]:
        """Names of layers that saw no input vector."""
        return [name for name, tokens in self.tokens.items() if tokens == 0]

    def problems(self) -> dict[str, str]:
        """Layers with inputs that are not finite, and the first batch that gave them."""
        problems = {}
        for name, seen in self._finite.items():
            bad = [batch for batch, finite in seen if not bool(finite)]
            if bad:
                problems[name] = f"calibration batch {bad[0]} gives it NaN or infinite inputs"
        return problems

    def stages_of(self, names: set[str]) -> list[list[str]]:
        """The stages, cut down to some layers."""
        cut = [[name for name in stage if name in names] for stage in self.stages]
        return [stage for stage in cut if stage]
