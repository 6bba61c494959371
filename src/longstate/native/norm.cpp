// The root-mean-square norm, plain or gated, and its gradient: one group of channels after the other, twice through the
// nearest cache, in float32.
#include "isa.h"

namespace longstate::ISA {

constexpr int64_t NORM_ROWS = 32;  // that a job takes at least

// A fixed number of rows for each job, so that sums over rows do not depend on the number of threads.
static int64_t rows_of_job(const RMSNorm& x) { return std::max(NORM_ROWS, (x.batch * x.length + 63) / 64); }

// Work on each row by its sequence and step.
template <class Body>
static void for_rows(const RMSNorm& x, int64_t job, const Body& body) {
    const int64_t size = rows_of_job(x);
    for (int64_t row = job * size; row < std::min((job + 1) * size, x.batch * x.length); row++)
        body(row / x.length, row % x.length);
}

static int64_t jobs_of(const RMSNorm& x) { return (x.batch * x.length + rows_of_job(x) - 1) / rows_of_job(x); }
static int64_t threads_of(const RMSNorm& x) { return x.batch * x.length * x.width < SMALL ? 1 : x.threads; }

void rms_norm(const RMSNorm& x) {
    const int64_t size = x.width / x.groups;
    const vf offset = all(float(x.offset));
    for_jobs(jobs_of(x), threads_of(x), [&](int64_t job) {
        std::vector<float> gated(x.gate && x.gate_first ? size + W : 0);
        for_rows(x, job, [&](int64_t b, int64_t t) {
            for (int64_t first = 0; first < x.width; first += size) {
                vf squares{};
                for_vectors(size, [&](int64_t c, int some) {
                    vf z = read(x.x, b, t, first + c, some);
                    if (!gated.empty()) {
                        z *= silu(read(x.gate, b, t, first + c, some));
                        store(gated.data() + c, z);
                    }
                    squares += z * z;
                });
                const vf scale = all(1 / std::sqrt(total(squares) / float(size) + float(x.eps)));
                for_vectors(size, [&](int64_t c, int some) {
                    vf y = scale * (gated.empty() ? read(x.x, b, t, first + c, some) : load(gated.data() + c));
                    if (x.round) y = widen(narrow(y));
                    if (x.weight) y *= offset + read(x.weight, 0, 0, first + c, some);
                    if (x.gate && gated.empty()) y *= silu(read(x.gate, b, t, first + c, some));
                    write(x.y, b, t, first + c, y, some);
                });
            }
        });
    });
}

// The gradient of one group: with n = z r, r = (mean z² + eps)^(-1/2) and d = dL/dn, dL/dz = r (d - n mean(d n)).
static void rms_norm_gradient(const RMSNormBackward& g, int64_t b, int64_t t, int64_t first, float* room, float* sums) {
    const RMSNorm& x = g.forward;
    const int64_t size = x.width / x.groups, stride = size + W;
    const bool gate_first = x.gate && x.gate_first, gate_after = x.gate && !x.gate_first;
    float *z = room, *d = z + stride, *gate = d + stride, *slope = gate + stride, *gain = slope + stride;
    vf squares{}, inner{};
    for_vectors(size, [&](int64_t c, int some) {
        const int64_t i = first + c;
        const vf input = read(x.x, b, t, i, some), grad = read(g.grad, b, t, i, some);
        vf s{}, ds{};
        if (x.gate) s = silu(read(x.gate, b, t, i, some), ds);
        const vf factor = x.weight ? all(float(x.offset)) + read(x.weight, 0, 0, i, some) : all(1.f);
        const vf normed = gate_first ? input * s : input, into = gate_after ? grad * s : grad;
        store(z + c, normed);
        store(d + c, into * factor);
        store(gate + c, s);
        store(slope + c, ds * (gate_first ? input : grad * factor));
        store(gain + c, into);
        squares += normed * normed;
        inner += into * factor * normed;
    });
    const float mean = total(squares) / float(size) + float(x.eps), r = 1 / std::sqrt(mean);
    const vf scale = all(r), common = all(total(inner) / float(size) / mean);
    for_vectors(size, [&](int64_t c, int some) {
        const int64_t i = first + c;
        const vf into = scale * (load(d + c) - load(z + c) * common), normed = scale * load(z + c);
        write(g.grad_x, b, t, i, gate_first ? into * load(gate + c) : into, some);
        if (x.gate) write(g.grad_gate, b, t, i, load(slope + c) * (gate_first ? into : normed), some);
        if (x.weight) store(sums + i, load(sums + i) + load(gain + c) * normed);
    });
}

void rms_norm_backward(const RMSNormBackward& g) {
    const RMSNorm& x = g.forward;
    const int64_t size = x.width / x.groups, jobs = jobs_of(x), stride = x.width + W;
    std::vector<float> sums(x.weight ? jobs * stride : 0);
    for_jobs(jobs, threads_of(x), [&](int64_t job) {
        std::vector<float> room(5 * (size + W));
        for_rows(x, job, [&](int64_t b, int64_t t) {
            for (int64_t first = 0; first < x.width; first += size)
                rms_norm_gradient(g, b, t, first, room.data(), sums.data() + job * stride);
        });
    });
    if (!x.weight) return;
    for_vectors(x.width, [&](int64_t c, int some) {
        vf sum{};
        for (int64_t job = 0; job < jobs; job++) sum += load(sums.data() + job * stride + c);
        write(g.grad_weight, 0, 0, c, sum, some);
    });
}

}  // namespace longstate::ISA
