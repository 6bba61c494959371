// The gradient of the selective scan: each tile is computed again from the state before it.
#include "selective_scan.h"

namespace longstate::ISA {

// Rows that the tile before this one will read, or that this one will write, from step `begin` on: they are asked for one
// by one between the steps, since they lie too far from each other for the machine to foresee which are next.
struct Foreseen {
    Rows rows[8];
    int64_t begins[8], count = 0;
    void add(const Rows& x, int64_t begin) {
        if (x && begin >= 0) rows[count] = x, begins[count++] = begin;
    }
};

// What the recurrence of a tile works on, backwards: of each step the gradient of C h, and sums over states of what
// reaches the input by B and Delta by the decay.
struct BackwardPart {
    Columns a, h, adjoint, grad_A, steps, inputs, sums, grads, by_input, by_decay;
    const float *B, *C;
    Columns sums_B, sums_C;  // [t K], over channels
    Columns before, decays;  // [t K]
    const Foreseen& foreseen;
    int64_t channel, pass, passes;  // the channels of this vector; of the passes over it each asks for its share
};

template <int K>
static void retreat(const SelectiveScan& x, const Tile& p, const BackwardPart& s) {
    vf h[K], adjoint[K], grad_A[K];
    for (int n = 0; n < K; n++) h[n] = s.h[n];
    for (int64_t t = 0; t < p.steps(); t++) {
        const bool fresh = starts(x, p.b, p.begin + t);
        const float *B = s.B + t * x.states, *C = s.C + t * x.states;
        const vf step = s.steps[t], input = s.inputs[t];
        vf sum = s.sums[t];
        for (int64_t i = s.pass; i < s.foreseen.count; i += s.passes)
            __builtin_prefetch(s.foreseen.rows[i].address(p.b, s.foreseen.begins[i] + t, s.channel), 0, 2);
#pragma GCC unroll 4
        for (int n = 0; n < K; n++) {
            const vf decay = fresh ? vf{} : power(step * s.a[n]);
            s.before.set(t * K + n, h[n]);
            s.decays.set(t * K + n, decay);
            h[n] = decay * h[n] + input * all(B[n]);
            sum += h[n] * all(C[n]);
        }
        s.sums.set(t, sum);
    }
    for (int n = 0; n < K; n++) adjoint[n] = s.adjoint[n], grad_A[n] = s.grad_A[n];
    for (int64_t t = p.steps() - 1; t >= 0; t--) {
        const float *B = s.B + t * x.states, *C = s.C + t * x.states;
        const vf step = s.steps[t], input = s.inputs[t], grad = s.grads[t];
        vf by_input = s.by_input[t], by_decay = s.by_decay[t];
#pragma GCC unroll 4
        for (int n = 0; n < K; n++) {
            const vf before = s.before[t * K + n], l = adjoint[n] + grad * all(C[n]);
            s.sums_C.add(t * K + n, grad * h[n]);
            s.sums_B.add(t * K + n, l * input);
            by_input += l * all(B[n]);
            adjoint[n] = l * s.decays[t * K + n];
            const vf flow = adjoint[n] * before;
            by_decay += flow * s.a[n];
            grad_A[n] += flow * step;
            h[n] = before;
        }
        s.by_input.set(t, by_input);
        s.by_decay.set(t, by_decay);
    }
    for (int n = 0; n < K; n++) s.adjoint.set(n, adjoint[n]), s.grad_A.set(n, grad_A[n]);
}

// Before the recurrence of a tile goes backwards: the gradient of what the gate met, and room for what will be summed.
static void prepare_backward(const SelectiveScanBackward& g, const Tile& p, Field grads, Field by_input, Field by_decay) {
    for (int64_t t = p.begin; t < p.end; t++)
        for (int64_t v = 0; v < p.vectors(); v++) {
            vf grad = read(g.grad, p.b, t, p.channel(v), p.count(v));
            if (g.forward.gate) {
                const vf z = read(g.forward.gate, p.b, t, p.channel(v), p.count(v));
                grad *= z * sigmoid(z);
            }
            grads.of(v).set(t - p.begin, grad);
            by_input.of(v).set(t - p.begin, vf{});
            by_decay.of(v).set(t - p.begin, vf{});
        }
}

// After it: the gradients of u, dt and the gate, and the sums for D, the bias and the elapsed time.
static void finish_backward(const SelectiveScanBackward& g, const Tile& p, int64_t piece, Field sums, Field grads,
                            Field by_input, Field by_decay, Columns grad_D, Columns grad_bias) {
    const SelectiveScan& x = g.forward;
    for (int64_t t = p.begin; t < p.end; t++) {
        const int64_t i = t - p.begin;
        const vf time = all(elapsed(x, p.b, t));
        vf of_elapsed{};
        for (int64_t v = 0; v < p.vectors(); v++) {
            const int64_t d = p.channel(v);
            const int count = p.count(v);
            const vf from = raw(x, p, v, t), step = x.softplus ? softplus(from) : from;
            const vf u = read(x.u, p.b, t, d, count), grad = grads.of(v)[i], input = by_input.of(v)[i];
            const vf of_step = input * u + by_decay.of(v)[i] * all(1 / LOG2E);
            const vf of_dt = of_step * time * (x.softplus ? sigmoid(from) : all(1.f));
            write(g.grad_u, p.b, t, d, input * step * time + of_channels(x.D, p, v) * grad, count);
            write(g.grad_dt, p.b, t, d, of_dt, count);
            if (x.gate) {
                const vf z = read(x.gate, p.b, t, d, count), s = sigmoid(z);
                const vf of_silu = read(g.grad, p.b, t, d, count) * sums.of(v)[i];
                write(g.grad_gate, p.b, t, d, of_silu * s * (all(1.f) + z * (all(1.f) - s)), count);
            }
            of_elapsed += of_step * step;
            grad_D.add(v, grad * u);
            grad_bias.add(v, of_dt);
        }
        if (x.elapsed) g.grad_elapsed[(piece * x.batch + p.b) * x.length + t] = total(of_elapsed);
    }
}

static void scan_piece_backward(const SelectiveScanBackward& g, int64_t b, int64_t piece) {
    const SelectiveScan& x = g.forward;
    const Tile whole = tile_of(x, b, piece, 0);
    const int64_t vectors = whole.vectors(), N = x.states, T = x.tile, sequence = x.width * N;
    Room room((4 * vectors * N + 6 * vectors * (T + 1) + 16 * T + 2 * vectors) * W + 2 * T * N);
    Columns a = room.columns(vectors * N), h = room.columns(vectors * N);
    Columns adjoint = room.columns(vectors * N), grad_A = room.columns(vectors * N);
    auto field = [&] { return Field{room.columns(vectors * (T + 1)), T}; };
    Field steps = field(), inputs = field(), sums = field(), grads = field(), by_input = field(), by_decay = field();
    Columns sums_B = room.columns(4 * T), sums_C = room.columns(4 * T), before = room.columns(4 * T), decays = room.columns(4 * T);
    Columns grad_D = room.columns(vectors), grad_bias = room.columns(vectors);
    float *B = room.take(T * N), *C = room.take(T * N);
    load_rates(x, whole, a);
    if (g.grad_final) load_states(x, whole, g.grad_final, adjoint);
    for (int64_t tile = (x.length + T - 1) / T - 1; tile >= 0; tile--) {
        const Tile p = tile_of(x, b, piece, tile);
        load_states(x, p, x.kept + tile * x.batch * sequence, h);
        gather_rows(x.B, p, N, B);
        gather_rows(x.C, p, N, C);
        prepare(x, p, steps, inputs, sums);
        prepare_backward(g, p, grads, by_input, by_decay);
        Foreseen foreseen;
        for (const Rows* rows : {&x.u, &x.dt, &x.gate, &g.grad}) foreseen.add(*rows, p.begin - T);
        for (const Rows* rows : {&g.grad_u, &g.grad_dt, &g.grad_gate}) foreseen.add(*rows, p.begin);
        // A few states of all channels at a time: the sums over channels then stay in the nearest cache.
        for (int64_t n = 0, pass = 0; n < N; pass++) {
            const int K = N - n >= 4 ? 4 : 1;
            std::fill_n(sums_B.at, K * T * W, 0.f);
            std::fill_n(sums_C.at, K * T * W, 0.f);
            for (int64_t v = 0; v < vectors; v++) {
                const int64_t row = v * N + n;
                const BackwardPart part{a.from(row), h.from(row), adjoint.from(row), grad_A.from(row), steps.of(v), inputs.of(v),
                                        sums.of(v), grads.of(v), by_input.of(v), by_decay.of(v), B + n, C + n, sums_B, sums_C,
                                        before, decays, foreseen, p.channel(v), pass, N / 4 + N % 4};
                K == 4 ? retreat<4>(x, p, part) : retreat<1>(x, p, part);
            }
            for (int64_t i = 0; i < p.steps() * K; i++) {
                const int64_t to = ((piece * x.batch + b) * x.length + p.begin + i / K) * N + n + i % K;
                g.grad_B[to] = total(sums_B[i]);
                g.grad_C[to] = total(sums_C[i]);
            }
            n += K;
        }
        finish_backward(g, p, piece, sums, grads, by_input, by_decay, grad_D, grad_bias);
    }
    store_states(x, whole, adjoint, g.grad_initial);
    // By log(-A) the derivative of A is A itself.
    for (int64_t n = 0; x.log_A && n < vectors * N; n++) grad_A.set(n, grad_A[n] * a[n] * all(1 / LOG2E));
    store_states(x, whole, grad_A, g.grad_A);
    for (int64_t v = 0; v < vectors; v++) {
        store_some(g.grad_D + b * x.width + whole.channel(v), grad_D[v], whole.count(v));
        store_some(g.grad_bias + b * x.width + whole.channel(v), grad_bias[v], whole.count(v));
    }
}

void selective_scan_backward(const SelectiveScanBackward& g) {
    const int64_t pieces = (g.forward.width + PIECE - 1) / PIECE;
#pragma omp parallel for schedule(static) num_threads(int(g.forward.threads))
    for (int64_t job = 0; job < g.forward.batch * pieces; job++) scan_piece_backward(g, job / pieces, job % pieces);
}

}  // namespace longstate::ISA
