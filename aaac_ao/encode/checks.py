"""What the encoder refuses to work on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from aaac_ao.config import AAACConfig
    from aaac_ao.encode.encode import Statistics
    from aaac_ao.encode.rows import OutputMetric


def check_weight(weight: torch.Tensor, config: AAACConfig) -> None:
    """Reject what cannot be quantised; see `encode` for the errors raised."""
    if not weight.is_floating_point():
        raise TypeError(f"weight must be floating-point, got {weight.dtype}")
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(
            f"weight must be 2-D [out_features, in_features] and not empty, got shape {list(weight.shape)}"
        )
    if weight.is_meta:
        raise ValueError("weight is on the meta device and has no values; load the model before quantising it")
    if weight.shape[1] < config.group_size:
        raise ValueError(
            f"in_features {weight.shape[1]} is smaller than group_size {config.group_size}; "
            "choose a smaller group_size or leave this layer out with filter_fn"
        )
    extremes = torch.stack(weight.detach().aminmax()).float()  # fp32 is what it is encoded from; NaN shows here too
    if not bool(torch.isfinite(extremes).all()):
        bad = int((~torch.isfinite(weight.float())).sum())
        raise ValueError(
            f"weight of shape {list(weight.shape)} has {bad} NaN or infinite values; repair the model first"
        )


def checked_moment(statistics: Statistics, in_features: int) -> torch.Tensor:
    """E[x_j^2], fp32 [in_features]; ValueError if it is of another layer, of no tokens or not finite."""
    h = statistics.second_moment.float()
    if tuple(h.shape) != (in_features,):
        raise ValueError(f"second_moment must have shape [{in_features}], got {list(h.shape)}")
    if statistics.tokens < 1:
        raise ValueError("the statistics hold no token; run calibration batches through the model first")
    if not bool(torch.isfinite(h).all()) or bool((h < 0).any()):
        raise ValueError("second_moment has negative, NaN or infinite values; check the calibration batches")
    return h


def check_second_order(
    config: AAACConfig,
    statistics: Statistics | None,
    output_shift: torch.Tensor | None,
    output_metric: OutputMetric | None,
    weight: torch.Tensor,
) -> None:
    """Reject data that second-order rounding of this weight cannot use; see `encode` for the errors raised."""
    n, k = weight.shape
    if statistics is None or statistics.hessian is None:
        raise ValueError(
            f"rounding={config.rounding!r} needs the full second moments of calibration data; prepare the layer with it"
        )
    metric = None if output_metric is None else output_metric.matrix
    parts = (
        ("hessian", statistics.hessian, (k, k)),
        ("output_shift", output_shift, (n, k)),
        ("output_metric", metric, (n, n)),
    )
    for name, part, shape in parts:
        if part is None:
            continue
        if tuple(part.shape) != shape:
            raise ValueError(f"{name} must have shape {list(shape)}, got {list(part.shape)}")
        if part.device != weight.device:
            raise ValueError(f"{name} is on {part.device} and the weight on {weight.device}; move one of them")
        if not bool(torch.isfinite(torch.stack(part.aminmax())).all()):  # NaN shows here too
            raise ValueError(f"{name} has NaN or infinite values; check the calibration batches")
