"""Other 4-bit and 8-bit products as variants, each quantised by its own rules and exact about what it stored.

All are optional: one whose library, device or shape is missing raises, and the tables say so.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks.shapes import bytes_of
from benchmarks.timing import copies_for
from benchmarks.variants import Variant, copies

Exact = Callable[[int, int], torch.Tensor]


def asymmetric(w: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Exact]:
    """Codes 0..15 (uint8 [N, K]), bf16 scales and zero points [N, groups], and (code - 8) * scale + zero in fp64."""
    n, k = w.shape
    groups = w.float().view(n, -1, group_size)
    low, high = groups.amin(-1), groups.amax(-1)
    scale = ((high - low) / 15).clamp(min=1e-8).bfloat16()
    zero = (low + 8 * scale.float()).bfloat16()
    codes = ((groups - zero.float()[..., None]) / scale.float()[..., None] + 8).round().clamp(0, 15).to(torch.uint8)

    def exact(start: int, stop: int) -> torch.Tensor:
        rows = slice(start, stop)
        values = codes[rows].double() - 8
        return (values * scale[rows].double()[..., None] + zero[rows].double()[..., None]).flatten(1)

    return codes.view(n, k), scale, zero, exact


def torch_int4_cpu(w: torch.Tensor, cold_bytes: int) -> Variant:
    """PyTorch's `_weight_int4pack_mm_for_cpu` with groups of 32; x in bf16."""
    codes, scale, zero, exact = asymmetric(w, 32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    scale_and_zero = torch.stack([scale, zero], -1).transpose(0, 1).contiguous()
    stored = copies((packed, scale_and_zero), cold_bytes)
    products = [lambda x, c=c: torch.ops.aten._weight_int4pack_mm_for_cpu(x, c[0], 32, c[1]) for c in stored]
    return Variant("torch int4 g32", products, torch.bfloat16, bytes_of(packed, scale_and_zero), exact)


def torch_int8_cpu(w: torch.Tensor, cold_bytes: int) -> Variant:
    """PyTorch's `_weight_int8pack_mm`, one scale per row; x in bf16."""
    scale = (w.abs().amax(1) / 127).bfloat16()
    codes = (w / scale.float()[:, None]).round().clamp(-128, 127).to(torch.int8)
    stored = copies((codes, scale), cold_bytes)
    products = [lambda x, c=c: torch.ops.aten._weight_int8pack_mm(x, *c) for c in stored]

    def exact(start: int, stop: int) -> torch.Tensor:
        return codes[start:stop].double() * scale[start:stop].double()[:, None]

    return Variant("torch int8", products, torch.bfloat16, bytes_of(codes, scale), exact)


def bitsandbytes_nf4(w: torch.Tensor, cold_bytes: int) -> Variant:
    """`matmul_4bit` of bitsandbytes with NF4 in blocks of 64; x in the dtype of W."""
    import bitsandbytes
    from bitsandbytes import functional

    codes, state = functional.quantize_4bit(w, blocksize=64, quant_type="nf4")
    stored = copies((codes,), cold_bytes)
    products = [lambda x, c=c: bitsandbytes.matmul_4bit(x, c[0].t(), quant_state=state) for c in stored]

    def exact(start: int, stop: int) -> torch.Tensor:
        return functional.dequantize_4bit(codes, state)[start:stop].double()

    return Variant("bitsandbytes nf4", products, w.dtype, bytes_of(codes, state.absmax), exact)


def tinygemm(w: torch.Tensor, cold_bytes: int) -> Variant:
    """PyTorch's `_weight_int4pack_mm` with groups of 128."""
    codes, scale, zero, exact = asymmetric(w, 128)
    packed = torch.ops.aten._convert_weight_to_int4pack(codes[:, 0::2] << 4 | codes[:, 1::2], 8)
    scale_and_zero = torch.stack([scale, zero], -1).transpose(0, 1).contiguous()
    stored = copies((packed, scale_and_zero), cold_bytes)
    products = [lambda x, c=c: torch.ops.aten._weight_int4pack_mm(x, c[0], 128, c[1]) for c in stored]
    return Variant("tinygemm int4 g128", products, torch.bfloat16, bytes_of(packed, scale_and_zero), exact)


def torchao_nvfp4(w: torch.Tensor, cold_bytes: int) -> Variant:
    """Torchao's weight-only NVFP4, which dequantises and multiplies."""
    from torchao.prototype.mx_formats.inference_workflow import NVFP4WeightOnlyConfig
    from torchao.quantization import quantize_

    with torch.device("meta"):
        layer = torch.nn.Linear(w.shape[1], w.shape[0], bias=False)
    layer.weight = torch.nn.Parameter(w.bfloat16(), requires_grad=False)
    quantize_(layer, NVFP4WeightOnlyConfig())
    weight = layer.weight.data
    products = [lambda x, c=c: F.linear(x, c[0]) for c in copies((weight,), cold_bytes)]

    def exact(start: int, stop: int) -> torch.Tensor:
        return weight.dequantize(torch.float32)[start:stop].double()

    return Variant("torchao nvfp4", products, torch.bfloat16, bytes_of(weight.qdata, weight.scale), exact)


def gemlite_int4(w: torch.Tensor, cold_bytes: int) -> Variant:
    """Gemlite's A16W4 with groups of 128 and its own choice of kernel; tunes itself on first use of a shape."""
    from gemlite.helper import A16W4_HQQ_INT

    codes, scale, zero, _ = asymmetric(w, 128)
    zeros = (8 - zero.float() / scale.float()).bfloat16()  # gemlite has (code - zero) * scale
    size = codes.numel() // 2 + bytes_of(scale, zeros)
    make = A16W4_HQQ_INT(device=str(w.device), dtype=torch.bfloat16)
    layers = [make.from_weights(codes, scale, zeros) for _ in range(copies_for(size, cold_bytes))]

    def exact(start: int, stop: int) -> torch.Tensor:
        values = codes[start:stop].double().view(stop - start, -1, 128) - zeros[start:stop].double()[..., None]
        return (values * scale[start:stop].double()[..., None]).flatten(1)

    products = [lambda x, layer=layer: layer(x) for layer in layers]
    return Variant("gemlite int4 g128", products, torch.bfloat16, size, exact)


def fbgemm_int4(w: torch.Tensor, cold_bytes: int) -> Variant:
    """FBGEMM's `bf16i4bf16_shuffled` with groups of 128, from FBGEMM or from MSLK, where it moved."""
    try:
        from mslk.quantize.shuffle import quantize_int4_preshuffle

        product = torch.ops.mslk.bf16i4bf16_shuffled
    except ImportError:
        from fbgemm_gpu.experimental.gen_ai.quantize import quantize_int4_preshuffle

        product = torch.ops.fbgemm.bf16i4bf16_shuffled
    packed, (scale, zero) = quantize_int4_preshuffle(w, group_size=128, dtype="bf16")
    stored = copies((packed, scale, zero), cold_bytes)
    products = [lambda x, c=c: product(x, *c) for c in stored]

    def exact(start: int, stop: int) -> torch.Tensor:
        groups = w[start:stop].float().view(stop - start, -1, 128)
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        step = (high - low).clamp(min=1e-6) / 15  # codes are rounded with it before it is rounded to bf16
        codes = ((groups - low) / step).round().clamp(0, 15) - 8
        return (codes.double() * step.bfloat16().double() + (low + 8 * step).bfloat16().double()).flatten(1)

    return Variant("fbgemm int4 g128", products, torch.bfloat16, bytes_of(packed, scale, zero), exact)


PEERS: dict[str, dict[str, Callable[[torch.Tensor, int], Variant]]] = {
    "cpu": {"torch-int4": torch_int4_cpu, "torch-int8": torch_int8_cpu, "bitsandbytes": bitsandbytes_nf4},
    "cuda": {
        "tinygemm": tinygemm,
        "torchao-nvfp4": torchao_nvfp4,
        "bitsandbytes": bitsandbytes_nf4,
        "gemlite": gemlite_int4,
        "fbgemm": fbgemm_int4,
    },
}
