// What the selective scan and its gradient share.
//
// A vector holds as many channels, so that no sum over states runs across its lanes. A thread takes PIECE channels of one
// sequence through tile after tile of steps. What belongs to a tile's channels and steps alone is computed before and
// after the recurrence, row by row, as memory likes it; the recurrence goes through the steps of one vector of channels
// and holds up to 16 states in registers.
#pragma once
#include "isa.h"

namespace longstate::ISA {

constexpr float LOG2E = 1.44269504089f;

// 2^z: infinite from 2^128 on, NaN stays NaN. Below 2^-126 it is 0 or stays there, which is nothing beside a state.
static inline vf power(vf z) {
#if WIDTH == 16
    const vf n = _mm512_roundscale_ps(z, 8), r = _mm512_reduce_ps(z, 8);  // to the nearest whole number, and the rest
#else
    const vf magic = all(12582912.f);
    z = choose(z < all(-126.f), all(-126.f), choose(z > all(128.f), all(128.f), z));
    const vf n = z + magic, r = z - (n - magic);
#endif
    vf p = all(1.5403530e-4f);
    p = p * r + all(1.3333558e-3f);
    p = p * r + all(9.6181291e-3f);
    p = p * r + all(5.5504109e-2f);
    p = p * r + all(2.4022651e-1f);
    p = p * r + all(6.9314718e-1f);
    p = p * r + all(1.f);
#if WIDTH == 16
    return _mm512_scalef_ps(p, n);
#else
    return number(vi(vu(bits(p)) + (vu(bits(n)) << 23)));
#endif
}

// Rows of W numbers, one for each state or step.
struct Columns {
    float* at;
    vf operator[](int64_t i) const { return load(at + i * W); }
    void set(int64_t i, vf x) const { store(at + i * W, x); }
    void add(int64_t i, vf x) const { set(i, (*this)[i] + x); }
    Columns from(int64_t i) const { return {at + i * W}; }
};

// Room for numbers, handed out in turn in up to 30 parts; each begins where a cache line does.
struct Room {
    std::vector<float> numbers;
    size_t used = 0;
    explicit Room(size_t count) : numbers(count + 16 * 31) { used = (64 - reinterpret_cast<uintptr_t>(numbers.data()) % 64) % 64 / 4; }
    float* take(size_t count) {
        float* found = numbers.data() + used;
        used += (count + 15) / 16 * 16;
        return found;
    }
    Columns columns(size_t count) { return {take(count * W)}; }
};

static void load_columns(const float* from, int64_t states, int count, Columns to) {
    for (int64_t n = 0; n < states; n++)
        for (int i = 0; i < W; i++) to.at[n * W + i] = i < count ? from[i * states + n] : 0.f;
}

static void store_columns(Columns from, int64_t states, int count, float* to) {
    for (int i = 0; i < count; i++)
        for (int64_t n = 0; n < states; n++) to[i * states + n] = from.at[n * W + i];
}

// A log2 e, from A itself or from log(-A).
static inline vf rate(bool log_A, vf A) { return (log_A ? -exp(A) : A) * all(LOG2E); }

// The steps of one tile, and the channels of one piece of a sequence.
struct Tile {
    int64_t b, begin, end, first, last;
    int64_t steps() const { return end - begin; }
    int64_t vectors() const { return (last - first + W - 1) / W; }
    int64_t channel(int64_t v) const { return first + v * W; }
    int count(int64_t v) const { return int(std::min<int64_t>(W, last - channel(v))); }
};

// A number for each step of a tile and channel of a piece: steps of one vector after the other. One more than a tile has,
// so that the vectors of a step do not all fall upon the same place in the cache.
struct Field {
    Columns at;
    int64_t steps;
    Columns of(int64_t v) const { return at.from(v * (steps + 1)); }
};

static inline float elapsed(const SelectiveScan& x, int64_t b, int64_t t) { return x.elapsed ? x.elapsed[b * x.length + t] : 1.f; }

static inline bool starts(const SelectiveScan& x, int64_t b, int64_t t) { return x.start && x.start[b * x.length + t]; }

static inline vf of_channels(const Rows& from, const Tile& p, int64_t v) {
    return from ? read(from, 0, 0, p.channel(v), p.count(v)) : vf{};
}

// dt + bias, from which the step is computed.
static inline vf raw(const SelectiveScan& x, const Tile& p, int64_t v, int64_t t) {
    return read(x.dt, p.b, t, p.channel(v), p.count(v)) + of_channels(x.bias, p, v);
}

// Steps, inputs step u, and the skip D u as the beginning of the sums.
static void prepare(const SelectiveScan& x, const Tile& p, Field steps, Field inputs, Field sums) {
    for (int64_t t = p.begin; t < p.end; t++)
        for (int64_t v = 0; v < p.vectors(); v++) {
            const vf u = read(x.u, p.b, t, p.channel(v), p.count(v)), z = raw(x, p, v, t);
            const vf step = (x.softplus ? softplus(z) : z) * all(elapsed(x, p.b, t));
            steps.of(v).set(t - p.begin, step);
            inputs.of(v).set(t - p.begin, step * u);
            sums.of(v).set(t - p.begin, of_channels(x.D, p, v) * u);
        }
}

// Rows of B and C of a tile, side by side in float32.
static void gather_rows(const Rows& from, const Tile& p, int64_t states, float* to) {
    for (int64_t t = p.begin; t < p.end; t++) {
        const float* row = read_row(from, p.b, t, states, to);
        if (row != to) std::copy_n(row, states, to);
        to += states;
    }
}

static Tile tile_of(const SelectiveScan& x, int64_t b, int64_t piece, int64_t tile) {
    const int64_t first = piece * PIECE;
    return {b, tile * x.tile, std::min((tile + 1) * x.tile, x.length), first, std::min(first + PIECE, x.width)};
}

// States [b d n] of a piece, as columns and back.
static void load_states(const SelectiveScan& x, const Tile& p, const float* from, Columns to) {
    for (int64_t v = 0; v < p.vectors(); v++)
        load_columns(from + (p.b * x.width + p.channel(v)) * x.states, x.states, p.count(v), to.from(v * x.states));
}

static void store_states(const SelectiveScan& x, const Tile& p, Columns from, float* to) {
    for (int64_t v = 0; v < p.vectors(); v++)
        store_columns(from.from(v * x.states), x.states, p.count(v), to + (p.b * x.width + p.channel(v)) * x.states);
}

static void load_rates(const SelectiveScan& x, const Tile& p, Columns a) {
    for (int64_t v = 0; v < p.vectors(); v++)
        for (int64_t n = 0; n < x.states; n++) {
            vf A{};
            for (int i = 0; i < p.count(v); i++) A[i] = number_at(x.A, 0, p.channel(v) + i, n);
            a.set(v * x.states + n, rate(x.log_A, A));
        }
}

}  // namespace longstate::ISA
