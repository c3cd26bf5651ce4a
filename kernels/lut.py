"""Device functions shared by the kernels: stored bytes -> codes, scale bits -> magnitude and book, sums -> y.

M, N, K are tokens, out_features, in_features; G is the group size. A stored tile is 16 rows x 64 columns = 512 bytes.
Only plain `tl`, so that Triton's interpreter runs the same source on a CPU; it mixes no global constants with its loop
counters, hence the literals.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# Triton's interpreter multiplies the bit patterns of bf16 operands as integers; there the same values go in as fp32.
DOT_DTYPE = tl.constexpr(tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16)


@triton.jit
def load_codes(qdata_ptr, stride_qdata, tile_row, tile_rows, k, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """codes[n, j] = code of weight (16 tile_row + n, k + j), uint8 [BLOCK_N, BLOCK_K]; 0 below the last tile row.

    BLOCK_N is a multiple of 16, BLOCK_K 16, 32 or 64, k a multiple of BLOCK_K inside the weight.
    A lane reads 16 consecutive bytes (8 where BLOCK_K < 64) and a warp a whole tile. One reshape and one permutation of
    the axes (tile row R, g, t, c, h, byte, nibble) then put the codes into rows 16 R + 8 h + g and columns 32 c + 8 t.
    """
    R: tl.constexpr = BLOCK_N // 16
    T: tl.constexpr = 2 if BLOCK_K == 16 else 4
    C: tl.constexpr = 2 if BLOCK_K == 64 else 1
    lane = tl.arange(0, R * 8 * T)
    row = tile_row + lane // (8 * T)
    in_tile = (lane // T % 8 * 4 + lane % T) * 16
    tile = k // 64 * 512 + k % 64 // 32 * 8 + k % 32 // 8 * 16
    start = row.to(tl.int64) * stride_qdata + in_tile + tile
    pointers = qdata_ptr + start[:, None] + tl.arange(0, C * 8)[None, :]
    packed = tl.load(pointers, mask=(row < tile_rows)[:, None], other=0)
    codes = tl.join(packed & 15, packed >> 4)
    codes = codes.reshape(R, 8, T, C, 2, 4, 2).trans(0, 4, 1, 3, 2, 5, 6)
    return codes.reshape(BLOCK_N, BLOCK_K)


@triton.jit
def decode_scale(bits):
    """(|s|, signbit(s)) of stored scales from their bits: int16 bits of bf16, or uint8 bits of E4M3.

    E4M3 is decoded by hand because sm_80 has no such type; the sign is read as a bit because -0.0 is a legal scale.
    """
    wide = bits.to(tl.int32)
    if bits.dtype == tl.uint8:
        selector = wide >> 7
        code = wide & 0x7F
        normal = ((code << 20) + (120 << 23)).to(tl.float32, bitcast=True)  # exponent bias 7 -> 127
        magnitude = tl.where(code < 8, code.to(tl.float32) * 0.001953125, normal)  # subnormals are multiples of 2^-9
    else:
        selector = (wide >> 15) & 1
        magnitude = ((wide & 0x7FFF) << 16).to(tl.float32, bitcast=True)
    return magnitude, selector


@triton.jit
def round_to(value, DTYPE: tl.constexpr):
    """The fp32 `value` rounded to nearest, ties to even; by hand where Triton's interpreter would cut it."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        value = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return value.to(DTYPE)


@triton.jit
def scale_x(x, factor):
    """Return x times the factors act_pre_scale, which are rounded to x's dtype first, as is the product."""
    factor = round_to(factor.to(tl.float32), x.dtype)
    if INTERPRETED and x.dtype == tl.bfloat16:
        return round_to(x.to(tl.float32) * factor.to(tl.float32), x.dtype)
    return x * factor


@triton.jit
def lookup(codebook_ptr, selector, codes):
    """codebooks[selector, codes] in bf16; `selector` int32 broadcasts against `codes`."""
    return tl.load(codebook_ptr + (selector * 16 + codes.to(tl.int32)))


@triton.jit
def store_y(
    total,
    y_ptr,
    per_tensor_scale_ptr,
    bias_ptr,
    M,
    N,
    m,
    pid_n,
    BLOCK_N: tl.constexpr,
):
    """y[m, n] = total[n, m] * per_tensor_scale + bias[n], in fp32 up to the cast to y's dtype."""
    n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if per_tensor_scale_ptr is not None:
        total = total * tl.load(per_tensor_scale_ptr)
    if bias_ptr is not None:
        total = total + tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    pointers = y_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
    mask = (m < M)[:, None] & (n < N)[None, :]
    tl.store(pointers, tl.trans(total).to(y_ptr.dtype.element_ty), mask=mask)
