"""Random quantised weights with known parts, and what they mean, computed without the code under test.

The oracle starts from codes, signed scales and books, not from packed bytes, and works in fp64. Only the packing of the
weight under test goes through the package (`test_packing` and the golden bytes in `test_serialization` cover it).
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import torch

from aaac_ao import AAACTensor
from aaac_ao.packing import pack, unpack

#: Every storable kind of weight: (format, group_size).
KINDS = [("int4", 128), ("int4", 64), ("int4", 32), ("nvfp4", 16)]
BOTH = [("int4", 64), ("nvfp4", 16)]
RAGGED = [(37, 172), (1, 16), (100, 130), (16, 64), (17, 300)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@dataclass
class Sample:
    """A random weight: its codes [N, K], stored scales [N, groups], books [2, 16] and per-tensor scale."""

    codes: torch.Tensor
    scale: torch.Tensor
    books: torch.Tensor
    per_tensor_scale: torch.Tensor | None
    group_size: int

    @property
    def parts(self) -> tuple:
        """The first arguments of the ops."""
        return pack(self.codes), self.scale, self.books, self.per_tensor_scale

    def tensor(self, dtype: torch.dtype = torch.float32, **optional) -> AAACTensor:
        """The weight under test."""
        qdata, scale, books, pts = self.parts
        return AAACTensor(qdata, scale, self.group_size, -self.codes.shape[1] % 64, dtype, books, pts, **optional)

    def dense(self) -> torch.Tensor:
        """What the weight means, fp64 [N, K]."""
        return dense_of(self.codes, self.scale, self.books, self.per_tensor_scale, self.group_size)


def dense_of(codes, scale, books, per_tensor_scale, group_size) -> torch.Tensor:
    """The documented formula in fp64; the sign of a scale is read from its bits."""
    bits = scale.view(torch.uint8) if scale.dtype == torch.float8_e4m3fn else scale.view(torch.int16).int()
    negative = bits >= 128 if scale.dtype == torch.float8_e4m3fn else bits < 0
    of_group = torch.arange(codes.shape[1]) // group_size
    w = books.double()[negative.long()[:, of_group], codes.long()] * scale.double().abs()[:, of_group]
    return w if per_tensor_scale is None else w * per_tensor_scale.double()


def sample(n: int, k: int, fmt: str = "int4", group_size: int = 64, zeros: bool = True) -> Sample:
    """A random weight; a few of its scales are 0.0 and -0.0 unless `zeros` is False."""
    scale = torch.rand(n, -(-k // group_size)).add(0.1) * (torch.rand(n, -(-k // group_size)) < 0.5).mul(2.0).sub(1)
    if zeros:
        scale = torch.where(torch.rand_like(scale) < 0.1, torch.zeros_like(scale).copysign(scale), scale)
        scale.view(-1)[-1] = -0.0
    nvfp4 = fmt == "nvfp4"
    return Sample(
        torch.randint(0, 16, (n, k), dtype=torch.uint8),
        scale.mul(400 if nvfp4 else 1).to(torch.float8_e4m3fn if nvfp4 else torch.bfloat16),
        torch.randn(2, 16).bfloat16(),
        torch.rand(()).add(0.5) / 400 if nvfp4 else None,
        group_size,
    )


def assert_product(y: torch.Tensor, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """Y = x w^T + bias (w in fp64), up to fp32 accumulation and one rounding to the dtype of y."""
    y, x, b = y.detach(), x.detach().double(), 0.0 if bias is None else bias.detach().double()
    expected = x @ w.t() + b
    magnitude = x.abs() @ w.abs().t() + (0.0 if bias is None else b.abs())
    info = torch.finfo(y.dtype)
    bound = expected.abs() * info.eps / 2 + magnitude * 2.0**-24 * (w.shape[1] ** 0.5 + 8) + info.tiny
    assert y.shape == expected.shape, (y.shape, expected.shape)
    worst = ((y.double() - expected).abs() / bound).nan_to_num(float("inf")).max() if y.numel() else torch.zeros(())
    assert worst <= 1, f"error is {float(worst):.3g} times the bound"


def assert_rounded(actual: torch.Tensor, w: torch.Tensor) -> None:
    """`actual` is w (fp64), computed in fp32 with at most two multiplications and rounded once to its dtype."""
    info = torch.finfo(actual.dtype)
    bound = w.abs() * (info.eps / 2 + 3 * 2.0**-24) + info.smallest_normal * info.eps
    assert actual.shape == w.shape, (actual.shape, w.shape)
    assert bool(((actual.detach().double() - w).abs() <= bound).all())


def of_tensor(w: AAACTensor) -> torch.Tensor:
    """What a stored [N, K] weight means, fp64, from its parts."""
    codes = unpack(w.qdata, w.out_features, w.in_features)
    return dense_of(codes, w.scale, w.codebooks, w.per_tensor_scale, w.group_size)


def dense(w: AAACTensor) -> torch.Tensor:
    return w.dequantize(torch.float32)


def saved(w: AAACTensor) -> AAACTensor:
    buffer = io.BytesIO()
    torch.save(w, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)
