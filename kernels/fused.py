"""Linear layer for few tokens (M <= 64): every weight is read once and decoded once, in the registers that multiply it.

The weight is the first operand of the dot and is stored in its fragment order, so that a lane loads 16 bytes and
multiplies what it loaded: no weight crosses shared memory or lanes. A program is one warp. One body has two lookups:
the assembly of `assembly.py`, and with ASM=False the portable twin in plain `tl`, which Triton's interpreter runs on a
CPU and which checks the first on a device.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .assembly import halves_to_fp16, lane_id, lookup_scaled_words, lookup_words, select_halves, unbias_e4m3
from .lut import DOT_DTYPE, decode_scale, lookup, round_to, scale_x, store_y

#: Neighbouring columns of a dot's operand that Triton gives to a lane, for operands that are joined in registers.
OPERAND_WIDTH = tl.constexpr(4 if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8) else 2)


@triton.jit
def largest_exponent(codebook_ptr):
    """Bits of the power of two p with 1 <= max |codebooks| / p < 2, at least 2^-126."""
    largest = tl.max(tl.abs(tl.load(codebook_ptr + tl.arange(0, 32)).to(tl.float32)), 0)
    return tl.maximum(largest.to(tl.int32, bitcast=True) & 0x7F800000, 0x00800000)


@triton.jit
def to_dtype(entry, exponent, DTYPE: tl.constexpr):
    """Entries as bf16, or divided by the power of two of `largest_exponent` as fp16: no unit of a book overflows."""
    if DTYPE == tl.bfloat16:
        return entry
    else:  # noqa: RET505  (Triton compiles the line after a return)
        return (entry.to(tl.float32) * (0x7F000000 - exponent).to(tl.float32, bitcast=True)).to(tl.float16)


@triton.jit
def both_books(codebook_ptr, exponent, DTYPE: tl.constexpr):
    """The register of every lane with an entry of both books, int32 [32, 4], see `assembly.py`."""
    entry = lane_id(tl.zeros([32, 4], tl.int32)) & 15
    low = to_dtype(tl.load(codebook_ptr + entry), exponent, DTYPE).to(tl.int16, bitcast=True)
    high = to_dtype(tl.load(codebook_ptr + 16 + entry), exponent, DTYPE).to(tl.int16, bitcast=True)
    return (low.to(tl.int32) & 0xFFFF) | (high.to(tl.int32) << 16)


@triton.jit
def to_words(rows):
    """Values of the 16 rows of a tile -> of its words, [32 lanes, 4 words (c, h)]: row 8 h + g, lane 4 g + t."""
    return tl.broadcast_to(rows.reshape(2, 8).trans(1, 0)[:, None, None, :], [8, 4, 2, 2]).reshape(32, 4)


@triton.jit
def load_scales(scale_row, tile, groups, G: tl.constexpr):
    """The scales of one tile [16 rows, 64 columns] in one int32 per row, 0 behind the last group.

    G = 16: four E4M3 bytes; G = 32: two bf16; G >= 64: one bf16 in the high half.
    """
    first = tile * 64 // G
    if G == 16:
        byte = tl.arange(0, 4)[None, :]
        bits = tl.load(scale_row[:, None] + (first + byte), mask=first + byte < groups, other=0).to(tl.int32)
        # a sum hides from the compiler that these are bytes: it would order the dot's operands for them
        return tl.sum(bits << (8 * byte), 1)
    if G == 32:
        low = tl.load(scale_row + first, mask=first < groups, other=0).to(tl.int32) & 0xFFFF
        return low | (tl.load(scale_row + first + 1, mask=first + 1 < groups, other=0).to(tl.int32) << 16)
    return tl.load(scale_row + first, mask=first < groups, other=0).to(tl.int32) << 16


@triton.jit
def magnitudes(word):
    """|s| in fp32 of the bf16 scales in the low and in the high halves of int32 words."""
    low, _ = decode_scale(word.to(tl.int16))
    high, _ = decode_scale((word >> 16).to(tl.int16))
    return low, high


@triton.jit
def decode_plain(
    words, codebook_ptr, exponent, scales, G: tl.constexpr, SECOND: tl.constexpr, SCALED: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """The weights of the codes 0..7 of each word, without assembly; times their scales, rounded once, if SCALED."""
    word = to_words(scales)
    column = tl.arange(0, 4)[None, :] // 2  # c
    if G == 16:
        byte = 2 * column + (tl.arange(0, 32)[:, None] % 4) // 2
        magnitude, selector = decode_scale(((word >> (8 * byte)) & 0xFF).to(tl.uint8))
    elif G == 32:
        magnitude, selector = decode_scale((word >> (16 * column)).to(tl.int16))
    else:
        magnitude, selector = decode_scale((word >> (16 * SECOND)).to(tl.int16))
    values = ()
    for v in tl.static_range(8):
        value = to_dtype(lookup(codebook_ptr, selector, (words >> (4 * v)) & 15), exponent, DTYPE)
        if SCALED:
            value = round_to(value.to(tl.float32) * round_to(magnitude, DTYPE).to(tl.float32), DTYPE)
        values += (value,)
    return values


@triton.jit
def decode_fast(words, books, scales, G: tl.constexpr, SECOND: tl.constexpr, SCALED: tl.constexpr, DTYPE: tl.constexpr):
    """Like `decode_plain`, with the assembly."""
    column = tl.broadcast_to(tl.arange(0, 4)[None, :] // 2, [32, 4])  # c
    if G == 16:
        # [g, t, h]: the bytes of c = 0 and c = 1 that lane 4 g + t needs move to bytes 0 and 2
        shift = tl.arange(0, 4)[None, :, None] // 2 * 8
        word = tl.broadcast_to(scales.reshape(2, 8).trans(1, 0)[:, None, :], [8, 4, 2]) >> shift
        pair = unbias_e4m3((word & 0x007F007F) << (4 if DTYPE == tl.bfloat16 else 7), DTYPE)
        word = tl.broadcast_to(word[:, :, None, :], [8, 4, 2, 2]).reshape(32, 4)
        pair = tl.broadcast_to(pair[:, :, None, :], [8, 4, 2, 2]).reshape(32, 4)
        halves = select_halves(word, tl.where(column == 0, 0x8888, 0xAAAA))
        return lookup_scaled_words(words, books, halves, pair, column, DTYPE)
    half = column if G == 32 else SECOND
    halves = select_halves(to_words(scales), 0x9999 + 0x2222 * half)
    if SCALED:
        pair = halves_to_fp16(scales) if DTYPE == tl.float16 else scales & 0x7FFF7FFF
        return lookup_scaled_words(words, books, halves, to_words(pair), half, DTYPE)
    return lookup_words(words, books, halves, DTYPE)


@triton.jit
def weight_tile(v):
    """Eight tensors [32, 4] of the codes 0..7 of words -> w [16, 64], its columns in another order.

    Column 32 c + 8 t + 4 e2 + 2 e1 + e0 of the stored tile goes to (c, e1, t, e2, e0), or to (c, e2, e1, t, e0) where a
    lane holds two neighbours of a dot's operand only. The order of columns is free as long as x has the same; in these
    the pairs of a 16-byte load of x are next to each other where the tensor cores take them.
    """
    w = tl.join(
        tl.join(tl.join(v[0], v[1]), tl.join(v[2], v[3])),
        tl.join(tl.join(v[4], v[5]), tl.join(v[6], v[7])),
    )
    w = w.reshape(8, 4, 2, 2, 2, 2, 2)  # g, t, c, h, e0, e1, e2
    w = w.trans(3, 0, 2, 5, 1, 6, 4) if OPERAND_WIDTH == 4 else w.trans(3, 0, 2, 6, 5, 1, 4)
    return w.reshape(16, 64)


@triton.jit
def x_tile(left, right, BLOCK_M: tl.constexpr):
    """Columns 0..31 and 32..63 of x, each [32, BLOCK_M] -> [64, BLOCK_M] in the order of `weight_tile`."""
    x = tl.join(left, right).reshape(4, 2, 2, 2, BLOCK_M, 2)  # t, e2, e1, e0, m, c
    x = x.trans(5, 2, 0, 1, 3, 4) if OPERAND_WIDTH == 4 else x.trans(5, 1, 2, 0, 3, 4)
    return x.reshape(64, BLOCK_M)


@triton.jit
def load_act(act_ptr, first, limit, BLOCK_M: tl.constexpr):
    """Factors of columns first .. first + 31 of x, [32, BLOCK_M]; with a limit, 0 from that column on.

    Loaded for 8 tokens, as a warp lays x out, so that every lane has the factors of its elements.
    """
    column = first + tl.broadcast_to(tl.arange(0, 32)[:, None], [32, 8])
    act = tl.load(act_ptr + column) if limit is None else tl.load(act_ptr + column, mask=column < limit, other=0.0)
    return tl.broadcast_to(act[:, None, :], [32, BLOCK_M // 8, 8]).reshape(32, BLOCK_M)


@triton.jit
def multiply_tile(
    words, x, total, part, codebook_ptr, exponent, books, scales, G: tl.constexpr, SECOND: tl.constexpr,
    SCALED: tl.constexpr, LAST: tl.constexpr, ASM: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Add a tile times x to `total`, by way of `part` where fp32 sums are scaled; LAST: `part` ends with this tile.

    SECOND: with G >= 64, the scale of the tile is in the high halves of `scales`, not in the low ones.
    """
    if ASM:
        values = decode_fast(words, books, scales, G, SECOND, SCALED, DTYPE)
    else:
        values = decode_plain(words, codebook_ptr, exponent, scales, G, SECOND, SCALED, DTYPE)
    DOT: tl.constexpr = tl.float32 if DOT_DTYPE == tl.float32 else DTYPE
    w, x = weight_tile(values).to(DOT), x.to(DOT)
    if SCALED:
        return tl.dot(w, x, total, input_precision="ieee"), part
    low, high = magnitudes(scales)
    if G == 32:
        left, right = tl.split(w.reshape(16, 2, 32).trans(0, 2, 1))
        x_left, x_right = tl.split(x.reshape(2, 32, x.shape[1]).trans(1, 2, 0))
        total += tl.dot(left, x_left, input_precision="ieee") * low[:, None]
        return total + tl.dot(right, x_right, input_precision="ieee") * high[:, None], part
    part = tl.dot(w, x, part, input_precision="ieee")
    if LAST:
        total += part * (high if SECOND else low)[:, None]
        part = tl.zeros(part.shape, tl.float32)
    return total, part


@triton.jit
def word_pointers(qdata_ptr, stride_qdata, row_tile, N):
    """Where each lane finds its four words of a tile: pointers [32, 4] to the first tile of a row of tiles.

    Rows of tiles below the last repeat it; nothing of them is stored.
    """
    row = tl.minimum(row_tile, (N + 15) // 16 - 1).to(tl.int64)
    start = qdata_ptr.to(tl.pointer_type(tl.int32)) + row * (stride_qdata // 4)
    return start + (tl.arange(0, 32)[:, None] * 4 + tl.arange(0, 4)[None, :])


@triton.jit
def scale_pointers(scale_ptr, stride_scale, row_tile, N):
    """Pointers [16] to the first scales of the rows of a tile; rows below the last repeat it."""
    n = tl.minimum(row_tile * 16 + tl.arange(0, 16), N - 1)
    return scale_ptr + n.to(tl.int64) * stride_scale


@triton.jit
def load_step_scales(scale_row, tile, mask, G: tl.constexpr, WORDS: tl.constexpr):
    """The scales of a tile inside K, as in `load_scales`; with WORDS and G >= 64, of two groups, the first one low."""
    if not WORDS:
        return load_scales(scale_row, tile, tl.where(mask, 0x7FFFFFFF, 0), G)
    word = tile if G <= 32 else tile // (G // 32)
    return tl.load(scale_row.to(tl.pointer_type(tl.int32)) + word, mask=mask, other=0)


@triton.jit(do_not_specialize=["M"])
def fused_kernel(
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
    ROW_TILES: tl.constexpr,
    TILES: tl.constexpr,
    SCALED: tl.constexpr,
    WORDS: tl.constexpr,
    ASM: tl.constexpr,
):
    """y[m, n] = per_tensor_scale * sum_k w[n, k] * act[k] * x[m, k] + bias[n] for all M <= BLOCK_M tokens at once.

    w[n, k] = |s[n, k // G]| * codebooks[signbit(s[n, k // G]), code[n, k]]. SCALED: w is rounded to x's dtype, as if it
    had been dequantised to that; otherwise scales multiply fp32 sums over a group.

    A program owns 16 * ROW_TILES rows of w and one of num_programs(1) ranges of K, TILES tiles of 64 columns a step;
    the next step's codes and scales are on their way while this step's are multiplied. With more than one range, fp32
    sums go to partial [ranges, M, N] for `finish_kernel`: every sum has a fixed order, so that equal inputs give equal
    bits.
    WORDS: rows of scales start at multiples of 4 bytes, so that loads take 4 bytes at a time.
    """
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    SHARE: tl.constexpr = G // 32 if WORDS and G >= 64 else 1  # tiles whose scales one load brings
    row_tile = tl.program_id(0) * ROW_TILES
    steps = K // (64 * TILES)
    each = tl.cdiv(steps, tl.num_programs(1))
    first = tl.minimum(tl.program_id(1) * each, steps)
    last = tl.minimum(first + each, steps)
    exponent = 0x3F800000  # of 1
    if DTYPE == tl.float16:
        exponent = largest_exponent(codebook_ptr)
    books = codebook_ptr
    if ASM:
        books = both_books(codebook_ptr, exponent, DTYPE)
    # the tokens that fill the block up repeat the last one
    token = tl.minimum(tl.arange(0, BLOCK_M), M - 1)
    x_offset = token[None, :] * stride_x + tl.arange(0, 32)[:, None]
    x_at = x_ptr + first * (64 * TILES)
    word_rows, scale_rows, words, scales, totals, parts = (), (), (), (), (), ()
    for r in tl.static_range(ROW_TILES):
        word_rows += (word_pointers(qdata_ptr, stride_qdata, row_tile + r, N) + first * (128 * TILES),)
        scale_rows += (scale_pointers(scale_ptr, stride_scale, row_tile + r, N),)
        totals += (tl.zeros([16, BLOCK_M], tl.float32),)
        parts += (tl.zeros([16, BLOCK_M], tl.float32),)
    for j in tl.static_range(TILES):
        for r in tl.static_range(ROW_TILES):
            words += (tl.load(word_rows[r] + j * 128, mask=first < last, other=0, eviction_policy="evict_first"),)
            if j % SHARE == 0:
                scales += (load_step_scales(scale_rows[r], first * TILES + j, first < last, G, WORDS),)
    for step in tl.range(first, last, num_stages=1):
        # after the last step its own codes are loaded once more, and dropped
        following = tl.minimum(step + 1, last - 1)
        next_words, next_scales, next_rows = (), (), ()
        for r in tl.static_range(ROW_TILES):
            next_rows += (word_rows[r] + (following - step) * (128 * TILES),)
        for j in tl.static_range(TILES):
            tile = step * TILES + j
            left, right = tl.load(x_at + j * 64 + x_offset), tl.load(x_at + (j * 64 + 32) + x_offset)
            if act_ptr is not None:
                left = scale_x(left, load_act(act_ptr, tile * 64, None, BLOCK_M))
                right = scale_x(right, load_act(act_ptr, tile * 64 + 32, None, BLOCK_M))
            x = x_tile(left, right, BLOCK_M)
            next_totals, next_parts = (), ()
            for r in tl.static_range(ROW_TILES):
                scale = scales[j // SHARE * ROW_TILES + r]
                # which of two groups in a word; where steps end inside of a word, the tile's goes to the high half
                second = j % SHARE // (SHARE // 2) if SHARE > 1 and TILES % SHARE == 0 else 1
                if SHARE > TILES:
                    scale = scale << (16 - ((tile >> (SHARE // 4)) & 1) * 16)
                total, part = multiply_tile(
                    words[j * ROW_TILES + r], x, totals[r], parts[r], codebook_ptr, exponent, books, scale,
                    G, second, SCALED, G <= 64 or (j + 1) * 64 % G == 0, ASM, DTYPE,
                )  # fmt: skip
                next_totals += (total,)
                next_parts += (part,)
                next_words += (tl.load(next_rows[r] + j * 128, eviction_policy="evict_first"),)
                if j % SHARE == 0:
                    next_scales += (load_step_scales(scale_rows[r], following * TILES + j, True, G, WORDS),)
            totals, parts = next_totals, next_parts
        words, scales, word_rows = next_words, next_scales, next_rows
        x_at += 64 * TILES
    if tl.program_id(1) == tl.num_programs(1) - 1:
        for tile in tl.range(steps * TILES, tl.cdiv(K, 64), num_stages=1):
            column = tile * 64 + tl.arange(0, 32)[:, None]
            # the codes that pad a tile are 0, not weight 0: the zeros of x keep them out
            left = tl.load(x_ptr + tile * 64 + x_offset, mask=column < K, other=0.0)
            right = tl.load(x_ptr + (tile * 64 + 32) + x_offset, mask=column + 32 < K, other=0.0)
            if act_ptr is not None:
                left = scale_x(left, load_act(act_ptr, tile * 64, K, BLOCK_M))
                right = scale_x(right, load_act(act_ptr, tile * 64 + 32, K, BLOCK_M))
            x = x_tile(left, right, BLOCK_M)
            next_totals = ()
            for r in tl.static_range(ROW_TILES):
                word = tl.load(word_pointers(qdata_ptr, stride_qdata, row_tile + r, N) + tile * 128)
                scale = load_scales(scale_pointers(scale_ptr, stride_scale, row_tile + r, N), tile, tl.cdiv(K, G), G)
                total, _ = multiply_tile(
                    word, x, totals[r], tl.zeros([16, BLOCK_M], tl.float32), codebook_ptr, exponent, books, scale,
                    G, 1, SCALED, True, ASM, DTYPE,
                )  # fmt: skip
                next_totals += (total,)
            totals = next_totals
    token = tl.arange(0, BLOCK_M)
    unit = exponent.to(tl.float32, bitcast=True) if DTYPE == tl.float16 else 1.0
    for r in tl.static_range(ROW_TILES):
        if partial_ptr is None:
            store_y(totals[r] * unit, y_ptr, per_tensor_scale_ptr, bias_ptr, M, N, token, row_tile + r, 16)
        else:
            sums = partial_ptr + tl.program_id(1).to(tl.int64) * M * N
            store_y(totals[r] * unit, sums, None, None, M, N, token, row_tile + r, 16)
