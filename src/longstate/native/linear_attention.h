// What both directions of linear attention and of the delta rule have in common. Included after decays.h.

static inline int lanes(int64_t width, int64_t i) { return int(std::min<int64_t>(W, width - i)); }

// D for the value channels [i, i + W) of a head.
static inline vf skip(const LinearAttention& x, int64_t h, int64_t i) {
    return x.skips == 1 ? all(number_at(x.D, 0, 0, h)) : read(x.D, 0, 0, h * x.values + i, lanes(x.values, i));
}

// What the steps of a chunk write for one head, and what they read with.
struct Chunk {
    const LinearAttention& x;
    const Decays decays;
    const int64_t n, p;               // keys and values in whole vectors
    Room g;                           // e^g by channel
    Room q_into, k_into, k_out;       // [C n]: by channel, q_t into_t, k_t into_t and k_s out_s
    Room through, seen;               // [n] [C p]
    Square scores, own;               // q_t D_ts k_s and k_t D_ts k_s for s <= t
    HeadDecays head;
    float dt[C];

    explicit Chunk(const LinearAttention& x)
        : x(x), decays{x.decay, x.start, x.length, x.channels}, n(filled(x.keys)), p(filled(x.values)),
          g(C * (decays.by_channel() ? n : 1)), q_into(decays.by_channel() ? C * n : 0), k_into(q_into), k_out(q_into),
          through(n), seen(x.erases ? C * p : 0) {}

    // Read decays, and compute the scores from q and k [C n] and, by head, their products without decay.
    APART void begin(int64_t b, int64_t t, int64_t count, int64_t h, const float* q, const float* k, const float* qk,
               const float* kk) {
        decays.read_steps(b, t, count, h, g.data());
        for (int64_t c = 0; c < C; c++) dt[c] = x.dt && c < count ? number_at(x.dt, b, t + c, h) : 1.f;
        if (decays.by_channel()) {
            for (Room* room : {&q_into, &k_into, &k_out}) std::copy_n(room == &q_into ? q : k, C * n, room->data());
            channel_decays(g.data(), n, through.data());
            decayed_scores(g.data(), q, x.erases ? k : nullptr, k_out.data(), n, scores, own);
            decay_from_begin(g.data(), q_into.data(), n);
            if (x.erases) decay_from_begin(g.data(), k_into.data(), n);
        } else {
            head.set(g.data());
            for (int i = 0; i < C * C; i += W) {
                store(scores + i, load(qk + i) * load(head.D + i));
                if (x.erases) store(own + i, load(kk + i) * load(head.D + i));
            }
        }
    }

    // From values, 0 after the last step, to what is written: dt_t times v_t or, if it erases, times what the state lacks
    // at the key, which takes the place of v_t. `alive` steps come before the first start: later ones see nothing of S,
    // be it NaN.
    void write(const float* S, const float* k, int64_t alive, float* v, float* written) {
        if (!x.erases) {
            std::copy_n(v, C * p, written);
            if (x.dt) scale_rows(written, p, dt);
            return;
        }
        multiply(alive, p, x.keys, decays.by_channel() ? k_into.data() : k, n, 1, S, p, seen.data(), p, REPLACE);
        if (!decays.by_channel()) scale_rows(seen.data(), p, head.into, alive);
        std::fill(seen.begin() + alive * p, seen.end(), 0.f);
        for (int64_t c = 0; c < C; c++)
            for (int64_t i = 0; i < p; i += W) {
                vf e = load(v + c * p + i) - load(&seen[c * p + i]);
                for (int64_t s = 0; s < c; s++) e -= all(own[c * C + s]) * load(written + s * p + i);
                store(v + c * p + i, e);
                store(written + c * p + i, e * all(dt[c]));
            }
    }

    // The state after the chunk, in the place of the one before; `written` is used up.
    void advance(float* S, const float* k, int64_t count, float* written) {
        if (!decays.by_channel()) scale_rows(written, p, head.out());
        multiply(x.keys, p, count, decays.by_channel() ? k_out.data() : k, 1, n, written, p, S, p,
                 decays.by_channel() ? Remains{through.data(), 1} : head.through());
    }
};
