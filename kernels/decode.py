"""Linear layer for few tokens (M <= 16): every weight is read and decoded once, K is split to fill the machine."""

from __future__ import annotations

import triton
import triton.language as tl

from .lut import store_y, weight_times_x


@triton.jit(do_not_specialize=["M"])
def decode_kernel(
    x_ptr,
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
    SPLITS: tl.constexpr,
):
    """y[m, n] = per_tensor_scale * sum_k w[n, k] * x[m, k] + bias[n] for all M <= BLOCK_M tokens at once.

    w[n, k] = |s[n, k // G]| * codebooks[signbit(s[n, k // G]), code[n, k]]. A program owns BLOCK_N rows of w and one of
    SPLITS ranges of K. With one range it writes y, with more its fp32 sums to partial [SPLITS, M, N], for
    `finish_kernel` to add: every sum has a fixed order, so that equal inputs give equal bits.
    """
    pid = tl.program_id(0)
    pid_n, split = pid // SPLITS, pid % SPLITS
    m = tl.arange(0, BLOCK_M)
    tiles = tl.cdiv(K, 64)
    per_split = tl.cdiv(tiles, SPLITS)
    total = weight_times_x(
        x_ptr, qdata_ptr, scale_ptr, codebook_ptr, M, N, K, stride_x, stride_qdata, stride_scale, m, pid_n,
        split * per_split, tl.minimum(split * per_split + per_split, tiles), G, BLOCK_N, BLOCK_M,
    )  # fmt: skip
    if SPLITS == 1:
        store_y(total, y_ptr, per_tensor_scale_ptr, bias_ptr, M, N, m, pid_n, BLOCK_N)
    else:
        partial_ptr += split.to(tl.int64) * M * N
        store_y(total, partial_ptr, None, None, M, N, m, pid_n, BLOCK_N)


@triton.jit(do_not_specialize=["M"])
def finish_kernel(
    partial_ptr,
    per_tensor_scale_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """y[m, n] = per_tensor_scale * sum_s partial[s, m, n] + bias[n], in fp32 up to the cast to y's dtype.

    A program owns BLOCK_N columns of one row of y.
    """
    blocks_n = tl.cdiv(N, BLOCK_N)
    m = (tl.program_id(0) // blocks_n).to(tl.int64)
    n = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N], tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(partial_ptr + (split * M + m) * N + n, mask=n < N, other=0.0)
    if per_tensor_scale_ptr is not None:
        total = total * tl.load(per_tensor_scale_ptr)
    if bias_ptr is not None:
        total = total + tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(y_ptr + m * N + n, total.to(y_ptr.dtype.element_ty), mask=n < N)
