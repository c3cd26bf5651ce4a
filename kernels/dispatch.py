"""Host side: which kernel with which blocks, and its launch. Nothing here reads a tensor's values."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from triton.runtime import JITFunction

from .decode import decode_kernel, finish_kernel
from .dequantize import dequantize_kernel
from .gemm import gemm_kernel

#: x dtypes of `linear` and result dtypes of `dequantize`.
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
#: Group sizes by scale dtype, and the integers that carry the scale's bits.
GROUP_SIZES = {torch.bfloat16: (32, 64, 128), torch.float8_e4m3fn: (16,)}
BITS = {torch.bfloat16: torch.int16, torch.float8_e4m3fn: torch.uint8}
MAX_GRID = 2**31 - 1


@dataclass(frozen=True)
class Launch:
    """One way to run `linear`.

    Attributes:
        kernel: the jitted function.
        block_m: tokens of a program.
        block_n: rows of the weight of a program, a multiple of 16.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline.
    """

    kernel: JITFunction
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


#: (largest M, launch): the first row whose M is not exceeded is used. At most two warps while M is small: with four,
#: sm_100 would stage the weight through shared memory.
TABLE = (
    (8, Launch(decode_kernel, 8, 16, 1, 3)),
    (16, Launch(decode_kernel, 16, 16, 1, 3)),
    (32, Launch(gemm_kernel, 32, 32, 2, 3)),
)
LARGE = Launch(gemm_kernel, 64, 64, 4, 3)
DEQUANTIZE_BLOCK = 64
#: Decoding programs that fill a large GPU, tiles of K below which a program is not worth its start, and most splits.
FILL, MIN_TILES, MAX_SPLITS = 1024, 4, 16
FINISH_BLOCK = 256


def choose(tokens: int) -> Launch:
    """The launch for M = `tokens` >= 1."""
    return next((launch for largest, launch in TABLE if tokens <= largest), LARGE)


def choose_splits(out_features: int, in_features: int, block_n: int) -> int:
    """Ranges of K in which `decode_kernel` works side by side: a power of two that depends on the shape alone."""
    splits = 1
    blocks, tiles = ceil_div(out_features, block_n), ceil_div(in_features, 64)
    while splits < MAX_SPLITS and blocks * splits < FILL and tiles >= 2 * splits * MIN_TILES:
        splits *= 2
    return splits


def ceil_div(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


def linear(
    x: torch.Tensor,
    qdata: torch.Tensor,
    scale: torch.Tensor,
    codebooks: torch.Tensor,
    per_tensor_scale: torch.Tensor | None,
    group_size: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return x @ w.T + bias for a stored weight w [N, K], summed in fp32 from unrounded weights.

    Args:
        x: [M, K], bf16, fp16 or fp32; M may be 0.
        qdata: packed codes, uint8 [ceil(N / 16), ceil(K / 64) * 512]; rows may be strided.
        scale: signed scales [N, ceil(K / group_size)], bf16 or float8_e4m3fn; rows may be strided.
        codebooks: bf16 [2, 16].
        per_tensor_scale: fp32 0-D factor of the whole weight, or None.
        group_size: weights per scale along K; 32, 64 or 128 with bf16 scales, 16 with float8_e4m3fn.
        bias: [N], any float dtype, or None.

    Returns:
        y [M, N] in x's dtype, contiguous.

    Raises:
        ValueError: a dtype, shape or stride the kernels do not take, or more blocks than a grid holds.
    """
    if x.dim() != 2 or x.dtype not in DTYPES:
        raise ValueError(f"x must be 2-D bf16, fp16 or fp32, got {x.dim()}-D {x.dtype}")
    tokens, in_features = x.shape
    _check_weight(qdata, scale, codebooks, per_tensor_scale, group_size, in_features)
    out_features = scale.shape[0]
    if bias is not None and tuple(bias.shape) != (out_features,):
        raise ValueError(f"bias must have shape [{out_features}], got {list(bias.shape)}")
    launch = choose(tokens)
    blocks = ceil_div(tokens, launch.block_m) * ceil_div(out_features, launch.block_n)
    _grid(blocks, [tokens, out_features])
    y = x.new_empty(tokens, out_features)
    if y.numel() == 0:
        return y
    x = x if x.stride(1) == 1 else x.contiguous()
    bias = None if bias is None else bias.contiguous()
    weight = (qdata, scale.view(BITS[scale.dtype]), codebooks.contiguous())
    sizes = (tokens, out_features, in_features, x.stride(0), qdata.stride(0), scale.stride(0))
    options = {"G": group_size, "BLOCK_M": launch.block_m, "BLOCK_N": launch.block_n}
    options |= {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    with _on(x):
        if launch.kernel is gemm_kernel:
            gemm_kernel[(blocks,)](x, *weight, per_tensor_scale, bias, y, *sizes, **options)
            return y
        splits = choose_splits(out_features, in_features, launch.block_n)
        partial = None if splits == 1 else x.new_empty(splits, *y.shape, dtype=torch.float32)
        grid = (blocks * splits,)
        decode_kernel[grid](x, *weight, per_tensor_scale, bias, y, partial, *sizes, **options, SPLITS=splits)
        if partial is not None:
            grid = (tokens * ceil_div(out_features, FINISH_BLOCK),)
            options = {"BLOCK_N": FINISH_BLOCK, "SPLITS": splits, "num_warps": 4}
            finish_kernel[grid](partial, per_tensor_scale, bias, y, tokens, out_features, **options)
    return y


def dequantize(
    qdata: torch.Tensor,
    scale: torch.Tensor,
    codebooks: torch.Tensor,
    per_tensor_scale: torch.Tensor | None,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The stored weight as a plain tensor.

    Args:
        qdata: packed codes, uint8 [ceil(N / 16), ceil(K / 64) * 512]; rows may be strided.
        scale: signed scales [N, ceil(K / group_size)], bf16 or float8_e4m3fn; rows may be strided.
        codebooks: bf16 [2, 16].
        per_tensor_scale: fp32 0-D factor of the whole weight, or None.
        group_size: weights per scale along K; 32, 64 or 128 with bf16 scales, 16 with float8_e4m3fn.
        in_features: K.
        dtype: bf16, fp16 or fp32.

    Returns:
        w [N, K] in `dtype`, contiguous.

    Raises:
        ValueError: a dtype, shape or stride the kernel does not take, or more blocks than a grid holds.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be bf16, fp16 or fp32, got {dtype}")
    _check_weight(qdata, scale, codebooks, per_tensor_scale, group_size, in_features)
    out_features = scale.shape[0]
    w = scale.new_empty(out_features, in_features, dtype=dtype)
    if w.numel() == 0:
        return w
    blocks = ceil_div(out_features, DEQUANTIZE_BLOCK) * ceil_div(in_features, DEQUANTIZE_BLOCK)
    with _on(w):
        dequantize_kernel[_grid(blocks, list(w.shape))](
            qdata,
            scale.view(BITS[scale.dtype]),
            codebooks.contiguous(),
            per_tensor_scale,
            w,
            out_features,
            in_features,
            qdata.stride(0),
            scale.stride(0),
            G=group_size,
            BLOCK_N=DEQUANTIZE_BLOCK,
            BLOCK_K=DEQUANTIZE_BLOCK,
            num_warps=4,
        )
    return w


def _check_weight(
    qdata: torch.Tensor,
    scale: torch.Tensor,
    codebooks: torch.Tensor,
    per_tensor_scale: torch.Tensor | None,
    group_size: int,
    in_features: int,
) -> None:
    """Reject whatever would make a kernel read outside the tensors or misread their bits."""
    if scale.dtype not in GROUP_SIZES or group_size not in GROUP_SIZES[scale.dtype]:
        known = {str(dtype): sizes for dtype, sizes in GROUP_SIZES.items()}
        raise ValueError(f"no kernel for {scale.dtype} scales with group_size {group_size}; known: {known}")
    rows, row_bytes = ceil_div(scale.shape[0], 16), ceil_div(in_features, 64) * 512
    if qdata.dtype != torch.uint8 or tuple(qdata.shape) != (rows, row_bytes):
        raise ValueError(f"qdata must be uint8 [{rows}, {row_bytes}], got {qdata.dtype} {list(qdata.shape)}")
    if scale.dim() != 2 or scale.shape[1] != ceil_div(in_features, group_size):
        raise ValueError(f"scale must be [N, {ceil_div(in_features, group_size)}], got {list(scale.shape)}")
    if codebooks.dtype != torch.bfloat16 or tuple(codebooks.shape) != (2, 16):
        raise ValueError(f"codebooks must be bf16 [2, 16], got {codebooks.dtype} {list(codebooks.shape)}")
    for name, tensor in (("qdata", qdata), ("scale", scale)):
        if tensor.stride(1) != 1 and tensor.shape[1] > 1:
            raise ValueError(f"{name} must have stride 1 along K, got strides {tensor.stride()}")
    if per_tensor_scale is not None and (per_tensor_scale.dtype != torch.float32 or per_tensor_scale.numel() != 1):
        raise ValueError(
            f"per_tensor_scale must be one fp32 number, got {per_tensor_scale.dtype} {list(per_tensor_scale.shape)}"
        )


def _grid(blocks: int, shape: list[int]) -> tuple[int]:
    if blocks > MAX_GRID:
        raise ValueError(f"a result {shape} needs {blocks} blocks, a CUDA grid holds {MAX_GRID}: split the input")
    return (blocks,)


def _on(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Make the tensor's GPU the current one: Triton launches there, not where the tensors are."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
