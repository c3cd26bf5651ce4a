// What every path of the kernel shares: the call, the stored tile, numbers from and to memory.
#ifndef AAAC_COMMON_H
#define AAAC_COMMON_H

#include <math.h>
#include <stdint.h>
#include <string.h>

enum { TILE_ROWS = 16, TILE_COLUMNS = 64, TILE_BYTES = 512, LINES = 8, LINE_BYTES = 64 };
enum { MODE_EXACT, MODE_INT16, MODE_INT8 };
enum { ISA_PLAIN, ISA_AVX2, ISA_AVX_VNNI, ISA_AVX512 };
enum { TYPE_FP32, TYPE_BF16 };
enum { SCALE_BF16, SCALE_E4M3 };
// Tokens that one decoding of a weight serves: at most so many, whose sums stay in the first-level cache, and of so
// many bytes of packed inputs, which are read again for every 16 rows and stay in the second-level cache.
enum { MAX_TOKENS = 32, MOST_INPUT_BYTES = 5 << 18 };
// Room that a packed token needs for a tile on any path.
enum { MOST_BYTES_PER_TILE = 512 };
// How far ahead of the codes memory is asked for more.
enum { PREFETCH_BYTES = 8192 };
// Integers: eight products of a book and a 16-bit input fit 32 bits, and so do 16 products with a 15-bit input.
enum { BOOK16_TOP = 8191, BOOK8_TOP = 127, INPUT16_TOP = 32767, INPUT15_TOP = 16383 };

// Everything for which a path has a kernel: DO(mode, groups per tile, scale type) for each of them, or those of a mode.
#define FOR_SCALES(DO, mode, G) DO(mode, G, SCALE_BF16) DO(mode, G, SCALE_E4M3)
#define FOR_GROUPS(DO, mode) FOR_SCALES(DO, mode, 1) FOR_SCALES(DO, mode, 2) FOR_SCALES(DO, mode, 4)
#define FOR_KINDS(DO) FOR_GROUPS(DO, MODE_EXACT) FOR_GROUPS(DO, MODE_INT16) FOR_GROUPS(DO, MODE_INT8)

#define INLINE static inline __attribute__((always_inline))
#define EXPORT __attribute__((visibility("default")))

// A stored weight; strides in bytes. E4M3 magnitudes are read as fp16, which makes them 2^8 too small.
typedef struct {
    const uint8_t *qdata, *scale;
    int64_t qdata_stride, scale_stride;
    int64_t rows, columns, tiles, group_size;
    int scale_type, scale_bytes, groups_per_tile; // groups_per_tile is 1 for groups of 64 and more
    float books[2][16]; // book 1 is negated: the signed scale times it is |scale| times book 1
} Weight;

// Lookup tables for one mode: two byte planes of 16-bit entries, or one of 8-bit entries.
typedef struct {
    uint16_t wide[2][16];
    uint8_t narrow[2][16];
    float unit; // the value of one integer step; 1 for MODE_EXACT, where `wide` has the bits of bf16
} Tables;

// Tokens of a call, packed for one instruction set and mode: [tile][token][bytes_per_tile].
typedef struct {
    const uint8_t *data;
    int64_t tokens;
} Packed;

INLINE void prefetch(const uint8_t *p) { __builtin_prefetch(p); }

INLINE uint32_t float_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

INLINE float bits_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE float load_number(const void *base, int type, int64_t index) {
    if (type == TYPE_FP32) {
        float value;
        memcpy(&value, (const uint8_t *)base + 4 * index, 4);
        return value;
    }
    uint16_t half;
    memcpy(&half, (const uint8_t *)base + 2 * index, 2);
    return bits_float((uint32_t)half << 16);
}

INLINE void store_number(void *base, int type, int64_t index, float value) {
    if (type == TYPE_FP32) {
        memcpy((uint8_t *)base + 4 * index, &value, 4);
        return;
    }
    const uint32_t bits = float_bits(value);
    // round to nearest, ties to even; a NaN stays one
    uint16_t half = (uint16_t)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
    if ((bits & 0x7FFFFFFF) > 0x7F800000) half = (uint16_t)(bits >> 16 | 0x40);
    memcpy((uint8_t *)base + 2 * index, &half, 2);
}

// The stored scale of group `index` of a row, with its sign, without the 2^8 of E4M3.
INLINE float load_scale(const uint8_t *row, int type, int64_t index) {
    if (type == SCALE_BF16) return load_number(row, TYPE_BF16, index);
    const uint32_t code = row[index] & 127, sign = (uint32_t)(row[index] >> 7) << 31;
    if (code == 127) return bits_float(0x7FC00000 | sign);
    const float magnitude = code < 8 ? (float)code * 0x1p-17f : bits_float((code << 20) + ((120 - 8) << 23));
    return bits_float(float_bits(magnitude) | sign);
}

// Bytes from the first scale of a row to the first of a tile.
INLINE int64_t scale_offset(const Weight *w, int64_t tile) {
    const int64_t group = w->groups_per_tile > 1 ? tile * w->groups_per_tile : tile * TILE_COLUMNS / w->group_size;
    return group * w->scale_bytes;
}

#endif
