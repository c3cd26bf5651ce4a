// AVX-512 (BW, VL, VNNI, VBMI): a line of a stored tile is one vector, the words (t, c, h) of 8 codes of rows g and g
// + 8. A 32-bit lane is a word from the lookup to the sum: the book is bit 4 of the index into a table of 32 entries.
#ifndef AAAC_AVX512_H
#define AAAC_AVX512_H

#include <immintrin.h>

#include "common.h"

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx2,fma,f16c")))
#define AVX512_INLINE AVX512 INLINE

// Bytes of a packed token and tile: MODE_EXACT 8 vectors of fp32, MODE_INT16 4 of int16 and the scales, MODE_INT8 2 of
// int8, the corrections and the scales. Lanes come in pairs, for the two rows.
static const int avx512_bytes_per_tile[] = {512, 320, 256};

// packing of tokens: lane 4 t + 2 c + h is word 4 c + t, columns 8 (4 c + t) .. + 7

// 16 fp32 inputs to their magnitudes' maximum over each 8.
AVX512_INLINE __m512 avx512_word_max(__m512 v) {
    v = _mm512_abs_ps(v);
    v = _mm512_max_ps(v, _mm512_permute_ps(v, 0xB1));
    v = _mm512_max_ps(v, _mm512_permute_ps(v, 0x4E));
    return _mm512_max_ps(v, _mm512_shuffle_f32x4(v, v, 0xB1));
}

// Largest magnitudes of the words of a tile, one for each lane, from four vectors that hold those of two words each.
AVX512_INLINE __m512 avx512_lanes(const __m512 *largest) {
    const __m512 first = _mm512_mask_blend_ps(0xF0F0, largest[0], largest[1]); // words 0 2 1 3, four times each
    const __m512 last = _mm512_mask_blend_ps(0xF0F0, largest[2], largest[3]);  // words 4 6 5 7
    // lanes (t, c, h) = words 0 0 4 4 1 1 5 5 2 2 6 6 3 3 7 7
    const __m512i from = _mm512_setr_epi32(0, 0, 16, 16, 8, 8, 24, 24, 4, 4, 20, 20, 12, 12, 28, 28);
    return _mm512_permutex2var_ps(first, from, last);
}

AVX512_INLINE __m512i avx512_round(__m512 v, __m512 largest, float top) {
    const __mmask16 enough = _mm512_cmp_ps_mask(largest, _mm512_set1_ps(0x1p-100f), _CMP_GT_OQ);
    const __m512 inverse = _mm512_maskz_div_ps(enough, _mm512_set1_ps(top), largest);
    return _mm512_cvtps_epi32(_mm512_mul_ps(v, inverse));
}

// Vector (i, half): column i + 4 half of every word.
AVX512 static void avx512_pack_exact(const float *x, uint8_t *out) {
    const __m512i word = _mm512_setr_epi32(0, 0, 4, 4, 1, 1, 5, 5, 2, 2, 6, 6, 3, 3, 7, 7);
    for (int column = 0; column < 8; column++) {
        const __m512i index = _mm512_add_epi32(_mm512_slli_epi32(word, 3), _mm512_set1_epi32(column));
        _mm512_storeu_ps((float *)(out + 64 * (2 * (column & 3) + column / 4)), _mm512_i32gather_ps(index, x, 4));
    }
}

// Vector i: columns i and i + 4 of every word.
AVX512 static void avx512_pack_int16(const float *x, float unit, uint8_t *out) {
    __m512 largest[4];
    __m512i q[2];
    for (int i = 0; i < 4; i++) {
        const __m512 v = _mm512_loadu_ps(x + 16 * i);
        largest[i] = avx512_word_max(v);
        const __m256i narrow = _mm512_cvtepi32_epi16(avx512_round(v, largest[i], INPUT16_TOP));
        q[i / 2] = i & 1 ? _mm512_inserti64x4(q[i / 2], narrow, 1) : _mm512_castsi256_si512(narrow);
    }
    // 16-bit lanes of vector 0: columns 0 and 4 of word 0, twice, of word 4, twice, ...
    const __m512i word = _mm512_setr_epi32(0, 0, 4, 4, 1, 1, 5, 5, 2, 2, 6, 6, 3, 3, 7, 7);
    const __m512i first =
        _mm512_add_epi16(_mm512_mullo_epi32(word, _mm512_set1_epi32(0x00080008)), _mm512_set1_epi32(4 << 16));
    for (int i = 0; i < 4; i++) {
        const __m512i from = _mm512_add_epi16(first, _mm512_set1_epi16((short)i));
        _mm512_storeu_si512(out + 64 * i, _mm512_permutex2var_epi16(q[0], from, q[1]));
    }
    _mm512_storeu_ps((float *)(out + 256), _mm512_mul_ps(avx512_lanes(largest), _mm512_set1_ps(unit / INPUT16_TOP)));
}

// Even and odd columns of every word; the weights are used with 128 added, the corrections take that out again.
AVX512 static void avx512_pack_int8(const float *x, float unit, uint8_t *out) {
    __m512 largest[4];
    __m512i q = _mm512_setzero_si512();
    for (int i = 0; i < 4; i++) {
        const __m512 v = _mm512_loadu_ps(x + 16 * i);
        largest[i] = avx512_word_max(v);
        const __m128i narrow = _mm512_cvtepi32_epi8(avx512_round(v, largest[i], 127.0f));
        q = i == 0   ? _mm512_inserti32x4(q, narrow, 0)
            : i == 1 ? _mm512_inserti32x4(q, narrow, 1)
            : i == 2 ? _mm512_inserti32x4(q, narrow, 2)
                     : _mm512_inserti32x4(q, narrow, 3);
    }
    const __m512i word = _mm512_setr_epi32(0, 0, 4, 4, 1, 1, 5, 5, 2, 2, 6, 6, 3, 3, 7, 7);
    const __m512i first =
        _mm512_add_epi8(_mm512_mullo_epi32(word, _mm512_set1_epi32(0x08080808)), _mm512_set1_epi32(0x06040200));
    const __m512i even = _mm512_permutexvar_epi8(first, q);
    const __m512i odd = _mm512_permutexvar_epi8(_mm512_add_epi8(first, _mm512_set1_epi8(1)), q);
    const __m512i ones = _mm512_set1_epi8(1);
    const __m512i sum = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(_mm512_setzero_si512(), ones, even), ones, odd);
    _mm512_storeu_si512(out, even);
    _mm512_storeu_si512(out + 64, odd);
    _mm512_storeu_si512(out + 128, _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(sum, 7)));
    _mm512_storeu_ps((float *)(out + 192), _mm512_mul_ps(avx512_lanes(largest), _mm512_set1_ps(unit / 127.0f)));
}

// scales and books

// Signed scales of rows g and g + 8 in one tile, a float for each lane (t, c, h). G groups per tile.
AVX512_INLINE __m512 avx512_scales(const uint8_t *upper, const uint8_t *lower, const int G, const int type) {
    uint64_t one = 0, two = 0;
    memcpy(&one, upper, type == SCALE_BF16 ? 2 * G : G);
    memcpy(&two, lower, type == SCALE_BF16 ? 2 * G : G);
    const __m128i both = _mm_set_epi64x((long long)two, (long long)one);
    // group of a word: 0 (G = 1), c (G = 2), 2 c + t / 2 (G = 4); bytes of the lower row begin at 8
    if (type == SCALE_BF16) {
        const __m512i spread =
            G == 1   ? _mm512_set4_epi32(0x0908FFFF, 0x0100FFFF, 0x0908FFFF, 0x0100FFFF)
            : G == 2 ? _mm512_set4_epi32(0x0B0AFFFF, 0x0302FFFF, 0x0908FFFF, 0x0100FFFF)
                     : _mm512_inserti64x4(_mm512_set4_epi32(0x0F0EFFFF, 0x0706FFFF, 0x0B0AFFFF, 0x0302FFFF),
                                          _mm256_set_epi32(0x0D0CFFFF, 0x0504FFFF, 0x0908FFFF, 0x0100FFFF, 0x0D0CFFFF,
                                                           0x0504FFFF, 0x0908FFFF, 0x0100FFFF),
                                          0);
        return _mm512_castsi512_ps(_mm512_shuffle_epi8(_mm512_broadcast_i32x4(both), spread));
    }
    // the byte in the high half of 16 bits, shifted by one below its sign, is an fp16 number
    const __m256i spread =
        G == 1   ? _mm256_set1_epi32(0x08FF00FF)
        : G == 2 ? _mm256_set1_epi64x(0x09FF01FF08FF00FF)
                 : _mm256_set_epi64x(0x0BFF03FF09FF01FF, 0x0BFF03FF09FF01FF, 0x0AFF02FF08FF00FF, 0x0AFF02FF08FF00FF);
    const __m256i high = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(both), spread);
    const __m256i top = _mm256_set1_epi16(0x7F00);
    const __mmask16 nan = _mm256_cmpeq_epi16_mask(_mm256_and_si256(high, top), top);
    const __m256i half = _mm256_and_si256(_mm256_srai_epi16(high, 1), _mm256_set1_epi16((short)0xBFFF));
    return _mm512_cvtph_ps(_mm256_mask_set1_epi16(half, nan, -1));
}

// The two books as one table of 32 entries: of 16 bits, or of bytes, twice, because bit 5 of an index does not matter.
typedef struct {
    uint8_t table[64];
} Avx512Tables;

static void avx512_tables(const Tables *tables, int mode, Avx512Tables *out) {
    if (mode != MODE_INT8) {
        memcpy(out->table, tables->wide, 64);
        return;
    }
    memcpy(out->table, tables->narrow, 32);
    memcpy(out->table + 32, tables->narrow, 32);
}

// Book entries of the codes of a line: 16 bits each, codes i and i + 4 of every word in entries[i]; or bytes, even and
// odd codes.
typedef struct {
    __m512i entries[4];
    __m512 scales;
} Avx512Line;

AVX512_INLINE Avx512Line avx512_line(__m512i table, __m512i codes, __m512 scales, const int mode) {
    Avx512Line line;
    const __m512i book = _mm512_srai_epi32(_mm512_castps_si512(scales), 31);
    const __m512i bit = mode == MODE_INT8 ? _mm512_set1_epi8(16) : _mm512_set1_epi16(16);
    line.scales = scales;
    for (int i = 0; i < (mode == MODE_INT8 ? 2 : 4); i++) {
        // bit 4 from `book`, the others from the code
        const __m512i index =
            _mm512_ternarylogic_epi32(i ? _mm512_srli_epi16(codes, 4 * (unsigned)i) : codes, book, bit, 0xD8);
        line.entries[i] =
            mode == MODE_INT8 ? _mm512_permutexvar_epi8(index, table) : _mm512_permutexvar_epi16(index, table);
    }
    return line;
}

// Add the products of one token and tile with two lines to totals[2][16]: together they load the token once.
AVX512_INLINE void avx512_products(const Avx512Line line[2], const uint8_t *x, float *totals, const int mode) {
    __m512 total[2] = {_mm512_load_ps(totals), _mm512_load_ps(totals + 16)}, sum[2], steps = _mm512_setzero_ps();
    __m512i sums[2];
    for (int l = 0; l < 2; l++) {
        sum[l] = steps;
        sums[l] = mode == MODE_INT8 ? _mm512_load_si512(x + 128) : _mm512_setzero_si512();
    }
    for (int i = 0; i < (mode == MODE_INT8 ? 2 : 4); i++) {
        const __m512i inputs = _mm512_load_si512(x + (mode == MODE_EXACT ? 128 : 64) * i);
        const __m512 last = _mm512_load_ps((const float *)(x + (mode == MODE_EXACT ? 128 * i + 64 : 0)));
        for (int l = 0; l < 2; l++) {
            const __m512i w = line[l].entries[i];
            if (mode == MODE_EXACT) {
                const __m512i high = _mm512_and_si512(w, _mm512_set1_epi32((int)0xFFFF0000));
                sum[l] =
                    _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(w, 16)), _mm512_castsi512_ps(inputs), sum[l]);
                sum[l] = _mm512_fmadd_ps(_mm512_castsi512_ps(high), last, sum[l]);
            } else if (mode == MODE_INT8)
                sums[l] = _mm512_dpbusd_epi32(sums[l], w, inputs);
            else
                sums[l] = _mm512_dpwssd_epi32(sums[l], w, inputs);
        }
    }
    if (mode != MODE_EXACT) steps = _mm512_load_ps((const float *)(x + (mode == MODE_INT16 ? 256 : 192)));
    for (int l = 0; l < 2; l++) {
        if (mode != MODE_EXACT) sum[l] = _mm512_cvtepi32_ps(sums[l]);
        const __m512 scales = mode == MODE_EXACT ? line[l].scales : _mm512_mul_ps(line[l].scales, steps);
        _mm512_store_ps(totals + 16 * l, _mm512_fmadd_ps(sum[l], scales, total[l]));
    }
}

// Two lines, the first of rows `scales` and `scales + 8`; `at`: see scale_offset.
AVX512_INLINE void avx512_pair(__m512i table, const uint8_t *lines, const uint8_t *const *scales, int64_t at,
                               const int mode, const int G, const int type, Avx512Line pair[2]) {
    for (int l = 0; l < 2; l++) {
        const uint8_t *line = lines + l * LINE_BYTES;
        prefetch(line + PREFETCH_BYTES);
        const __m512 s = avx512_scales(scales[l] + at, scales[l + 8] + at, G, type);
        pair[l] = avx512_line(table, _mm512_loadu_si512(line), s, mode);
    }
}

// Add the tiles first .. last - 1 of a tile row to totals [pair of lines][token][2][16]; `scales` are those of its 16
// rows. Lines are decoded a pair ahead, so that products need not wait.
AVX512_INLINE void avx512_tiles(const Weight *w, const Avx512Tables *tables, const uint8_t *codes,
                                const uint8_t *const *scales, const Packed *x, int64_t first, int64_t last,
                                float *totals, const int mode, const int G, const int type, const int64_t tokens) {
    const int bytes = avx512_bytes_per_tile[mode];
    const __m512i table = _mm512_loadu_si512(tables->table);
    Avx512Line pair[2], next[2];
    if (first >= last) return;
    avx512_pair(table, codes + first * TILE_BYTES, scales, scale_offset(w, first), mode, G, type, next);
    for (int64_t tile = first; tile < last; tile++) {
        const uint8_t *lines = codes + tile * TILE_BYTES, *inputs = x->data + tile * tokens * bytes;
        const int64_t at = scale_offset(w, tile), at_next = scale_offset(w, tile + 1);
        for (int g = 0; g < LINES; g += 2) {
            for (int l = 0; l < 2; l++) pair[l] = next[l];
            const int end = g == LINES - 2;
            if (!end || tile < last - 1)
                avx512_pair(table, lines + (g + 2) * LINE_BYTES, scales + (g + 2) % LINES, end ? at_next : at, mode, G,
                            type, next);
            float *total = totals + 16 * g * tokens;
            for (int64_t m = 0; m < tokens; m++) avx512_products(pair, inputs + m * bytes, total + 32 * m, mode);
        }
    }
}

#define AVX512_KIND(mode, G, type)                                                                                     \
    AVX512 static void avx512_##mode##_##G##_##type(const Weight *w, const Avx512Tables *tables, const uint8_t *codes, \
                                                    const uint8_t *const *scales, const Packed *x, int64_t first,      \
                                                    int64_t last, float *totals) {                                     \
        if (x->tokens == 1)                                                                                            \
            avx512_tiles(w, tables, codes, scales, x, first, last, totals, mode, G, type, 1);                          \
        else                                                                                                           \
            avx512_tiles(w, tables, codes, scales, x, first, last, totals, mode, G, type, x->tokens);                  \
    }
FOR_KINDS(AVX512_KIND)

typedef void (*Avx512Kernel)(const Weight *, const Avx512Tables *, const uint8_t *, const uint8_t *const *,
                             const Packed *, int64_t, int64_t, float *);

// [mode][scale type][log2 of the groups per tile]
#define AVX512_ENTRY(mode, G, type) [mode][type][G / 2] = avx512_##mode##_##G##_##type,
static const Avx512Kernel avx512_kernels[3][2][3] = {FOR_KINDS(AVX512_ENTRY)};

// The sums over lanes of token m -> sums[16] by row.
AVX512 static void avx512_sums(const float *totals, int64_t tokens, int64_t m, float *sums) {
    __m256 v[LINES];
    for (int g = 0; g < LINES; g++) {
        const __m512 all = _mm512_load_ps(totals + 32 * (g / 2 * tokens + m) + g % 2 * 16);
        v[g] = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    }
    for (int h = 0; h < 2; h++) {
        __m256 four[2];
        for (int i = 0; i < 2; i++) {
            const __m256 *w = v + 4 * i; // even lanes belong to row g, odd ones to row g + 8
            const __m256 a = h ? _mm256_shuffle_ps(w[0], w[1], 0xDD) : _mm256_shuffle_ps(w[0], w[1], 0x88);
            const __m256 b = h ? _mm256_shuffle_ps(w[2], w[3], 0xDD) : _mm256_shuffle_ps(w[2], w[3], 0x88);
            four[i] = _mm256_hadd_ps(a, b);
        }
        const __m256 low = _mm256_permute2f128_ps(four[0], four[1], 0x20),
                     high = _mm256_permute2f128_ps(four[0], four[1], 0x31);
        _mm256_storeu_ps(sums + 8 * h, _mm256_add_ps(low, high));
    }
}

// dequantisation

// The 16 rows of the tiles first .. last - 1: out[row][64 (tile - first)] with `stride` floats from row to row. 16
// columns of a row lie in one group: one scale and, as 16 entries in fp32 fill a vector, one lookup.
AVX512_INLINE void avx512_decode_tiles(const Weight *w, const uint8_t *codes, const uint8_t *const *scales,
                                       int64_t first, int64_t last, float factor, float *out, int64_t stride,
                                       const int G, const int type) {
    const __m512i shifts = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
    const __m512 factors = _mm512_set1_ps(factor);
    for (int g = 0; g < LINES; g++) // line by line: memory likes to be written in few places at a time
        for (int64_t tile = first; tile < last; tile++) {
            const int64_t at = scale_offset(w, tile);
            const __m512i line = _mm512_loadu_si512(codes + tile * TILE_BYTES + g * LINE_BYTES);
            float scale[16];
            _mm512_storeu_ps(scale, avx512_scales(scales[g] + at, scales[g + 8] + at, G, type));
            for (int h = 0; h < 2; h++)
                for (int i = 0; i < 4; i++) {
                    // words 2 i and 2 i + 1 of the row, in lanes 4 t + 2 c + h
                    const int lane = 8 * (i & 1) + 2 * (i / 2) + h;
                    const __m512i words = _mm512_inserti64x4(_mm512_set1_epi32(lane), _mm256_set1_epi32(lane + 4), 1);
                    const __m512i index = _mm512_srlv_epi32(_mm512_permutexvar_epi32(words, line), shifts);
                    const __m512 book = _mm512_loadu_ps(w->books[float_bits(scale[lane]) >> 31]);
                    const __m512 values =
                        _mm512_mul_ps(_mm512_permutexvar_ps(index, book), _mm512_set1_ps(scale[lane]));
                    _mm512_storeu_ps(out + (g + 8 * h) * stride + (tile - first) * TILE_COLUMNS + 16 * i,
                                     _mm512_mul_ps(values, factors));
                }
        }
}

AVX512 static void avx512_decode(const Weight *w, const uint8_t *codes, const uint8_t *const *scales, int64_t first,
                                 int64_t last, float factor, float *out, int64_t stride) {
#define AVX512_DECODE(mode, G, type)                                                                                   \
    if (w->groups_per_tile == G && w->scale_type == type) {                                                            \
        avx512_decode_tiles(w, codes, scales, first, last, factor, out, stride, G, type);                              \
        return;                                                                                                        \
    }
    FOR_GROUPS(AVX512_DECODE, MODE_EXACT)
}

#endif
