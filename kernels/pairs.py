"""Linear layer for up to 16 tokens and large weights, with one shared-memory read for every two weights.

A table in shared memory holds, for both books and every byte of two codes, the pair of weights; 32 copies of it, one
per bank, so that no read waits for another: 64 KiB. A read's address is one PRMT: byte of codes << 8 | book << 7 |
lane << 2, and for an E4M3 scale the book's bit already is bit 7. Filling the table takes a program as long as decoding
some hundred thousand weights, so programs are persistent: they walk over many blocks of rows and ranges of K.

This needs Gluon, which places a tensor in shared memory and fixes layouts; it is an experimental part of Triton. Where
it is missing or has changed, importing this file or compiling its kernel fails, and `dispatch` goes on with `fused`.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from .assembly import (
    HALVES_TO_FP16,
    LANE,
    TABLE_LOOKUP,
    TABLE_LOOKUP_BF16,
    TABLE_LOOKUP_FP16,
    UNBIAS_BF16,
    UNBIAS_FP16,
)

#: Named `thread_barrier` in Triton 3.6, `barrier` later.
barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier
#: Warps of a program, tiles of 64 columns of a step, bytes of the table, programs of a multiprocessor with 228 KiB.
WARPS, TILES, TABLE_BYTES, PROGRAMS = 8, 4, 65536, 3
GROUP_SIZES = (16, 64, 128)
MAX_TOKENS = 16

PLAIN_CONSTRAINTS = gl.constexpr("=h," * 8 + "r,r,r")
SCALED_CONSTRAINTS = gl.constexpr("=h," * 8 + "r,r,r,r")
BF16_TYPES = gl.constexpr((gl.bfloat16,) * 8)
FP16_TYPES = gl.constexpr((gl.float16,) * 8)
ROWS = gl.constexpr(16 * WARPS)
LANES = gl.constexpr(32 * WARPS)
NUM_WARPS = gl.constexpr(WARPS)
STEP = gl.constexpr(TILES)


@gluon.jit
def largest_exponent(codebook_ptr):
    """Bits of the power of two p with 1 <= max |codebooks| / p < 2, at least 2^-126."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [NUM_WARPS], [0])
    entries = gl.load(codebook_ptr + gl.arange(0, 32, layout)).to(gl.float32)
    largest = gl.max(gl.maximum(entries, -entries), 0)
    return gl.maximum(largest.to(gl.int32, bitcast=True) & 0x7F800000, 0x00800000)


@gluon.jit
def entry_bits(codebook_ptr, index, exponent, DTYPE: gl.constexpr):
    """The 16 bits of book entries in DTYPE; in fp16 divided by the power of two of `largest_exponent`."""
    entry = gl.load(codebook_ptr + index)
    if DTYPE == gl.float16:
        factor = (0x7F000000 - exponent).to(gl.float32, bitcast=True)
        bits = (entry.to(gl.float32) * factor).to(gl.float16).to(gl.int16, bitcast=True)
    else:
        bits = entry.to(gl.int16, bitcast=True)
    return bits.to(gl.int32) & 0xFFFF


@gluon.jit
def fill_table(codebook_ptr, exponent, DTYPE: gl.constexpr):
    """The table [256 bytes, 2 books x 32 lanes] of pairs, in shared memory from its very start."""
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [NUM_WARPS, 1], [1, 0])
    shared: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    table = gl.allocate_shared_memory(gl.int32, [256, 64], shared)
    byte = gl.arange(0, 256, gl.SliceLayout(1, layout))[:, None]
    book = gl.arange(0, 64, gl.SliceLayout(0, layout))[None, :] // 32 * 16
    low = entry_bits(codebook_ptr, book + (byte & 15), exponent, DTYPE)
    high = entry_bits(codebook_ptr, book + (byte >> 4), exponent, DTYPE)
    table.store(low | (high << 16))
    barrier()
    return table


@gluon.jit
def weight_tile(v, operand: gl.constexpr):
    """Eight tensors [lanes, 4 words] of codes 0..7 -> w [ROWS, 64], columns in the order (c, e1, t, e2, e0)."""
    w = gl.join(
        gl.join(gl.join(v[0], v[1]), gl.join(v[2], v[3])),
        gl.join(gl.join(v[4], v[5]), gl.join(v[6], v[7])),
    )  # [lanes, (c, h), e0, e1, e2]
    w = w.reshape(NUM_WARPS, 8, 4, 2, 2, 2, 2, 2).permute(0, 4, 1, 3, 6, 2, 7, 5).reshape(ROWS, 64)
    return gl.convert_layout(w, operand, assert_trivial=True)


@gluon.jit
def scale_x(x, factor):
    """Return x times the factors act_pre_scale, which are rounded to x's dtype first, as is the product."""
    return x * factor.to(gl.float32).to(x.dtype)


@gluon.jit
def x_tile(x, operand: gl.constexpr, BLOCK_M: gl.constexpr):
    """Columns 32 c + 8 t + 4 e2 + 2 e1 + e0 of x, [64, BLOCK_M], in the order of `weight_tile`."""
    x = x.reshape(2, 4, 2, 2, 2, BLOCK_M).permute(0, 3, 1, 2, 4, 5).reshape(64, BLOCK_M)
    return gl.convert_layout(x, operand, assert_trivial=True)


@gluon.jit
def to_words(values, words_layout: gl.constexpr):
    """Values of the two rows of a lane -> of its words (c, h): [lanes, 2] -> [lanes, 4]."""
    values = gl.expand_dims(values, 1).broadcast_to([LANES, 2, 2]).reshape(LANES, 4)
    return gl.convert_layout(values, words_layout, assert_trivial=True)


@gluon.jit
def two_groups(scale, lane_address, G: gl.constexpr, DTYPE: gl.constexpr):
    """Two scales in a word, for each row of a lane -> the low bytes of its addresses for each, |s| of each in DTYPE.

    Scales and results have a half of the word each; E4M3 scales are in the low bytes of the halves.
    """
    if G == 16:
        low = (scale & 0x00800080) | lane_address
        pair = (scale & 0x007F007F) << (4 if DTYPE == gl.bfloat16 else 7)
        unbias: gl.constexpr = UNBIAS_BF16 if DTYPE == gl.bfloat16 else UNBIAS_FP16
        pair = gl.inline_asm_elementwise(unbias, "=r,r", [pair], dtype=gl.int32, is_pure=True, pack=1)
    else:
        low = ((scale >> 8) & 0x00800080) | lane_address
        pair = scale & 0x7FFF7FFF
        if DTYPE == gl.float16:
            pair = gl.inline_asm_elementwise(HALVES_TO_FP16, "=r,r", [scale], dtype=gl.int32, is_pure=True, pack=1)
    return low, pair


@gluon.jit
def decode(
    words, low, pair, byte, words_layout: gl.constexpr, operand: gl.constexpr, SCALED: gl.constexpr,
    DTYPE: gl.constexpr,
):  # fmt: skip
    """Words [lanes, 4], results of `two_groups` -> w [ROWS, 64]; byte 0 or 2 says which of the two a word takes."""
    low = to_words(low, words_layout)
    if SCALED:
        text: gl.constexpr = TABLE_LOOKUP_BF16 if DTYPE == gl.bfloat16 else TABLE_LOOKUP_FP16
        inputs = [words, low, byte, to_words(pair, words_layout)]
        constraints: gl.constexpr = SCALED_CONSTRAINTS
    else:
        text: gl.constexpr = TABLE_LOOKUP
        inputs = [words, low, byte]
        constraints: gl.constexpr = PLAIN_CONSTRAINTS
    types: gl.constexpr = BF16_TYPES if DTYPE == gl.bfloat16 else FP16_TYPES
    values = gl.inline_asm_elementwise(text, constraints, inputs, dtype=types, is_pure=False, pack=1)
    return weight_tile(values, operand)


@gluon.jit(do_not_specialize=["M", "splits"])
def pairs_kernel(
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
    splits,
    stride_x,
    stride_qdata,
    stride_scale,
    G: gl.constexpr,
    BLOCK_M: gl.constexpr,
    SCALED: gl.constexpr,
):
    """Like `fused_kernel`, for K a multiple of 256, scales in whole words, and groups of 16, 64 or 128."""
    DTYPE: gl.constexpr = x_ptr.dtype.element_ty
    SHARE: gl.constexpr = G // 32 if G >= 64 else 1
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[NUM_WARPS, 1], instr_shape=[16, 8])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 4)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, 4)
    loaded: gl.constexpr = gl.DotOperandLayout(1, mma, 8)  # a lane holds 8 consecutive columns
    words_layout: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [NUM_WARPS, 1], [1, 0])
    by_column: gl.constexpr = gl.BlockedLayout([1, 2, 2], [32, 1, 1], [NUM_WARPS, 1, 1], [2, 1, 0])
    by_half: gl.constexpr = gl.SliceLayout(1, by_column)
    exponent = 0x3F800000
    if DTYPE == gl.float16:
        exponent = largest_exponent(codebook_ptr)
    table = fill_table(codebook_ptr, exponent, DTYPE)
    lane = gl.arange(0, LANES, gl.SliceLayout(1, words_layout))
    word = gl.arange(0, 4, gl.SliceLayout(0, words_layout))
    no_byte = gl.zeros([LANES, 4], gl.int32, words_layout)
    byte_of_column = no_byte + (word // 2 * 2)[None, :]
    row_lane = gl.arange(0, LANES, gl.SliceLayout(1, by_half))
    row_half = gl.arange(0, 2, gl.SliceLayout(0, by_half))
    row_of = (row_lane // 32 * 16 + row_lane % 32 // 4)[:, None] + (row_half * 8)[None, :]
    byte_shift = (row_lane % 4 // 2 * 8)[:, None]
    lane_address = gl.inline_asm_elementwise(
        LANE, "=r,r", [gl.zeros([LANES, 2], gl.int32, by_half)], dtype=gl.int32, is_pure=True, pack=1
    )
    lane_address = lane_address * 0x00040004  # for both groups of a word
    sum_row = gl.arange(0, ROWS, gl.SliceLayout(1, mma))
    sum_token = gl.arange(0, BLOCK_M, gl.SliceLayout(0, mma))
    token = gl.minimum(gl.arange(0, BLOCK_M, gl.SliceLayout(0, loaded)), M - 1)
    column = gl.arange(0, 64, gl.SliceLayout(1, loaded))
    x_offset = token[None, :] * stride_x + column[:, None]
    steps = K // (64 * STEP)
    each = gl.cdiv(steps, splits)
    for item in range(gl.program_id(0), gl.cdiv(N, ROWS) * splits, gl.num_programs(0)):
        block = item // splits
        first = gl.minimum(item % splits * each, steps)
        last = gl.minimum(first + each, steps)
        tile_row = gl.minimum(block * NUM_WARPS + lane // 32, (N + 15) // 16 - 1).to(gl.int64)
        words_at = qdata_ptr.to(gl.pointer_type(gl.int32), bitcast=True) + (
            (tile_row * (stride_qdata // 4) + lane % 32 * 4)[:, None] + word[None, :]
        )
        words_at += first * (128 * STEP)
        scales_at = (
            scale_ptr.to(gl.pointer_type(gl.int8), bitcast=True)
            + gl.minimum(block * ROWS + row_of, N - 1).to(gl.int64) * stride_scale * (1 if G == 16 else 2)
        ).to(gl.pointer_type(gl.int32), bitcast=True)
        sums_at = (
            scale_ptr.to(gl.pointer_type(gl.int8), bitcast=True)
            + gl.minimum(block * ROWS + sum_row, N - 1).to(gl.int64) * stride_scale * (1 if G == 16 else 2)
        ).to(gl.pointer_type(gl.int32), bitcast=True)
        scales_at += first * (STEP // SHARE)
        sums_at += first * (STEP // SHARE)
        x_at = x_ptr + first * (64 * STEP)
        total = gl.zeros([ROWS, BLOCK_M], gl.float32, mma)
        part = gl.zeros([ROWS, BLOCK_M], gl.float32, mma)
        words, scales = (), ()
        for j in gl.static_range(STEP):
            words += (gl.load(words_at + j * 128, mask=first < last, other=0),)
            if j % SHARE == 0:
                scales += (gl.load(scales_at + j // SHARE, mask=first < last, other=0),)
        for step in range(first, last):
            following = gl.minimum(step + 1, last - 1)
            next_at = words_at + (following - step) * (128 * STEP)
            next_scales_at = scales_at + (following - step) * (STEP // SHARE)
            next_words, next_scales = (), ()
            for j in gl.static_range(STEP):
                if j % SHARE == 0:
                    scale = scales[j // SHARE]
                    low, pair = two_groups(scale >> byte_shift if G == 16 else scale, lane_address, G, DTYPE)
                second = j % SHARE // (SHARE // 2) if SHARE > 1 else 0  # of the groups of a word
                byte = byte_of_column if G == 16 else no_byte + 2 * second
                x = gl.load(x_at + j * 64 + x_offset)
                if act_ptr is not None:
                    x = scale_x(x, gl.load(act_ptr + (step * STEP + j) * 64 + column)[:, None])
                x = x_tile(x, right, BLOCK_M)
                w = decode(words[j], low, pair, byte, words_layout, left, SCALED, DTYPE)
                if SCALED:
                    total = mma_v2(w, x, total)
                else:
                    part = mma_v2(w, x, part)
                    if (j + 1) * 64 % G == 0:
                        bits = gl.load(sums_at + j // SHARE) << (16 - 16 * second)
                        total += part * (bits & 0x7FFF0000).to(gl.float32, bitcast=True)[:, None]
                        part = gl.zeros([ROWS, BLOCK_M], gl.float32, mma)
                next_words += (gl.load(next_at + j * 128),)
                if j % SHARE == 0:
                    next_scales += (gl.load(next_scales_at + j // SHARE),)
            words, scales, words_at, scales_at = next_words, next_scales, next_at, next_scales_at
            sums_at += STEP // SHARE
            x_at += 64 * STEP
        if DTYPE == gl.float16:
            total = total * exponent.to(gl.float32, bitcast=True)
        n = block * ROWS + sum_row
        mask = (n < N)[:, None] & (sum_token < M)[None, :]
        offset = sum_token.to(gl.int64)[None, :] * N + n[:, None]
        if partial_ptr is None:
            if per_tensor_scale_ptr is not None:
                total = total * gl.load(per_tensor_scale_ptr)
            if bias_ptr is not None:
                total = total + gl.load(bias_ptr + n, mask=n < N, other=0.0).to(gl.float32)[:, None]
            gl.store(y_ptr + offset, total.to(y_ptr.dtype.element_ty), mask=mask)
        else:
            gl.store(partial_ptr + (item % splits).to(gl.int64) * M * N + offset, total, mask=mask)
    table._keep_alive()  # nothing else may use its place before
