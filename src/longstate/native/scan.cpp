// The elementwise recurrence and its gradient, as fast as memory gives a and b: row after row in the order in which they
// lie there, with the state of a strip of channels in the cache. No sum crosses channels, so strips may have any width.
#include "isa.h"

namespace longstate::ISA {

// A pair (re, im) as one number of 64 bits, so that its halves move without a shuffle of each width's own.
typedef uint64_t vl __attribute__((vector_size(4 * WIDTH)));
constexpr uint64_t REAL = 0xffffffffu, REAL_SIGN = 0x80000000u, IMAGINARY_SIGN = REAL_SIGN << 32;

static inline vl pairs(vf x) {
    vl y;
    std::memcpy(&y, &x, sizeof y);
    return y;
}
static inline vf numbers(vl x) {
    vf y;
    std::memcpy(&y, &x, sizeof y);
    return y;
}

// a x + b, or conj(a) x + b.
template <bool PAIRS, bool CONJUGATE>
static inline vf product(vf a, vf x, vf b) {
    if constexpr (!PAIRS) return a * x + b;
    const vl p = pairs(a), swapped = pairs(x) >> 32 | pairs(x) << 32;
    const vf real = numbers((p & REAL) | p << 32);
    const vf imaginary = numbers((p >> 32 | (p & ~REAL)) ^ (CONJUGATE ? IMAGINARY_SIGN : REAL_SIGN));
    return real * x + (imaginary * numbers(swapped) + b);
}

static inline bool starts(const Scan& x, int64_t b, int64_t t) { return x.start && x.start[b * x.length + t]; }
static inline bool counts(const Scan& x, int64_t b, int64_t t) { return !x.valid || x.valid[b * x.length + t]; }

// One strip of channels of one sequence.
struct Strip {
    int64_t b, begin, end;

    template <class Function>
    void each(Function function) const {
        int64_t i = begin;
        for (; i + W <= end; i += W) function(i, W);
        if (i < end) function(i, int(end - i));
    }
    void zero(const Rows& x, int64_t t) const {
        each([&](int64_t i, int count) { write(x, b, t, i, vf{}, count); });
    }
    void copy(const float* from, float* to) const {
        from ? std::memcpy(to + begin, from + begin, 4 * (end - begin)) : std::memset(to + begin, 0, 4 * (end - begin));
    }
};

template <class Function>
static void each_strip(const Scan& x, Function function) {
    constexpr int64_t WIDEST = 2048, LINE = 16;  // some rows of a strip fit into the cache; threads share no line of it
    const bool small = x.batch * x.length * x.width < SMALL;
    const int64_t threads = small ? 1 : x.threads, each = (x.batch * x.width + threads - 1) / threads;
    const int64_t width = std::min(WIDEST, (std::min(each, x.width) + LINE - 1) / LINE * LINE);
    const int64_t strips = (x.width + width - 1) / std::max<int64_t>(width, 1), jobs = x.batch * strips;
    auto run = [&](int64_t job) {
        const int64_t begin = job % strips * width;
        function(Strip{job / strips, begin, std::min(begin + width, x.width)});
    };
    if (small) {
        for (int64_t job = 0; job < jobs; job++) run(job);
        return;
    }
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t job = 0; job < jobs; job++) run(job);
}

template <bool PAIRS>
static void advance(const Scan& x, const Strip& strip) {
    const int64_t b = strip.b;
    float* state = x.final + b * x.width;
    strip.copy(x.initial ? x.initial + b * x.width : nullptr, state);
    for (int64_t t = 0; t < x.length; t++) {
        const bool first = starts(x, b, t);
        if (!counts(x, b, t)) {
            if (first) strip.copy(nullptr, state);
            strip.zero(x.h, t);
            continue;
        }
        strip.each([&](int64_t i, int count) {
            vf h = read(x.b, b, t, i, count);  // after a start whatever came before is not even multiplied
            if (!first) h = product<PAIRS, false>(read(x.a, b, t, i, count), load_some(state + i, count), h);
            store_some(state + i, h, count);
            write(x.h, b, t, i, h, count);
        });
    }
}

void scan(const Scan& x) {
    each_strip(x, [&](const Strip& strip) { x.pairs ? advance<true>(x, strip) : advance<false>(x, strip); });
}

// In which row of h the state before each step stands: not always in the last, for where a step does not count h is zero.
constexpr int64_t INITIAL = -1, NOTHING = -2;

static std::vector<int64_t> before_each(const Scan& x, int64_t b) {
    std::vector<int64_t> rows(x.length);
    int64_t at = INITIAL;
    for (int64_t t = 0; t < x.length; t++) {
        rows[t] = starts(x, b, t) ? NOTHING : at;
        at = counts(x, b, t) ? t : rows[t];
    }
    return rows;
}

// The adjoint l_t = g_t + conj(a_(t+1)) l_(t+1), which is the gradient of b_t; that of a_t is l_t conj(h_(t-1)).
template <bool PAIRS>
static void retreat(const ScanBackward& g, const Strip& strip) {
    constexpr int64_t RUN = 256;  // steps summed apart before they join the others: fewer roundings for each term
    const Scan& x = g.forward;
    const int64_t b = strip.b;
    const bool fixed = g.grad_a.row == 0;
    const std::vector<int64_t> rows = before_each(x, b);
    std::vector<float> run(fixed ? strip.end - strip.begin : 0);
    float* adjoint = g.grad_initial + b * x.width;
    strip.copy(g.grad_final + b * x.width, adjoint);
    if (fixed) strip.zero(g.grad_a, 0);
    for (int64_t t = x.length - 1; t >= 0; t--) {
        const int64_t before = rows[t];
        if (counts(x, b, t)) {
            strip.each([&](int64_t i, int count) {
                const vf l = load_some(adjoint + i, count) + read(g.grad, b, t, i, count);
                write(g.grad_b, b, t, i, l, count);
                vf h{}, carried{};
                if (before >= 0) h = read(x.h, b, before, i, count);
                if (before == INITIAL && x.initial) h = load_some(x.initial + b * x.width + i, count);
                if (before != NOTHING) carried = product<PAIRS, true>(read(x.a, b, t, i, count), l, vf{});
                store_some(adjoint + i, carried, count);
                const vf flow = before == NOTHING ? vf{} : product<PAIRS, true>(h, l, vf{});
                float* sum = run.data() + i - strip.begin;
                fixed ? store_some(sum, load_some(sum, count) + flow, count) : write(g.grad_a, b, t, i, flow, count);
            });
        } else {
            if (before == NOTHING) strip.copy(nullptr, adjoint);
            strip.zero(g.grad_b, t);
            if (!fixed) strip.zero(g.grad_a, t);
        }
        if (!fixed || t % RUN) continue;
        strip.each([&](int64_t i, int count) {
            float* sum = run.data() + i - strip.begin;
            write(g.grad_a, b, 0, i, read(g.grad_a, b, 0, i, count) + load_some(sum, count), count);
            store_some(sum, vf{}, count);
        });
    }
}

void scan_backward(const ScanBackward& g) {
    const Scan& x = g.forward;
    each_strip(x, [&](const Strip& strip) { x.pairs ? retreat<true>(g, strip) : retreat<false>(g, strip); });
}

}  // namespace longstate::ISA
