"""Other 4-bit and 8-bit products on a CPU, as variants. Each quantises W itself and is exact about what it stored."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.shapes import bytes_of
from benchmarks.variants import Variant, copies

TORCH_INT4_GROUP = 32


def torch_int4(w: torch.Tensor, cold_bytes: int) -> Variant:
    """PyTorch's `_weight_int4pack_mm_for_cpu`: codes 0..15 around 8, a scale and a zero point per group; x in bf16."""
    n, k = w.shape
    groups = w.view(n, -1, TORCH_INT4_GROUP)
    low, high = groups.amin(-1), groups.amax(-1)
    scale = ((high - low) / 15).clamp(min=1e-8).bfloat16()
    zero = (low + 8 * scale.float()).bfloat16()  # w = (code - 8) * scale + zero
    codes = ((groups - zero.float()[..., None]) / scale.float()[..., None] + 8).round().clamp(0, 15).int().view(n, k)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scale_and_zero = torch.stack([scale, zero], -1).transpose(0, 1).contiguous()

    def exact(start: int, stop: int) -> torch.Tensor:
        values = (codes[start:stop].double() - 8).view(stop - start, -1, TORCH_INT4_GROUP)
        return (values * scale[start:stop].double()[..., None] + zero[start:stop].double()[..., None]).flatten(1)

    products = [
        lambda x, c=c: torch.ops.aten._weight_int4pack_mm_for_cpu(x, c[0], TORCH_INT4_GROUP, c[1])
        for c in copies((packed, scale_and_zero), cold_bytes)
    ]
    name = f"torch int4 g{TORCH_INT4_GROUP}"
    return Variant(name, products, torch.bfloat16, bytes_of(packed, scale_and_zero), exact)


def torch_int8(w: torch.Tensor, cold_bytes: int) -> Variant:
    """PyTorch's `_weight_int8pack_mm`: one scale per row; x in bf16."""
    scale = (w.abs().amax(1) / 127).bfloat16()
    codes = (w / scale.float()[:, None]).round().clamp(-128, 127).to(torch.int8)
    products = [
        lambda x, c=c: torch.ops.aten._weight_int8pack_mm(x, c[0], c[1]) for c in copies((codes, scale), cold_bytes)
    ]

    def exact(start: int, stop: int) -> torch.Tensor:
        return codes[start:stop].double() * scale[start:stop].double()[:, None]

    return Variant("torch int8", products, torch.bfloat16, bytes_of(codes, scale), exact)


def bitsandbytes_nf4(w: torch.Tensor, cold_bytes: int) -> Variant:
    """`matmul_4bit` of bitsandbytes with NF4 in blocks of 64; x in the dtype of W."""
    import bitsandbytes
    from bitsandbytes import functional

    codes, state = functional.quantize_4bit(w, blocksize=64, quant_type="nf4")
    products = [
        lambda x, c=c: bitsandbytes.matmul_4bit(x, c[0].t(), quant_state=state) for c in copies((codes,), cold_bytes)
    ]

    def exact(start: int, stop: int) -> torch.Tensor:
        return functional.dequantize_4bit(codes, state)[start:stop].double()

    return Variant("bitsandbytes nf4", products, w.dtype, bytes_of(codes, state.absmax), exact)


PEERS: dict[str, Callable[[torch.Tensor, int], Variant]] = {
    "torch int4": torch_int4,
    "torch int8": torch_int8,
    "bitsandbytes": bitsandbytes_nf4,
}
