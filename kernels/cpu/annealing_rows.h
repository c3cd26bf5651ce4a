// Annealing of as many rows as a vector has lanes: see aaac_ao/encode/annealing.py. Part of rounding_rows.h.
TARGET static void NAME(anneal_rows)(void *job, int64_t index) {
    Anneal *a = job;
    const int columns = a->columns;
    const int64_t row = index * LANES;
    const int lanes = a->rows - row < LANES ? (int)(a->rows - row) : LANES;
    Floats *memory = aligned_alloc(sizeof(Floats), 2 * sizeof(Floats) * columns);
    int *known = calloc((columns + STRIP - 1) / STRIP, sizeof(int));
    if (memory == NULL || known == NULL) {
        a->failed = 1;
        free(memory);
        free(known);
        return;
    }
    Floats *value = memory, *pull = memory + columns, heat = load(a->heat + row, lanes), growth = {0};
    for (int i = 0; i < columns; i++) {
        value[i] = load(a->values + i * a->rows + row, lanes);
        pull[i] = load(a->pull + i * a->rows + row, lanes);
    }
    Steps steps = {.metric = a->metric, .pull = pull, .columns = columns, .known = known};
    Ints at = {0}; // where the rows are in the noise
    for (int lane = 0; lane < lanes; lane++) at[lane] = a->offset[row + lane];
    for (int sweep = 0; sweep < a->sweeps; sweep++) {
        const float *noise = a->noise + (int64_t)sweep * columns;
        Floats scale = {0}, inverse = {0};
        Ints second = {0}, code;
        for (int i = 0; i < columns; i++) {
            if (i % a->group_size == 0) {
                const int64_t group = (int64_t)(i / a->group_size) * a->rows + row;
                scale = load(a->scale + group, lanes);
                inverse = reciprocal(scale);
                for (int lane = 0; lane < lanes; lane++) second[lane] = -(int32_t)a->selector[group + lane];
            }
            if (i % STRIP == 0) catch_up(&steps, i / STRIP);
            const float curvature = a->metric[(int64_t)i * columns + i];
            const Floats push = heat * gather(noise, at) * (1.0f / sqrtf(curvature));
            at = (at + 1) & (at + 1 < columns);
            const Floats wanted = value[i] - pull[i] * (1.0f / curvature) + push;
            const Floats moved = nearest_of(&a->books, second, wanted * inverse, &code) * scale;
            const Floats step = moved - value[i];
            if (!any(step != 0)) continue;
            growth += step * (2.0f * pull[i] + step * curvature);
            value[i] = moved;
            for (int lane = 0; lane < lanes; lane++) a->codes[i * a->rows + row + lane] = (uint8_t)code[lane];
            move(&steps, i, step);
        }
    }
    catch_up_all(&steps);
    for (int i = 0; i < columns; i++) {
        store(a->values + i * a->rows + row, value[i], lanes);
        store(a->pull + i * a->rows + row, pull[i], lanes);
    }
    store(a->growth + row, growth, lanes);
    free(memory);
    free(known);
}
