"""Scale formats: how the scale of a group and the book it selects share one stored number.

The magnitude of a stored scale is the group's scale, its sign bit the index of the group's codebook. The bit is read
as a bit: -0.0 is a legal scale (an all-zero group that uses book 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

E4M3_MAX = 448.0
E4M3_MIN = 2.0**-9  # smallest positive (subnormal) value


@dataclass(frozen=True)
class ScaleFormat:
    """One way to store group scales.

    Attributes:
        name: the value of `AAACConfig.format`.
        scale_dtype: storage dtype of the signed scales.
        group_sizes: allowed numbers of consecutive weights per scale, the default first.
        grid: name of the fixed grid whose round-to-nearest is this format's baseline.
    """

    name: str
    scale_dtype: torch.dtype
    group_sizes: tuple[int, ...]
    grid: str

    @property
    def has_per_tensor_scale(self) -> bool:
        """Whether an fp32 scale per tensor multiplies the group scales."""
        return self.scale_dtype == torch.float8_e4m3fn

    def per_tensor_scale(self, weight_amax: torch.Tensor, top: float, largest: float = E4M3_MAX) -> torch.Tensor | None:
        """The fp32 scale that maps the largest group's `weight_amax / top` onto an E4M3 value.

        Args:
            weight_amax: largest magnitude of the weight, 0-D.
            top: magnitude of the book entry onto which a group's largest weight is mapped.
            largest: that E4M3 value; below the format's maximum it leaves room for a search to go up.
        """
        if not self.has_per_tensor_scale:
            return None
        scale = weight_amax.float() / (top * largest)
        return torch.where(scale > 0, scale, torch.ones_like(scale))

    def round(self, scale: torch.Tensor, per_tensor_scale: torch.Tensor | None) -> torch.Tensor:
        """Positive fp32 scales, rounded to the nearest storable finite ones (fp32). Zero stays zero."""
        if per_tensor_scale is None:
            return scale.clamp(max=torch.finfo(self.scale_dtype).max).to(self.scale_dtype).float()
        code = (scale / per_tensor_scale).clamp(E4M3_MIN, E4M3_MAX).to(self.scale_dtype).float()
        return torch.where(scale > 0, code * per_tensor_scale, 0.0)

    def neighbours(
        self, scale: torch.Tensor, per_tensor_scale: torch.Tensor | None, count: int, step: float
    ) -> torch.Tensor:
        """Storable scales around storable ones, [2 * count + 1, ...]: in steps of a share, or of E4M3's codes."""
        offsets = torch.arange(-count, count + 1, device=scale.device).view(-1, *[1] * scale.dim())
        if per_tensor_scale is None:
            return self.round(scale * (1 + step * offsets.double()).float(), None)
        # consecutive E4M3 codes are consecutive integers of their bit patterns
        code = (scale / per_tensor_scale).to(self.scale_dtype).view(torch.uint8)
        codes = (code + offsets).clamp_(1, 126).to(torch.uint8)
        return (codes.view(self.scale_dtype).float() * per_tensor_scale).mul_(scale > 0)

    def store(self, scale: torch.Tensor, selector: torch.Tensor, per_tensor_scale: torch.Tensor | None) -> torch.Tensor:
        """Stored signed scales from rounded positive scales (fp32) and selectors (bool), both [N, groups]."""
        code = scale if per_tensor_scale is None else scale / per_tensor_scale
        return torch.where(selector, -code, code).to(self.scale_dtype)


def load_scale(stored: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Magnitudes (fp32) and book selectors (bool) of stored scales of either format."""
    return stored.float().abs(), selector_bit(stored)


def selector_bit(stored: torch.Tensor) -> torch.Tensor:
    """The sign bit of stored scales as bool; exact for -0.0."""
    if stored.dtype == torch.float8_e4m3fn:
        return stored.view(torch.uint8) >= 128
    return torch.signbit(stored)


FORMATS = {
    "int4": ScaleFormat("int4", torch.bfloat16, (128, 64, 32), grid="int4"),
    "nvfp4": ScaleFormat("nvfp4", torch.float8_e4m3fn, (16,), grid="fp4"),
}
