// Linear attention: a chunk's steps meet each other in a small square, and the state in two products with its rows.
#include "isa.h"

namespace longstate::ISA {

#include "chunks.h"
#include "decays.h"
#include "linear_attention.h"

// One step of some channels of a head: the state is read from memory and written once.
template <int N>
static void step(const LinearAttention& x, int64_t b, int64_t h, int64_t i, int count, const float* remains,
                 const float* q, const float* k) {
    const int64_t every = x.channels > 1, at = (b * x.heads + h) * x.keys * x.values + i;
    const float* before = (x.initial ? x.initial : x.final) + at;
    float* after = x.final + at;
    const auto decayed = [&](int64_t m, int n) {
        const float f = x.initial ? remains[m * every] : -1.f;
        const vf old = f == -1.f ? vf{} : load_some(before + m * x.values + n * W, count);
        return f <= 0.f ? old + old * all(f) : old * all(f);
    };
    vf v[N], y[N] = {};
    for (int n = 0; n < N; n++) v[n] = read(x.v, b, 0, h * x.values + i + n * W, count);
    for (int n = 0; n < N && x.D; n++) y[n] = v[n] * skip(x, h, i + n * W);
    for (int64_t m = 0; m < x.keys && x.erases; m++)
        for (int n = 0; n < N; n++) v[n] -= decayed(m, n) * all(k[m]);
    for (int n = 0; n < N && x.dt; n++) v[n] *= all(number_at(x.dt, b, 0, h));
    for (int64_t m = 0; m < x.keys; m++)
        for (int n = 0; n < N; n++) {
            const vf s = decayed(m, n) + v[n] * all(k[m]);
            store_some(after + m * x.values + n * W, s, count);
            y[n] += s * all(q[m]);
        }
    for (int n = 0; n < N; n++) write(x.y, b, 0, h * x.values + i + n * W, y[n], count);
}

static void one_step(const LinearAttention& x) {
    const Decays decays{x.decay, x.start, x.length, x.channels};
    const int64_t width = filled(x.keys), shared = x.heads / x.groups;
    const int64_t threads = x.batch * x.heads * x.keys * x.values > 1 << 16 ? x.threads : 1;
    for_jobs(x.batch * x.heads, threads, [&](int64_t job) {
        const FlushedToZero flushed;
        const int64_t b = job / x.heads, h = job % x.heads, first = h / shared * x.keys;
        Room room(2 * width + filled(std::max<int64_t>(1, x.channels)));
        float* remains = room.data() + 2 * width;
        decays.read_steps(b, 0, 1, h, remains, 1);
        for (int64_t i = 0; i < std::max<int64_t>(1, x.channels); i += W) store(remains + i, remaining(load(remains + i)));
        const float* q = read_row(from(x.q, first), b, 0, x.keys, room.data());
        const float* k = read_row(from(x.k, first), b, 0, x.keys, room.data() + width);
        int64_t i = 0;
        for (; i + 4 * W <= x.values; i += 4 * W) step<4>(x, b, h, i, W, remains, q, k);
        for (; i < x.values; i += W) step<1>(x, b, h, i, lanes(x.values, i), remains, q, k);
    });
}

// What the steps of a chunk read for one head.
static void read_out(const LinearAttention& x, const Chunk& chunk, const float* S, const float* q, const float* written,
                     int64_t count, int64_t alive, float* y) {
    const int64_t n = chunk.n, p = chunk.p;
    const bool by_channel = chunk.decays.by_channel();
    multiply(alive, p, x.keys, by_channel ? chunk.q_into.data() : q, n, 1, S, p, y, p, REPLACE);
    std::fill_n(y + alive * p, (count - alive) * p, 0.f);
    multiply_lower(count, p, chunk.scores, written, p, y, p, by_channel ? ADD : Remains{chunk.head.remains_into, 1});
}

void linear_attention(const LinearAttention& x) {
    if (x.length == 1 && !x.kept) return one_step(x);
    const int64_t shared = x.heads / x.groups, pieces = (shared + HEADS - 1) / HEADS;
    const int64_t state = x.keys * x.values, tiles = (x.length + x.tile - 1) / x.tile;
#pragma omp parallel for schedule(static) num_threads(x.threads)
    for (int64_t job = 0; job < x.batch * x.groups * pieces; job++) {
        const FlushedToZero flushed;
        const int64_t piece = job % pieces, group = job / pieces % x.groups, b = job / pieces / x.groups;
        const int64_t first = group * shared + piece * HEADS, end = std::min(first + HEADS, (group + 1) * shared);
        Chunk chunk(x);
        const int64_t n = chunk.n, p = chunk.p;
        Room q(C * n), k(C * n), columns(n * C), v(C * p), written(C * p), y(C * p), states((end - first) * x.keys * p);
        Square qk, kk;
        for (int64_t h = first; h < end && x.initial; h++)
            widen_rows(x.initial + (b * x.heads + h) * state, x.keys, x.values, &states[(h - first) * x.keys * p]);
        for (int64_t t = 0; t < x.length; t += C) {
            const int64_t count = std::min<int64_t>(C, x.length - t), alive = chunk.decays.before_start(b, t, count);
            gather(x.q, b, t, count, group * x.keys, x.keys, q.data());
            gather(x.k, b, t, count, group * x.keys, x.keys, k.data());
            if (!chunk.decays.by_channel()) {
                transpose(C, n, k.data(), n, columns.data(), C);
                multiply(C, C, x.keys, q.data(), n, 1, columns.data(), C, qk, C, REPLACE);
                if (x.erases) multiply(C, C, x.keys, k.data(), n, 1, columns.data(), C, kk, C, REPLACE);
            }
            for (int64_t h = first; h < end; h++) {
                float* S = &states[(h - first) * x.keys * p];
                if (x.kept && t % x.tile == 0)
                    narrow_rows(S, x.keys, x.values, x.kept + ((t / x.tile * x.batch + b) * x.heads + h) * state);
                gather(x.v, b, t, count, h * x.values, x.values, v.data());
                chunk.begin(b, t, count, h, q.data(), k.data(), qk, kk);
                chunk.write(S, k.data(), alive, v.data(), written.data());
                read_out(x, chunk, S, q.data(), written.data(), count, alive, y.data());
                chunk.advance(S, k.data(), count, written.data());
                for (int64_t i = 0; i < p && x.D; i += W)
                    for (int64_t c = 0; c < count; c++)
                        store(&y[c * p + i], load(&y[c * p + i]) + load(&v[c * p + i]) * skip(x, h, i));
                scatter(x.y, b, t, count, h * x.values, x.values, y.data());
            }
        }
        for (int64_t h = first; h < end; h++) {
            float* final = x.final + (b * x.heads + h) * state;
            narrow_rows(&states[(h - first) * x.keys * p], x.keys, x.values, final);
            if (x.kept) std::copy_n(final, state, x.kept + ((tiles * x.batch + b) * x.heads + h) * state);
        }
    }
}

}  // namespace longstate::ISA
