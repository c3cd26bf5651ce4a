"""Linear layer for many tokens (M > 16): a grid over blocks of tokens and of out_features."""

from __future__ import annotations

import triton
import triton.language as tl

from .lut import store_y, weight_times_x


@triton.jit(do_not_specialize=["M"])
def gemm_kernel(
    x_ptr,
    qdata_ptr,
    scale_ptr,
    codebook_ptr,
    per_tensor_scale_ptr,
    bias_ptr,
    y_ptr,
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
    """y[m, n] = per_tensor_scale * sum_k w[n, k] * x[m, k] + bias[n] for one block of BLOCK_M tokens.

    w[n, k] = |s[n, k // G]| * codebooks[signbit(s[n, k // G]), code[n, k]]. Neighbouring programs share a block of w,
    so that its bytes come from the cache for all but the first.
    """
    pid = tl.program_id(0)
    blocks_m = tl.cdiv(M, BLOCK_M)
    pid_n = pid // blocks_m
    m = pid % blocks_m * BLOCK_M + tl.arange(0, BLOCK_M)
    total = weight_times_x(
        x_ptr, qdata_ptr, scale_ptr, codebook_ptr, M, N, K, stride_x, stride_qdata, stride_scale, m, pid_n,
        0, tl.cdiv(K, 64), G, BLOCK_N, BLOCK_M,
    )  # fmt: skip
    store_y(total, y_ptr, per_tensor_scale_ptr, bias_ptr, M, N, m, pid_n, BLOCK_N)
