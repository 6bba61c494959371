// The short causal convolution and its gradient: one row of channels after the other, from the last k rows of inputs,
// which are in the nearest cache. A job is some steps and channels of one sequence; no job waits for another.
#include "isa.h"

namespace longstate::ISA {

constexpr int64_t CHANNELS = 512, STEPS = 64;  // of one job
constexpr int64_t FEW_CHANNELS = 192;          // of one job, if there is one step only
constexpr int RUN = 4;                         // steps that are computed together, where all see as many before them

// The steps of one sequence that count, one after the other, and how many inputs before each it sees.
struct CountedSteps {
    std::vector<int64_t> at, back;  // `back` has one entry more: what a next step would see
    int64_t count;

    CountedSteps(const ShortConvolution& x, int64_t b) {
        int64_t seen = x.initial ? x.taps - 1 : 0;
        at.reserve(x.length);
        back.reserve(x.length + 1);
        for (int64_t t = 0; t < x.length; t++) {
            if (x.start && x.start[b * x.length + t]) seen = 0;
            if (x.valid && !x.valid[b * x.length + t]) continue;
            at.push_back(t);
            back.push_back(seen);
            seen = std::min(seen + 1, x.taps - 1);
        }
        back.push_back(seen);
        count = int64_t(at.size());
    }
};

// Where input j is from some channel on; those before the first are in the initial window.
static const char* input_row(const ShortConvolution& x, const CountedSteps& steps, int64_t b, int64_t j, int64_t first) {
    return j < 0 ? x.initial.address(b, x.taps - 1 + j, first) : x.u.address(b, steps.at[j], first);
}

static std::vector<CountedSteps> counted_steps(const ShortConvolution& x) {
    std::vector<CountedSteps> steps;
    steps.reserve(x.batch);
    for (int64_t b = 0; b < x.batch; b++) steps.emplace_back(x, b);
    return steps;
}

// Weight and bias in float32, as rows of channels: tap(i) meets the input i steps before.
struct ConvolutionTaps {
    int64_t taps, stride;
    std::unique_ptr<float[]> room;

    explicit ConvolutionTaps(const ShortConvolution& x)
        : taps(x.taps), stride(x.width + W), room(new float[(x.taps + 1) * stride]) {
        if (x.weight.narrow)
            turn(reinterpret_cast<const uint16_t*>(x.weight.at), x.weight.row, x.width);
        else
            turn(reinterpret_cast<const float*>(x.weight.at), x.weight.row, x.width);
        float* row = room.get() + taps * stride;
        for_vectors(x.width, [&](int64_t c, int some) { store(row + c, x.bias ? read(x.bias, 0, 0, c, some) : vf{}); });
    }
    const float* tap(int64_t i) const { return room.get() + i * stride; }
    const float* bias() const { return tap(taps); }

    template <class T>
    void turn(const T* weight, int64_t row, int64_t width) {
        float* to = room.get();
        if (taps == 4 && row == 4) return turn_4(weight, width, to, to + stride, to + 2 * stride, to + 3 * stride);
        for (int64_t c = 0; c < width; c++)
            for (int64_t i = 0; i < taps; i++) to[i * stride + c] = widen(weight[c * row + taps - 1 - i]);
    }
    // What nearly all models have, so that the compiler may do it in vectors.
    template <class T>
    static void turn_4(const T* __restrict weight, int64_t width, float* __restrict newest, float* __restrict second,
                       float* __restrict third, float* __restrict oldest) {
        for (int64_t c = 0; c < width; c++) {
            newest[c] = widen(weight[4 * c + 3]);
            second[c] = widen(weight[4 * c + 2]);
            third[c] = widen(weight[4 * c + 1]);
            oldest[c] = widen(weight[4 * c]);
        }
    }
};

// All inputs that a run of steps sees, the oldest first, from some channel on.
struct SeenRows {
    const char* row[MOST_TAPS + RUN - 1];
    int64_t taps, run;  // of each step, and the number of steps

    SeenRows(const ShortConvolution& x, const CountedSteps& steps, int64_t b, int64_t j, int64_t end, int64_t first)
        : taps(steps.back[j] + 1), run(1) {
        const int64_t* back = steps.back.data() + j;
        if (taps > 1 && taps <= 4 && j + RUN <= end && std::all_of(back, back + RUN, [&](int64_t n) { return n == taps - 1; }))
            run = RUN;
        for (int64_t i = 0; i < taps + run - 1; i++) row[i] = input_row(x, steps, b, j - taps + 1 + i, first);
    }
};

// The inputs and taps of some channels, and what they give; R steps of N taps, or one step of any number if N is 0.
template <int N, int R, bool NARROW>
struct ConvolutionLanes {
    int64_t n;
    vf in[(N ? N : MOST_TAPS) + R - 1], taps[N ? N : MOST_TAPS], bias;

    ConvolutionLanes(const ConvolutionTaps& w, const SeenRows& seen, int64_t first, int64_t c, int some)
        : n(N ? N : seen.taps), bias(load(w.bias() + first + c)) {
        for (int64_t i = 0; i < n + R - 1; i++) {
            const char* p = seen.row[i] + c * (NARROW ? 2 : 4);
            vh narrow{};
            if (NARROW) std::memcpy(&narrow, p, 2 * (some < W ? some : W));
            in[i] = NARROW ? widen(narrow) : load_some(reinterpret_cast<const float*>(p), some);
        }
        for (int64_t i = 0; i < n; i++) taps[i] = load(w.tap(n - 1 - i) + first + c);
    }
    vf sum(int r) const {
        vf y = bias;
        for (int64_t i = 0; i < n; i++) y += taps[i] * in[r + i];
        return y;
    }
};

template <int N, int R, bool NARROW>
static void convolve_rows(const ShortConvolution& x, const ConvolutionTaps& w, const SeenRows& seen, int64_t b,
                          const int64_t* at, int64_t first, int64_t channels) {
    for_vectors(channels, [&](int64_t c, int some) {
        const ConvolutionLanes<N, R, NARROW> lanes(w, seen, first, c, some);
        for (int r = 0; r < R; r++) {
            const vf y = lanes.sum(r);
            write(x.y, b, at[r], first + c, x.silu ? silu(y) : y, some);
        }
    });
}

// f with the number of taps and steps, if as many as usual, and the type of the inputs as constants.
#define FOR_ROWS(f, narrow, seen, ...)                                                           \
    switch ((seen.run == 1 ? 0 : 100) + 10 * std::min<int64_t>(seen.taps, 5) + bool(narrow)) {   \
        case 30: f<3, 1, false>(__VA_ARGS__); break;                                             \
        case 31: f<3, 1, true>(__VA_ARGS__); break;                                              \
        case 40: f<4, 1, false>(__VA_ARGS__); break;                                             \
        case 41: f<4, 1, true>(__VA_ARGS__); break;                                              \
        case 120: f<2, RUN, false>(__VA_ARGS__); break;                                          \
        case 121: f<2, RUN, true>(__VA_ARGS__); break;                                           \
        case 130: f<3, RUN, false>(__VA_ARGS__); break;                                          \
        case 131: f<3, RUN, true>(__VA_ARGS__); break;                                           \
        case 140: f<4, RUN, false>(__VA_ARGS__); break;                                          \
        case 141: f<4, RUN, true>(__VA_ARGS__); break;                                           \
        default: (narrow) ? f<0, 1, true>(__VA_ARGS__) : f<0, 1, false>(__VA_ARGS__);            \
    }

// The final window is some of the inputs: copied, whatever they are, as all these rows are of one type.
static void write_window(const ShortConvolution& x, const CountedSteps& steps, int64_t b) {
    const int64_t before = x.taps - 1, bytes = x.width * (x.u.narrow ? 2 : 4);
    for (int64_t i = 0; i < before; i++) {
        if (before - i > steps.back.back())
            std::memset(x.final.address(b, i, 0), 0, bytes);
        else
            std::memcpy(x.final.address(b, i, 0), input_row(x, steps, b, steps.count - before + i, 0), bytes);
    }
}

// One step of some channels.
static void convolve_once(ShortConvolution x, int64_t first, int64_t width) {
    for (Rows* rows : {&x.u, &x.bias, &x.initial, &x.y, &x.final})
        if (*rows) *rows = from(*rows, first);
    x.weight.at = x.weight.address(0, first, 0);
    x.width = width;
    // All of it is elsewhere in memory, and too little of each to be foreseen.
    for (int64_t b = 0; b < x.batch; b++)
        for (int64_t k = 0; k + 1 < x.taps; k++)
            for (int64_t c = 0; c < width; c += W) {
                if (x.initial) __builtin_prefetch(x.initial.address(b, k, c));
                __builtin_prefetch(x.final.address(b, k, c), 1);
            }
    const ConvolutionTaps w(x);
    for (int64_t b = 0; b < x.batch; b++) {
        const CountedSteps steps(x, b);
        if (steps.count) {
            const SeenRows seen(x, steps, b, 0, 1, 0);
            FOR_ROWS(convolve_rows, x.u.narrow, seen, x, w, seen, b, steps.at.data(), 0, width)
        }
        write_window(x, steps, b);
    }
}

void short_convolution(const ShortConvolution& x) {
    const int64_t threads = x.batch * x.length * x.width < SMALL ? 1 : x.threads;
    if (x.length == 1)
        return for_jobs((x.width + FEW_CHANNELS - 1) / FEW_CHANNELS, threads, [&](int64_t job) {
            convolve_once(x, job * FEW_CHANNELS, std::min(FEW_CHANNELS, x.width - job * FEW_CHANNELS));
        });
    const ConvolutionTaps w(x);
    const std::vector<CountedSteps> steps = counted_steps(x);
    const int64_t across = (x.width + CHANNELS - 1) / CHANNELS, along = (x.length + STEPS - 1) / STEPS;
    for_jobs(x.batch * along * across, threads, [&](int64_t job) {
        const int64_t b = job / (along * across), begin = job / across % along * STEPS;
        const int64_t end = std::min(begin + STEPS, steps[b].count);
        const int64_t first = job % across * CHANNELS, channels = std::min(CHANNELS, x.width - first);
        for (int64_t j = begin; j < end;) {
            const SeenRows seen(x, steps[b], b, j, end, first);
            FOR_ROWS(convolve_rows, x.u.narrow, seen, x, w, seen, b, &steps[b].at[j], first, channels)
            j += seen.run;
        }
    });
    for (int64_t b = 0; b < x.batch; b++) write_window(x, steps[b], b);
}

// dL/d(pre-activation) of some steps, into rows of `ring`; the gradients of taps and bias gain from it in `sums` (if
// any), which are laid out as the taps.
template <int N, int R, bool NARROW>
static void adjoint_rows(const ShortConvolutionBackward& g, const ConvolutionTaps& w, const SeenRows& seen, int64_t b,
                         int64_t j, const int64_t* at, int64_t first, int64_t channels, float* ring, float* sums) {
    for_vectors(channels, [&](int64_t c, int some) {
        const ConvolutionLanes<N, R, NARROW> lanes(w, seen, first, c, some);
        vf gain[N ? N : MOST_TAPS], total{};
        for (int64_t i = 0; i < lanes.n; i++) gain[i] = vf{};
        for (int r = 0; r < R; r++) {
            vf d = read(g.grad, b, at[r], first + c, some), slope;
            if (g.forward.silu) {
                silu(lanes.sum(r), slope);
                d *= slope;
            }
            store(ring + (j + r) % (w.taps + RUN - 1) * CHANNELS + c, d);
            for (int64_t i = 0; i < lanes.n; i++) gain[i] += d * lanes.in[r + i];
            total += d;
        }
        if (!sums) return;
        float* sum = sums + first + c;
        for (int64_t i = 0; i < lanes.n; i++) {
            float* own = sum + (lanes.n - 1 - i) * w.stride;
            store(own, load(own) + gain[i]);
        }
        store(sum + w.taps * w.stride, load(sum + w.taps * w.stride) + total);
    });
}

// The gradient of input m: from the steps that saw it (their adjoints are in `ring`), and from the final window.
static void gradient_row(const ShortConvolutionBackward& g, const ConvolutionTaps& w, const CountedSteps& steps, int64_t b,
                         int64_t m, int64_t first, int64_t channels, const float* ring) {
    const float *taps[MOST_TAPS], *adjoints[MOST_TAPS];
    int64_t count = 0;
    for (int64_t i = std::max<int64_t>(0, -m); i < std::min(w.taps, steps.count - m); i++) {
        if (steps.back[m + i] < i) break;  // another sequence has begun
        taps[count] = w.tap(i) + first;
        adjoints[count++] = ring + (m + i) % (w.taps + RUN - 1) * CHANNELS;
    }
    const bool kept = steps.count - m <= steps.back.back();
    const int64_t place = m - steps.count + w.taps - 1;
    const Rows& to = m < 0 ? g.grad_initial : g.grad_u;
    const int64_t t = m < 0 ? w.taps - 1 + m : steps.at[m];
    for_vectors(channels, [&](int64_t c, int some) {
        vf sum = kept ? read(g.grad_final, b, place, first + c, some) : vf{};
        for (int64_t i = 0; i < count; i++) sum += load(taps[i] + c) * load(adjoints[i] + c);
        write(to, b, t, first + c, sum, some);
    });
}

void short_convolution_backward(const ShortConvolutionBackward& g) {
    const ShortConvolution& x = g.forward;
    const ConvolutionTaps w(x);
    const std::vector<CountedSteps> all_steps = counted_steps(x);
    const int64_t length = std::max(STEPS, (x.length + 15) / 16), along = std::max<int64_t>(1, (x.length + length - 1) / length);
    const int64_t across = (x.width + CHANNELS - 1) / CHANNELS, size = (x.taps + 1) * w.stride;
    const int64_t threads = x.batch * x.length * x.width < SMALL ? 1 : x.threads;
    std::vector<float> sums(x.batch * along * size);
    for_jobs(x.batch * along * across, threads, [&](int64_t job) {
        const int64_t b = job / (along * across), first = job % across * CHANNELS;
        const int64_t channels = std::min(CHANNELS, x.width - first), before = x.taps - 1;
        const CountedSteps& steps = all_steps[b];
        const int64_t begin = job / across % along * length, end = std::min(begin + length, steps.count);
        float* own = sums.data() + job / across * size;
        std::vector<float> ring((x.taps + RUN - 1) * CHANNELS);
        // Steps after the last see some of these inputs, the first steps some of those before.
        for (int64_t j = begin, m = begin == 0 && x.initial ? -before : begin; m < end;) {
            if (j < steps.count) {
                const SeenRows seen(x, steps, b, j, end, first);
                FOR_ROWS(adjoint_rows, x.u.narrow, seen, g, w, seen, b, j, &steps.at[j], first, channels, ring.data(),
                         j < end ? own : nullptr)
                j += seen.run;
            } else
                j++;
            for (; m < std::min(j - before, end); m++) gradient_row(g, w, steps, b, m, first, channels, ring.data());
        }
    });
    for_jobs(across, threads, [&](int64_t job) {
        const int64_t first = job * CHANNELS;
        for_vectors(std::min(CHANNELS, x.width - first), [&](int64_t c, int some) {
            for (int64_t i = 0; i <= x.taps; i++) {
                vf sum{};
                for (int64_t k = 0; k < x.batch * along; k++) sum += load(sums.data() + k * size + i * w.stride + first + c);
                if (i == x.taps && x.bias) write(g.grad_bias, 0, 0, first + c, sum, some);
                for (int lane = 0; lane < (i < x.taps ? some : 0); lane++)
                    write(g.grad_weight, 0, first + c + lane, x.taps - 1 - i, all(sum[lane]), 1);
            }
        });
    });
}

}  // namespace longstate::ISA
