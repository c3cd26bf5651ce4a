"""The second half of a linear layer whose K was split: partial sums -> y."""

from __future__ import annotations

import triton
import triton.language as tl


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
