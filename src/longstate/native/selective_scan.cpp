// The selective scan and its gradient. A vector holds as many channels, so that no sum runs across its lanes; a thread
// takes PIECE channels of one sequence through tile after tile of steps, whose rows of u and dt it then finds in its cache.
#include "isa.h"

namespace longstate::ISA {

// 2^z; below 2^-126 it stays there, which is nothing beside a state; from 2^128 on it is infinite, and NaN stays NaN.
static inline vf decay(vf z) {
    const vf magic = all(12582912.f);
    z = choose(z < all(-126.f), all(-126.f), choose(z > all(128.f), all(128.f), z));
    vf n = z + magic, r = z - (n - magic);
    vf p = all(1.5403530e-4f);
    p = p * r + all(1.3333558e-3f);
    p = p * r + all(9.6181291e-3f);
    p = p * r + all(5.5504109e-2f);
    p = p * r + all(2.4022651e-1f);
    p = p * r + all(6.9314718e-1f);
    p = p * r + all(1.f);
    return number(bits(p) + (bits(n) << 23));
}

constexpr float LOG2E = 1.44269504089f;

// The channels of one vector: where they are, and A log2 e and the state with states as rows.
struct Lanes {
    int64_t at;
    int count;
    float *a, *h;
};

// Take the state of some channels through steps [begin, end); N is the number of states if known, else 0.
template <int N>
static void advance(const SelectiveScan& x, int64_t b, const Lanes& c, int64_t begin, int64_t end) {
    const int64_t states = N ? N : x.states;
    std::vector<float> room(2 * states);
    vf h[N ? N : 1];
    for (int n = 0; n < N; n++) h[n] = load(c.h + n * W);
    for (int64_t t = begin; t < end; t++) {
        if (x.start && x.start[b * x.length + t]) {
            for (int n = 0; n < N; n++) h[n] = vf{};
            if (!N) std::fill_n(c.h, states * W, 0.f);
        }
        const float *B = read_row(x.B, b, t, states, room.data()), *C = read_row(x.C, b, t, states, room.data() + states);
        vf step = read(x.dt, b, t, c.at, c.count), input = read(x.u, b, t, c.at, c.count) * step;
        vf sum[4] = {};
        if constexpr (N > 0) {
#pragma GCC unroll 16
            for (int n = 0; n < N; n++) {
                h[n] = decay(step * load(c.a + n * W)) * h[n] + input * all(B[n]);
                sum[n % 4] += h[n] * all(C[n]);
            }
        } else {
            for (int64_t n = 0; n < states; n++) {
                vf s = decay(step * load(c.a + n * W)) * load(c.h + n * W) + input * all(B[n]);
                store(c.h + n * W, s);
                sum[n % 4] += s * all(C[n]);
            }
        }
        write(x.y, b, t, c.at, (sum[0] + sum[1]) + (sum[2] + sum[3]), c.count);
    }
    for (int n = 0; n < N; n++) store(c.h + n * W, h[n]);
}

static void load_columns(const float* from, int64_t states, const Lanes& c, float factor, float* to) {
    for (int64_t n = 0; n < states; n++)
        for (int i = 0; i < W; i++) to[n * W + i] = i < c.count ? from[(c.at + i) * states + n] * factor : 0.f;
}

static void store_columns(const float* from, int64_t states, const Lanes& c, float* to) {
    for (int i = 0; i < c.count; i++)
        for (int64_t n = 0; n < states; n++) to[(c.at + i) * states + n] = from[n * W + i];
}

void selective_scan(const SelectiveScan& x) {
    const int64_t pieces = (x.width + PIECE - 1) / PIECE, tiles = (x.length + x.tile - 1) / x.tile;
    const int64_t vectors = PIECE / W, size = x.states * W, sequence = x.width * x.states;
#pragma omp parallel for schedule(static) num_threads(x.threads)
    for (int64_t job = 0; job < x.batch * pieces; job++) {
        const int64_t b = job / pieces, first = job % pieces * PIECE;
        std::vector<float> room(2 * vectors * size);
        std::vector<Lanes> all_lanes;
        for (int64_t at = first; at < std::min(first + PIECE, x.width); at += W) {
            float* own = room.data() + 2 * size * int64_t(all_lanes.size());
            all_lanes.push_back({at, int(std::min<int64_t>(W, x.width - at)), own, own + size});
            load_columns(x.A, x.states, all_lanes.back(), LOG2E, own);
            load_columns(x.initial + b * sequence, x.states, all_lanes.back(), 1.f, own + size);
        }
        for (int64_t tile = 0; tile < tiles; tile++)
            for (const Lanes& c : all_lanes) {
                if (x.kept) store_columns(c.h, x.states, c, x.kept + (tile * x.batch + b) * sequence);
                const int64_t begin = tile * x.tile, end = std::min(begin + x.tile, x.length);
                if (x.states == 16)
                    advance<16>(x, b, c, begin, end);
                else
                    advance<0>(x, b, c, begin, end);
            }
        for (const Lanes& c : all_lanes) {
            store_columns(c.h, x.states, c, x.final + b * sequence);
            if (x.kept) store_columns(c.h, x.states, c, x.kept + (tiles * x.batch + b) * sequence);
        }
    }
}

// One tile backwards: states and decays are computed again from the kept state; `adjoint` is dL/dh after the tile, and
// before it on return. Sums over channels are collected in sums_B and sums_C [t n] of vectors.
static void retreat(const SelectiveScanBackward& g, int64_t b, const Lanes& c, int64_t tile, float* adjoint, float* grad_A,
                    float* states_at, float* decays_at, float* sums_B, float* sums_C) {
    const SelectiveScan& x = g.forward;
    const int64_t N = x.states, size = N * W;
    const int64_t begin = tile * x.tile, end = std::min(begin + x.tile, x.length);
    std::vector<float> room(2 * N);
    load_columns(x.kept + (tile * x.batch + b) * x.width * N, N, c, 1.f, states_at);
    for (int64_t t = begin; t < end; t++) {
        const float* B = read_row(x.B, b, t, N, room.data());
        const bool starts = x.start && x.start[b * x.length + t];
        vf step = read(x.dt, b, t, c.at, c.count), input = read(x.u, b, t, c.at, c.count) * step;
        float *before = states_at + (t - begin) * size, *a = decays_at + (t - begin) * size;
        for (int64_t n = 0; n < N; n++) {
            vf d = starts ? vf{} : decay(step * load(c.a + n * W));
            store(a + n * W, d);
            store(before + size + n * W, d * load(before + n * W) + input * all(B[n]));
        }
    }
    for (int64_t t = end - 1; t >= begin; t--) {
        const float *B = read_row(x.B, b, t, N, room.data()), *C = read_row(x.C, b, t, N, room.data() + N);
        vf step = read(x.dt, b, t, c.at, c.count), u = read(x.u, b, t, c.at, c.count);
        vf grad = read(g.grad, b, t, c.at, c.count);
        vf input = u * step, from_B{}, from_a{};
        const float *before = states_at + (t - begin) * size, *a = decays_at + (t - begin) * size;
        float *sum_B = sums_B + (t - begin) * size, *sum_C = sums_C + (t - begin) * size;
        for (int64_t n = 0; n < N; n++) {
            vf l = load(adjoint + n * W) + grad * all(C[n]);
            vf decayed = l * load(a + n * W), flow = decayed * load(before + n * W);
            store(sum_C + n * W, load(sum_C + n * W) + grad * load(before + size + n * W));
            store(sum_B + n * W, load(sum_B + n * W) + l * input);
            from_B += l * all(B[n]);
            from_a += flow * load(c.a + n * W);
            store(grad_A + n * W, load(grad_A + n * W) + flow * step);
            store(adjoint + n * W, decayed);
        }
        write(g.grad_u, b, t, c.at, from_B * step, c.count);
        write(g.grad_dt, b, t, c.at, from_B * u + from_a * all(1 / LOG2E), c.count);
    }
}

void selective_scan_backward(const SelectiveScanBackward& g) {
    const SelectiveScan& x = g.forward;
    const int64_t pieces = (x.width + PIECE - 1) / PIECE, tiles = (x.length + x.tile - 1) / x.tile;
    const int64_t N = x.states, size = N * W, vectors = PIECE / W;
#pragma omp parallel for schedule(static) num_threads(x.threads)
    for (int64_t job = 0; job < x.batch * pieces; job++) {
        const int64_t b = job / pieces, piece = job % pieces, first = piece * PIECE;
        std::vector<float> room(3 * vectors * size), scratch((4 * x.tile + 1) * size);
        float *states_at = scratch.data(), *decays_at = states_at + (x.tile + 1) * size;
        float *sums_B = decays_at + x.tile * size, *sums_C = sums_B + x.tile * size;
        std::vector<Lanes> all_lanes;
        for (int64_t at = first; at < std::min(first + PIECE, x.width); at += W) {
            float* own = room.data() + 3 * size * int64_t(all_lanes.size());
            all_lanes.push_back({at, int(std::min<int64_t>(W, x.width - at)), own, own + size});
            load_columns(x.A, N, all_lanes.back(), LOG2E, own);
            load_columns(g.grad_final + b * x.width * N, N, all_lanes.back(), 1.f, own + size);
        }
        for (int64_t tile = tiles - 1; tile >= 0; tile--) {
            std::fill_n(sums_B, 2 * x.tile * size, 0.f);
            for (const Lanes& c : all_lanes)
                retreat(g, b, c, tile, c.h, c.h + size, states_at, decays_at, sums_B, sums_C);
            const int64_t begin = tile * x.tile, end = std::min(begin + x.tile, x.length);
            for (int64_t i = 0; i < (end - begin) * N; i++) {
                const int64_t to = ((piece * x.batch + b) * x.length + begin) * N + i;
                g.grad_B[to] = total(load(sums_B + i * W));
                g.grad_C[to] = total(load(sums_C + i * W));
            }
        }
        for (const Lanes& c : all_lanes) {
            store_columns(c.h, N, c, g.grad_initial + b * x.width * N);
            store_columns(c.h + size, N, c, g.grad_A + b * x.width * N);
        }
    }
}

}  // namespace longstate::ISA
