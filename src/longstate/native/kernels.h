// What each kernel takes, and the table of kernels that there is one of for each instruction set.
//
// Addresses, sizes and strides only: nothing here knows of PyTorch. Sizes and strides are counted in numbers, never in
// bytes. Every field has eight bytes: Python gives one number for each, in their order (module.cpp).
#pragma once
#include <cstdint>

namespace longstate {

// Rows [batch time width] of float32 or bfloat16, neighbours in a row side by side; sequences and steps at any distance.
struct Rows {
    char* at;  // null if there are none
    int64_t batch, row;
    int64_t narrow;  // bfloat16

    explicit operator bool() const { return at != nullptr; }
    char* address(int64_t b, int64_t t, int64_t i) const { return at + (b * batch + t * row + i) * (narrow ? 2 : 4); }
};

struct Elementwise {
    int64_t function;  // exp, log, softplus, sigmoid, silu, its slope
    const float* x;
    float* y;
    int64_t count;
};

// y = x Wᵀ + b; with scales, of each row of W for each `group` of inputs.
struct Linear {
    int64_t batch, length, in, out, threads;
    int64_t kind, group;  // kind of the weights: 0 float32, 1 bfloat16, 2 int8
    Rows x;               // [b t in], 8 rows at most
    const char* weight;   // [out in]
    int64_t weight_row;
    Rows scale, bias;     // [1 out in/group] [1 1 out]
    Rows y;               // [b t out]
};

struct ReadMemory {
    const float* x;
    int64_t count, threads;
    float* sum;
};

// step_t = elapsed_t f(dt_t + bias), f softplus or nothing;  h_t = e^(step_t A) h_(t-1) + step_t u_t B_t,
// y_t = (C_t h_t + D u_t) silu(gate_t); channels d, states n. All but u, dt, B, C, A and initial may be absent.
struct SelectiveScan {
    int64_t batch, length, width, states, tile, softplus, log_A, threads;  // tile: steps between kept states
    Rows u, dt, gate, B, C;                                               // [b t d] three times, [b t n] twice
    Rows A, D, bias;                // [1 d n] (or log(-A), if log_A), [1 1 d] twice
    const float *initial, *elapsed; // [b d n] [b t]
    const uint8_t* start;           // [b t]
    Rows y;                               // [b t d]
    float *final, *kept;  // [b d n]; [tiles b d n], the state before each tile, null if not wanted
};

struct SelectiveScanBackward {
    SelectiveScan forward;            // with kept; initial, y and final are not used
    Rows grad;                        // of y
    const float* grad_final;          // of final
    Rows grad_u, grad_dt, grad_gate;  // [b t d]
    float *grad_A, *grad_D, *grad_bias, *grad_initial;  // [b d n], [b d], [b d]: for each sequence; [b d n]
    float *grad_B, *grad_C, *grad_elapsed;              // [pieces b t n], [pieces b t]: for each piece of channels
};

// h_t = a_t h_(t-1) + b_t of numbers, or of pairs (re, im); the width counts floats. A fixed a is rows at a distance of 0.
struct Scan {
    int64_t batch, length, width, pairs, threads;
    Rows a;                        // [b t w]
    const float* initial;          // [b w]; null if zero
    const uint8_t *start, *valid;  // [b t], may be null
    Rows b, h;                     // [b t w]
    float* final;                  // [b w]
};

struct ScanBackward {
    Scan forward;             // with what it gave as h; b and final are not used
    Rows grad;                // of h
    const float* grad_final;  // of final
    Rows grad_a, grad_b;      // [b t w]; that of a fixed a is [b 1 w], float32 and at a distance of 0: for each sequence
    float* grad_initial;      // [b w]
};

// K_l = the sum over n of w_n e^(l z_n), of pairs (re, im) twice its real part, for each row; in double precision.
struct Vandermonde {
    int64_t rows, states, length, pairs, narrow, threads;  // narrow: outputs (and gradients) are float32
    const double *weights, *log_base;                      // [rows n]
    char* kernel;                                          // [rows length]; the backward pass finds its gradient here
};

struct VandermondeBackward {
    Vandermonde forward;
    double *grad_weights, *grad_log_base;  // [rows n]
};

// K_sl = the sum over n of (a_sn (z_l - r_n) + b_sn) / ((z_l - r_n)^2 + w_n^2), in double precision: several sums s for each
// row of poles r + iw.
struct Cauchy {
    int64_t sums, rows, states, nodes, narrow, threads;  // narrow: outputs (and gradients) are float32
    const double *a, *b;                                 // [sums rows n]
    const double *real, *imaginary;                      // [rows n]
    const double* z;                                     // [nodes] of pairs (re, im)
    char* kernel;                                        // [sums rows nodes] of pairs; the backward pass finds its gradient here
};

struct CauchyBackward {
    Cauchy forward;
    double *grad_a, *grad_b;             // [sums rows n]
    double *grad_real, *grad_imaginary;  // [rows n]
};

// y_t = activation(bias + Σ_i weight_(k-1-i) u_(t-i)), over the steps of the same sequence that count.
struct ShortConvolution {
    int64_t batch, length, width, taps, silu, threads;
    Rows u, weight, bias, initial;  // [b t d] [1 d k] [1 1 d] [b k-1 d]; the last two may be absent
    const uint8_t *start, *valid;   // [b t], may be null
    Rows y, final;                  // [b t d], not written where a step does not count, and [b k-1 d]
};

struct ShortConvolutionBackward {
    ShortConvolution forward;                           // y and final are not used
    Rows grad, grad_final;                              // of y and final
    Rows grad_u, grad_weight, grad_bias, grad_initial;  // as what they are gradients of
};

// y = (offset + weight) x / (mean(x^2) + eps)^(1/2) by groups of channels; x is x silu(gate) if gate_first, else y silu(gate)
// is y. With `round`, what was normed is rounded to bfloat16 before the weight meets it.
struct RMSNorm {
    int64_t batch, length, width, groups, gate_first, round, threads;
    double eps, offset;
    Rows x, weight, gate;  // [b t d] [1 1 d] [b t d]; the last two may be absent
    Rows y;                // [b t d]
};

struct RMSNormBackward {
    RMSNorm forward;                      // y is not used
    Rows grad;                            // of y
    Rows grad_x, grad_weight, grad_gate;  // as what they are gradients of
};

// step = softplus(x + bias) between the least and the most, decay = -step e^A_log: of each head.
struct HeadSteps {
    int64_t batch, heads;
    double least, most;
    Rows x, bias, A_log, step, decay;  // [b 1 h] [1 1 h] [1 1 h] [b 1 h] [b 1 h]
};

// y = x + factor z
struct Add {
    int64_t batch, width;
    double factor;
    Rows x, z, y;  // [b 1 d]
};

// S_t = diag(e^(g_t)) S_(t-1) + k_t (dt_t v_t)^T,  y_t = S_t^T q_t + D v_t; heads h share groups g of queries and keys.
// If it erases (the delta rule), v_t - (diag(e^(g_t)) S_(t-1))^T k_t stands for the v_t that is written: what the state
// holds at the key is taken away first. There is no D then.
struct LinearAttention {
    int64_t batch, length, groups, heads, keys, values;
    int64_t channels;        // of the log decay, to a head: none, one or `keys`
    int64_t skips;           // numbers of D, to a head: one for all its values, or `values`; one if D is absent
    int64_t erases;          // whether it erases: 1 or 0
    int64_t tile, threads;   // tile: steps between kept states
    Rows q, k, v;            // [b t (g k)] [b t (g k)] [b t (h p)]
    Rows decay, dt, D;       // [b t (h channels)] [b t h] [1 1 (h skips)]; may be absent
    const float* initial;    // [b h k p]; null if there is none
    const uint8_t* start;    // [b t], may be null
    Rows y;                  // [b t (h p)]
    float *final, *kept;     // [b h k p] [tiles+1 b h k p]: the states around tiles; null if not wanted
};

struct LinearAttentionBackward {
    LinearAttention forward;  // with kept; initial, y and final are not used
    Rows grad;                // of y
    const float* grad_final;  // of final
    Rows grad_q, grad_k;      // [(pieces b) t (g k)]: for each piece of a group's heads
    Rows grad_v, grad_decay;  // [b t (h p)] [b t (h channels)]: that of a decay at a distance of 0 is added to what is there
    Rows grad_dt;             // [b t h]
    float *grad_D, *grad_initial;  // [b h p]: for each sequence and channel; [b h k p]
};

constexpr int64_t MOST_TAPS = 64;   // of a short convolution
constexpr int64_t SMALL = 1 << 14;  // numbers that one thread is done with before others are awake
constexpr int64_t HEADS = 4;        // heads of a group whose sums are formed together
constexpr int64_t PIECE = 256;      // channels whose sums are formed together, whatever the number of threads

// Every kernel: its name and what it takes. Declared, tabled and bound from this list.
#define LONGSTATE_KERNELS(KERNEL)                                \
    KERNEL(add, Add)                                             \
    KERNEL(elementwise, Elementwise)                             \
    KERNEL(head_steps, HeadSteps)                                \
    KERNEL(linear, Linear)                                       \
    KERNEL(linear_attention, LinearAttention)                    \
    KERNEL(linear_attention_backward, LinearAttentionBackward)   \
    KERNEL(read_memory, ReadMemory)                              \
    KERNEL(selective_scan, SelectiveScan)                        \
    KERNEL(selective_scan_backward, SelectiveScanBackward)       \
    KERNEL(scan, Scan)                                           \
    KERNEL(scan_backward, ScanBackward)                          \
    KERNEL(vandermonde, Vandermonde)                             \
    KERNEL(vandermonde_backward, VandermondeBackward)            \
    KERNEL(cauchy, Cauchy)                                       \
    KERNEL(cauchy_backward, CauchyBackward)                      \
    KERNEL(short_convolution, ShortConvolution)                  \
    KERNEL(short_convolution_backward, ShortConvolutionBackward) \
    KERNEL(rms_norm, RMSNorm)                                    \
    KERNEL(rms_norm_backward, RMSNormBackward)

struct Kernels {
    const char* name;
#define MEMBER(name, Arguments) void (*name)(const Arguments&);
    LONGSTATE_KERNELS(MEMBER)
#undef MEMBER
};

// The best that this processor runs; or the one of that name, null if it does not run here.
const Kernels* choose_kernels(const char* name);

}  // namespace longstate
