// What rounding.c does with as many rows as a vector has lanes. Included once for each instruction set, with LANES,
// TARGET (the attribute that asks for it) and NAME.
#define Floats NAME(Floats)
#define Ints NAME(Ints)
#define pick NAME(pick)
#define load NAME(load)
#define store NAME(store)
#define reciprocal NAME(reciprocal)
#define look_up NAME(look_up)
#define look_up_in NAME(look_up_in)
#define look_up_few NAME(look_up_few)
#define gather NAME(gather)
#define any NAME(any)
#define Steps NAME(Steps)
#define descend NAME(descend)
#define catch_up NAME(catch_up)
#define catch_up_all NAME(catch_up_all)
#define move NAME(move)
#define nearest NAME(nearest)
#define nearest_of NAME(nearest_of)
#define take_steps NAME(take_steps)
#define take_strip NAME(take_strip)
#define try_steps NAME(try_steps)
#define WAYS (LANES == 16 ? 2 : 1) // that registers have room for
#define pull_of NAME(pull_of)
#define root_times NAME(root_times)
#define try_scales NAME(try_scales)
#define choose NAME(choose)

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

INLINE TARGET Floats pick(Ints mask, Floats yes, Floats no) {
#if LANES == 8
    return (Floats)_mm256_blendv_ps((__m256)no, (__m256)yes, (__m256)mask);
#else
    return (Floats)((mask & (Ints)yes) | (~mask & (Ints)no));
#endif
}

INLINE TARGET Floats load(const float *from, int lanes) {
    Floats x = {0};
    memcpy(&x, from, lanes == LANES ? sizeof x : sizeof(float) * lanes);
    return x;
}

INLINE TARGET void store(float *to, Floats x, int lanes) {
    memcpy(to, &x, lanes == LANES ? sizeof x : sizeof(float) * lanes);
}

// 1 / x, and 0 for zero and subnormal numbers
INLINE TARGET Floats reciprocal(Floats x) { return (Floats)((Ints)(1.0f / x) & (x >= 0x1p-126f)); }

// An entry of 16 in `table` for every lane.
INLINE TARGET Floats look_up(const float *table, Ints at) {
#if LANES == 16
    return (Floats)_mm512_permutexvar_ps((__m512i)at, _mm512_loadu_ps(table));
#elif LANES == 8
    const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)at);
    const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), (__m256i)at);
    return (Floats)_mm256_blendv_ps(low, high, (__m256)(at << 28)); // by the bit of 8
#else
    return (Floats){table[at[0]], table[at[1]], table[at[2]], table[at[3]]};
#endif
}

// The same of up to 8, whatever `table` holds behind them.
INLINE TARGET Floats look_up_few(const float *table, Ints at) {
#if LANES == 8
    return (Floats)_mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)at);
#else
    return look_up(table, at);
#endif
}

INLINE TARGET Floats gather(const float *from, Ints at) {
#if LANES == 16
    return (Floats)_mm512_i32gather_ps((__m512i)at, from, 4);
#elif LANES == 8
    return (Floats)_mm256_i32gather_ps(from, (__m256i)at, 4);
#else
    return look_up(from, at);
#endif
}

INLINE TARGET int any(Ints mask) {
#if LANES == 16
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif LANES == 8
    return _mm256_movemask_ps((__m256)mask) != 0;
#else
    return (mask[0] | mask[1] | mask[2] | mask[3]) != 0;
#endif
}

// An entry of one of two tables.
INLINE TARGET Floats look_up_in(const float tables[2][16], Ints second, Ints at) {
#if LANES == 16
    const __m512i index = (__m512i)(at + (second & 16));
    return (Floats)_mm512_permutex2var_ps(_mm512_loadu_ps(tables[0]), index, _mm512_loadu_ps(tables[1]));
#else
    return pick(second, look_up(tables[1], at), look_up(tables[0], at));
#endif
}

// The nearest entry of one book; ties go to the lower one.
INLINE TARGET Floats nearest(const Books *books, int book, Floats x) {
    Ints code = -(x > books->tree[0][book]);
#pragma GCC unroll 3
    for (int level = 1; level < 4; level++)
        code += code - (x > look_up_few(books->tree[level] + (book << level), code));
    return look_up(books->entry[book], code);
}

// The same with a book for every lane, and the codes.
INLINE TARGET Floats nearest_of(const Books *books, Ints second, Floats x, Ints *code) {
    Ints found = -(x > look_up_few(books->tree[0], second & 1));
#pragma GCC unroll 2
    for (int level = 1; level < 3; level++)
        found += found - (x > look_up_few(books->tree[level], found + (second & (1 << level))));
    *code = found + found - (x > look_up(books->tree[3], found + (second & 8)));
    return look_up_in(books->entry, second, *code);
}

// What the steps of a strip's columns, `ways` of them for each, change in the columns from .. end - 1, which are
// `stride` apart; `rows` are theirs in a matrix of this width. Four at a time: one would wait for itself.
INLINE TARGET void take_strip(Floats *left, int stride, const float *rows, int columns, const Floats *own, int ways,
                              int from, int end) {
    int j = from;
    for (; j + 4 <= end; j += 4) {
        Floats x[4][WAYS];
#pragma GCC unroll 4
        for (int n = 0; n < 4; n++) memcpy(x[n], left + (j + n) * stride, sizeof(Floats) * ways);
#pragma GCC unroll 8
        for (int i = 0; i < STRIP; i++)
#pragma GCC unroll 4
            for (int n = 0; n < 4; n++)
#pragma GCC unroll 2
                for (int way = 0; way < ways; way++)
                    x[n][way] -= rows[(int64_t)i * columns + j + n] * own[i * ways + way];
#pragma GCC unroll 4
        for (int n = 0; n < 4; n++) memcpy(left + (j + n) * stride, x[n], sizeof(Floats) * ways);
    }
    for (; j < end; j++)
        for (int i = 0; i < STRIP; i++)
            for (int way = 0; way < ways; way++)
                left[j * stride + way] -= rows[(int64_t)i * columns + j] * own[i * ways + way];
}

// The same with one way to go, and any number of steps.
INLINE TARGET void take_steps(Floats *left, const float *rows, int columns, const Floats *steps, int count, int from,
                              int end) {
    if (count < STRIP) {
        for (int i = 0; i < count; i++)
            for (int j = from; j < end; j++) left[j] -= rows[(int64_t)i * columns + j] * steps[i];
        return;
    }
    Floats own[STRIP]; // not in memory, where `left` might change them
    memcpy(own, steps, sizeof own);
    take_strip(left, 1, rows, columns, own, 1, from, end);
}

// What the steps of a strip change in the columns behind it, up to `end`, in some of the ways to go.
INLINE TARGET void try_steps(Floats left[][4], const float *rows, int columns, const Floats steps[STRIP][4], int way,
                             int end) {
    Floats own[STRIP * WAYS]; // in registers
#pragma GCC unroll 8
    for (int i = 0; i < STRIP; i++) memcpy(own + i * WAYS, &steps[i][way], sizeof(Floats) * WAYS);
    take_strip(&left[0][way], 4, rows, columns, own, WAYS, STRIP, end);
}

// A group rounded under `ways / 2` scales, with both books under each: none of the ways to go waits for the others.
INLINE TARGET void try_scales(const Block *b, const Floats *target, int first, int end, const Floats *scale, int ways,
                              Floats *cost) {
    const int columns = b->columns;
    Floats left[MOST_COLUMNS][4], inverse[2];
    for (int way = 0; way < ways; way += 2) inverse[way / 2] = reciprocal(scale[way / 2]);
    for (int way = 0; way < ways; way++) cost[way] = (Floats){0};
    for (int i = first; i < end; i++)
        for (int way = 0; way < ways; way++) left[i][way] = target[i];
    for (int start = first; start < end; start += STRIP) {
        const int count = end - start < STRIP ? end - start : STRIP;
        const float *rows = b->factor + (int64_t)start * columns + start;
        Floats error[STRIP][4];
        for (int i = 0; i < count; i++) {
            const float *row_of = rows + (int64_t)i * columns;
#pragma GCC unroll 4
            for (int way = 0; way < ways; way++) {
                Floats x = left[start + i][way], value = nearest(&b->books, way & 1, x * inverse[way / 2]);
                error[i][way] = (x - value * scale[way / 2]) * (1.0f / row_of[i]);
                cost[way] += error[i][way] * error[i][way];
            }
            for (int j = i + 1; j < count; j++)
#pragma GCC unroll 4
                for (int way = 0; way < ways; way++) left[start + j][way] -= row_of[j] * error[i][way];
        }
        if (count == STRIP)
            for (int way = 0; way < ways; way += WAYS) try_steps(left + start, rows, columns, error, way, end - start);
    }
}

// The scale and book of a group with which feedback inside the group leaves the least error.
INLINE TARGET void choose(const Block *b, const Floats *target, int group, int64_t row, int lanes, Floats *scale,
                          Ints *second) {
    const int first = b->ends[group], end = b->ends[group + 1];
    Floats least = (Floats){0} + INFINITY, s[2], cost[4];
    *scale = (Floats){0};
    *second = (Ints){0};
    for (int candidate = 0; candidate < b->count; candidate += 2) {
        const int ways = candidate + 1 < b->count ? 4 : 2;
        for (int i = 0; i < ways / 2; i++)
            s[i] = load(b->candidates + ((int64_t)(candidate + i) * b->groups + group) * b->rows + row, lanes);
        if (ways == 4)
            try_scales(b, target, first, end, s, 4, cost);
        else
            try_scales(b, target, first, end, s, 2, cost);
        for (int way = 0; way < ways; way++) {
            Ints better = cost[way] < least;
            least = pick(better, cost[way], least);
            *scale = pick(better, s[way / 2], *scale);
            *second = (*second & ~better) | (way & 1 ? better : (Ints){0});
        }
    }
}

// Half the gradient: the metric times what is wrong, which is root^T times root times it.
INLINE TARGET void pull_of(const Block *b, const Floats *root_times_error, Floats *pull) {
    memset(pull, 0, sizeof(Floats) * b->columns);
    for (int start = 0; start < b->columns; start += STRIP) {
        int count = b->columns - start < STRIP ? b->columns - start : STRIP;
        take_steps(pull, b->root + (int64_t)start * b->columns, b->columns, root_times_error + start, count, 0,
                   start + count);
    }
}

INLINE TARGET void root_times(const Block *b, const Floats *error, Floats *product) {
    int start = 0;
    for (; start + STRIP <= b->columns; start += STRIP) {
        const float *rows = b->root + (int64_t)start * b->columns;
        Floats sum[STRIP] = {{0}}; // side by side: one sum would wait for itself
        for (int j = 0; j < start + STRIP; j++)
#pragma GCC unroll 8
            for (int i = 0; i < STRIP; i++) sum[i] += rows[(int64_t)i * b->columns + j] * error[j];
        memcpy(product + start, sum, sizeof sum);
    }
    for (; start < b->columns; start++) {
        product[start] = (Floats){0};
        for (int j = 0; j <= start; j++) product[start] += b->root[(int64_t)start * b->columns + j] * error[j];
    }
}

// Steps of columns that not all other columns know of yet: most weights stay where they are, and it is the others that
// cost time.
typedef struct {
    const float *metric;
    Floats *pull;
    int columns, count, *known; // how many of the steps the columns of a strip know of
    int column[PENDING];
    Floats step[PENDING];
} Steps;

// Add what the steps that a strip does not know of change in its columns.
INLINE TARGET void catch_up(Steps *steps, int strip) {
    const int start = strip * STRIP, columns = steps->columns, known = steps->known[strip], count = steps->count;
    Floats *pull = steps->pull + start;
    steps->known[strip] = count;
    if (start + STRIP > columns) {
        for (int p = known; p < count; p++)
            for (int j = start; j < columns; j++)
                pull[j - start] += steps->metric[(int64_t)steps->column[p] * columns + j] * steps->step[p];
        return;
    }
    Floats own[STRIP];
    memcpy(own, pull, sizeof own);
    for (int p = known; p < count; p++) {
        const float *row_of = steps->metric + (int64_t)steps->column[p] * columns + start;
        const Floats step = steps->step[p];
#pragma GCC unroll 8
        for (int j = 0; j < STRIP; j++) own[j] += row_of[j] * step;
    }
    memcpy(pull, own, sizeof own);
}

INLINE TARGET void catch_up_all(Steps *steps) {
    const int strips = (steps->columns + STRIP - 1) / STRIP;
    for (int strip = 0; strip < strips; strip++) catch_up(steps, strip);
    memset(steps->known, 0, strips * sizeof *steps->known);
    steps->count = 0;
}

// A step of a column, of which only its own strip hears at once.
INLINE TARGET void move(Steps *steps, int column, Floats step) {
    const int start = column / STRIP * STRIP;
    const int stop = start + STRIP < steps->columns ? start + STRIP : steps->columns;
    const float *row_of = steps->metric + (int64_t)column * steps->columns;
    for (int j = start; j < stop; j++) steps->pull[j] += row_of[j] * step;
    steps->column[steps->count] = column;
    steps->step[steps->count++] = step;
    steps->known[column / STRIP] = steps->count;
    if (steps->count == PENDING) catch_up_all(steps);
}

// Set code after code to its best value with all others fixed, `sweeps` times over.
INLINE TARGET void descend(const Block *b, const Floats *scale, const Floats *inverse, const Ints *second, Floats *pull,
                           Floats *value, Ints *code) {
    int known[MOST_COLUMNS / STRIP] = {0};
    Steps steps = {.metric = b->metric, .pull = pull, .columns = b->columns, .known = known};
    for (int sweep = 0; sweep < b->sweeps; sweep++)
        for (int i = 0, group = 0; i < b->columns; i++) {
            group += i == b->ends[group + 1];
            if (i % STRIP == 0) catch_up(&steps, i / STRIP);
            Ints found;
            const Floats best = value[i] - pull[i] * (1.0f / b->metric[(int64_t)i * b->columns + i]);
            const Floats moved = nearest_of(&b->books, second[group], best * inverse[group], &found) * scale[group];
            const Floats step = moved - value[i];
            if (!any(step != 0)) continue;
            value[i] = moved;
            code[i] = found;
            move(&steps, i, step);
        }
}

TARGET static void NAME(round_rows)(void *job, int64_t index) {
    const Block *b = job;
    int columns = b->columns;
    int64_t row = index * LANES;
    int lanes = b->rows - row < LANES ? (int)(b->rows - row) : LANES;
    Floats target[MOST_COLUMNS], left[MOST_COLUMNS], value[MOST_COLUMNS], lost[MOST_COLUMNS], pull[MOST_COLUMNS];
    Floats scale[MOST_COLUMNS], inverse[MOST_COLUMNS]; // of groups, of which there are no more than columns
    Ints second[MOST_COLUMNS], code[MOST_COLUMNS];
    for (int i = 0; i < columns; i++) target[i] = left[i] = load(b->target + i * b->rows + row, lanes);
    for (int group = 0; group < b->groups; group++) {
        choose(b, left, group, row, lanes, &scale[group], &second[group]);
        inverse[group] = reciprocal(scale[group]);
        for (int start = b->ends[group]; start < b->ends[group + 1]; start += STRIP) {
            int stop = start + STRIP < b->ends[group + 1] ? start + STRIP : b->ends[group + 1];
            for (int i = start; i < stop; i++) {
                const float *row_of = b->factor + (int64_t)i * columns;
                value[i] = nearest_of(&b->books, second[group], left[i] * inverse[group], &code[i]) * scale[group];
                lost[i] = (left[i] - value[i]) * (1.0f / row_of[i]); // which is root times the error
                for (int j = i + 1; j < stop; j++) left[j] -= row_of[j] * lost[i];
            }
            take_steps(left, b->factor + (int64_t)start * columns, columns, lost + start, stop - start, stop, columns);
        }
    }
    if (b->sweeps > 0) {
        pull_of(b, lost, pull);
        descend(b, scale, inverse, second, pull, value, code);
        for (int i = 0; i < columns; i++) target[i] -= value[i];
        root_times(b, target, lost);
    }
    for (int i = 0; i < columns; i++) {
        store(b->target + i * b->rows + row, lost[i], lanes);
        store(b->values + i * b->rows + row, value[i], lanes);
        for (int lane = 0; lane < lanes; lane++) b->codes[i * b->rows + row + lane] = (uint8_t)code[i][lane];
    }
    for (int group = 0; group < b->groups; group++) {
        store(b->scale + group * b->rows + row, scale[group], lanes);
        for (int lane = 0; lane < lanes; lane++) b->selector[group * b->rows + row + lane] = second[group][lane] != 0;
    }
}

#include "annealing_rows.h"

#undef Floats
#undef Ints
#undef pick
#undef load
#undef store
#undef reciprocal
#undef look_up
#undef look_up_in
#undef look_up_few
#undef gather
#undef any
#undef Steps
#undef descend
#undef catch_up
#undef catch_up_all
#undef move
#undef nearest
#undef nearest_of
#undef take_steps
#undef take_strip
#undef try_steps
#undef WAYS
#undef pull_of
#undef root_times
#undef try_scales
#undef choose
#undef LANES
#undef TARGET
#undef NAME
