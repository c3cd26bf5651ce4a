// AVX2: a line of a stored tile is 64 bytes, the words (t, c, h) of 8 codes of rows g and g + 8. Shuffles sort it into
// the codes of either row, 32 bytes each; tables of 16 bytes then give the low and the high bytes of their book
// entries.
//
// Word order of a row, 4 words in each 128-bit half ("word" w = 4 c + t is columns 8 w .. 8 w + 7 of the tile):
//   groups of 64 and more:  0 4 2 6 | 1 5 3 7
//   groups of 32:           0 1 2 3 | 4 5 6 7, so that a half lies in one group and has one book
//   groups of 16:           0 4 1 5 | 2 6 3 7, so that words d and d + 2 of a half lie in one group
// G below is the number of groups in a tile: 1 (also for larger groups), 2 or 4.
#ifndef AAAC_AVX2_H
#define AAAC_AVX2_H

#include <immintrin.h>

#include "common.h"

#if defined(__has_include)
#if __has_include(<avxvnniintrin.h>)
#define HAS_AVX_VNNI // the compiler knows it
#endif
#endif

#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define AVX2_INLINE AVX2 INLINE

// Bytes of a packed token and tile: MODE_EXACT 8 vectors of fp32, MODE_INT16 4 of int16 and the scales, MODE_INT8 2 of
// int8, the corrections and the scales.
static const int avx2_bytes_per_tile[] = {256, 160, 128};

AVX2_INLINE __m256i avx2_load(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }

INLINE const uint8_t *avx2_order(int G) {
    static const uint8_t order[3][8] = {{0, 4, 2, 6, 1, 5, 3, 7}, {0, 1, 2, 3, 4, 5, 6, 7}, {0, 4, 1, 5, 2, 6, 3, 7}};
    return order[G / 2];
}

// The codes of the upper and the lower row of a line, in word order.
AVX2_INLINE void avx2_sort(const uint8_t *line, const int G, __m256i rows[2]) {
    if (G == 2) {
        const __m256i rows_apart = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        const __m256i a = _mm256_permutevar8x32_epi32(avx2_load(line), rows_apart);
        const __m256i b = _mm256_permutevar8x32_epi32(avx2_load(line + 32), rows_apart);
        rows[0] = _mm256_unpacklo_epi64(a, b);
        rows[1] = _mm256_unpackhi_epi64(a, b);
        return;
    }
    const __m256 a = _mm256_loadu_ps((const float *)line), b = _mm256_loadu_ps((const float *)(line + 32));
    rows[0] = _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0x88));
    rows[1] = _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0xDD));
    for (int h = 0; h < 2 && G == 4; h++) rows[h] = _mm256_permute4x64_epi64(rows[h], 0xD8);
}

// packing of tokens

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

// Steps of a tile from the largest inputs of its blocks: words 0 and 2, 1 and 3 of the lower half, then of the upper
// one; a lane for each block, and twice, for two rows.
AVX2_INLINE __m256 avx2_steps(const __m256 largest[4], float factor) {
    const __m256 low = _mm256_unpacklo_ps(largest[0], largest[1]), high = _mm256_unpacklo_ps(largest[2], largest[3]);
    return _mm256_mul_ps(_mm256_blend_ps(low, high, 0xF0), _mm256_set1_ps(factor));
}

// The largest of all lanes, everywhere.
AVX2_INLINE __m256 avx2_max(__m256 v) {
    v = _mm256_max_ps(v, _mm256_permute_ps(v, 0x4E));
    v = _mm256_max_ps(v, _mm256_permute_ps(v, 0xB1));
    return _mm256_max_ps(v, _mm256_permute2f128_ps(v, v, 1));
}

// A block that shares a step is words d and d + 2 of a half: what the 32-bit sums see that are added up as integers.
AVX2 static void avx2_pack_int16(const float *x, const uint8_t *order, float unit, uint8_t *out) {
    __m256i low[2], high[2];
    __m256 largest[4];
    for (int half = 0; half < 2; half++) {
        __m256 v[4], inverse[2];
        for (int d = 0; d < 4; d++) v[d] = _mm256_loadu_ps(x + 8 * order[4 * half + d]);
        for (int d = 0; d < 2; d++) {
            largest[2 * half + d] = avx2_max(_mm256_max_ps(avx2_abs(v[d]), avx2_abs(v[d + 2])));
            inverse[d] = avx2_inverse(largest[2 * half + d], INPUT15_TOP);
        }
        low[half] = avx2_even_odd(_mm256_packs_epi32(avx2_round(v[0], inverse[0]), avx2_round(v[1], inverse[1])));
        high[half] = avx2_even_odd(_mm256_packs_epi32(avx2_round(v[2], inverse[0]), avx2_round(v[3], inverse[1])));
    }
    _mm256_storeu_si256((__m256i *)out, _mm256_permute2x128_si256(low[0], low[1], 0x20));
    _mm256_storeu_si256((__m256i *)(out + 32), _mm256_permute2x128_si256(high[0], high[1], 0x20));
    _mm256_storeu_si256((__m256i *)(out + 64), _mm256_permute2x128_si256(low[0], low[1], 0x31));
    _mm256_storeu_si256((__m256i *)(out + 96), _mm256_permute2x128_si256(high[0], high[1], 0x31));
    _mm256_storeu_ps((float *)(out + 128), avx2_steps(largest, unit / INPUT15_TOP));
}

// The weights are used with 128 added; -128 times the sum of the inputs takes that out again. Blocks are those of 16
// bits. `top` is the largest input: 63 where pairs of products must fit 16 bits.
AVX2 static void avx2_pack_int8(const float *x, const uint8_t *order, float unit, float top, uint8_t *out) {
    __m256i even[2], odd[2];
    __m256 largest[4];
    for (int half = 0; half < 2; half++) {
        __m256 v[4];
        __m256i q[4];
        for (int d = 0; d < 4; d++) v[d] = _mm256_loadu_ps(x + 8 * order[4 * half + d]);
        for (int d = 0; d < 2; d++) {
            largest[2 * half + d] = avx2_max(_mm256_max_ps(avx2_abs(v[d]), avx2_abs(v[d + 2])));
            const __m256 inverse = avx2_inverse(largest[2 * half + d], top);
            for (int i = d; i < 4; i += 2) q[i] = avx2_round(v[i], inverse);
        }
        // bytes of columns 0 .. 3 of the four words, and of columns 4 .. 7
        const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
        const __m256i sorted =
            _mm256_shuffle_epi8(bytes, _mm256_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15, 0, 2, 4,
                                                        6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
        const __m128i first = _mm256_castsi256_si128(sorted), last = _mm256_extracti128_si256(sorted, 1);
        even[half] = _mm256_castsi128_si256(_mm_unpacklo_epi16(first, last));
        odd[half] = _mm256_castsi128_si256(_mm_unpackhi_epi16(first, last));
    }
    const __m256i e = _mm256_permute2x128_si256(even[0], even[1], 0x20), ones = _mm256_set1_epi16(1);
    const __m256i o = _mm256_permute2x128_si256(odd[0], odd[1], 0x20), bytes = _mm256_set1_epi8(1);
    const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(bytes, e), _mm256_maddubs_epi16(bytes, o));
    const __m256i sum = _mm256_slli_epi32(_mm256_madd_epi16(pairs, ones), 7);
    _mm256_storeu_si256((__m256i *)out, e);
    _mm256_storeu_si256((__m256i *)(out + 32), o);
    _mm256_storeu_si256((__m256i *)(out + 64), _mm256_sub_epi32(_mm256_setzero_si256(), sum));
    _mm256_storeu_ps((float *)(out + 96), avx2_steps(largest, unit / top));
}

// scales and books

// Signed scales of two rows in one tile: in either half those of words 0 and 2 of the upper row, of words 1 and 3, then
// of the lower row.
AVX2_INLINE __m256 avx2_scales(const uint8_t *const p[2], const int G, const int type) {
    if (type == SCALE_BF16) {
        __m256i rows[2]; // from memory, so that the shuffle does not wait for what finds the books
        for (int h = 0; h < 2; h++) {
            if (G == 1) __asm__("vpbroadcastw %1, %0" : "=x"(rows[h]) : "m"(*(const uint8_t (*)[2])p[h]));
            if (G == 2) __asm__("vpbroadcastd %1, %0" : "=x"(rows[h]) : "m"(*(const uint8_t (*)[4])p[h]));
            if (G == 4) __asm__("vpbroadcastq %1, %0" : "=x"(rows[h]) : "m"(*(const uint8_t (*)[8])p[h]));
        }
        // above two bytes of zero: bytes 2 i, 2 i + 1 for group i of the upper row, 8 further on of the lower one
        const __m256i bytes =
            G == 1 ? _mm256_set1_epi64x(0x0100FFFF0100FFFF)
            : G == 2
                ? _mm256_setr_epi64x(0x0100FFFF0100FFFF, 0x0100FFFF0100FFFF, 0x0302FFFF0302FFFF, 0x0302FFFF0302FFFF)
                : _mm256_setr_epi64x(0x0504FFFF0100FFFF, 0x0504FFFF0100FFFF, 0x0706FFFF0302FFFF, 0x0706FFFF0302FFFF);
        const __m256i lower = _mm256_setr_epi64x(0, 0x0808000008080000, 0, 0x0808000008080000);
        const __m256i both = _mm256_unpacklo_epi64(rows[0], rows[1]);
        return _mm256_castsi256_ps(_mm256_shuffle_epi8(both, _mm256_add_epi8(bytes, lower)));
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
    const __m256i groups = G == 1   ? _mm256_setr_epi32(0, 0, 4, 4, 0, 0, 4, 4)
                           : G == 2 ? _mm256_setr_epi32(0, 0, 4, 4, 1, 1, 5, 5)
                                    : _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
    return _mm256_permutevar8x32_ps(_mm256_cvtph_ps(half), groups);
}

// Those of one of the rows, for each word.
AVX2_INLINE __m256 avx2_scales_of(__m256 scales, const int h) {
    return h ? _mm256_permute_ps(scales, 0xEE) : _mm256_permute_ps(scales, 0x44);
}

// Which books the halves of a row use (G <= 2), as an offset into a plane of Avx2Tables.
AVX2_INLINE size_t avx2_books(const uint8_t *p, const int G, const int type) {
    const int bytes = type == SCALE_BF16 ? 2 : 1;
    if (G == 1) return (size_t)((int8_t)p[bytes - 1] >> 7 & 96);
    uint32_t bits = 0;
    memcpy(&bits, p, 2 * (size_t)bytes);
    return (bits >> (8 * bytes - 6) & 32) | (bits >> (16 * bytes - 7) & 64);
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

// Entries of one plane. For G = 4 the signs of `choice` tell the book of each word, otherwise `books` that of each
// half.
AVX2_INLINE __m256i avx2_look(const Avx2Tables *tables, int plane, size_t books, __m256 choice, __m256i index,
                              const int G) {
    if (G != 4) return _mm256_shuffle_epi8(avx2_load(tables->table[plane][0] + books), index);
    const __m256 zero = _mm256_castsi256_ps(_mm256_shuffle_epi8(avx2_load(tables->table[plane][0]), index));
    const __m256 one = _mm256_castsi256_ps(_mm256_shuffle_epi8(avx2_load(tables->table[plane][3]), index));
    return _mm256_castps_si256(avx2_blend(zero, one, choice));
}

// What is known of a line ahead of its turn: its codes in word order, where the scales of its rows are (E4M3, which
// takes longer: the scales), and their books.
typedef struct {
    __m256i codes[2];
    const uint8_t *at[2];
    __m256 scales;
    size_t books[2];
} Avx2Line;

// Of a line of rows `scales` and `scales + 8`; `offset`: see scale_offset.
AVX2_INLINE void avx2_start(const uint8_t *line, const uint8_t *const *scales, int64_t offset, const int G,
                            const int type, Avx2Line *out) {
    avx2_sort(line, G, out->codes);
    for (int h = 0; h < 2; h++) {
        out->at[h] = scales[8 * h] + offset;
        out->books[h] = G == 4 ? 0 : avx2_books(out->at[h], G, type);
    }
    if (type == SCALE_E4M3) out->scales = avx2_scales(out->at, G, type);
}

// Book entries of the codes of two rows: even columns, then odd ones, as bytes (MODE_INT8: two vectors), or as 16 bits,
// of words 0, 1 and of words 2, 3 of either half (four vectors).
typedef struct {
    __m256i entries[2][4];
    __m256 scales;
} Avx2Rows;

AVX2_INLINE Avx2Rows avx2_rows(const Avx2Tables *tables, const Avx2Line *line, const int mode, const int G,
                               const int type) {
    const __m256i nibble = _mm256_set1_epi8(15);
    Avx2Rows rows;
    rows.scales = type == SCALE_E4M3 ? line->scales : avx2_scales(line->at, G, type);
    for (int h = 0; h < 2; h++) {
        const __m256 choice = avx2_scales_of(rows.scales, h);
        for (int parity = 0; parity < 2; parity++) {
            const __m256i codes = parity ? _mm256_srli_epi16(line->codes[h], 4) : line->codes[h];
            const __m256i index = _mm256_and_si256(codes, nibble);
            const __m256i low = avx2_look(tables, 0, line->books[h], choice, index, G);
            if (mode == MODE_INT8) {
                rows.entries[h][parity] = low;
                continue;
            }
            const __m256i high = avx2_look(tables, 1, line->books[h], choice, index, G);
            rows.entries[h][2 * parity] = _mm256_unpacklo_epi8(low, high);
            rows.entries[h][2 * parity + 1] = _mm256_unpackhi_epi8(low, high);
        }
    }
    return rows;
}

// products of the rows of a line

// The sums of products of a row, tile and token.
AVX2_INLINE __m256i avx2_int16(const __m256i w[4], const uint8_t *x) {
    __m256i products[4];
    for (int i = 0; i < 4; i++) products[i] = _mm256_madd_epi16(w[i], avx2_load(x + 32 * i));
    return _mm256_add_epi32(_mm256_add_epi32(products[0], products[2]), _mm256_add_epi32(products[1], products[3]));
}

AVX2_INLINE __m256i avx2_int8(const __m256i w[2], const uint8_t *x) {
    const __m256i ones = _mm256_set1_epi16(1);
    const __m256i even = _mm256_madd_epi16(_mm256_maddubs_epi16(w[0], avx2_load(x)), ones);
    const __m256i odd = _mm256_madd_epi16(_mm256_maddubs_epi16(w[1], avx2_load(x + 32)), ones);
    return _mm256_add_epi32(_mm256_add_epi32(even, avx2_load(x + 64)), odd);
}

// Add such sums of both rows to total[8]. Lanes that share a scale and a step are added first: with 16 bits, 0 and 1 of
// a half see words 0 and 2, with 8 bits, 0 and 2 do.
AVX2_INLINE void avx2_add(const __m256i sums[2], __m256 scales, const uint8_t *x, float *total, const int mode) {
    __m256i both;
    if (mode == MODE_INT8)
        both = _mm256_add_epi32(_mm256_unpacklo_epi64(sums[0], sums[1]), _mm256_unpackhi_epi64(sums[0], sums[1]));
    else {
        const __m256 upper = _mm256_castsi256_ps(sums[0]), lower = _mm256_castsi256_ps(sums[1]);
        both = _mm256_add_epi32(_mm256_castps_si256(_mm256_shuffle_ps(upper, lower, 0x88)),
                                _mm256_castps_si256(_mm256_shuffle_ps(upper, lower, 0xDD)));
    }
    const __m256 steps = _mm256_loadu_ps((const float *)(x + (mode == MODE_INT8 ? 96 : 128)));
    const __m256 factors = _mm256_mul_ps(scales, steps);
    _mm256_storeu_ps(total, _mm256_fmadd_ps(_mm256_cvtepi32_ps(both), factors, _mm256_loadu_ps(total)));
}

// The entries of word d of both halves in fp32: bf16 bits, shifted.
AVX2_INLINE __m256 avx2_widen(__m256i entries, int last) {
    const __m256i zero = _mm256_setzero_si256();
    return _mm256_castsi256_ps(last ? _mm256_unpackhi_epi16(zero, entries) : _mm256_unpacklo_epi16(zero, entries));
}

// Add the products of a row, tile and token to total[8], all lanes of which are sums of the row.
AVX2_INLINE void avx2_exact(const __m256i w[4], __m256 scales, const uint8_t *x, float *total, const int G) {
    __m256 sum[2], before = _mm256_loadu_ps(total);
    for (int d = 0; d < 4; d++) {
        const __m256 even = avx2_widen(w[d / 2], d & 1), odd = avx2_widen(w[2 + d / 2], d & 1);
        const __m256 here = _mm256_mul_ps(even, _mm256_loadu_ps((const float *)(x + 32 * d)));
        const __m256 word = _mm256_fmadd_ps(odd, _mm256_loadu_ps((const float *)(x + 32 * (4 + d))), here);
        sum[d & 1] = d < 2 ? word : _mm256_add_ps(sum[d & 1], word);
    }
    if (G == 4) before = _mm256_fmadd_ps(sum[1], _mm256_movehdup_ps(scales), before);
    const __m256 rest = G == 4 ? sum[0] : _mm256_add_ps(sum[0], sum[1]);
    _mm256_storeu_ps(total, _mm256_fmadd_ps(rest, G == 4 ? _mm256_moveldup_ps(scales) : scales, before));
}

// Floats of a token in the totals of a line: those of one row, then of the other, or (integers) of both.
INLINE int avx2_totals(int mode) { return mode == MODE_EXACT ? 16 : 8; }

typedef void (*Avx2Kernel)(const Weight *, const Avx2Tables *, const uint8_t *, const uint8_t *const *, const Packed *,
                           int64_t, int64_t, float *);

#define TARGET AVX2
#define NAME(x) avx2_##x
#define VNNI 0
#include "avx2_rows.h"
#ifdef HAS_AVX_VNNI
#define TARGET __attribute__((target("avx2,fma,f16c,avxvnni")))
#define NAME(x) avx_vnni_##x
#define VNNI 1
#include "avx2_rows.h"
#endif

// The sums over lanes of token m -> sums[16] by row.
AVX2 static void avx2_sums(const float *totals, int64_t tokens, int64_t m, float *sums, int mode) {
    const int size = avx2_totals(mode);
    __m128 pairs[LINES]; // in either half of a pair, two sums of a row
    for (int g = 0; g < LINES; g++) {
        const float *v = totals + size * (g * tokens + m);
        __m256 sum = _mm256_load_ps(v);
        if (mode == MODE_EXACT) sum = _mm256_hadd_ps(sum, _mm256_load_ps(v + 8));
        pairs[g] = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
    }
    for (int g = 0; g < LINES; g += 4) {
        const __m128 a = _mm_hadd_ps(pairs[g], pairs[g + 1]), b = _mm_hadd_ps(pairs[g + 2], pairs[g + 3]);
        _mm_storeu_ps(sums + g, _mm_shuffle_ps(a, b, 0x88));
        _mm_storeu_ps(sums + LINES + g, _mm_shuffle_ps(a, b, 0xDD));
    }
}

#endif
