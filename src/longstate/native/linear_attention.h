// What both directions of linear attention do with values. Included after chunks.h.

// The values of a chunk as they are and as they are written: times dt.
static inline void read_values(const LinearAttention& x, int64_t b, int64_t t, int64_t count, int64_t h, float* v,
                               float* written, int64_t ahead = C) {
    const int64_t p = filled(x.values);
    gather(x.v, b, t, count, h * x.values, x.values, v, ahead);
    std::copy_n(v, C * p, written);
    if (!x.dt) return;
    float dt[C] = {};
    for (int64_t c = 0; c < count; c++) dt[c] = number_at(x.dt, b, t + c, h);
    scale_rows(written, p, dt);
}

// D for the value channels [i, i + count) of a head.
static inline vf skip(const LinearAttention& x, int64_t h, int64_t i, int count) {
    return x.skips == 1 ? all(x.D[h]) : load_some(x.D + h * x.values + i, count);
}

static inline int lanes(int64_t width, int64_t i) { return int(std::min<int64_t>(W, width - i)); }
