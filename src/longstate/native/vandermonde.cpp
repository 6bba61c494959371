// Vandermonde products and their gradients, in double precision throughout: a phase of 100,000 radians still has ten digits.
//
// Powers factor: e^((BLOCK m + j) z) = e^(BLOCK m z) e^(jz). The second factor is a table, the first goes from block to
// block by one product, so that all but one product a block and state is a product of matrices. A power is the product of
// at most LONGEST / BLOCK + 7 others, each good to a few roundings: its relative error stays below 1000 of 2^-53, and that
// of its argument, |l z| 2^-53.
#include "isa.h"

namespace longstate::ISA {

constexpr int64_t BLOCK = 64, GROUP = 4, LONGEST = 8192;  // steps of a table; blocks at once; steps of a job
constexpr double TINY = 1e-150;  // smaller powers are zero: their products would be denormal, which is slow

static inline double chop(double x) { return std::fabs(x) < TINY ? 0. : x; }

// out[r][j] = the sum over k of a[r across + k along] b[k][j], for GROUP rows r and BLOCK columns j.
static void multiply(const double* a, int64_t across, int64_t along, int64_t count, const double* b, double* out) {
    constexpr int COLUMNS = W >= 16 ? 4 : 2;  // vectors: as many as leave room in the registers for their sums
    for (int64_t j = 0; j < BLOCK; j += COLUMNS * D) {
        vd sum[GROUP][COLUMNS] = {};
        for (int64_t k = 0; k < count; k++) {
            for (int c = 0; c < COLUMNS; c++) {
                vd x;
                std::memcpy(&x, b + k * BLOCK + j + c * D, sizeof x);
                for (int r = 0; r < GROUP; r++) sum[r][c] += (a[r * across + k * along] - vd{}) * x;
            }
        }
        for (int r = 0; r < GROUP; r++)
            for (int c = 0; c < COLUMNS; c++) std::memcpy(out + r * BLOCK + j + c * D, &sum[r][c], sizeof(vd));
    }
}

// A number of each state: real parts, then imaginary parts.
struct Numbers {
    int64_t count;
    std::vector<double> parts;
    explicit Numbers(int64_t count) : count(count), parts(2 * count) {}
    double* real() { return parts.data(); }
    double* imaginary() { return parts.data() + count; }

    void multiply(Numbers& by) {
        double *__restrict re = real(), *__restrict im = imaginary();
        const double *__restrict x = by.real(), *__restrict y = by.imaginary();
        for (int64_t n = 0; n < count; n++) {
            const double product = re[n] * x[n] - im[n] * y[n];
            im[n] = chop(re[n] * y[n] + im[n] * x[n]);
            re[n] = chop(product);
        }
    }
};

// What a job needs of the powers of its row's bases.
struct Powers {
    Numbers first, step;        // e^(begin z), e^(BLOCK z)
    std::vector<double> table;  // e^(jz): [n j] of real parts, then of imaginary parts

    Powers(const Vandermonde& x, int64_t row, int64_t begin)
        : first(x.states), step(x.states), table((x.pairs ? 2 : 1) * x.states * BLOCK) {
        for (int64_t n = 0; n < x.states; n++) {
            const double* z = x.log_base + (row * x.states + n) * (x.pairs ? 2 : 1);
            auto set = [&](double count, double& real, double& imaginary) {
                const double size = std::exp(count * z[0]), phase = x.pairs ? count * z[1] : 0;
                real = chop(size * std::cos(phase)), imaginary = chop(size * std::sin(phase));
            };
            set(double(begin), first.real()[n], first.imaginary()[n]);
            set(BLOCK, step.real()[n], step.imaginary()[n]);
            double real, imaginary;
            set(1, real, imaginary);
            fill(real, imaginary, table.data() + n * BLOCK, x.pairs ? table.data() + (x.states + n) * BLOCK : nullptr);
        }
    }

    // The powers of x + iy: the second half of 2k of them is the first one times the k-th.
    static void fill(double x, double y, double* real, double* imaginary) {
        real[0] = 1;
        if (imaginary) imaginary[0] = 0;
        for (int64_t k = 1; k < BLOCK; k *= 2) {
            for (int64_t j = 0; j < k; j++) {
                const double re = real[j], im = imaginary ? imaginary[j] : 0;
                real[k + j] = chop(re * x - im * y);
                if (imaginary) imaginary[k + j] = chop(re * y + im * x);
            }
            const double square = chop(x * x - y * y);
            y = chop(2 * x * y);
            x = square;
        }
    }
};

template <class Function>
static void each_job(const Vandermonde& x, Function function) {
    const int64_t pieces = (x.length + LONGEST - 1) / LONGEST, jobs = x.rows * pieces;
    const int64_t threads = x.rows * x.states * x.length < SMALL ? 1 : x.threads;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t job = 0; job < jobs; job++) {
        const int64_t begin = job % pieces * LONGEST;
        function(job, job / pieces, begin, std::min(begin + LONGEST, x.length));
    }
}

void vandermonde(const Vandermonde& x) {
    const int64_t parts = x.pairs ? 2 : 1, N = x.states;
    each_job(x, [&](int64_t, int64_t row, int64_t begin, int64_t end) {
        Powers powers(x, row, begin);
        Numbers weights(N);
        for (int64_t n = 0; n < N; n++) {
            const double* w = x.weights + (row * N + n) * parts;
            weights.real()[n] = parts * w[0];
            if (x.pairs) weights.imaginary()[n] = 2 * w[1];
        }
        weights.multiply(powers.first);
        std::vector<double> factors(GROUP * parts * N), out(GROUP * BLOCK);
        for (int64_t l = begin; l < end; l += GROUP * BLOCK) {
            for (int64_t r = 0; r < GROUP; r++, weights.multiply(powers.step)) {
                double* to = factors.data() + r * parts * N;
                std::copy_n(weights.real(), N, to);
                for (int64_t n = 0; x.pairs && n < N; n++) to[N + n] = -weights.imaginary()[n];
            }
            multiply(factors.data(), parts * N, 1, parts * N, powers.table.data(), out.data());
            const int64_t count = std::min(GROUP * BLOCK, end - l), to = row * x.length + l;
            if (x.narrow)
                std::copy_n(out.data(), count, reinterpret_cast<float*>(x.kernel) + to);
            else
                std::copy_n(out.data(), count, reinterpret_cast<double*>(x.kernel) + to);
        }
    });
}

// Of a gradient g, the sums over l of g_l e^(lz) and g_l l e^(lz) in one piece of a row: [n] of (re, im, re, im).
static void moments(const Vandermonde& x, int64_t row, int64_t begin, int64_t end, double* to) {
    const int64_t parts = x.pairs ? 2 : 1, N = x.states, blocks = (end - begin + BLOCK - 1) / BLOCK;
    // For each block m and state: e^(BLOCK m z), real and imaginary, and m times that.
    const int64_t half = parts * N, columns = (2 * half + GROUP - 1) / GROUP * GROUP;
    Powers powers(x, row, begin);
    std::vector<double> grad(blocks * BLOCK), factors(blocks * columns), sums(columns * BLOCK);
    if (x.narrow)
        std::copy(reinterpret_cast<float*>(x.kernel) + row * x.length + begin,
                  reinterpret_cast<float*>(x.kernel) + row * x.length + end, grad.begin());
    else
        std::copy(reinterpret_cast<double*>(x.kernel) + row * x.length + begin,
                  reinterpret_cast<double*>(x.kernel) + row * x.length + end, grad.begin());
    for (int64_t m = 0; m < blocks; m++, powers.first.multiply(powers.step)) {
        double* factor = factors.data() + m * columns;
        std::copy_n(powers.first.real(), half, factor);  // imaginary parts follow
        for (int64_t i = 0; i < half; i++) factor[half + i] = double(m) * factor[i];
    }
    for (int64_t i = 0; i < columns; i += GROUP)
        multiply(factors.data() + i, 1, columns, blocks, grad.data(), sums.data() + i * BLOCK);
    for (int64_t n = 0; n < N; n++) {
        const double* table = powers.table.data() + n * BLOCK;
        double sum[2][2] = {};
        for (int64_t j = 0; j < BLOCK; j++) {
            const double re = table[j], im = x.pairs ? table[N * BLOCK + j] : 0;
            const double* at = sums.data() + n * BLOCK + j;
            const double g_re = at[0], g_im = x.pairs ? at[N * BLOCK] : 0;
            const double h_re = BLOCK * at[half * BLOCK] + j * g_re;
            const double h_im = x.pairs ? BLOCK * at[(half + N) * BLOCK] + j * g_im : 0;
            sum[0][0] += re * g_re - im * g_im, sum[0][1] += re * g_im + im * g_re;
            sum[1][0] += re * h_re - im * h_im, sum[1][1] += re * h_im + im * h_re;
        }
        for (int part = 0; part < 2; part++) {
            to[4 * n + part] = sum[0][part];
            to[4 * n + 2 + part] = sum[1][part] + double(begin) * sum[0][part];
        }
    }
}

void vandermonde_backward(const VandermondeBackward& g) {
    const Vandermonde& x = g.forward;
    const int64_t N = x.states, pieces = (x.length + LONGEST - 1) / LONGEST;
    std::vector<double> each(x.rows * pieces * N * 4);
    each_job(x, [&](int64_t job, int64_t row, int64_t begin, int64_t end) {
        moments(x, row, begin, end, each.data() + job * N * 4);
    });
    for (int64_t i = 0; i < x.rows * N; i++) {
        double sum[4] = {};
        for (int64_t piece = 0; piece < pieces; piece++)
            for (int k = 0; k < 4; k++) sum[k] += each[((i / N * pieces + piece) * N + i % N) * 4 + k];
        if (!x.pairs) {
            g.grad_weights[i] = sum[0];
            g.grad_log_base[i] = x.weights[i] * sum[2];
            continue;
        }
        const double re = x.weights[2 * i], im = x.weights[2 * i + 1];
        g.grad_weights[2 * i] = 2 * sum[0], g.grad_weights[2 * i + 1] = -2 * sum[1];
        g.grad_log_base[2 * i] = 2 * (re * sum[2] - im * sum[3]);
        g.grad_log_base[2 * i + 1] = -2 * (re * sum[3] + im * sum[2]);
    }
}

}  // namespace longstate::ISA
