// Cauchy sums over conjugate pairs of poles and their gradients, in double precision: near a pole nothing but differences
// of what was given enters, and far out on the axis the square of a square has room. A vector holds as many nodes.
#include "isa.h"

namespace longstate::ISA {

constexpr int64_t LONGEST = 8192, GROUP = 4;  // nodes of a job; sums that share a quotient in registers

static inline vd at(const double* p) {
    vd x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

// R = 1 / ((z - pole)(z - conjugate pole)) and S = (z - its real part) R.
struct Quotients {
    vd R_re, R_im, S_re, S_im;
    Quotients(vd re, vd im, double real, double imaginary) {
        const vd x = re - real, q_re = x * x - (im - imaginary) * (im + imaginary), q_im = 2. * x * im;
        const vd inverse = 1. / (q_re * q_re + q_im * q_im);
        R_re = q_re * inverse, R_im = -q_im * inverse;
        S_re = x * R_re - im * R_im, S_im = x * R_im + im * R_re;
    }
};

// Numbers [begin, end) of rows of pairs, apart, and on to a whole vector by copies of the last or by zeros.
struct Parts {
    int64_t length;
    std::vector<double> re, im;
    Parts(int64_t rows, int64_t count) : length((count + D - 1) / D * D), re(rows * length), im(rows * length) {}
    template <class Number>
    void set(int64_t row, const Number* from, int64_t count, bool repeat) {
        for (int64_t i = 0; i < length; i++) {
            const int64_t j = std::min(i, count - 1);
            re[row * length + i] = i < count || repeat ? from[2 * j] : 0;
            im[row * length + i] = i < count || repeat ? from[2 * j + 1] : 0;
        }
    }
};

// The sums [first, first + P) of a row at the nodes from `begin` on.
template <int P>
static void add(const Cauchy& x, int64_t row, int64_t first, int64_t begin, int64_t count, const Parts& z) {
    const int64_t N = x.states;
    const double *a = x.a + (first * x.rows + row) * N, *b = x.b + (first * x.rows + row) * N;
    for (int64_t l = 0; l < count; l += D) {
        const vd re = at(&z.re[l]), im = at(&z.im[l]);
        vd sum_re[P] = {}, sum_im[P] = {};
        for (int64_t n = 0; n < N; n++) {
            const Quotients q(re, im, x.real[row * N + n], x.imaginary[row * N + n]);
            for (int p = 0; p < P; p++) {
                const double a_n = a[p * x.rows * N + n], b_n = b[p * x.rows * N + n];
                sum_re[p] += a_n * q.S_re, sum_re[p] += b_n * q.R_re;
                sum_im[p] += a_n * q.S_im, sum_im[p] += b_n * q.R_im;
            }
        }
        for (int p = 0; p < P; p++)
            for (int i = 0; i < std::min<int64_t>(D, count - l); i++) {
                const int64_t to = 2 * (((first + p) * x.rows + row) * x.nodes + begin + l + i);
                if (x.narrow) {
                    float* kernel = reinterpret_cast<float*>(x.kernel) + to;
                    kernel[0] = float(sum_re[p][i]), kernel[1] = float(sum_im[p][i]);
                } else {
                    double* kernel = reinterpret_cast<double*>(x.kernel) + to;
                    kernel[0] = sum_re[p][i], kernel[1] = sum_im[p][i];
                }
            }
    }
}

template <class Function>
static void each_job(const Cauchy& x, Function function) {
    const int64_t pieces = (x.nodes + LONGEST - 1) / LONGEST, jobs = x.rows * pieces;
    const int64_t threads = x.rows * x.states * x.nodes < SMALL ? 1 : x.threads;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t job = 0; job < jobs; job++) {
        const int64_t piece = job % pieces, begin = piece * LONGEST, count = std::min(LONGEST, x.nodes - begin);
        Parts z(1, count);
        z.set(0, x.z + 2 * begin, count, true);
        function(job / pieces, piece, begin, count, z);
    }
}

void cauchy(const Cauchy& x) {
    each_job(x, [&](int64_t row, int64_t, int64_t begin, int64_t count, const Parts& z) {
        int64_t first = 0;
        for (; first + GROUP <= x.sums; first += GROUP) add<GROUP>(x, row, first, begin, count, z);
        for (; first < x.sums; first++) add<1>(x, row, first, begin, count, z);
    });
}

static double total_of(vd x) {
    double sum = 0;
    for (int i = 0; i < D; i++) sum += x[i];
    return sum;
}

// The gradients of P sums, g: for each state of the row, sums over nodes of Re(conj(g) S) and Re(conj(g) R), which are
// those of a and b; and of Re(S Q) and Re(R Q) with Q = conj(G) S + conj(H) R, G and H the sums of a g and b g.
template <int P>
static void gather(const Cauchy& x, int64_t row, int64_t first, const Parts& z, const Parts& g, double* grad_a,
                   double* grad_b, double* of_poles) {
    const int64_t N = x.states, across = x.rows * N;
    for (int64_t n = 0; n < N; n++) {
        const int64_t at_n = row * N + n;
        vd sum_a[P] = {}, sum_b[P] = {}, sum_S{}, sum_R{};
        for (int64_t l = 0; l < z.length; l += D) {
            const Quotients q(at(&z.re[l]), at(&z.im[l]), x.real[at_n], x.imaginary[at_n]);
            vd G_re{}, G_im{}, H_re{}, H_im{};
            for (int p = 0; p < P; p++) {
                const double a = x.a[(first + p) * across + at_n], b = x.b[(first + p) * across + at_n];
                const vd re = at(&g.re[(first + p) * g.length + l]), im = at(&g.im[(first + p) * g.length + l]);
                sum_a[p] += re * q.S_re, sum_a[p] += im * q.S_im;
                sum_b[p] += re * q.R_re, sum_b[p] += im * q.R_im;
                G_re += a * re, G_im += a * im, H_re += b * re, H_im += b * im;
            }
            const vd Q_re = G_re * q.S_re + G_im * q.S_im + (H_re * q.R_re + H_im * q.R_im);
            const vd Q_im = G_re * q.S_im - G_im * q.S_re + (H_re * q.R_im - H_im * q.R_re);
            sum_S += q.S_re * Q_re - q.S_im * Q_im;
            sum_R += q.R_re * Q_re - q.R_im * Q_im;
        }
        for (int p = 0; p < P; p++) {
            grad_a[(first + p) * across + at_n] = total_of(sum_a[p]);
            grad_b[(first + p) * across + at_n] = total_of(sum_b[p]);
        }
        of_poles[2 * at_n] += total_of(sum_S), of_poles[2 * at_n + 1] += total_of(sum_R);
    }
}

void cauchy_backward(const CauchyBackward& g) {
    const Cauchy& x = g.forward;
    const int64_t each = x.rows * x.states, pieces = (x.nodes + LONGEST - 1) / LONGEST, size = 2 * (x.sums + 1) * each;
    std::vector<double> found(pieces * size);  // of each piece: gradients of a, of b, and what those of poles are made of
    each_job(x, [&](int64_t row, int64_t piece, int64_t begin, int64_t count, const Parts& z) {
        Parts grad(x.sums, count);
        for (int64_t sum = 0; sum < x.sums; sum++) {
            const int64_t from = 2 * ((sum * x.rows + row) * x.nodes + begin);
            if (x.narrow)
                grad.set(sum, reinterpret_cast<float*>(x.kernel) + from, count, false);
            else
                grad.set(sum, reinterpret_cast<double*>(x.kernel) + from, count, false);
        }
        double *a = found.data() + piece * size, *b = a + x.sums * each, *poles = b + x.sums * each;
        int64_t first = 0;
        for (; first + GROUP <= x.sums; first += GROUP) gather<GROUP>(x, row, first, z, grad, a, b, poles);
        for (; first < x.sums; first++) gather<1>(x, row, first, z, grad, a, b, poles);
    });
    std::vector<double> sum(size);
    for (int64_t piece = 0; piece < pieces; piece++)
        for (int64_t i = 0; i < size; i++) sum[i] += found[piece * size + i];
    std::copy_n(sum.data(), x.sums * each, g.grad_a);
    std::copy_n(sum.data() + x.sums * each, x.sums * each, g.grad_b);
    for (int64_t i = 0; i < each; i++) {  // dS/dr = 2 S^2 - R, dR/dr = 2 S R, dS/dw = -2 w S R, dR/dw = -2 w R^2
        const double* of_poles = sum.data() + 2 * (x.sums * each + i);
        g.grad_real[i] = 2 * of_poles[0];
        for (int64_t k = 0; k < x.sums; k++) g.grad_real[i] -= x.a[k * each + i] * g.grad_b[k * each + i];
        g.grad_imaginary[i] = -2 * x.imaginary[i] * of_poles[1];
    }
}

}  // namespace longstate::ISA
