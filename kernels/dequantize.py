"""Stored weight -> plain weight in bf16, fp16 or fp32."""

from __future__ import annotations

import triton
import triton.language as tl

from .lut import decode_scale, load_codes, lookup, round_to


@triton.jit
def dequantize_kernel(
    qdata_ptr,
    scale_ptr,
    codebook_ptr,
    per_tensor_scale_ptr,
    w_ptr,
    N,
    K,
    stride_qdata,
    stride_scale,
    G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """w[n, k] = per_tensor_scale * (|s[n, k // G]| * codebooks[signbit(s[n, k // G]), code[n, k]]), rounded once more.

    |s| * entry has at most 16 significant bits and is exact in fp32; per_tensor_scale rounds once, the cast once.
    """
    pid = tl.program_id(0)
    blocks_k = tl.cdiv(K, BLOCK_K)
    pid_n = pid // blocks_k
    start = pid % blocks_k * BLOCK_K
    n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = start + tl.arange(0, BLOCK_K)
    codes = load_codes(qdata_ptr, stride_qdata, pid_n * (BLOCK_N // 16), tl.cdiv(N, 16), start, BLOCK_N, BLOCK_K)
    mask = (n < N)[:, None] & (k < K)[None, :]
    scale_pointers = scale_ptr + n.to(tl.int64)[:, None] * stride_scale + (k // G)[None, :]
    magnitude, selector = decode_scale(tl.load(scale_pointers, mask=mask, other=0))
    w = lookup(codebook_ptr, selector, codes).to(tl.float32) * magnitude
    if per_tensor_scale_ptr is not None:
        w = w * tl.load(per_tensor_scale_ptr)
    pointers = w_ptr + n.to(tl.int64)[:, None] * K + k[None, :]
    tl.store(pointers, round_to(w, w_ptr.dtype.element_ty), mask=mask)
