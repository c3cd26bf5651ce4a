// Every path of the CPU kernel on ragged shapes, in buffers of exactly the documented size, against sums in double.
// `make sanitize` builds it with AddressSanitizer and UndefinedBehaviorSanitizer.
#include "sanitize.h"

#include "../kernels/cpu/linear.c"

typedef struct {
    int64_t rows, columns, group_size, groups, tiles;
    int scale_type;
    uint8_t *qdata, *scale;
    uint16_t books[32];
    double *dense, *scales; // [rows, columns], with the scale of the tensor: weights, and the scale of each
} Sample;

static const float tensor_scale = 0.75f;

static Sample make_sample(int64_t rows, int64_t columns, int64_t group_size, int scale_type) {
    Sample s = {
        rows, columns, group_size, (columns + group_size - 1) / group_size, (columns + 63) / 64, scale_type, 0, 0,
        {0},  0,       0};
    const size_t bytes = (size_t)((rows + 15) / 16 * s.tiles * TILE_BYTES);
    s.qdata = take(bytes);
    for (size_t i = 0; i < bytes; i++) s.qdata[i] = (uint8_t)(uniform() * 128 + 128);
    s.scale = take((size_t)(rows * s.groups * (scale_type == SCALE_BF16 ? 2 : 1)));
    for (int64_t i = 0; i < rows * s.groups; i++) {
        if (scale_type == SCALE_BF16)
            store_number(s.scale, TYPE_BF16, i, i % 11 ? (float)uniform() : -0.0f);
        else
            s.scale[i] = (uint8_t)(i % 11 ? (i * 37 % 127) | (i & 1) << 7 : 0x80);
    }
    for (int i = 0; i < 32; i++) store_number(s.books, TYPE_BF16, i, (float)uniform());
    s.dense = take((size_t)(rows * columns) * sizeof(double));
    s.scales = take((size_t)(rows * columns) * sizeof(double));
    for (int64_t n = 0; n < rows; n++)
        for (int64_t k = 0; k < columns; k++) {
            const int64_t row = n % 16, column = k % 64, lane = 4 * (row % 8) + column % 32 / 8;
            const int64_t word = 2 * (column / 32) + row / 8;
            const uint8_t *tile = s.qdata + (n / 16 * s.tiles + k / 64) * TILE_BYTES;
            const int code = tile[16 * lane + 4 * word + column % 8 / 2] >> 4 * (column % 2) & 15;
            const int64_t at = n * s.groups + k / group_size;
            const float scale = load_scale(s.scale + (scale_type == SCALE_BF16 ? 2 * at : at), scale_type, 0);
            const float entry = load_number(s.books, TYPE_BF16, 16 * (float_bits(scale) >> 31) + code);
            const double unit = scale_type == SCALE_BF16 ? 1 : 256;
            s.scales[n * columns + k] = fabs((double)scale) * unit * tensor_scale;
            s.dense[n * columns + k] = s.scales[n * columns + k] * entry;
        }
    return s;
}

static void check(const char *what, const Sample *s, int isa, int mode, int64_t tokens, double error, double bound) {
    if (error <= bound) return;
    failures++;
    printf("%s: isa %d, mode %d, %ld tokens, [%ld, %ld], group %ld, scales %d: error %g, bound %g\n", what, isa, mode,
           (long)tokens, (long)s->rows, (long)s->columns, (long)s->group_size, s->scale_type, error, bound);
}

static void check_linear(const Sample *s, int isa, int mode, int64_t tokens, int type, int threads) {
    // how far integers may be from an entry of a book and from an input, both at most 1, by mode
    const double entry[] = {0, 0.5 / BOOK16_TOP, 0.5 / BOOK8_TOP};
    const double input[] = {0, 0.5 / (isa == ISA_AVX512 ? INPUT16_TOP : INPUT15_TOP),
                            0.5 / (isa == ISA_AVX2 ? 63 : 127)};
    const double rounding = type == TYPE_BF16 ? 4e-3 : 1e-6;
    const size_t size = type == TYPE_FP32 ? 4 : 2;
    void *x = take((size_t)(tokens * s->columns) * size), *y = take((size_t)(tokens * s->rows) * size);
    float *bias = take((size_t)s->rows * 4);
    for (int64_t i = 0; i < tokens * s->columns; i++) store_number(x, type, i, (float)uniform());
    for (int64_t i = 0; i < s->rows; i++) bias[i] = (float)uniform();
    const int64_t scale_stride = s->groups * (s->scale_type == SCALE_BF16 ? 2 : 1);
    const int status = aaac_linear(isa, mode, threads, x, type, s->columns, tokens, s->qdata, s->tiles * TILE_BYTES,
                                   s->scale, scale_stride, s->scale_type, s->books, &tensor_scale, s->group_size,
                                   s->rows, s->columns, bias, TYPE_FP32, y);
    check("status", s, isa, mode, tokens, status, 0);
    for (int64_t m = 0; m < tokens; m++)
        for (int64_t n = 0; n < s->rows; n++) {
            double sum = bias[n], bound = rounding * fabs(bias[n]);
            for (int64_t k = 0; k < s->columns; k++) {
                const double w = s->dense[n * s->columns + k], in = load_number(x, type, m * s->columns + k);
                const double step = s->scales[n * s->columns + k] * entry[mode];
                sum += w * in;
                bound += rounding * fabs(w * in) + step * fabs(in) + (fabs(w) + step) * input[mode];
            }
            check("linear", s, isa, mode, tokens, fabs(load_number(y, type, m * s->rows + n) - sum), bound + 1e-30);
        }
    free(x), free(y), free(bias);
}

static void check_dequantize(const Sample *s, int isa) {
    float *w = take((size_t)(s->rows * s->columns) * 4);
    const int64_t scale_stride = s->groups * (s->scale_type == SCALE_BF16 ? 2 : 1);
    const int status = aaac_dequantize(isa, 2, s->qdata, s->tiles * TILE_BYTES, s->scale, scale_stride, s->scale_type,
                                       s->books, &tensor_scale, s->group_size, s->rows, s->columns, w);
    check("status", s, isa, 0, 0, status, 0);
    for (int64_t i = 0; i < s->rows * s->columns; i++)
        check("dequantize", s, isa, 0, 0, fabs(w[i] - s->dense[i]), fabs(s->dense[i]) * 2e-7);
    free(w);
}

int main(void) {
    static const int64_t shapes[][2] = {{37, 172}, {1, 16}, {100, 130}, {16, 64}, {17, 300}, {3, 1}};
    static const int64_t groups[][2] = {{128, SCALE_BF16}, {64, SCALE_BF16}, {32, SCALE_BF16}, {16, SCALE_BF16},
                                        {192, SCALE_BF16}, {16, SCALE_E4M3}, {32, SCALE_E4M3}, {64, SCALE_E4M3}};
    static const int64_t tokens[] = {1, 2, 5, 33};
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        for (size_t j = 0; j < sizeof groups / sizeof *groups; j++) {
            const Sample s = make_sample(shapes[i][0], shapes[i][1], groups[j][0], (int)groups[j][1]);
            for (int isa = ISA_PLAIN; isa <= ISA_AVX512; isa++) {
                if (!aaac_has_isa(isa)) continue;
                check_dequantize(&s, isa);
                for (int mode = MODE_EXACT; mode <= MODE_INT8; mode++)
                    for (int t = 0; t < 4; t++) check_linear(&s, isa, mode, tokens[t], (t + (int)j) % 2, t % 2 ? 3 : 1);
            }
            free(s.qdata), free(s.scale), free(s.dense), free(s.scales);
        }
    int count = 0;
    for (int isa = ISA_PLAIN; isa <= ISA_AVX512; isa++) count += aaac_has_isa(isa);
    printf("%d failures with %d instruction sets\n", failures, count);
    return failures != 0;
}
