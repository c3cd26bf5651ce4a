"""Layer shapes of known models, random weights of those shapes without the encoder, and what a product must move."""

from __future__ import annotations

import torch

from aaac_ao import AAACTensor
from aaac_ao.codebooks import fixed_codebooks
from aaac_ao.formats import FORMATS
from aaac_ao.packing import TILE_COLUMNS, pack, packed_shape, unpack

#: Linear layers of one decoder block, as transformers has them: {model: {layer: (N, K)}}.
MODELS = {
    "Llama-3-8B": {
        "q, o": (4096, 4096),
        "k, v": (1024, 4096),
        "gate, up": (14336, 4096),
        "down": (4096, 14336),
    },
    "Llama-3-70B": {
        "q, o": (8192, 8192),
        "k, v": (1024, 8192),
        "gate, up": (28672, 8192),
        "down": (8192, 28672),
    },
    "Qwen2.5-7B": {
        "q, o": (3584, 3584),
        "k, v": (512, 3584),
        "gate, up": (18944, 3584),
        "down": (3584, 18944),
    },
}
CUDA_SHAPES = list(dict.fromkeys(shape for layers in MODELS.values() for shape in layers.values()))
CUDA_TOKENS = [2**i for i in range(13)]
CPU_SHAPES = [(1024, 1024), (4096, 4096), (14336, 4096), (4096, 14336)]
CPU_TOKENS = [1, 2, 4, 8, 16, 64, 256]


def parse_shape(text: str) -> tuple[int, int]:
    """(N, K) of "NxK", for argparse.

    Raises:
        ValueError: not two positive integers.
    """
    n, k = (int(part) for part in text.split("x"))
    if n < 1 or k < 1:
        raise ValueError(f"a shape is NxK with positive N and K, got {text!r}")
    return n, k


def parse_format(text: str) -> tuple[str, int]:
    """(format, group_size) of "int4-128" or "nvfp4-16", for argparse.

    Raises:
        ValueError: not a format and one of its group sizes.
    """
    name, _, group_size = text.rpartition("-")
    if name not in FORMATS or int(group_size) not in FORMATS[name].group_sizes:
        known = [f"{fmt}-{size}" for fmt, scales in FORMATS.items() for size in scales.group_sizes]
        raise ValueError(f"unknown format {text!r}; known: {', '.join(known)}")
    return name, int(group_size)


def random_weight(
    n: int,
    k: int,
    fmt: str,
    group_size: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> AAACTensor:
    """A random weight [n, k] of the size and spread of a trained one, made at memory speed.

    Codes are uniform, scales have both signs at random and spread by a factor of about four, one in 64 of them is zero
    (of either sign), the books are BOF4-S and its mirror, each entry moved a little.
    """
    books = fixed_codebooks("bof4-s", group_size)
    books = (books + 0.02 * torch.randn(2, 16)).bfloat16().to(device)
    qdata = torch.randint(0, 256, packed_shape(n, k), dtype=torch.uint8, device=device)
    if n % 16 or k % TILE_COLUMNS:
        qdata = pack(unpack(qdata, n, k))  # the filling of ragged edges is code 0
    shape = (n, -(-k // group_size))
    magnitude = torch.exp2(2 * torch.rand(shape, device=device)) * (torch.rand(shape, device=device) > 1 / 64)
    negative = torch.rand(shape, device=device) < 0.5
    stored = torch.where(negative, -magnitude, magnitude)
    if FORMATS[fmt].has_per_tensor_scale:
        # E4M3's largest value is 448: a weight of about 0.02 per unit of book and scale
        scale, per_tensor_scale = (stored * 112).to(torch.float8_e4m3fn), torch.tensor(0.02 / 112, device=device)
    else:
        scale, per_tensor_scale = (stored * 0.02).bfloat16(), None
    return AAACTensor(qdata, scale, group_size, -k % TILE_COLUMNS, dtype, books, per_tensor_scale)


def bytes_of(*tensors: torch.Tensor) -> int:
    """Bytes of plain tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def product_bytes(weight_bytes: int, m: int, n: int, k: int, itemsize: int) -> int:
    """Bytes that y = x W^T must move: codes and scales (`weight_bytes`), x [m, k] and y [m, n]."""
    return weight_bytes + m * (n + k) * itemsize
