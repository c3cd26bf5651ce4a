// Rounding of blocks and annealing by every instruction set on ragged shapes, in buffers of exactly the documented
// size: what comes back must belong together, in double. `make sanitize` builds it with AddressSanitizer and
// UndefinedBehaviorSanitizer.
#include "sanitize.h"

#include "../kernels/cpu/rounding.c"

static float *random_floats(int64_t count, double low, double high) {
    float *x = take((size_t)count * sizeof *x);
    for (int64_t i = 0; i < count; i++) x[i] = (float)(low + (high - low) * (uniform() + 1) / 2);
    return x;
}

static float *random_books(void) { // ascending
    float *books = take(32 * sizeof *books);
    for (int i = 0; i < 32; i++) books[i] = (float)(i % 16 * 0.125 - 1 + 0.05 * uniform());
    return books;
}

static void check(const char *what, int isa, int64_t rows, int columns, double error, double bound) {
    if (error <= bound) return;
    failures++;
    printf("%s: isa %d, [%d, %ld]: %g, bound %g\n", what, isa, columns, (long)rows, error, bound);
}

// Lower L, the upper U with U^T = L^-1, and L^T L
static void random_metric(int columns, float *lower, float *upper, float *metric) {
    for (int i = 0; i < columns; i++)
        for (int j = 0; j < columns; j++)
            lower[i * columns + j] = j > i ? 0 : (float)(j == i ? 1.5 + uniform() / 2 : uniform() / sqrt(columns));
    for (int j = 0; j < columns; j++)
        for (int i = 0; i < columns; i++) {
            double sum = i == j;
            for (int k = j; k < i; k++) sum -= lower[i * columns + k] * (double)upper[j * columns + k];
            upper[j * columns + i] = i < j ? 0 : (float)(sum / lower[i * columns + i]);
        }
    for (int i = 0; i < columns; i++)
        for (int j = 0; j < columns; j++) {
            double sum = 0;
            for (int k = 0; k < columns; k++) sum += lower[k * columns + i] * (double)lower[k * columns + j];
            metric[i * columns + j] = (float)sum;
        }
}

static void check_round(int isa, int64_t rows, int columns, int group_size, int sweeps) {
    const int groups = (columns + group_size - 1) / group_size, count = 3;
    const size_t square = (size_t)columns * columns * sizeof(float);
    float *lower = take(square), *upper = take(square), *metric = take(square), *books = random_books();
    random_metric(columns, lower, upper, metric);
    float *target = random_floats(columns * rows, -2, 2), *errors = take(columns * rows * sizeof *errors);
    float *candidates = random_floats(count * groups * rows, 0.5, 2), *scale = take(groups * rows * sizeof *scale);
    float *values = take(columns * rows * sizeof *values);
    uint8_t *selector = take(groups * rows), *codes = take(columns * rows);
    int32_t *ends = take((groups + 1) * sizeof *ends);
    for (int g = 0; g <= groups; g++) ends[g] = g * group_size < columns ? g * group_size : columns;
    memcpy(errors, target, columns * rows * sizeof *errors);
    aaac_round_block(errors, upper, metric, lower, books, candidates, ends, values, scale, selector, codes, rows,
                     columns, groups, count, sweeps, isa, rows % 3 + 1);
    for (int64_t r = 0; r < rows; r++)
        for (int i = 0; i < columns; i++) {
            double sum = 0;
            for (int j = 0; j <= i; j++) {
                const int64_t at = j / group_size * rows + r;
                if (codes[j * rows + r] > 15 || selector[at] > 1) abort();
                const float value = values[j * rows + r];
                check("values", isa, rows, columns, value != books[16 * selector[at] + codes[j * rows + r]] * scale[at],
                      0);
                sum += lower[i * columns + j] * ((double)target[j * rows + r] - value);
            }
            check("errors", isa, rows, columns, fabs(errors[i * rows + r] - sum), 1e-3);
        }
    for (int64_t i = 0; i < groups * rows; i++) {
        int found = 0;
        for (int c = 0; c < count; c++) found |= candidates[c * groups * rows + i] == scale[i];
        check("scale", isa, rows, columns, !found, 0);
    }
    free(lower), free(upper), free(metric), free(books), free(target), free(errors), free(candidates), free(scale);
    free(selector), free(codes), free(ends), free(values);
}

// H times (values - weight) of row r, and its product with that.
static double pulled(const float *metric, const float *values, const float *weight, int columns, int64_t rows,
                     int64_t r, double *pull) {
    double error = 0;
    for (int i = 0; i < columns; i++) {
        pull[i] = 0;
        for (int j = 0; j < columns; j++)
            pull[i] += metric[i * columns + j] * ((double)values[j * rows + r] - weight[j * rows + r]);
        error += pull[i] * ((double)values[i * rows + r] - weight[i * rows + r]);
    }
    return error;
}

static void check_anneal(int isa, int64_t rows, int columns, int group_size) {
    const int groups = (columns + group_size - 1) / group_size, sweeps = 4;
    const size_t square = (size_t)columns * columns * sizeof(float);
    float *lower = take(square), *upper = take(square), *metric = take(square), *books = random_books();
    random_metric(columns, lower, upper, metric);
    float *weight = random_floats(columns * rows, -2, 2), *values = take(columns * rows * sizeof *values);
    float *pull = take(columns * rows * sizeof *pull), *growth = take(rows * sizeof *growth);
    float *scale = random_floats(groups * rows, 0.5, 2), *noise = random_floats(sweeps * columns, -1, 1);
    float *heat = random_floats(rows, 0, 0.3);
    double *before = take(rows * sizeof *before), *own = take(columns * sizeof *own);
    uint8_t *selector = take(groups * rows), *codes = take(columns * rows);
    int32_t *offset = take(rows * sizeof *offset);
    for (int64_t i = 0; i < groups * rows; i++) selector[i] = uniform() > 0;
    for (int64_t r = 0; r < rows; r++) {
        offset[r] = (int32_t)((uniform() + 1) * 0.4999 * columns);
        for (int i = 0; i < columns; i++) {
            const int64_t at = i / group_size * rows + r;
            codes[i * rows + r] = (uint8_t)((uniform() + 1) * 7.99);
            values[i * rows + r] = books[16 * selector[at] + codes[i * rows + r]] * scale[at];
        }
        before[r] = pulled(metric, values, weight, columns, rows, r, own);
        for (int i = 0; i < columns; i++) pull[i * rows + r] = (float)own[i];
    }
    const int failed = aaac_anneal(values, codes, pull, growth, metric, noise, heat, books, scale, selector, offset,
                                   rows, columns, group_size, sweeps, isa, rows % 3 + 1);
    check("memory", isa, rows, columns, failed, 0);
    for (int64_t r = 0; r < rows; r++) {
        const double after = pulled(metric, values, weight, columns, rows, r, own);
        check("growth", isa, rows, columns, fabs(growth[r] - after + before[r]), 1e-3 * before[r]);
        for (int i = 0; i < columns; i++) {
            const int64_t at = i / group_size * rows + r;
            if (codes[i * rows + r] > 15) abort();
            const float value = books[16 * selector[at] + codes[i * rows + r]] * scale[at];
            check("values", isa, rows, columns, fabs(values[i * rows + r] - value), 0);
            check("pull", isa, rows, columns, fabs(pull[i * rows + r] - own[i]), 1e-3 * sqrt(before[r]));
        }
    }
    free(lower), free(upper), free(metric), free(books), free(weight), free(values), free(pull), free(growth);
    free(scale), free(noise), free(heat), free(before), free(own), free(selector), free(codes), free(offset);
}

int main(void) {
    static const int shapes[][3] = {{37, 172, 64},  {1, 16, 16}, {50, 130, 32}, {16, 64, 64},
                                    {17, 256, 128}, {3, 1, 16},  {9, 23, 7},    {33, 90, 16}};
    for (int isa = ISA_PLAIN; isa <= ISA_AVX512; isa++)
        for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
            for (int sweeps = 0; sweeps < 4; sweeps += 3)
                check_round(isa, shapes[i][0], shapes[i][1], shapes[i][2], sweeps);
            check_anneal(isa, shapes[i][0], shapes[i][1], shapes[i][2]);
        }
    printf("%d failures of the encoder with vectors of up to %d rows\n", failures, rows_of(ISA_AVX512).lanes);
    return failures != 0;
}
