// y = x W^T + bias and dequantisation for stored two-book weights, on raw pointers. The caller has checked every size:
// see the binding in __init__.py, which is the only user. The layout of qdata is described in aaac_ao/packing.py.
#include <stdlib.h>

#include "common.h"
#include "plain.h"
#include "pool.h"

#if defined(__x86_64__)
#define X86(...) __VA_ARGS__
#include <cpuid.h>

#include "avx2.h"
#include "avx2_decode.h"
#include "avx512.h"
#else
#define X86(...)
#endif

// Below this many products, a second thread comes too late to help.
enum { SHORT_PRODUCTS = 1 << 17 };

enum { DONE = 0, NO_MEMORY = -1, NO_SUCH_PATH = -2 };

static int has_isa[ISA_AVX512 + 1];

// Filled once: virtual machines take microseconds for a cpuid.
__attribute__((constructor)) static void find_isas(void) {
    has_isa[ISA_PLAIN] = 1;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    has_isa[ISA_AVX2] = avx2;
#ifdef HAS_AVX_VNNI
    unsigned a = 0, b, c, d; // not all compilers know the name of this feature
    has_isa[ISA_AVX_VNNI] = avx2 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
#endif
    has_isa[ISA_AVX512] = avx2 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") &&
                          __builtin_cpu_supports("avx512vbmi");
#endif
}

// Whether this machine, and the compiler, have an instruction set.
EXPORT int aaac_has_isa(int isa) { return isa >= ISA_PLAIN && isa <= ISA_AVX512 && has_isa[isa]; }

// Whether this machine works on the halves of AVX2's vectors one after the other (Zen, Zen+).
EXPORT int aaac_halves_vectors(void) {
#if defined(__x86_64__)
    return __builtin_cpu_is("znver1") != 0;
#else
    return 0;
#endif
}

// the weight

static Weight make_weight(const void *qdata, int64_t qdata_stride, const void *scale, int64_t scale_stride,
                          int scale_type, const void *books, int64_t rows, int64_t columns, int64_t group_size) {
    Weight w = {qdata, scale, qdata_stride, scale_stride, rows, columns, 0, group_size, scale_type, 0, 1, {{0}}};
    w.tiles = (columns + TILE_COLUMNS - 1) / TILE_COLUMNS;
    w.scale_bytes = scale_type == SCALE_BF16 ? 2 : 1;
    if (group_size < TILE_COLUMNS) w.groups_per_tile = (int)(TILE_COLUMNS / group_size);
    for (int i = 0; i < 32; i++) {
        const float entry = load_number(books, TYPE_BF16, i);
        w.books[i / 16][i % 16] = i < 16 ? entry : -entry;
    }
    return w;
}

// Fill the tables of `mode`, or those of MODE_EXACT if the books have no good integers; returns which.
static int make_tables(const Weight *w, int mode, Tables *tables) {
    float largest = 0;
    int finite = 1;
    for (int i = 0; i < 32; i++) {
        const float magnitude = fabsf(w->books[i / 16][i % 16]);
        finite &= magnitude < INFINITY;
        if (magnitude > largest) largest = magnitude;
    }
    if (!finite || !(largest > 0x1p-60f)) mode = MODE_EXACT;
    const float top = mode == MODE_INT16 ? BOOK16_TOP : BOOK8_TOP;
    tables->unit = mode == MODE_EXACT ? 1.0f : largest / top;
    for (int i = 0; i < 32; i++) {
        const float entry = w->books[i / 16][i % 16];
        const long step = mode == MODE_EXACT ? 0 : lrintf(entry / largest * top);
        tables->wide[i / 16][i % 16] =
            mode == MODE_EXACT ? (uint16_t)(float_bits(entry) >> 16) : (uint16_t)(int16_t)step;
        tables->narrow[i / 16][i % 16] = (uint8_t)(step + 128);
    }
    return mode;
}

// What 2^8 too small E4M3 numbers and the scale of the tensor make up for.
static float make_factor(const Weight *w, const void *per_tensor_scale) {
    const float factor = per_tensor_scale == NULL ? 1.0f : load_number(per_tensor_scale, TYPE_FP32, 0);
    return w->scale_type == SCALE_E4M3 ? factor * 256.0f : factor;
}

// The scales of the 16 rows of a tile row. Rows below the last one repeat it. If groups are missing in the last tile,
// `last` has those that exist, then zeros.
typedef struct {
    const uint8_t *row[TILE_ROWS], *last[TILE_ROWS];
    uint8_t copy[TILE_ROWS][8];
    int64_t full; // tiles that have all their groups
} ScaleRows;

static void find_scales(const Weight *w, int64_t tile_row, ScaleRows *rows) {
    const int64_t groups = (w->columns + w->group_size - 1) / w->group_size;
    rows->full = w->groups_per_tile > 1 ? groups / w->groups_per_tile : w->tiles;
    memset(rows->copy, 0, sizeof rows->copy);
    for (int r = 0; r < TILE_ROWS; r++) {
        const int64_t row = tile_row * TILE_ROWS + r;
        rows->row[r] = w->scale + (row < w->rows ? row : w->rows - 1) * w->scale_stride;
        // those of the next tile row come from 16 places at once: ask for them now
        if (row + TILE_ROWS < w->rows)
            for (int64_t byte = 0; byte < groups * w->scale_bytes; byte += 64)
                prefetch(rows->row[r] + TILE_ROWS * w->scale_stride + byte);
        rows->last[r] = rows->copy[r];
        if (rows->full == w->tiles) continue;
        const int64_t at = rows->full * w->groups_per_tile;
        memcpy(rows->copy[r], rows->row[r] + at * w->scale_bytes, (size_t)((groups - at) * w->scale_bytes));
    }
}

// linear: a job is a block of tokens

typedef struct {
    int isa, mode;
    Weight w;
    PlainTables plain;
    X86(Avx2Tables avx2; Avx512Tables avx512;)
    float unit, factor; // value of one step of an integer product, and of one unit of a sum
    const void *x, *bias;
    int x_type, bias_type, bytes_per_tile;
    int64_t x_stride, tokens;
    uint8_t *packed, rough[MAX_TOKENS]; // rough: tokens whose integers would not do
    void *y;
} Linear;

// AVX-VNNI adds two instructions to AVX2 and shares its layouts.
INLINE int is_avx2(int isa) { return isa == ISA_AVX2 || isa == ISA_AVX_VNNI; }

static void pack_tile(const Linear *job, const float *x, uint8_t *out) {
#if defined(__x86_64__)
    if (is_avx2(job->isa)) {
        const uint8_t *order = avx2_order(job->w.groups_per_tile);
        if (job->mode == MODE_EXACT) avx2_pack_exact(x, order, out);
        if (job->mode == MODE_INT16) avx2_pack_int16(x, order, job->unit, out);
        if (job->mode == MODE_INT8) avx2_pack_int8(x, order, job->unit, job->isa == ISA_AVX2 ? 63.0f : 127.0f, out);
    }
    if (job->isa == ISA_AVX512 && job->mode == MODE_EXACT) avx512_pack_exact(x, out);
    if (job->isa == ISA_AVX512 && job->mode == MODE_INT16) avx512_pack_int16(x, job->unit, out);
    if (job->isa == ISA_AVX512 && job->mode == MODE_INT8) avx512_pack_int8(x, job->unit, out);
    if (job->isa != ISA_PLAIN) return;
#endif
    (void)job;
    memcpy(out, x, PLAIN_BYTES_PER_TILE);
}

// Task: pack token m. It is rough if it is not finite, or so small that its steps leave the normal range.
static void pack_token(void *argument, int64_t m) {
    Linear *job = argument;
    const uint8_t *row = (const uint8_t *)job->x + m * job->x_stride * (job->x_type == TYPE_FP32 ? 4 : 2);
    uint32_t largest = 0;
    for (int64_t tile = 0; tile < job->w.tiles; tile++) {
        float x[TILE_COLUMNS] = {0};
        const int64_t start = tile * TILE_COLUMNS, left = job->w.columns - start;
        const int count = (int)(left < TILE_COLUMNS ? left : TILE_COLUMNS);
        if (job->x_type == TYPE_FP32)
            memcpy(x, row + 4 * start, (size_t)count * 4);
        else
            for (int k = 0; k < count; k++) x[k] = load_number(row, TYPE_BF16, start + k);
        for (int k = 0; k < TILE_COLUMNS; k++) {
            const uint32_t magnitude = float_bits(x[k]) & 0x7FFFFFFF;
            largest = magnitude > largest ? magnitude : largest;
        }
        pack_tile(job, x, job->packed + (tile * job->tokens + m) * job->bytes_per_tile);
    }
    const float top = bits_float(largest);
    job->rough[m] = largest >= 0x7F800000 || (largest != 0 && (top < 0x1p-76f || !(top * fabsf(job->unit) > 0x1p-85f)));
}

static void add_tiles(const Linear *job, const uint8_t *codes, const uint8_t *const *scales, const Packed *x,
                      int64_t first, int64_t last, float *totals) {
#if defined(__x86_64__)
    const int level = job->w.groups_per_tile / 2;
    if (job->isa == ISA_AVX512)
        avx512_kernels[job->mode][job->w.scale_type][level](&job->w, &job->avx512, codes, scales, x, first, last,
                                                            totals);
    if (job->isa == ISA_AVX2)
        avx2_kernels[job->mode][job->w.scale_type][level](&job->w, &job->avx2, codes, scales, x, first, last, totals);
#ifdef HAS_AVX_VNNI
    if (job->isa == ISA_AVX_VNNI)
        avx_vnni_kernels[job->mode][job->w.scale_type][level](&job->w, &job->avx2, codes, scales, x, first, last,
                                                              totals);
#endif
    if (job->isa != ISA_PLAIN) return;
#endif
    plain_tiles(&job->w, &job->plain, codes, scales, x, first, last, totals);
}

static void add_lanes(const Linear *job, const float *totals, int64_t tokens, int64_t m, float *sums) {
    X86(if (job->isa == ISA_AVX512) avx512_sums(totals, tokens, m, sums);)
    X86(if (is_avx2(job->isa)) avx2_sums(totals, tokens, m, sums, job->mode);)
    if (job->isa == ISA_PLAIN) plain_sums(totals, tokens, m, sums);
}

// Results of token m for the rows of a tile row.
static void store_row(const Linear *job, int64_t index, int64_t m, float *sums) {
    const int64_t first = index * TILE_ROWS, left = job->w.rows - first, at = m * job->w.rows + first;
    const int count = (int)(left < TILE_ROWS ? left : TILE_ROWS);
    for (int r = 0; r < count; r++) sums[r] *= job->factor;
    if (job->bias != NULL)
        for (int r = 0; r < count; r++) sums[r] += load_number(job->bias, job->bias_type, first + r);
    for (int r = 0; r < count; r++) store_number(job->y, job->x_type, at + r, sums[r]);
}

// Task: 16 rows of the weight, times all tokens.
static void tile_row(void *argument, int64_t index) {
    const Linear *job = argument;
    const Weight *w = &job->w;
    const uint8_t *codes = w->qdata + index * w->qdata_stride;
    float totals[LINES * MAX_TOKENS * 16] __attribute__((aligned(64))), sums[TILE_ROWS];
    ScaleRows scales;
    find_scales(w, index, &scales);
    memset(totals, 0, sizeof(float) * LINES * 16 * (size_t)job->tokens);
    const Packed x = {job->packed, job->tokens};
    add_tiles(job, codes, scales.row, &x, 0, scales.full, totals);
    if (scales.full < w->tiles) {
        const Packed end = {job->packed + scales.full * job->tokens * job->bytes_per_tile, job->tokens};
        add_tiles(job, codes + scales.full * TILE_BYTES, scales.last, &end, 0, 1, totals);
    }
    for (int64_t m = 0; m < job->tokens; m++) {
        add_lanes(job, totals, job->tokens, m, sums);
        store_row(job, index, m, sums);
    }
}

// Fill what depends on the arithmetic.
static void prepare(Linear *job, int mode, const void *per_tensor_scale) {
    Tables tables;
    job->mode = job->isa == ISA_PLAIN ? MODE_EXACT : make_tables(&job->w, mode, &tables);
    const float factor = make_factor(&job->w, per_tensor_scale);
    // steps of integers carry all factors, so that a sum has the size of its result
    job->unit = job->mode == MODE_EXACT ? 1.0f : tables.unit * factor;
    job->factor = job->mode == MODE_EXACT ? factor : 1.0f;
    job->bytes_per_tile = PLAIN_BYTES_PER_TILE;
    if (job->isa == ISA_PLAIN) plain_tables(&job->w, &job->plain);
    X86(if (is_avx2(job->isa)) avx2_tables(&tables, job->mode, &job->avx2);)
    X86(if (job->isa == ISA_AVX512) avx512_tables(&tables, job->mode, &job->avx512);)
    X86(if (is_avx2(job->isa)) job->bytes_per_tile = avx2_bytes_per_tile[job->mode];)
    X86(if (job->isa == ISA_AVX512) job->bytes_per_tile = avx512_bytes_per_tile[job->mode];)
}

// Tokens first .. first + count - 1 of the call.
static void run_block(const Linear *call, int64_t first, int64_t count, uint8_t *memory, int threads, uint8_t *rough) {
    Linear job = *call;
    const int size = job.x_type == TYPE_FP32 ? 4 : 2;
    job.x = (const uint8_t *)call->x + first * call->x_stride * size;
    job.y = (uint8_t *)call->y + first * call->w.rows * size;
    job.tokens = count;
    job.packed = memory;
    pool_run(threads, count, pack_token, &job);
    pool_run(threads, (job.w.rows + TILE_ROWS - 1) / TILE_ROWS, tile_row, &job);
    memcpy(rough, job.rough, (size_t)count);
}

// Blocks of about equal size, as few as the caches allow.
static int64_t tokens_at_a_time(int64_t bytes_per_token, int64_t tokens) {
    int64_t most = bytes_per_token > 0 ? MOST_INPUT_BYTES / bytes_per_token : MAX_TOKENS;
    if (most > MAX_TOKENS) most = MAX_TOKENS;
    if (most < 1) most = 1;
    const int64_t blocks = (tokens + most - 1) / most;
    return (tokens + blocks - 1) / blocks;
}

// x [tokens, columns] and y [tokens, rows] of one type, y contiguous; qdata_stride and scale_stride in bytes, x_stride
// in elements; per_tensor_scale and bias may be null.
EXPORT int aaac_linear(int isa, int mode, int threads, const void *x, int x_type, int64_t x_stride, int64_t tokens,
                       const void *qdata, int64_t qdata_stride, const void *scale, int64_t scale_stride, int scale_type,
                       const void *books, const void *per_tensor_scale, int64_t group_size, int64_t rows,
                       int64_t columns, const void *bias, int bias_type, void *y) {
    if (!aaac_has_isa(isa)) return NO_SUCH_PATH;
    if (tokens * rows * columns < SHORT_PRODUCTS) threads = 1;
    Linear job;
    job.isa = isa;
    job.w = make_weight(qdata, qdata_stride, scale, scale_stride, scale_type, books, rows, columns, group_size);
    job.x = x, job.x_type = x_type, job.x_stride = x_stride, job.tokens = tokens;
    job.bias = bias, job.bias_type = bias_type, job.y = y;
    prepare(&job, mode, per_tensor_scale);
    const int64_t per_token = job.bytes_per_tile * job.w.tiles, most = tokens_at_a_time(per_token, tokens);
    int64_t bytes = per_token * most;
    if (bytes < MOST_BYTES_PER_TILE * job.w.tiles) bytes = MOST_BYTES_PER_TILE * job.w.tiles; // a rough token
    uint8_t *memory = malloc((size_t)bytes + 64);
    if (memory == NULL) return NO_MEMORY;
    uint8_t *packed = (uint8_t *)(((uintptr_t)memory + 63) & ~(uintptr_t)63), rough[MAX_TOKENS], no[1];
    for (int64_t first = 0; first < tokens; first += most) {
        const int64_t count = tokens - first < most ? tokens - first : most;
        run_block(&job, first, count, packed, threads, rough);
        for (int64_t m = 0; m < count && job.mode != MODE_EXACT; m++) {
            if (!rough[m]) continue;
            Linear exact = job;
            prepare(&exact, MODE_EXACT, per_tensor_scale);
            run_block(&exact, first + m, 1, packed, threads, no);
        }
    }
    free(memory);
    return DONE;
}

// dequantisation

typedef struct {
    int isa;
    Weight w;
    PlainTables plain;
    X86(Avx2Tables avx2;)
    float factor;
    float *out;
} Dequantize;

// The 16 rows of the tiles first .. last - 1, side by side: out[row][64 (last - first)], `stride` from row to row.
static void decode_tiles(const Dequantize *job, const uint8_t *codes, const uint8_t *const *scales, int64_t first,
                         int64_t last, float *out, int64_t stride) {
    const Weight *w = &job->w;
    X86(if (job->isa == ISA_AVX512) {
        avx512_decode(w, codes, scales, first, last, job->factor, out, stride);
        return;
    })
    X86(if (is_avx2(job->isa)) {
        avx2_decode(w, &job->avx2, codes, scales, first, last, job->factor, out, stride);
        return;
    })
    for (int64_t tile = first; tile < last; tile++)
        for (int row = 0; row < TILE_ROWS; row++) {
            const uint8_t *line = codes + tile * TILE_BYTES + row % 8 * LINE_BYTES;
            float *to = out + row * stride + (tile - first) * TILE_COLUMNS;
            plain_decode(w, &job->plain, line, row / 8, scales[row] + scale_offset(w, tile), to);
            for (int k = 0; k < TILE_COLUMNS; k++) to[k] *= job->factor;
        }
}

// Task: decode 16 rows. What reaches over the edges of the weight is decoded tile by tile, aside.
static void decode_rows(void *argument, int64_t index) {
    const Dequantize *job = argument;
    const Weight *w = &job->w;
    const int64_t left = w->rows - index * TILE_ROWS, columns = w->columns;
    const int count = (int)(left < TILE_ROWS ? left : TILE_ROWS);
    const uint8_t *codes = w->qdata + index * w->qdata_stride;
    float *out = job->out + index * TILE_ROWS * columns, edge[TILE_ROWS * TILE_COLUMNS];
    ScaleRows scales;
    find_scales(w, index, &scales);
    const int64_t full = columns / TILE_COLUMNS < scales.full ? columns / TILE_COLUMNS : scales.full;
    const int64_t whole = count == TILE_ROWS ? full : 0;
    decode_tiles(job, codes, scales.row, 0, whole, out, columns);
    for (int64_t tile = whole; tile < w->tiles; tile++) {
        const int64_t start = tile * TILE_COLUMNS,
                      width = columns - start < TILE_COLUMNS ? columns - start : TILE_COLUMNS;
        if (tile < scales.full)
            decode_tiles(job, codes, scales.row, tile, tile + 1, edge, TILE_COLUMNS);
        else
            decode_tiles(job, codes + tile * TILE_BYTES, scales.last, 0, 1, edge, TILE_COLUMNS);
        for (int r = 0; r < count; r++)
            memcpy(out + r * columns + start, edge + r * TILE_COLUMNS, (size_t)width * sizeof(float));
    }
}

// The fp32 weight [rows, columns], contiguous.
EXPORT int aaac_dequantize(int isa, int threads, const void *qdata, int64_t qdata_stride, const void *scale,
                           int64_t scale_stride, int scale_type, const void *books, const void *per_tensor_scale,
                           int64_t group_size, int64_t rows, int64_t columns, float *out) {
    if (!aaac_has_isa(isa)) return NO_SUCH_PATH;
    Dequantize job;
    Tables tables;
    job.isa = isa;
    job.w = make_weight(qdata, qdata_stride, scale, scale_stride, scale_type, books, rows, columns, group_size);
    job.factor = make_factor(&job.w, per_tensor_scale);
    job.out = out;
    make_tables(&job.w, MODE_EXACT, &tables);
    if (isa == ISA_PLAIN) plain_tables(&job.w, &job.plain);
    X86(if (is_avx2(isa)) avx2_tables(&tables, MODE_EXACT, &job.avx2);)
    pool_run(threads, (rows + TILE_ROWS - 1) / TILE_ROWS, decode_rows, &job);
    return DONE;
}
