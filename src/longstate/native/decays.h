// Decays within a chunk of C steps. Exponents are never positive, and no two sums are subtracted.
//
// Included after chunks.h. D_ts = e^(g_(s+1) + ... + g_t) is what is left of step s at step t; `into` is what is left of
// the state before the chunk at each step, `out` of each step at the chunk's end, `through` of the state there. A start
// is a g of -inf.

typedef float Square[C * C];

// The factor e^x, x <= 0, as the number that stands for it (chunks.h).
static inline vf remaining(vf x) {
    vf rest, y = exp(x, rest);
    return choose(y >= all(0.5f), y - all(1.f) + rest, choose(y == all(0.f), all(-1.f), y));
}

// Which log decays there are: none (`channels` 0), one for a head, or one for each key channel of it.
struct Decays {
    const Rows& g;
    const uint8_t* start;  // [b t]
    int64_t length, channels;

    bool by_channel() const { return channels > 1; }
    bool starts(int64_t b, int64_t t) const { return start && start[b * length + t]; }

    // How many of `count` steps from t on come before the first start.
    int64_t before_start(int64_t b, int64_t t, int64_t count) const {
        int64_t c = 0;
        while (c < count && !starts(b, t + c)) c++;
        return c;
    }

    // g for `count` steps from t on, as [steps], which fill vectors, or as rows [steps channels]; 0 for the other steps.
    void read_steps(int64_t b, int64_t t, int64_t count, int64_t head, float* to, int64_t steps = C) const {
        const int64_t row = by_channel() ? filled(channels) : 1;
        std::fill_n(to, steps * row, 0.f);
        for (int64_t c = 0; c < count; c++)
            if (starts(b, t + c))
                std::fill_n(to + c * row, row, -INFINITY);
            else if (by_channel())
                for (int64_t i = 0; i < channels; i += W) {
                    const int some = int(std::min<int64_t>(W, channels - i));
                    store(to + c * row + i, read(g, b, t + c, head * channels + i, some));
                }
            else if (channels)
                to[c] = read(g, b, t + c, head, 1)[0];
    }
};

// From one g for each step.
struct HeadDecays {
    Square D;                      // 0 above the diagonal
    float into[C], remains_into[C], remains_out[C];

    const float* out() const { return D + (C - 1) * C; }
    Remains through() const { return {remains_into + C - 1, 0}; }

    void set(const float* g) {
        float sum = 0.f;
        for (int t = 0; t < C; t++) into[t] = sum += g[t];
        for (int i = 0; i < C; i += W) {
            vi lane;
            for (int l = 0; l < W; l++) lane[l] = i + l;
            vf z{};
            for (int t = 0; t < C; t++) {
                z = choose(lane < t, z + all(g[t]), vf{});
                store(D + t * C + i, choose(lane <= t, exp(z), vf{}));
            }
            store(remains_out + i, remaining(z));
            z = load(into + i);
            store(into + i, exp(z));
            store(remains_into + i, remaining(z));
        }
    }
};

static inline void scale_rows(float* x, int64_t width, const float* factors, int64_t count = C) {
    for (int64_t t = 0; t < count; t++)
        for (int64_t i = 0; i < width; i += W) store(x + t * width + i, load(x + t * width + i) * all(factors[t]));
}

// From rows of g of `width` channels: g becomes e^g, and `through` what remains of the state. Products of up to C
// of them are taken where their exponents' sums would cost as many exponentials.
static inline void channel_decays(float* g, int64_t width, float* through) {
    for (int64_t i = 0; i < width; i += W) {
        vf sum{};
        for (int t = 0; t < C; t++) {
            const vf z = load(g + t * width + i);
            sum += z;
            store(g + t * width + i, exp(z));
        }
        store(through + i, remaining(sum));
    }
}

// scores[t][s] = sum_n q_t D_ts k_s for s <= t, else 0, from a = e^g and q and k in rows of `width` channels; and, if there
// are two readers, the same of the other one. k_s becomes k_s out_s: what is left of it is taken along from step to step,
// four at a time.
static inline void decayed_scores(const float* a, const float* q, const float* other, float* k, int64_t width,
                                  float* scores, float* other_scores) {
    for (int t = 0; t < C; t += 4)
        for (int s = 0; s < C; s++) {
            vf sum[4] = {}, other_sum[4] = {};
            for (int64_t i = 0; i < width && s < t + 4; i += W) {
                vf left = load(k + s * width + i);
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) {
                    if (t + j > s) left *= load(a + (t + j) * width + i);
                    if (t + j >= s) sum[j] += left * load(q + (t + j) * width + i);
                    if (t + j >= s && other) other_sum[j] += left * load(other + (t + j) * width + i);
                }
                store(k + s * width + i, left);
            }
            for (int j = 0; j < 4; j++) {
                scores[(t + j) * C + s] = total(sum[j]);
                if (other) other_scores[(t + j) * C + s] = total(other_sum[j]);
            }
        }
}

// q_t becomes q_t into_t.
static inline void decay_from_begin(const float* a, float* q, int64_t width) {
    for (int64_t i = 0; i < width; i += W) {
        vf left = all(1.f);
        for (int t = 0; t < C; t++) {
            left *= load(a + t * width + i);
            store(q + t * width + i, load(q + t * width + i) * left);
        }
    }
}
