// Rounding of a block of columns under a quadratic error, 16 rows of the weight at a time: see
// aaac_ao/encode/rounding.py, which has the same steps in PyTorch. Below it, annealing: see aaac_ao/encode/annealing.py.
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "pool.h"

enum { LANES = 16, MOST_COLUMNS = 256 };

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

#define INLINE static inline __attribute__((always_inline))
#if defined(__x86_64__) && defined(__gnu_linux__)
#define EVERY_ISA __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define EVERY_ISA
#endif

typedef struct {
    float entry[2][16], middle[2][15];
} Books;

// All matrices are [columns or groups][rows], rows contiguous; `factor`, `metric` and `root` are [columns][columns].
typedef struct {
    float *target; // in: what to round; out: root times the error
    const float *factor, *metric, *root, *candidates;
    const int32_t *ends;
    float *scale;
    uint8_t *selector, *codes;
    int64_t rows;
    int columns, groups, count, sweeps;
    Books books;
} Block;

static void fill_books(Books *books, const float *entries) {
    memcpy(books->entry, entries, sizeof books->entry);
    for (int book = 0; book < 2; book++)
        for (int i = 0; i < 15; i++)
            books->middle[book][i] = (books->entry[book][i] + books->entry[book][i + 1]) * 0.5f;
}

INLINE Floats splat(float x) { return (Floats){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }

INLINE Floats pick(Ints mask, Floats yes, Floats no) { return (Floats)((mask & (Ints)yes) | (~mask & (Ints)no)); }

INLINE Floats load(const float *from, int lanes) {
    Floats x = {0};
    memcpy(&x, from, lanes == LANES ? sizeof x : sizeof(float) * lanes);
    return x;
}

INLINE void store(float *to, Floats x, int lanes) { memcpy(to, &x, lanes == LANES ? sizeof x : sizeof(float) * lanes); }

// 1 / x, and 0 for zero and subnormal numbers
INLINE Floats reciprocal(Floats x) { return (Floats)((Ints)(1.0f / x) & (x >= 0x1p-126f)); }

// The nearest entry of one book; ties go to the lower one.
INLINE Floats nearest(const Books *books, int book, Floats x) {
    Floats value = splat(books->entry[book][0]);
#pragma GCC unroll 15
    for (int i = 0; i < 15; i++) value = pick(x > books->middle[book][i], splat(books->entry[book][i + 1]), value);
    return value;
}

// The same with a book for every lane, and the codes.
INLINE Floats nearest_of(const Books *books, Ints second, Floats x, Ints *code) {
    Floats value = pick(second, splat(books->entry[1][0]), splat(books->entry[0][0]));
    *code = (Ints){0};
#pragma GCC unroll 15
    for (int i = 0; i < 15; i++) {
        Ints above = x > pick(second, splat(books->middle[1][i]), splat(books->middle[0][i]));
        value = pick(above, pick(second, splat(books->entry[1][i + 1]), splat(books->entry[0][i + 1])), value);
        *code -= above;
    }
    return value;
}

// The scale and book of a group with which feedback inside the group leaves the least error.
INLINE void choose(const Block *b, const Floats *target, int group, int64_t row, int lanes, Floats *scale,
                   Ints *second) {
    int first = b->ends[group], end = b->ends[group + 1], columns = b->columns;
    Floats least = splat(INFINITY), left[MOST_COLUMNS];
    *scale = splat(0);
    *second = (Ints){0};
    for (int candidate = 0; candidate < b->count; candidate++) {
        Floats s = load(b->candidates + ((int64_t)candidate * b->groups + group) * b->rows + row, lanes);
        Floats inverse = reciprocal(s);
        for (int book = 0; book < 2; book++) {
            Floats cost = splat(0);
            memcpy(left + first, target + first, sizeof(Floats) * (end - first));
            for (int i = first; i < end; i++) {
                const float *row_of = b->factor + (int64_t)i * columns;
                Floats error = (left[i] - nearest(&b->books, book, left[i] * inverse) * s) * (1.0f / row_of[i]);
                cost += error * error;
                for (int j = i + 1; j < end; j++) left[j] -= row_of[j] * error;
            }
            Ints better = cost < least;
            least = pick(better, cost, least);
            *scale = pick(better, s, *scale);
            *second = (*second & ~better) | (book ? better : (Ints){0});
        }
    }
}

EVERY_ISA static void round_rows(void *job, int64_t index) {
    const Block *b = job;
    int columns = b->columns;
    int64_t row = index * LANES;
    int lanes = b->rows - row < LANES ? (int)(b->rows - row) : LANES;
    Floats target[MOST_COLUMNS], left[MOST_COLUMNS], value[MOST_COLUMNS], pull[MOST_COLUMNS];
    Floats scale[MOST_COLUMNS], inverse[MOST_COLUMNS]; // of groups, of which there are no more than columns
    Ints second[MOST_COLUMNS], code[MOST_COLUMNS];
    for (int i = 0; i < columns; i++) target[i] = left[i] = load(b->target + i * b->rows + row, lanes);
    for (int group = 0; group < b->groups; group++) {
        choose(b, left, group, row, lanes, &scale[group], &second[group]);
        inverse[group] = reciprocal(scale[group]);
        for (int i = b->ends[group]; i < b->ends[group + 1]; i++) {
            const float *row_of = b->factor + (int64_t)i * columns;
            value[i] = nearest_of(&b->books, second[group], left[i] * inverse[group], &code[i]) * scale[group];
            Floats error = (left[i] - value[i]) * (1.0f / row_of[i]);
            for (int j = i + 1; j < columns; j++) left[j] -= row_of[j] * error;
        }
    }
    for (int i = 0; i < columns; i++) { // metric times error
        Floats sum = splat(0);
        for (int j = 0; j < columns; j++) sum += b->metric[(int64_t)i * columns + j] * (target[j] - value[j]);
        pull[i] = sum;
    }
    for (int sweep = 0; sweep < b->sweeps; sweep++)
        for (int group = 0; group < b->groups; group++)
            for (int i = b->ends[group]; i < b->ends[group + 1]; i++) {
                const float *row_of = b->metric + (int64_t)i * columns;
                Floats best = value[i] + pull[i] * (1.0f / row_of[i]);
                Floats moved = nearest_of(&b->books, second[group], best * inverse[group], &code[i]) * scale[group];
                Floats step = moved - value[i];
                value[i] = moved;
                for (int j = 0; j < columns; j++) pull[j] -= row_of[j] * step;
            }
    for (int i = 0; i < columns; i++) {
        Floats sum = splat(0);
        for (int j = 0; j <= i; j++) sum += b->root[(int64_t)i * columns + j] * (target[j] - value[j]);
        store(b->target + i * b->rows + row, sum, lanes);
        for (int lane = 0; lane < lanes; lane++) b->codes[i * b->rows + row + lane] = (uint8_t)code[i][lane];
    }
    for (int group = 0; group < b->groups; group++) {
        store(b->scale + group * b->rows + row, scale[group], lanes);
        for (int lane = 0; lane < lanes; lane++) b->selector[group * b->rows + row + lane] = second[group][lane] != 0;
    }
}

// Sizes and layouts are checked by the caller: columns and groups are 1 .. MOST_COLUMNS, every group has a column.
__attribute__((visibility("default"))) void
aaac_round_block(float *target, const float *factor, const float *metric, const float *root, const float *books,
                 const float *candidates, const int32_t *ends, float *scale, uint8_t *selector, uint8_t *codes,
                 int64_t rows, int columns, int groups, int count, int sweeps, int threads) {
    Block block = {.target = target,
                   .factor = factor,
                   .metric = metric,
                   .root = root,
                   .candidates = candidates,
                   .ends = ends,
                   .scale = scale,
                   .selector = selector,
                   .codes = codes,
                   .rows = rows,
                   .columns = columns,
                   .groups = groups,
                   .count = count,
                   .sweeps = sweeps};
    fill_books(&block.books, books);
    pool_run(threads, (rows + LANES - 1) / LANES, round_rows, &block);
}

// Annealing. Matrices as above, with all columns of the weight.

typedef struct {
    float *values, *pull, *growth; // in and out: values, half the gradient, and by how much the error rose
    uint8_t *codes;
    const float *metric, *noise, *heat, *scale; // noise [sweeps][columns]
    const int32_t *offset;
    const uint8_t *selector;
    int64_t rows;
    int columns, group_size, sweeps;
    Books books;
    int failed;
} Anneal;

INLINE int any(Ints mask) {
    int32_t bits = 0;
    for (int lane = 0; lane < LANES; lane++) bits |= mask[lane];
    return bits != 0;
}

EVERY_ISA static void anneal_rows(void *job, int64_t index) {
    Anneal *a = job;
    const int columns = a->columns;
    const int64_t row = index * LANES;
    const int lanes = a->rows - row < LANES ? (int)(a->rows - row) : LANES;
    Floats *memory = aligned_alloc(sizeof(Floats), 2 * sizeof(Floats) * columns);
    if (memory == NULL) {
        a->failed = 1;
        return;
    }
    Floats *value = memory, *pull = memory + columns, heat = load(a->heat + row, lanes), growth = splat(0);
    for (int i = 0; i < columns; i++) {
        value[i] = load(a->values + i * a->rows + row, lanes);
        pull[i] = load(a->pull + i * a->rows + row, lanes);
    }
    int at[LANES] = {0}; // where the rows are in the noise
    for (int lane = 0; lane < lanes; lane++) at[lane] = a->offset[row + lane];
    for (int sweep = 0; sweep < a->sweeps; sweep++) {
        const float *noise = a->noise + (int64_t)sweep * columns;
        Floats scale = splat(0), inverse = scale;
        Ints second = {0}, code;
        for (int i = 0; i < columns; i++) {
            if (i % a->group_size == 0) {
                const int64_t group = (int64_t)(i / a->group_size) * a->rows + row;
                scale = load(a->scale + group, lanes);
                inverse = reciprocal(scale);
                for (int lane = 0; lane < lanes; lane++) second[lane] = -(int32_t)a->selector[group + lane];
            }
            Floats push;
            for (int lane = 0; lane < LANES; lane++) {
                push[lane] = noise[at[lane]];
                at[lane] = at[lane] + 1 < columns ? at[lane] + 1 : 0;
            }
            const float *row_of = a->metric + (int64_t)i * columns;
            const Floats wanted = value[i] - pull[i] * (1.0f / row_of[i]) + heat * push * (1.0f / sqrtf(row_of[i]));
            const Floats moved = nearest_of(&a->books, second, wanted * inverse, &code) * scale;
            const Floats step = moved - value[i];
            if (!any(step != 0)) continue;
            growth += step * (2.0f * pull[i] + step * row_of[i]);
            value[i] = moved;
            for (int j = 0; j < columns; j++) pull[j] += row_of[j] * step;
            for (int lane = 0; lane < lanes; lane++) a->codes[i * a->rows + row + lane] = (uint8_t)code[lane];
        }
    }
    for (int i = 0; i < columns; i++) {
        store(a->values + i * a->rows + row, value[i], lanes);
        store(a->pull + i * a->rows + row, pull[i], lanes);
    }
    store(a->growth + row, growth, lanes);
    free(memory);
}

// Sizes and layouts are checked by the caller. Returns 0, or 1 without memory: then some rows are as they were.
__attribute__((visibility("default"))) int
aaac_anneal(float *values, uint8_t *codes, float *pull, float *growth, const float *metric, const float *noise,
            const float *heat, const float *books, const float *scale, const uint8_t *selector, const int32_t *offset,
            int64_t rows, int columns, int group_size, int sweeps, int threads) {
    Anneal job = {.values = values,
                  .pull = pull,
                  .growth = growth,
                  .codes = codes,
                  .metric = metric,
                  .noise = noise,
                  .heat = heat,
                  .scale = scale,
                  .selector = selector,
                  .offset = offset,
                  .rows = rows,
                  .columns = columns,
                  .group_size = group_size,
                  .sweeps = sweeps};
    fill_books(&job.books, books);
    pool_run(threads, (rows + LANES - 1) / LANES, anneal_rows, &job);
    return job.failed;
}
