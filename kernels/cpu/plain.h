// Plain C for every other machine: rows of a tile are decoded to fp32, in loops that compilers vectorise. It is exact
// in all modes.
#ifndef AAAC_PLAIN_H
#define AAAC_PLAIN_H

#include "common.h"

enum { PLAIN_BYTES_PER_TILE = 4 * TILE_COLUMNS };

// The two entries of every byte of codes, for either book.
typedef struct {
    float pairs[2][256][2];
} PlainTables;

static void plain_tables(const Weight *w, PlainTables *tables) {
    for (int i = 0; i < 512; i++) {
        tables->pairs[i / 256][i % 256][0] = w->books[i / 256][i % 16];
        tables->pairs[i / 256][i % 256][1] = w->books[i / 256][i % 256 / 16];
    }
}

// The weights of row 8 h + g of a tile, without the factor of the scales; `line` are the codes of rows g and g + 8, and
// `scales` those of the row in this tile.
static void plain_decode(const Weight *w, const PlainTables *tables, const uint8_t *line, int h, const uint8_t *scales,
                         float *out) {
    for (int word = 0; word < 8; word++) {
        const uint8_t *codes = line + 16 * (word % 4) + 8 * (word / 4) + 4 * h;
        const float scale = load_scale(scales, w->scale_type, 8 * word * w->groups_per_tile / TILE_COLUMNS);
        const float (*pairs)[2] = tables->pairs[float_bits(scale) >> 31];
        float entries[8];
        for (int i = 0; i < 4; i++) memcpy(entries + 2 * i, pairs[codes[i]], 8);
        for (int i = 0; i < 8; i++) out[8 * word + i] = scale * entries[i];
    }
}

// Add the tiles first .. last - 1 of a tile row to totals [line][token][2][8]; `scales` are those of its 16 rows.
static void plain_tiles(const Weight *w, const PlainTables *tables, const uint8_t *codes, const uint8_t *const *scales,
                        const Packed *x, int64_t first, int64_t last, float *totals) {
    float decoded[TILE_COLUMNS];
    for (int64_t tile = first; tile < last; tile++) {
        const float *inputs = (const float *)(x->data + tile * x->tokens * PLAIN_BYTES_PER_TILE);
        for (int row = 0; row < TILE_ROWS; row++) {
            const uint8_t *line = codes + tile * TILE_BYTES + row % 8 * LINE_BYTES;
            plain_decode(w, tables, line, row / 8, scales[row] + scale_offset(w, tile), decoded);
            for (int64_t m = 0; m < x->tokens; m++) {
                float *total = totals + 16 * (row % 8 * x->tokens + m) + 8 * (row / 8), sum[8] = {0};
                for (int k = 0; k < TILE_COLUMNS; k += 8)
                    for (int lane = 0; lane < 8; lane++)
                        sum[lane] += decoded[k + lane] * inputs[TILE_COLUMNS * m + k + lane];
                for (int lane = 0; lane < 8; lane++) total[lane] += sum[lane];
            }
        }
    }
}

// The sums over lanes of token m -> sums[16] by row.
static void plain_sums(const float *totals, int64_t tokens, int64_t m, float *sums) {
    for (int row = 0; row < TILE_ROWS; row++) {
        const float *v = totals + 16 * (row % 8 * tokens + m) + row / 8 * 8;
        sums[row] = ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]));
    }
}

#endif
