"""Linear layer for fp32 x of any number of tokens, exact to the rounding of fp32 sums; portable and not fast."""

from __future__ import annotations

import triton
import triton.language as tl

from .lut import DOT_DTYPE, decode_scale, load_codes, lookup, scale_x, store_y


@triton.jit
def high_part(x):
    """The fp32 `x` cut (not rounded, so that nothing overflows) to the 8 significant bits of bf16."""
    return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def exact_dot(w, x):
    """The fp32 product w @ x with w bf16 and x fp32, on bf16 tensor cores.

    x = x1 + x2 + x3 splits into bf16 parts without a remainder: 24 significant bits in pieces of 8. Products of two
    bf16 numbers are exact in fp32. Small parts are added first.
    """
    first = high_part(x)
    rest = tl.where(x == first, 0.0, x - first)  # an infinity is its own first part
    second = high_part(rest)
    third = (rest - second).to(tl.bfloat16)
    w = w.to(DOT_DTYPE)
    total = tl.dot(w, second.to(tl.bfloat16).to(DOT_DTYPE), input_precision="ieee")
    total += tl.dot(w, third.to(DOT_DTYPE), input_precision="ieee")
    return tl.dot(w, first.to(tl.bfloat16).to(DOT_DTYPE), acc=total, input_precision="ieee")


@triton.jit
def weight_times_x(
    x_ptr,
    act_ptr,
    qdata_ptr,
    scale_ptr,
    codebook_ptr,
    M,
    N,
    K,
    stride_x,
    stride_qdata,
    stride_scale,
    m,
    pid_n,
    first_tile,
    last_tile,
    G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """sum_g |s[n, g]| * sum_{k in g} codebooks[signbit(s[n, g]), code[n, k]] * x[m, k], fp32 [BLOCK_N, BLOCK_M].

    x is multiplied by act[k] first, unless act_ptr is None. The sum runs over the columns of the tiles first_tile ..
    last_tile - 1. The weight is the first operand, so that few tokens need only a narrow second one. A step lies inside
    one group: the scale multiplies fp32 sums and never rounds a weight.
    """
    STEP: tl.constexpr = G if G < 64 else 64
    n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_step = tl.arange(0, STEP)
    x_row = x_ptr + m.to(tl.int64) * stride_x
    scale_row = scale_ptr + n.to(tl.int64) * stride_scale
    tile_row = pid_n * (BLOCK_N // 16)
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    last_step = tl.minimum(last_tile * (64 // STEP), tl.cdiv(K, STEP))
    for step in tl.range(first_tile * (64 // STEP), last_step, loop_unroll_factor=64 // STEP):
        k = step * STEP + in_step
        codes = load_codes(qdata_ptr, stride_qdata, tile_row, tl.cdiv(N, 16), step * STEP, BLOCK_N, STEP)
        bits = tl.load(scale_row + step * STEP // G, mask=n < N, other=0)
        magnitude, selector = decode_scale(bits)
        w = lookup(codebook_ptr, selector[:, None], codes)
        # the codes that pad a tile are 0, not weight 0: the zeros of x keep them out
        x = tl.load(x_row[None, :] + k[:, None], mask=(k < K)[:, None] & (m < M)[None, :], other=0.0)
        if act_ptr is not None:
            x = scale_x(x, tl.load(act_ptr + k, mask=k < K, other=0.0)[:, None])
        total += exact_dot(w, x) * magnitude[:, None]
    return total


@triton.jit(do_not_specialize=["M"])
def exact_kernel(
    x_ptr,
    act_ptr,
    qdata_ptr,
    scale_ptr,
    codebook_ptr,
    per_tensor_scale_ptr,
    bias_ptr,
    y_ptr,
    partial_ptr,
    M,
    N,
    K,
    stride_x,
    stride_qdata,
    stride_scale,
    G: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y[m, n] = per_tensor_scale * sum_k w[n, k] * act[k] * x[m, k] + bias[n], a block [BLOCK_M, BLOCK_N] a program.

    w[n, k] = |s[n, k // G]| * codebooks[signbit(s[n, k // G]), code[n, k]]. Neighbouring programs share a block of w,
    so that its bytes come from the cache for all but the first. With more than one of num_programs(1) ranges of K, fp32
    sums go to partial [ranges, M, N], for `finish_kernel`.
    """
    blocks_m = tl.cdiv(M, BLOCK_M)
    pid_n = tl.program_id(0) // blocks_m
    m = tl.program_id(0) % blocks_m * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(1)
    tiles = tl.cdiv(K, 64)
    each = tl.cdiv(tiles, tl.num_programs(1))
    total = weight_times_x(
        x_ptr, act_ptr, qdata_ptr, scale_ptr, codebook_ptr, M, N, K, stride_x, stride_qdata, stride_scale, m, pid_n,
        split * each, tl.minimum(split * each + each, tiles), G, BLOCK_N, BLOCK_M,
    )  # fmt: skip
    if partial_ptr is None:
        store_y(total, y_ptr, per_tensor_scale_ptr, bias_ptr, M, N, m, pid_n, BLOCK_N)
    else:
        store_y(total, partial_ptr + split.to(tl.int64) * M * N, None, None, M, N, m, pid_n, BLOCK_N)
