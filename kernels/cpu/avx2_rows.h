// Products of a line's two rows, included by avx2.h once for AVX2 alone and once with AVX-VNNI. TARGET: the attribute
// of the functions; NAME(x): their names; VNNI: whether one instruction multiplies integers and adds the products up.

#define TARGET_INLINE TARGET INLINE

// Add the products of one token and tile with both rows of a line to total[8].
TARGET_INLINE void NAME(integers)(const Avx2Rows *rows, const uint8_t *x, float *total, const int mode) {
    __m256i sums[2];
#if VNNI
    for (int i = 0; i < (mode == MODE_INT8 ? 2 : 4); i++) {
        __m256i inputs = avx2_load(x + 32 * i);
        // one load for both rows, where gcc prefers two: here it is loads that limit the speed
        __asm__("" : "+x"(inputs));
        for (int h = 0; h < 2; h++) {
            const __m256i w = rows->entries[h][i];
            if (mode == MODE_INT8)
                sums[h] = _mm256_dpbusd_avx_epi32(i ? sums[h] : avx2_load(x + 64), w, inputs);
            else
                sums[h] = i ? _mm256_dpwssd_avx_epi32(sums[h], w, inputs) : _mm256_madd_epi16(w, inputs);
        }
    }
#else
    for (int h = 0; h < 2; h++)
        sums[h] = mode == MODE_INT8 ? avx2_int8(rows->entries[h], x) : avx2_int16(rows->entries[h], x);
#endif
    avx2_add(sums, rows->scales, x, total, mode);
}

// Add the tiles first .. last - 1 of a tile row to totals [line][token][avx2_totals(mode)]; `scales` are those of its
// 16 rows.
TARGET_INLINE void NAME(tiles)(const Weight *w, const Avx2Tables *tables, const uint8_t *codes,
                               const uint8_t *const *scales, const Packed *x, int64_t first, int64_t last,
                               float *totals, const int mode, const int G, const int type, const int64_t tokens) {
    const int bytes = avx2_bytes_per_tile[mode], size = avx2_totals(mode);
    // integer products are so short that they would wait for the decoding: start it a line ahead
    const int ahead = mode != MODE_EXACT;
    Avx2Line next;
    if (ahead && first < last) avx2_start(codes + first * TILE_BYTES, scales, scale_offset(w, first), G, type, &next);
    for (int64_t tile = first; tile < last; tile++) {
        const uint8_t *line = codes + tile * TILE_BYTES, *inputs = x->data + tile * tokens * bytes;
        const int64_t at = scale_offset(w, tile), at_next = scale_offset(w, tile + 1);
        float *total = totals;
        for (int g = 0; g < LINES; g++, line += LINE_BYTES, total += size * tokens) {
            prefetch(line + PREFETCH_BYTES);
            if (!ahead) avx2_start(line, scales + g, at, G, type, &next);
            const Avx2Rows rows = avx2_rows(tables, &next, mode, G, type);
            const int end = g == LINES - 1;
            if (ahead && (!end || tile < last - 1))
                avx2_start(line + LINE_BYTES, scales + (g + 1) % LINES, end ? at_next : at, G, type, &next);
            const __m256 scales_of[2] = {avx2_scales_of(rows.scales, 0), avx2_scales_of(rows.scales, 1)};
            for (int64_t m = 0; m < tokens; m++) {
                const uint8_t *in = inputs + m * bytes;
                float *t = total + size * m;
                if (mode != MODE_EXACT) NAME(integers)(&rows, in, t, mode);
                for (int h = 0; h < 2 && mode == MODE_EXACT; h++)
                    avx2_exact(rows.entries[h], scales_of[h], in, t + 8 * h, G);
            }
        }
    }
}

// Few tokens have code of their own, but not in fp32, where unrolled code has too many numbers at once.
#define KIND(mode, G, type)                                                                                            \
    TARGET static void NAME(mode##_##G##_##type)(const Weight *w, const Avx2Tables *tables, const uint8_t *codes,      \
                                                 const uint8_t *const *scales, const Packed *x, int64_t first,         \
                                                 int64_t last, float *totals) {                                        \
        FOR_TOKENS(x->tokens == 1, 1, mode, G, type)                                                                   \
        FOR_TOKENS(mode != MODE_EXACT && x->tokens == 2, 2, mode, G, type)                                             \
        FOR_TOKENS(mode != MODE_EXACT && x->tokens == 3, 3, mode, G, type)                                             \
        FOR_TOKENS(mode != MODE_EXACT && x->tokens == 4, 4, mode, G, type)                                             \
        FOR_TOKENS(1, x->tokens, mode, G, type)                                                                        \
    }
#define FOR_TOKENS(condition, count, mode, G, type)                                                                    \
    if (condition) {                                                                                                   \
        NAME(tiles)(w, tables, codes, scales, x, first, last, totals, mode, G, type, count);                           \
        return;                                                                                                        \
    }
FOR_KINDS(KIND)

// [mode][scale type][log2 of the groups per tile]
#define ENTRY(mode, G, type) [mode][type][G / 2] = NAME(mode##_##G##_##type),
static const Avx2Kernel NAME(kernels)[3][2][3] = {FOR_KINDS(ENTRY)};

#undef ENTRY
#undef KIND
#undef FOR_TOKENS
#undef TARGET_INLINE
#undef TARGET
#undef NAME
#undef VNNI
