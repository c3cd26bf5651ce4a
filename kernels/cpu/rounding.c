// Rounding of a block of columns under a quadratic error: see aaac_ao/encode/rounding.py, which has the same steps in
// PyTorch. Below it, annealing: see aaac_ao/encode/annealing.py. The work on rows is in rounding_rows.h and
// annealing_rows.h.
#include <stdlib.h>

#include "common.h"
#include "pool.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// STRIP: columns whose steps are kept in registers until all of them are known. PENDING: steps of annealing that are
// kept until all columns hear of them.
enum { MOST_COLUMNS = 256, STRIP = 8, PENDING = 64 };

// In `tree`, level by level, what tells the entries of a book apart: the 2^level nodes of the second book stand behind
// those of the first. What lies behind them is only read along.
typedef struct {
    float entry[2][16], tree[4][24];
} Books;

// All matrices are [columns or groups][rows], rows contiguous; `factor`, `metric` and `root` are [columns][columns].
typedef struct {
    float *target; // in: what to round; out: root times the error
    const float *factor, *metric, *root, *candidates;
    const int32_t *ends;
    float *values, *scale;
    uint8_t *selector, *codes;
    int64_t rows;
    int columns, groups, count, sweeps;
    Books books;
} Block;

// Annealing; matrices as above, with all columns of the weight.

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

static void fill_books(Books *books, const float *entries) {
    memcpy(books->entry, entries, sizeof books->entry);
    memset(books->tree, 0, sizeof books->tree);
    for (int book = 0; book < 2; book++)
        for (int level = 0; level < 4; level++)
            for (int node = 0; node < 1 << level; node++) {
                const float *below = books->entry[book] + (2 * node + 1) * (8 >> level) - 1;
                books->tree[level][(book << level) + node] = (below[0] + below[1]) * 0.5f;
            }
}

// How many rows go side by side in a vector, and by what code
#define LANES 4
#define TARGET
#define NAME(x) x##_plain
#include "rounding_rows.h"
#if defined(__x86_64__)
#define LANES 8
#define TARGET __attribute__((target("arch=x86-64-v3")))
#define NAME(x) x##_avx2
#include "rounding_rows.h"
#define LANES 16
#define TARGET __attribute__((target("arch=x86-64-v4")))
#define NAME(x) x##_avx512
#include "rounding_rows.h"
#endif

typedef struct {
    int lanes;
    Task round, anneal;
} Rows;

// The code for an instruction set, or for the best one below it that this machine has.
static Rows rows_of(int isa) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (isa >= ISA_AVX512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return (Rows){16, round_rows_avx512, anneal_rows_avx512};
    if (isa >= ISA_AVX2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return (Rows){8, round_rows_avx2, anneal_rows_avx2};
#endif
    (void)isa;
    return (Rows){4, round_rows_plain, anneal_rows_plain};
}

// Whether the machine multiplies bf16 numbers faster than fp32 ones.
EXPORT int aaac_has_bfloat16(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512bf16") != 0;
#else
    return 0;
#endif
}

// Sizes and layouts are checked by the caller: columns and groups are 1 .. MOST_COLUMNS, every group has a column.
EXPORT void aaac_round_block(float *target, const float *factor, const float *metric, const float *root,
                             const float *books, const float *candidates, const int32_t *ends, float *values,
                             float *scale, uint8_t *selector, uint8_t *codes, int64_t rows, int columns, int groups,
                             int count, int sweeps, int isa, int threads) {
    Block block = {.target = target,
                   .factor = factor,
                   .metric = metric,
                   .root = root,
                   .candidates = candidates,
                   .ends = ends,
                   .values = values,
                   .scale = scale,
                   .selector = selector,
                   .codes = codes,
                   .rows = rows,
                   .columns = columns,
                   .groups = groups,
                   .count = count,
                   .sweeps = sweeps};
    fill_books(&block.books, books);
    const Rows path = rows_of(isa);
    pool_run(threads, (rows + path.lanes - 1) / path.lanes, path.round, &block);
}

// Sizes and layouts are checked by the caller. Returns 0, or 1 without memory: then some rows are as they were.
EXPORT int aaac_anneal(float *values, uint8_t *codes, float *pull, float *growth, const float *metric,
                       const float *noise, const float *heat, const float *books, const float *scale,
                       const uint8_t *selector, const int32_t *offset, int64_t rows, int columns, int group_size,
                       int sweeps, int isa, int threads) {
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
    const Rows path = rows_of(isa);
    pool_run(threads, (rows + path.lanes - 1) / path.lanes, path.anneal, &job);
    return job.failed;
}
