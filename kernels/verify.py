"""The fast lookup proves itself on the device before it is used: once per kernel variant, against the portable twin."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable

import torch

logger = logging.getLogger(__name__)
#: Largest difference of two results of one row, relative to the row's largest: rounding stays far below, a wrong book,
#: code or scale goes far above.
TOLERANCE = 0.02

_verdicts: dict[Hashable, bool] = {}
_warned: set[Hashable] = set()


def fast_is_right(
    variant: Hashable, device: torch.device, results: Callable[[], tuple[torch.Tensor, torch.Tensor]]
) -> bool:
    """Whether the fast lookup of `variant` may be used on `device`; `results` gives y of the fast one and of the twin.

    The first call for a variant runs `results`, and warns once if they differ or the fast one fails. While a CUDA graph
    is captured nothing can be checked: an unchecked variant is then not used, and its check is left to a later call.
    """
    if device.type != "cuda":
        return False
    key = (device.index, variant)
    if key in _verdicts:
        return _verdicts[key]
    if torch.cuda.is_current_stream_capturing():
        if key not in _warned:
            _warned.add(key)
            logger.warning("%s is not checked yet and a CUDA graph is captured: the portable kernel runs instead. "
                           "Call aaac_ao.warmup before capturing.", variant)  # fmt: skip
        return False
    _verdicts[key] = _compare(variant, results)
    return _verdicts[key]


def forget() -> None:
    """Forget all verdicts: every variant is checked anew."""
    _verdicts.clear()
    _warned.clear()


def _compare(variant: Hashable, results: Callable[[], tuple[torch.Tensor, torch.Tensor]]) -> bool:
    try:
        fast, twin = (y.float() for y in results())
    except Exception as error:  # a Triton that cannot compile the assembly fails in many ways
        logger.warning("%s does not run here (%s: %s); the portable kernel is used, which is slower.",
                       variant, type(error).__name__, str(error)[:500])  # fmt: skip
        return False
    difference = ((fast - twin).abs().amax(0) / twin.abs().amax(0)).nan_to_num(nan=float("inf")).max().item()
    if difference > TOLERANCE:
        logger.warning("%s differs from the portable kernel by %.3g here, which is used now and is slower. "
                       "Please report this with your GPU and the versions of triton and the driver.",
                       variant, difference)  # fmt: skip
        return False
    logger.debug("%s agrees with the portable kernel to %.3g", variant, difference)
    return True


def problem(
    device: torch.device,
    dtype: torch.dtype,
    scale_dtype: torch.dtype,
    group_size: int,
    shape: tuple[int, int, int],
    words: bool = True,
) -> tuple[torch.Tensor, ...]:
    """Random x, qdata, scale, codebooks of shape (M, N, K); scales of a row are of one size, those of rows of many.

    Rows of scales start at multiples of 16 elements if `words`, else one element behind.
    """
    tokens, out_features, in_features = shape
    generator = torch.Generator(device).manual_seed(0)
    groups = -(-in_features // group_size)
    sign = torch.randint(0, 2, (out_features, groups), device=device, generator=generator)
    fraction = torch.randint(0, 8, (out_features, groups), device=device, generator=generator)
    row = torch.arange(out_features, device=device)[:, None]
    if scale_dtype == torch.float8_e4m3fn:
        exponent = row % 15  # subnormals included
        scale = (sign << 7 | exponent << 3 | fraction).to(torch.uint8).view(scale_dtype)
    else:
        scale = ((1 - 2 * sign) * (1 + fraction / 8) * 2.0 ** (row % 9 - 8)).to(scale_dtype)
    wide = scale.view(torch.uint8).new_zeros(out_features, (groups + 16) // 16 * 16 * scale.element_size())
    scale = wide.view(scale_dtype)[:, 0 if words else 1 :][:, :groups].copy_(scale)
    size = (-(-out_features // 16), -(-in_features // 64) * 512)
    qdata = torch.randint(0, 256, size, device=device, generator=generator).to(torch.uint8)
    codebooks = torch.randn(2, 16, device=device, generator=generator).bfloat16()
    x = torch.randn(tokens, in_features, device=device, generator=generator).to(dtype)
    return x, qdata, scale, codebooks
