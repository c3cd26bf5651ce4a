"""Compiling and checking the kernels of a model before they are needed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from aaac_ao.tensor import AAACTensor


def warmup(model: nn.Module, batch_sizes: Iterable[int] = (1,)) -> int:
    """Run every CUDA kernel once that `model` will need for these numbers of tokens.

    Kernels are compiled, and checked against their portable twins, when they are first used. That takes seconds, and a
    check cannot run while a CUDA graph is captured: call this before serving and before capturing. The number of tokens
    is that of a whole call, batch times sequence; neighbouring numbers share kernels, and nothing is compiled again
    when it changes.

    Args:
        model: any module; layers without `AAACTensor` weights, and those on a CPU, need no warming up.
        batch_sizes: numbers of tokens, each at least 1.

    Returns:
        How many products were run: layers of one shape and format count once.

    Raises:
        ValueError: a batch size is below 1.
    """
    sizes = sorted(set(batch_sizes))
    if any(size < 1 for size in sizes):
        raise ValueError(f"batch_sizes must be at least 1, got {sizes}")
    count = 0
    with torch.no_grad():
        for weight, bias in _distinct_layers(model, "cuda"):
            for size in sizes:
                x = torch.zeros(size, weight.shape[-1], dtype=weight.dtype, device=weight.device)
                nn.functional.linear(x, weight, bias)
                count += 1
    return count


def _distinct_layers(model: nn.Module, device: str) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """Weight and bias of one layer of every kind whose weights are `AAACTensor`s on this type of device."""
    seen = set()
    for module in model.modules():
        weight, bias = (getattr(module, name, None) for name in ("weight", "bias"))
        data = weight.data if isinstance(weight, nn.Parameter) else weight
        if not isinstance(data, AAACTensor) or data.device.type != device:
            continue
        key = (
            data.shape,
            data.dtype,
            data.device,
            data.scale.dtype,
            data.group_size,
            data.scale.stride(),
            bias is None,
            None if data.act_pre_scale is None else data.act_pre_scale.dtype,
        )
        if key not in seen:
            seen.add(key)
            yield data, bias
