// The selective scan.
#include "selective_scan.h"

namespace longstate::ISA {

static void finish(const SelectiveScan& x, const Tile& p, Field sums) {
    for (int64_t t = p.begin; t < p.end; t++)
        for (int64_t v = 0; v < p.vectors(); v++) {
            vf y = sums.of(v)[t - p.begin];
            if (x.gate) {
                const vf z = read(x.gate, p.b, t, p.channel(v), p.count(v));
                y *= z * sigmoid(z);
            }
            write(x.y, p.b, t, p.channel(v), y, p.count(v));
        }
}

// What the recurrence of a tile works on: the vector of channels at `channel`, `a` and `h` from the first of K states on.
// Rows of B and C have x.states.
struct Part {
    int64_t channel;
    Columns a, h, steps, inputs, sums;
    const float *B, *C;
};

template <int K>
static void advance(const SelectiveScan& x, const Tile& p, const Part& s) {
    vf h[K];
    for (int n = 0; n < K; n++) h[n] = s.h[n];
    for (int64_t t = 0; t < p.steps(); t++) {
        if (starts(x, p.b, p.begin + t))
            for (int n = 0; n < K; n++) h[n] = vf{};
        const float *B = s.B + t * x.states, *C = s.C + t * x.states;
        const vf step = s.steps[t], input = s.inputs[t];
        vf sum[4] = {s.sums[t]};
        // Rows lie too far from each other for the machine to foresee which are next.
        for (const Rows* rows : {&x.u, &x.dt, &x.gate})
            if (*rows) __builtin_prefetch(rows->address(p.b, p.end + t, s.channel), 0, 2);
        __builtin_prefetch(x.y.address(p.b, p.begin + t, s.channel), 1, 2);
#pragma GCC unroll 16
        for (int n = 0; n < K; n++) {
            h[n] = power(step * s.a[n]) * h[n] + input * all(B[n]);
            sum[n % 4] += h[n] * all(C[n]);
        }
        s.sums.set(t, (sum[0] + sum[1]) + (sum[2] + sum[3]));
    }
    for (int n = 0; n < K; n++) s.h.set(n, h[n]);
}

static void scan_piece(const SelectiveScan& x, int64_t b, int64_t piece) {
    const Tile whole = tile_of(x, b, piece, 0);
    const int64_t vectors = whole.vectors(), N = x.states, T = x.tile, sequence = x.width * N;
    Room room((2 * vectors * N + 3 * vectors * (T + 1)) * W + 2 * T * N);
    Columns a = room.columns(vectors * N), h = room.columns(vectors * N);
    auto field = [&] { return Field{room.columns(vectors * (T + 1)), T}; };
    Field steps = field(), inputs = field(), sums = field();
    float *B = room.take(T * N), *C = room.take(T * N);
    load_rates(x, whole, a);
    load_states(x, whole, x.initial, h);
    for (int64_t i = 0; i * T < x.length; i++) {
        const Tile p = tile_of(x, b, piece, i);
        if (x.kept) store_states(x, p, h, x.kept + i * x.batch * sequence);
        gather_rows(x.B, p, N, B);
        gather_rows(x.C, p, N, C);
        prepare(x, p, steps, inputs, sums);
        for (int64_t v = 0; v < vectors; v++)
            for (int64_t n = 0; n < N;) {
                const int64_t row = v * N + n;
                const Part part{p.channel(v), a.from(row), h.from(row), steps.of(v), inputs.of(v), sums.of(v), B + n, C + n};
                if (N - n >= 16)
                    advance<16>(x, p, part), n += 16;
                else if (N - n >= 4)
                    advance<4>(x, p, part), n += 4;
                else
                    advance<1>(x, p, part), n += 1;
            }
        finish(x, p, sums);
    }
    store_states(x, whole, h, x.final);
}

// Channels between what is read and what is asked for: memory is not foreseen by the machine across pages.
constexpr int64_t AHEAD = 32;

// The same for so few steps that turning states into columns would take longest: a vector holds states of one channel.
static void scan_few(const SelectiveScan& x, int64_t b, int64_t piece) {
    const Tile p = {b, 0, x.length, piece * PIECE, std::min((piece + 1) * PIECE, x.width)};
    const int64_t N = x.states, T = x.length;
    Room room(3 * p.vectors() * (T + 1) * W + 2 * T * N);
    auto field = [&] { return Field{room.columns(p.vectors() * (T + 1)), T}; };
    Field steps = field(), inputs = field(), sums = field();
    float *B = room.take(T * N), *C = room.take(T * N);
    gather_rows(x.B, p, N, B);
    gather_rows(x.C, p, N, C);
    prepare(x, p, steps, inputs, sums);
    const float* before = x.initial + b * x.width * N;
    float* after = x.final + b * x.width * N;
    const Rows A = x.A;  // a copy, which nothing that is written can be
    const bool log_A = x.log_A;
    for_vectors(p.last - p.first, [&](int64_t c, int count) {
        for_vectors(N, [&](int64_t n, int some) {
            for (int64_t t = 0; t < T; t++) {
                const Columns step = steps.of(c / W).from(t), input = inputs.of(c / W).from(t);
                const vf b_t = load_some(B + t * N + n, some), c_t = load_some(C + t * N + n, some);
                const bool fresh = starts(x, b, t);
                const float* old = t ? after : before;
                vf products[W] = {};
                for (int i = 0; i < count; i++) {
                    const int64_t d = p.first + c + i, at = d * N + n;
                    __builtin_prefetch(A.address(0, d + AHEAD, n), 0, 2);
                    __builtin_prefetch(old + at + AHEAD * N, 0, 2);
                    __builtin_prefetch(after + at + AHEAD * N, 1, 2);
                    const vf a = rate(log_A, read(A, 0, d, n, some));
                    const vf h_before = fresh ? vf{} : load_some(old + at, some);
                    const vf h = power(all(step.at[i]) * a) * h_before + all(input.at[i]) * b_t;
                    store_some(after + at, h, some);
                    products[i] = h * c_t;
                }
                sums.of(c / W).add(t, totals<W>(products));
            }
        });
    });
    finish(x, p, sums);
}

constexpr int64_t FEW = 4;          // steps
constexpr int64_t ALONE = 1 << 14;  // up to so many updates of states a second thread takes longer to come than to help

void selective_scan(const SelectiveScan& x) {
    const int64_t pieces = (x.width + PIECE - 1) / PIECE;
    const bool few = x.length > 0 && x.length <= FEW && !x.kept;
    const bool alone = x.batch * x.length * x.width * x.states <= ALONE;
    for_jobs(x.batch * pieces, alone ? 1 : x.threads, [&](int64_t job) {
        few ? scan_few(x, job / pieces, job % pieces) : scan_piece(x, job / pieces, job % pieces);
    });
}

}  // namespace longstate::ISA
