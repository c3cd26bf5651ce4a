"""One function per kernel that cuts the work into programs and launches them; nothing is checked here."""

from __future__ import annotations

import logging

import torch

from . import blocks, table, verify
from .dequantize import dequantize_kernel
from .exact import exact_kernel
from .finish import finish_kernel
from .fused import fused_kernel

try:
    from . import pairs
except Exception as error:  # Gluon is experimental: it may be missing, or have changed in any way
    logging.getLogger(__name__).debug("no pair table with this Triton: %s", error)
    pairs = None

#: The integers that carry the bits of a scale.
BITS = {torch.bfloat16: torch.int16, torch.float8_e4m3fn: torch.uint8}
MAX_GRID = 2**31 - 1
DEQUANTIZE_BLOCK = 64
#: fp32: (largest M, BLOCK_M, BLOCK_N, warps), the first row whose M is not exceeded. K is split up to the second.
EXACT = ((8, 8, 16, 1), (16, 16, 16, 1), (32, 32, 32, 2), (float("inf"), 64, 64, 4))
FINISH_BLOCK = 256


def ceil_div(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


def grid(programs: int, shape: list[int]) -> tuple[int]:
    """The launch grid of a result of `shape`.

    Raises:
        ValueError: there are more programs than a grid holds.
    """
    if programs > MAX_GRID:
        raise ValueError(f"a result {shape} needs {programs} blocks, a CUDA grid holds {MAX_GRID}: split the input")
    return (programs,)


def fused(x, qdata, scale, codebooks, per_tensor_scale, group_size, bias, act) -> torch.Tensor:
    """Few tokens: codes are decoded inside the product."""
    block = blocks.block_for(x.shape[0])
    words = in_words(scale)
    variant = ("fused", x.dtype, group_size, block.tokens, words, _dtype(act))

    def results() -> tuple[torch.Tensor, torch.Tensor]:
        shape = (block.tokens - 1, 16 * block.row_tiles + 5, 64 * block.tiles * 3 + 80)
        problem = verify.problem(x.device, x.dtype, scale.dtype, group_size, shape, words)
        layer = (*problem, None, group_size, None, _like(act, shape))
        return launch_fused(*layer, block, asm=True), launch_fused(*layer, block, asm=False)

    asm = verify.fast_is_right(variant, x.device, results)
    return launch_fused(x, qdata, scale, codebooks, per_tensor_scale, group_size, bias, act, block, asm)


def launch_fused(x, qdata, scale, codebooks, per_tensor_scale, group_size, bias, act, block, asm) -> torch.Tensor:
    """`fused` with a given block, with the assembly or as the portable twin."""
    (tokens, in_features), out_features = x.shape, scale.shape[0]
    programs = ceil_div(out_features, 16 * block.row_tiles)
    splits = _splits(x.device, programs, in_features // (64 * block.tiles))
    y, partial = _results(x, out_features, splits)
    fused_kernel[(programs, splits)](
        x,
        act,
        qdata,
        scale.view(BITS[scale.dtype]),
        codebooks,
        per_tensor_scale if splits == 1 else None,
        bias if splits == 1 else None,
        y,
        partial,
        tokens,
        out_features,
        in_features,
        x.stride(0) if tokens > 1 else in_features,
        qdata.stride(0),
        scale.stride(0),
        G=group_size,
        BLOCK_M=block.tokens,
        ROW_TILES=block.row_tiles,
        TILES=block.tiles,
        SCALED=blocks.scales_weights(block, group_size),
        WORDS=in_words(scale),
        ASM=asm,
        num_warps=1,
    )
    return _finish(y, partial, per_tensor_scale, bias)


def exact(x, qdata, scale, codebooks, per_tensor_scale, group_size, bias, act) -> torch.Tensor:
    """Any number of fp32 tokens."""
    (tokens, in_features), out_features = x.shape, scale.shape[0]
    _, block_m, block_n, num_warps = next(row for row in EXACT if tokens <= row[0])
    programs = ceil_div(tokens, block_m) * ceil_div(out_features, block_n)
    splits = _splits(x.device, programs, in_features // 256) if tokens <= EXACT[1][0] else 1
    y, partial = _results(x, out_features, splits)
    exact_kernel[(programs, splits)](
        x,
        act,
        qdata,
        scale.view(BITS[scale.dtype]),
        codebooks,
        per_tensor_scale if splits == 1 else None,
        bias if splits == 1 else None,
        y,
        partial,
        tokens,
        out_features,
        in_features,
        x.stride(0) if tokens > 1 else in_features,
        qdata.stride(0),
        scale.stride(0),
        G=group_size,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=num_warps,
    )
    return _finish(y, partial, per_tensor_scale, bias)


def fits_pairs(x, qdata, scale, codebooks, per_tensor_scale, group_size, bias, act, pair_weights) -> bool:
    """Whether the pair table is worth filling, takes this layer, and was found right."""
    (tokens, in_features), out_features = x.shape, scale.shape[0]
    if pairs is None or pair_weights is None or out_features * in_features < pair_weights:
        return False
    if tokens > pairs.MAX_TOKENS or group_size not in pairs.GROUP_SIZES or in_features % (64 * pairs.TILES):
        return False
    if not in_words(scale):
        return False
    block = blocks.block_for(tokens)

    def results() -> tuple[torch.Tensor, torch.Tensor]:
        shape = (block.tokens - 1, 2 * 16 * pairs.WARPS + 5, 64 * pairs.TILES * 3)
        problem = verify.problem(x.device, x.dtype, scale.dtype, group_size, shape)
        layer = (*problem, None, group_size, None, _like(act, shape))
        return launch_pairs(*layer), launch_fused(*layer, block, asm=False)

    return verify.fast_is_right(("pairs", x.dtype, group_size, block.tokens, _dtype(act)), x.device, results)


def launch_pairs(x, qdata, scale, codebooks, per_tensor_scale, group_size, bias, act) -> torch.Tensor:
    """Up to 16 tokens and a large weight."""
    (tokens, in_features), out_features = x.shape, scale.shape[0]
    block = blocks.block_for(tokens)
    resident = pairs.PROGRAMS * table.of_device(x.device)[1]
    row_blocks = ceil_div(out_features, 16 * pairs.WARPS)
    splits = table.choose_even_splits(row_blocks, in_features // (64 * pairs.TILES), resident)
    y, partial = _results(x, out_features, splits)
    pairs.pairs_kernel[(min(row_blocks * splits, resident),)](
        x,
        act,
        qdata,
        scale.view(BITS[scale.dtype]),
        codebooks,
        per_tensor_scale if splits == 1 else None,
        bias if splits == 1 else None,
        y,
        partial,
        tokens,
        out_features,
        in_features,
        splits,
        x.stride(0) if tokens > 1 else in_features,
        qdata.stride(0),
        scale.stride(0),
        G=group_size,
        BLOCK_M=block.tokens,
        SCALED=blocks.scales_weights(block, group_size),
        num_warps=pairs.WARPS,
    )
    return _finish(y, partial, per_tensor_scale, bias)


def _dtype(act: torch.Tensor | None) -> torch.dtype | None:
    return None if act is None else act.dtype


def _like(act: torch.Tensor | None, shape: tuple[int, int, int]) -> torch.Tensor | None:
    """Factors of the features of x for a check of shape (M, N, K)."""
    return None if act is None else torch.linspace(0.5, 1.5, shape[2], device=act.device).to(act.dtype)


def _splits(device: torch.device, programs: int, steps: int) -> int:
    limits, processors = table.of_device(device)
    return table.choose_splits(programs, steps, limits.programs * processors)


def _results(x: torch.Tensor, out_features: int, splits: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return y and, for a split K, room for partial sums."""
    y = x.new_empty(x.shape[0], out_features)
    return y, None if splits == 1 else x.new_empty(splits, *y.shape, dtype=torch.float32)


def _finish(y, partial, per_tensor_scale, bias):
    """Add partial sums up, if there are any."""
    if partial is not None:
        tokens, out_features = y.shape
        finish_kernel[(tokens * ceil_div(out_features, FINISH_BLOCK),)](
            partial,
            per_tensor_scale,
            bias,
            y,
            tokens,
            out_features,
            BLOCK_N=FINISH_BLOCK,
            SPLITS=partial.shape[0],
            num_warps=4,
        )
    return y


def dense(x, qdata, scale, codebooks, per_tensor_scale, group_size, bias, act, slab_bytes) -> torch.Tensor:
    """Many tokens: slabs of rows are dequantised into one workspace, each multiplied by the vendor's library."""
    if act is not None:
        x = x * act.to(x.dtype)
    (tokens, in_features), out_features = x.shape, scale.shape[0]
    rows = max(slab_bytes // (in_features * x.element_size()) // 128, 1) * 128
    rows = ceil_div(ceil_div(out_features, ceil_div(out_features, rows)), 128) * 128  # slabs of about equal size
    y = x.new_empty(tokens, out_features)
    workspace = x.new_empty(min(rows, out_features), in_features)
    for first in range(0, out_features, rows):
        last = min(first + rows, out_features)
        w = workspace[: last - first]
        dequantize_into(w, qdata[first // 16 :], scale[first:last], codebooks, per_tensor_scale, group_size)
        out = y[:, first:last]
        if bias is None:
            torch.mm(x, w.t(), out=out)
        else:
            torch.addmm(bias[first:last].to(x.dtype), x, w.t(), out=out)
    return y


def dequantize_into(
    w: torch.Tensor,
    qdata: torch.Tensor,
    scale: torch.Tensor,
    codebooks: torch.Tensor,
    per_tensor_scale: torch.Tensor | None,
    group_size: int,
) -> None:
    """Write the stored weight to w [N, K], in its dtype."""
    out_features, in_features = w.shape
    programs = ceil_div(out_features, DEQUANTIZE_BLOCK) * ceil_div(in_features, DEQUANTIZE_BLOCK)
    dequantize_kernel[grid(programs, list(w.shape))](
        qdata,
        scale.view(BITS[scale.dtype]),
        codebooks,
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


def in_words(scale: torch.Tensor) -> bool:
    """Whether every row of scales starts at a multiple of 4 bytes."""
    size = scale.element_size()
    return scale.storage_offset() * size % 4 == 0 and scale.stride(0) * size % 4 == 0
