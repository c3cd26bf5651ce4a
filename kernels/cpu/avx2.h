// AVX2: a line of a stored tile is 64 bytes, the words (t, c, h) of 8 codes of rows g and g + 8. Two shuffles sort it
// into the codes of either row, 32 bytes each; tables of 16 bytes then give the low and the high bytes of their book
// entries.
//
// Word order of a row, 4 words in each 128-bit half ("word" w = 4 c + t is columns 8 w .. 8 w + 7 of the tile):
//   groups of 64 and more:  0 4 2 6 | 1 5 3 7
//   groups of 32:           0 2 1 3 | 4 6 5 7, so that a half lies in one group and has one book
//   groups of 16:           0 4 1 5 | 2 6 3 7, so that words d and d + 2 of a half lie in one group
// G below is the number of groups in a tile: 1 (also for larger groups), 2 or 4.
#ifndef AAAC_AVX2_H
#define AAAC_AVX2_H

#include <immintrin.h>

#include "common.h"

#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define AVX2_INLINE AVX2 INLINE

// Bytes of a packed token and tile: MODE_EXACT 8 vectors of fp32, MODE_INT16 4 of int16 and the scales, MODE_INT8 2 of
// int8, the corrections and the scales.
static const int avx2_bytes_per_tile[] = {256, 160, 128};

AVX2_INLINE __m256i avx2_load(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }

AVX2_INLINE __m256i avx2_twice(const void *p) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)p));
}

INLINE const uint8_t *avx2_order(int G) {
    static const uint8_t order[3][8] = {{0, 4, 2, 6, 1, 5, 3, 7}, {0, 2, 1, 3, 4, 6, 5, 7}, {0, 4, 1, 5, 2, 6, 3, 7}};
    return order[G / 2];
}

// The codes of the upper and the lower row of a line, in word order.
AVX2_INLINE void avx2_sort(const uint8_t *line, const int G, __m256i rows[2]) {
    const __m256 a = _mm256_loadu_ps((const float *)line), b = _mm256_loadu_ps((const float *)(line + 32));
    rows[0] = _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0x88));
    rows[1] = _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0xDD));
    for (int h = 0; h < 2; h++) {
        if (G == 2) rows[h] = _mm256_permutevar8x32_epi32(rows[h], _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
        if (G == 4) rows[h] = _mm256_permute4x64_epi64(rows[h], 0xD8);
    }
}

// packing of tokens

// The largest of each of the two halves, everywhere in that half.
AVX2_INLINE __m256 avx2_half_max(__m256 v) {
    v = _mm256_max_ps(v, _mm256_permute_ps(v, 0x4E));
    return _mm256_max_ps(v, _mm256_permute_ps(v, 0xB1));
}

AVX2_INLINE __m256 avx2_abs(__m256 v) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v); }

// top / largest, or 0 where a block has nothing that matters
AVX2_INLINE __m256 avx2_inverse(__m256 largest, float top) {
    const __m256 enough = _mm256_cmp_ps(largest, _mm256_set1_ps(0x1p-100f), _CMP_GT_OQ);
    return _mm256_and_ps(enough, _mm256_div_ps(_mm256_set1_ps(top), largest));
}

AVX2_INLINE __m256i avx2_round(__m256 v, __m256 inverse) { return _mm256_cvtps_epi32(_mm256_mul_ps(v, inverse)); }

// 64 fp32 inputs of one tile -> 8 vectors: even columns of the words of both halves, then the odd columns.
AVX2 static void avx2_pack_exact(const float *x, const uint8_t *order, uint8_t *out) {
    for (int d = 0; d < 4; d++) {
        const float *low = x + 8 * order[d], *high = x + 8 * order[4 + d];
        const __m256 first = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low)), _mm_loadu_ps(high), 1);
        const __m256 last =
            _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low + 4)), _mm_loadu_ps(high + 4), 1);
        _mm256_storeu_ps((float *)(out + 32 * d), _mm256_shuffle_ps(first, last, 0x88));
        _mm256_storeu_ps((float *)(out + 32 * (4 + d)), _mm256_shuffle_ps(first, last, 0xDD));
    }
}

// Two words of int16 (in halves: first four columns of both, last four of both) -> [even columns | odd columns].
AVX2_INLINE __m256i avx2_even_odd(__m256i words) {
    const __m256i pairs = _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15, 0, 1, 4, 5, 8, 9, 12,
                                           13, 2, 3, 6, 7, 10, 11, 14, 15);
    return _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(words, pairs), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

// A block that shares a scale is what one 32-bit sum sees: first or last four columns of words d and d + 2 of a half.
AVX2 static void avx2_pack_int16(const float *x, const uint8_t *order, float unit, uint8_t *out) {
    __m256i low[2], high[2];
    __m256 steps = _mm256_setzero_ps();
    for (int half = 0; half < 2; half++) {
        __m256 v[4], largest[2], inverse[2];
        for (int d = 0; d < 4; d++) v[d] = _mm256_loadu_ps(x + 8 * order[4 * half + d]);
        for (int d = 0; d < 2; d++) {
            largest[d] = avx2_half_max(_mm256_max_ps(avx2_abs(v[d]), avx2_abs(v[d + 2])));
            inverse[d] = avx2_inverse(largest[d], 32767.0f);
        }
        low[half] = avx2_even_odd(_mm256_packs_epi32(avx2_round(v[0], inverse[0]), avx2_round(v[1], inverse[1])));
        high[half] = avx2_even_odd(_mm256_packs_epi32(avx2_round(v[2], inverse[0]), avx2_round(v[3], inverse[1])));
        // sums of this half: first and last columns of words 0 and 2, then of words 1 and 3
        const __m256 both = _mm256_blend_ps(largest[0], largest[1], 0xCC);
        const __m128 first = _mm256_castps256_ps128(both), last = _mm256_extractf128_ps(both, 1);
        const __m128 sums = _mm_blend_ps(first, last, 0xA);
        steps = half ? _mm256_insertf128_ps(steps, sums, 1) : _mm256_castps128_ps256(sums);
    }
    _mm256_storeu_si256((__m256i *)out, _mm256_permute2x128_si256(low[0], low[1], 0x20));
    _mm256_storeu_si256((__m256i *)(out + 32), _mm256_permute2x128_si256(high[0], high[1], 0x20));
    _mm256_storeu_si256((__m256i *)(out + 64), _mm256_permute2x128_si256(low[0], low[1], 0x31));
    _mm256_storeu_si256((__m256i *)(out + 96), _mm256_permute2x128_si256(high[0], high[1], 0x31));
    _mm256_storeu_ps((float *)(out + 128), _mm256_mul_ps(steps, _mm256_set1_ps(unit / 32767.0f)));
}

// The weights are used with 128 added, so that pairs of products with 7-bit inputs fit 16 bits; -128 times the sum of
// the inputs takes that out again. A block that shares a scale is a word.
AVX2 static void avx2_pack_int8(const float *x, const uint8_t *order, float unit, uint8_t *out) {
    __m256i even[2], odd[2];
    __m256 steps = _mm256_setzero_ps();
    for (int half = 0; half < 2; half++) {
        __m256i q[4];
        __m128 sums = _mm_setzero_ps();
        for (int d = 0; d < 4; d++) {
            const __m256 v = _mm256_loadu_ps(x + 8 * order[4 * half + d]);
            __m256 largest = avx2_half_max(avx2_abs(v));
            largest = _mm256_max_ps(largest, _mm256_permute2f128_ps(largest, largest, 1));
            q[d] = avx2_round(v, avx2_inverse(largest, 63.0f));
            const __m128 here = _mm_castsi128_ps(_mm_cmpeq_epi32(_mm_setr_epi32(0, 1, 2, 3), _mm_set1_epi32(d)));
            sums = _mm_blendv_ps(sums, _mm256_castps256_ps128(largest), here);
        }
        // bytes of columns 0 .. 3 of the four words, and of columns 4 .. 7
        const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
        const __m256i sorted =
            _mm256_shuffle_epi8(bytes, _mm256_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15, 0, 2, 4,
                                                        6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
        const __m128i first = _mm256_castsi256_si128(sorted), last = _mm256_extracti128_si256(sorted, 1);
        const __m256i e = _mm256_castsi128_si256(_mm_unpacklo_epi16(first, last));
        const __m256i o = _mm256_castsi128_si256(_mm_unpackhi_epi16(first, last));
        even[half] = e, odd[half] = o;
        steps = half ? _mm256_insertf128_ps(steps, sums, 1) : _mm256_castps128_ps256(sums);
    }
    const __m256i e = _mm256_permute2x128_si256(even[0], even[1], 0x20), ones = _mm256_set1_epi16(1);
    const __m256i o = _mm256_permute2x128_si256(odd[0], odd[1], 0x20), bytes = _mm256_set1_epi8(1);
    const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(bytes, e), _mm256_maddubs_epi16(bytes, o));
    const __m256i sum = _mm256_slli_epi32(_mm256_madd_epi16(pairs, ones), 7);
    _mm256_storeu_si256((__m256i *)out, e);
    _mm256_storeu_si256((__m256i *)(out + 32), o);
    _mm256_storeu_si256((__m256i *)(out + 64), _mm256_sub_epi32(_mm256_setzero_si256(), sum));
    _mm256_storeu_ps((float *)(out + 96), _mm256_mul_ps(steps, _mm256_set1_ps(unit / 63.0f)));
}

// scales and books

// Signed scales of two rows in one tile, one for each 32-bit lane of a row: for words, or (sums of 16-bit products) for
// two lanes that see words 0 and 2 of a half, then two that see words 1 and 3.
AVX2_INLINE void avx2_scales(const uint8_t *const p[2], const int G, const int type, const int words,
                             __m256 scales[2]) {
    const __m256i spread = G == 1   ? _mm256_setzero_si256()
                           : G == 2 ? _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1)
                           : words  ? _mm256_setr_epi32(0, 2, 0, 2, 1, 3, 1, 3)
                                    : _mm256_setr_epi32(0, 0, 2, 2, 1, 1, 3, 3);
    if (type == SCALE_BF16) {
        // bytes 2 i and 2 i + 1 above two of zero
        const __m256i bytes =
            _mm256_add_epi32(_mm256_mullo_epi32(spread, _mm256_set1_epi32(0x02020000)), _mm256_set1_epi32(0x0100FFFF));
        for (int h = 0; h < 2; h++) {
            uint64_t bits = 0;
            memcpy(&bits, p[h], 2 * G);
            const __m256i all = _mm256_broadcastq_epi64(_mm_cvtsi64_si128((long long)bits));
            scales[h] = _mm256_castsi256_ps(_mm256_shuffle_epi8(all, bytes));
        }
        return;
    }
    // a byte in the high half of 16 bits, shifted by one below its sign, is an fp16 number
    uint32_t bits[2] = {0, 0};
    memcpy(&bits[0], p[0], G);
    memcpy(&bits[1], p[1], G);
    const __m128i both = _mm_cvtsi64_si128((long long)(bits[0] | (uint64_t)bits[1] << 32));
    const __m128i high = _mm_unpacklo_epi8(_mm_setzero_si128(), both);
    __m128i half = _mm_and_si128(_mm_srai_epi16(high, 1), _mm_set1_epi16((short)0xBFFF));
    // NaN is all ones below the sign; a good scale never is, so this is tested outside of the vectors
    const uint32_t tops = ((bits[0] & 0x7F7F7F7F) + 0x01010101) | ((bits[1] & 0x7F7F7F7F) + 0x01010101);
    if (__builtin_expect((tops & 0x80808080) != 0, 0)) {
        const __m128i top = _mm_set1_epi16(0x7F00);
        half = _mm_or_si128(half, _mm_cmpeq_epi16(_mm_and_si128(high, top), top));
    }
    const __m256 floats = _mm256_cvtph_ps(half);
    scales[0] = _mm256_permutevar8x32_ps(floats, spread);
    scales[1] = _mm256_permutevar8x32_ps(floats, _mm256_add_epi32(spread, _mm256_set1_epi32(4)));
}

// Where book 1 is used: an index of tables for G <= 2 (bit i for half i).
AVX2_INLINE int avx2_book(const uint8_t *p, const int G, const int type) {
    const int step = type == SCALE_BF16 ? 2 : 1, sign = step - 1;
    return G == 1 ? (p[sign] >> 7) * 3 : p[sign] >> 7 | (p[step + sign] >> 7) << 1;
}

// Byte tables for the four choices of books in the halves of a vector: [plane][choice].
typedef struct {
    uint8_t table[2][4][32];
} Avx2Tables;

static void avx2_tables(const Tables *tables, int mode, Avx2Tables *out) {
    for (int choice = 0; choice < 4; choice++)
        for (int i = 0; i < 32; i++) {
            const int book = choice >> (i / 16) & 1;
            const uint16_t wide = mode == MODE_INT8 ? tables->narrow[book][i % 16] : tables->wide[book][i % 16];
            out->table[0][choice][i] = (uint8_t)wide;
            out->table[1][choice][i] = (uint8_t)(wide >> 8);
        }
}

// Lanes of `one` where `choice` is negative. The intrinsic would do, but gcc 12 adds a comparison with zero to it.
AVX2_INLINE __m256 avx2_blend(__m256 zero, __m256 one, __m256 choice) {
    __m256 out;
    __asm__("vblendvps %3, %2, %1, %0" : "=x"(out) : "x"(zero), "x"(one), "x"(choice));
    return out;
}

// Entries of one plane. For G = 4 the signs of `choice` tell the book of each word, otherwise `book` that of each half.
AVX2_INLINE __m256i avx2_look(const Avx2Tables *tables, int plane, int book, __m256 choice, __m256i index,
                              const int G) {
    if (G != 4) return _mm256_shuffle_epi8(avx2_load(tables->table[plane][book]), index);
    const __m256 zero = _mm256_castsi256_ps(_mm256_shuffle_epi8(avx2_load(tables->table[plane][0]), index));
    const __m256 one = _mm256_castsi256_ps(_mm256_shuffle_epi8(avx2_load(tables->table[plane][3]), index));
    return _mm256_castps_si256(avx2_blend(zero, one, choice));
}

// Book entries of the codes of a row: `even` and `odd` columns as bytes (MODE_INT8), or as 16 bits, words 0, 1 and 2, 3
// of either half apart.
typedef struct {
    __m256i even[2], odd[2];
    __m256 scales;
} Avx2Row;

AVX2_INLINE void avx2_entries(const Avx2Tables *tables, __m256i codes, const uint8_t *p, const int mode, const int G,
                              const int type, Avx2Row *row) {
    const __m256i nibble = _mm256_set1_epi8(15);
    const int book = G == 4 ? 0 : avx2_book(p, G, type);
    const __m256 choice = mode == MODE_INT16 ? _mm256_permute_ps(row->scales, 0x88) : row->scales;
    for (int parity = 0; parity < 2; parity++) {
        __m256i *out = parity ? row->odd : row->even;
        const __m256i index = _mm256_and_si256(parity ? _mm256_srli_epi16(codes, 4) : codes, nibble);
        const __m256i low = avx2_look(tables, 0, book, choice, index, G);
        out[0] = low;
        if (mode == MODE_INT8) continue;
        const __m256i high = avx2_look(tables, 1, book, choice, index, G);
        out[0] = _mm256_unpacklo_epi8(low, high);
        out[1] = _mm256_unpackhi_epi8(low, high);
    }
}

// products of one row, tile and token

AVX2_INLINE __m256 avx2_int16(const Avx2Row *row, const uint8_t *x, __m256 total) {
    const __m256i even = _mm256_madd_epi16(row->even[0], avx2_load(x)),
                  odd = _mm256_madd_epi16(row->odd[0], avx2_load(x + 64));
    const __m256i even2 = _mm256_madd_epi16(row->even[1], avx2_load(x + 32)),
                  odd2 = _mm256_madd_epi16(row->odd[1], avx2_load(x + 96));
    const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(even, odd), _mm256_add_epi32(even2, odd2));
    const __m256 steps = _mm256_loadu_ps((const float *)(x + 128));
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), _mm256_mul_ps(row->scales, steps), total);
}

AVX2_INLINE __m256 avx2_int8(const Avx2Row *row, const uint8_t *x, __m256 total) {
    const __m256i ones = _mm256_set1_epi16(1);
    const __m256i even = _mm256_madd_epi16(_mm256_maddubs_epi16(row->even[0], avx2_load(x)), ones);
    const __m256i odd = _mm256_madd_epi16(_mm256_maddubs_epi16(row->odd[0], avx2_load(x + 32)), ones);
    const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(even, avx2_load(x + 64)), odd);
    const __m256 steps = _mm256_loadu_ps((const float *)(x + 96));
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), _mm256_mul_ps(row->scales, steps), total);
}

// The entries of word d of both halves in fp32: bf16 bits, shifted.
AVX2_INLINE __m256 avx2_widen(__m256i entries, int last) {
    const __m256i zero = _mm256_setzero_si256();
    return _mm256_castsi256_ps(last ? _mm256_unpackhi_epi16(zero, entries) : _mm256_unpacklo_epi16(zero, entries));
}

AVX2_INLINE __m256 avx2_exact(const Avx2Row *row, const uint8_t *x, __m256 total, const int G) {
    __m256 sum[2];
    for (int d = 0; d < 4; d++) {
        const __m256 even = avx2_widen(row->even[d / 2], d & 1), odd = avx2_widen(row->odd[d / 2], d & 1);
        const __m256 here = _mm256_mul_ps(even, _mm256_loadu_ps((const float *)(x + 32 * d)));
        const __m256 word = _mm256_fmadd_ps(odd, _mm256_loadu_ps((const float *)(x + 32 * (4 + d))), here);
        sum[d & 1] = d < 2 ? word : _mm256_add_ps(sum[d & 1], word);
    }
    if (G != 4) return _mm256_fmadd_ps(_mm256_add_ps(sum[0], sum[1]), row->scales, total);
    total = _mm256_fmadd_ps(sum[0], _mm256_moveldup_ps(row->scales), total);
    return _mm256_fmadd_ps(sum[1], _mm256_movehdup_ps(row->scales), total);
}

AVX2_INLINE __m256 avx2_product(const Avx2Row *row, const uint8_t *x, __m256 total, const int mode, const int G) {
    if (mode == MODE_INT16) return avx2_int16(row, x, total);
    return mode == MODE_INT8 ? avx2_int8(row, x, total) : avx2_exact(row, x, total, G);
}

// Add the tiles first .. last - 1 of a tile row to totals [line][token][2][8]; `scales` are those of its 16 rows.
AVX2_INLINE void avx2_tiles(const Weight *w, const Avx2Tables *tables, const uint8_t *codes,
                            const uint8_t *const *scales, const Packed *x, int64_t first, int64_t last, float *totals,
                            const int mode, const int G, const int type, const int64_t tokens) {
    const int bytes = avx2_bytes_per_tile[mode];
    for (int64_t tile = first; tile < last; tile++) {
        const uint8_t *line = codes + tile * TILE_BYTES, *inputs = x->data + tile * tokens * bytes;
        const int64_t at = scale_offset(w, tile);
        float *total = totals;
        for (int g = 0; g < LINES; g++, line += LINE_BYTES, total += 16 * tokens) {
            prefetch(line + PREFETCH_BYTES);
            const uint8_t *const p[2] = {scales[g] + at, scales[g + 8] + at};
            __m256i codes_of[2];
            __m256 scales_of[2];
            Avx2Row row[2];
            avx2_sort(line, G, codes_of);
            avx2_scales(p, G, type, mode != MODE_INT16, scales_of);
            for (int h = 0; h < 2; h++) {
                row[h].scales = scales_of[h];
                avx2_entries(tables, codes_of[h], p[h], mode, G, type, &row[h]);
            }
            for (int64_t m = 0; m < tokens; m++) {
                float *t = total + 16 * m;
                _mm256_storeu_ps(t, avx2_product(&row[0], inputs + m * bytes, _mm256_loadu_ps(t), mode, G));
                _mm256_storeu_ps(t + 8, avx2_product(&row[1], inputs + m * bytes, _mm256_loadu_ps(t + 8), mode, G));
            }
        }
    }
}

#define AVX2_KIND(mode, G, type)                                                                                       \
    AVX2 static void avx2_##mode##_##G##_##type(const Weight *w, const Avx2Tables *tables, const uint8_t *codes,       \
                                                const uint8_t *const *scales, const Packed *x, int64_t first,          \
                                                int64_t last, float *totals) {                                         \
        if (x->tokens == 1)                                                                                            \
            avx2_tiles(w, tables, codes, scales, x, first, last, totals, mode, G, type, 1);                            \
        else                                                                                                           \
            avx2_tiles(w, tables, codes, scales, x, first, last, totals, mode, G, type, x->tokens);                    \
    }
#define AVX2_KINDS(mode)                                                                                               \
    AVX2_KIND(mode, 1, SCALE_BF16)                                                                                     \
    AVX2_KIND(mode, 2, SCALE_BF16)                                                                                     \
    AVX2_KIND(mode, 4, SCALE_BF16)                                                                                     \
    AVX2_KIND(mode, 1, SCALE_E4M3)                                                                                     \
    AVX2_KIND(mode, 2, SCALE_E4M3)                                                                                     \
    AVX2_KIND(mode, 4, SCALE_E4M3)
AVX2_KINDS(MODE_EXACT)
AVX2_KINDS(MODE_INT16)
AVX2_KINDS(MODE_INT8)

typedef void (*Avx2Kernel)(const Weight *, const Avx2Tables *, const uint8_t *, const uint8_t *const *, const Packed *,
                           int64_t, int64_t, float *);

// [mode][scale type][log2 of the groups per tile]
#define AVX2_ROW(mode, type) {avx2_##mode##_1_##type, avx2_##mode##_2_##type, avx2_##mode##_4_##type}
static const Avx2Kernel avx2_kernels[3][2][3] = {
    {AVX2_ROW(MODE_EXACT, SCALE_BF16), AVX2_ROW(MODE_EXACT, SCALE_E4M3)},
    {AVX2_ROW(MODE_INT16, SCALE_BF16), AVX2_ROW(MODE_INT16, SCALE_E4M3)},
    {AVX2_ROW(MODE_INT8, SCALE_BF16), AVX2_ROW(MODE_INT8, SCALE_E4M3)},
};

// The sums over lanes of token m -> sums[16] by row.
AVX2 static void avx2_sums(const float *totals, int64_t tokens, int64_t m, float *sums) {
    const int64_t stride = 16 * tokens;
    for (int h = 0; h < 2; h++) {
        __m256 four[2];
        for (int i = 0; i < 2; i++) {
            const float *v = totals + 4 * i * stride + 16 * m + 8 * h;
            const __m256 a = _mm256_hadd_ps(_mm256_load_ps(v), _mm256_load_ps(v + stride));
            const __m256 b = _mm256_hadd_ps(_mm256_load_ps(v + 2 * stride), _mm256_load_ps(v + 3 * stride));
            four[i] = _mm256_hadd_ps(a, b);
        }
        const __m256 low = _mm256_permute2f128_ps(four[0], four[1], 0x20),
                     high = _mm256_permute2f128_ps(four[0], four[1], 0x31);
        _mm256_storeu_ps(sums + 8 * h, _mm256_add_ps(low, high));
    }
}

// dequantisation

// 64 weights of a row, in natural order, from its codes in word order.
AVX2_INLINE void avx2_decode_row(const Avx2Tables *tables, __m256i codes, const uint8_t *p, __m256 scales, float factor,
                                 float *out, const int G, const int type) {
    const __m256i nibble = _mm256_set1_epi8(15), zero = _mm256_setzero_si256();
    const int book = G == 4 ? 0 : avx2_book(p, G, type);
    const __m256i even = _mm256_and_si256(codes, nibble), odd = _mm256_and_si256(_mm256_srli_epi16(codes, 4), nibble);
    const uint8_t *order = avx2_order(G);
    for (int d = 0; d < 4; d++) {
        const __m256i index = d < 2 ? _mm256_unpacklo_epi8(even, odd) : _mm256_unpackhi_epi8(even, odd);
        const __m256 choice = d < 2 ? _mm256_unpacklo_ps(scales, scales) : _mm256_unpackhi_ps(scales, scales);
        const __m256i low = avx2_look(tables, 0, book, choice, index, G),
                      high = avx2_look(tables, 1, book, choice, index, G);
        const __m256i entries = d & 1 ? _mm256_unpackhi_epi8(low, high) : _mm256_unpacklo_epi8(low, high);
        const __m256 scale =
            d & 1 ? _mm256_movehdup_ps(scales) : _mm256_moveldup_ps(scales); // words d and d + 2 share it
        const __m256 a = _mm256_mul_ps(_mm256_castsi256_ps(_mm256_unpacklo_epi16(zero, entries)), scale);
        const __m256 b = _mm256_mul_ps(_mm256_castsi256_ps(_mm256_unpackhi_epi16(zero, entries)), scale);
        const __m256 factors = _mm256_set1_ps(factor);
        _mm256_storeu_ps(out + 8 * order[d], _mm256_mul_ps(_mm256_permute2f128_ps(a, b, 0x20), factors));
        _mm256_storeu_ps(out + 8 * order[4 + d], _mm256_mul_ps(_mm256_permute2f128_ps(a, b, 0x31), factors));
    }
}

// The 16 rows of one tile: out[row][64] with `stride` floats from row to row; `scales` are those of the rows in this
// tile.
AVX2_INLINE void avx2_decode_tile(const Avx2Tables *tables, const uint8_t *line, const uint8_t *const *scales,
                                  int64_t at, float factor, float *out, int64_t stride, const int G, const int type) {
    for (int g = 0; g < LINES; g++, line += LINE_BYTES) {
        const uint8_t *const p[2] = {scales[g] + at, scales[g + 8] + at};
        __m256i codes[2];
        __m256 scales_of[2];
        avx2_sort(line, G, codes);
        avx2_scales(p, G, type, 1, scales_of);
        for (int h = 0; h < 2; h++)
            avx2_decode_row(tables, codes[h], p[h], scales_of[h], factor, out + (g + 8 * h) * stride, G, type);
    }
}

AVX2 static void avx2_decode(const Weight *w, const Avx2Tables *tables, const uint8_t *line,
                             const uint8_t *const *scales, int64_t at, float factor, float *out, int64_t stride) {
#define AVX2_DECODE(G, type)                                                                                           \
    if (w->groups_per_tile == G && w->scale_type == type) {                                                            \
        avx2_decode_tile(tables, line, scales, at, factor, out, stride, G, type);                                      \
        return;                                                                                                        \
    }
    AVX2_DECODE(1, SCALE_BF16)
    AVX2_DECODE(2, SCALE_BF16)
    AVX2_DECODE(4, SCALE_BF16)
    AVX2_DECODE(1, SCALE_E4M3)
    AVX2_DECODE(2, SCALE_E4M3)
    AVX2_DECODE(4, SCALE_E4M3)
}

#endif
