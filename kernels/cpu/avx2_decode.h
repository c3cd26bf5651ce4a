// AVX2: dequantisation, by the tables and shuffles of avx2.h.
#ifndef AAAC_AVX2_DECODE_H
#define AAAC_AVX2_DECODE_H

#include "avx2.h"

// 64 weights of a row, in natural order, from its codes in word order.
AVX2_INLINE void avx2_decode_row(const Avx2Tables *tables, __m256i codes, const uint8_t *p, __m256 scales, float factor,
                                 float *out, const int G, const int type) {
    const __m256i nibble = _mm256_set1_epi8(15), zero = _mm256_setzero_si256();
    const size_t books = G == 4 ? 0 : avx2_books(p, G, type);
    const __m256i even = _mm256_and_si256(codes, nibble), odd = _mm256_and_si256(_mm256_srli_epi16(codes, 4), nibble);
    const uint8_t *order = avx2_order(G);
    for (int d = 0; d < 4; d++) {
        const __m256i index = d < 2 ? _mm256_unpacklo_epi8(even, odd) : _mm256_unpackhi_epi8(even, odd);
        const __m256 choice = d < 2 ? _mm256_unpacklo_ps(scales, scales) : _mm256_unpackhi_ps(scales, scales);
        const __m256i low = avx2_look(tables, 0, books, choice, index, G),
                      high = avx2_look(tables, 1, books, choice, index, G);
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

// The 16 rows of the tiles first .. last - 1: out[row][64 (tile - first)] with `stride` floats from row to row.
AVX2_INLINE void avx2_decode_tiles(const Weight *w, const Avx2Tables *tables, const uint8_t *codes,
                                   const uint8_t *const *scales, int64_t first, int64_t last, float factor, float *out,
                                   int64_t stride, const int G, const int type) {
    for (int g = 0; g < LINES; g++) // line by line: memory likes to be written in few places at a time
        for (int64_t tile = first; tile < last; tile++) {
            const int64_t at = scale_offset(w, tile);
            const uint8_t *const p[2] = {scales[g] + at, scales[g + 8] + at};
            float *to = out + g * stride + (tile - first) * TILE_COLUMNS;
            __m256i rows[2];
            avx2_sort(codes + tile * TILE_BYTES + g * LINE_BYTES, G, rows);
            const __m256 both = avx2_scales(p, G, type);
            for (int h = 0; h < 2; h++)
                avx2_decode_row(tables, rows[h], p[h], avx2_scales_of(both, h), factor, to + 8 * h * stride, G, type);
        }
}

AVX2 static void avx2_decode(const Weight *w, const Avx2Tables *tables, const uint8_t *codes,
                             const uint8_t *const *scales, int64_t first, int64_t last, float factor, float *out,
                             int64_t stride) {
#define AVX2_DECODE(mode, G, type)                                                                                     \
    if (w->groups_per_tile == G && w->scale_type == type) {                                                            \
        avx2_decode_tiles(w, tables, codes, scales, first, last, factor, out, stride, G, type);                        \
        return;                                                                                                        \
    }
    FOR_GROUPS(AVX2_DECODE, MODE_EXACT)
}

#endif
