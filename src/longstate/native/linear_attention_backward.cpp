// The gradient of linear attention, tile after tile from the last: the states before a tile's chunks are computed again
// from the one that was kept, and `adjoint`, the gradient of the state after a chunk, goes backwards through them.
//
// Gradients of log decays are sums over what crosses a step, a (source, reader) pair in the chunk or the state on either
// side; no two sums are subtracted, so that nothing cancels but what cancels in the gradient.
#include "isa.h"

namespace longstate::ISA {

#include "chunks.h"
#include "decays.h"
#include "linear_attention.h"

namespace {

// A piece of a group's heads in one sequence: its room, and what is shared by the heads of a tile.
struct Piece {
    const LinearAttentionBackward& g;
    const LinearAttention& x;
    const Decays decays;
    const int64_t b, group, n, p, size, chunks;  // n, p: keys and values in whole vectors; size of a state
    Room q, k, grad_q, grad_k;                   // [chunks C n]
    Room q_columns, k_columns;                   // [chunks n C]
    Room pairs, grad_pairs;                      // [chunks C C]: q_t k_s without decay, and its gradient of all heads
    Room states, adjoints;                       // [chunks k p] [heads k p]
    Room grad_D;                                 // [heads p]
    Room a, given, v, v_columns, grad, grad_columns, grad_v, q_into, k_out, through, carried, columns, from_q, from_k;
    Square scores, grad_scores;
    HeadDecays head;

    Piece(const LinearAttentionBackward& g, int64_t b, int64_t group, int64_t heads)
        : g(g), x(g.forward), decays{x.decay, x.start, x.length, x.channels}, b(b), group(group), n(filled(x.keys)),
          p(filled(x.values)), size(x.keys * p), chunks(x.tile / C), q(chunks * C * n), k(q.size()), grad_q(q.size()),
          grad_k(q.size()), q_columns(q.size()), k_columns(q.size()), pairs(chunks * C * C), grad_pairs(pairs.size()),
          states(chunks * size), adjoints(heads * size), grad_D(heads * p), a(C * (x.channels > 1 ? n : 1)), given(C * p), v(C * p), v_columns(C * p),
          grad(C * p), grad_columns(C * p), grad_v(C * p), q_into(C * n), k_out(C * n), through(n), carried(n), columns(n * C),
          from_q(C * n), from_k(C * n) {}

    // The shared part of the tile of steps [t, end).
    void begin(int64_t t, int64_t end) {
        for (int64_t j = 0; t < end; t += C, j++) {
            const int64_t count = std::min<int64_t>(C, end - t), at = j * C * n;
            gather(x.q, b, t, count, group * x.keys, x.keys, &q[at]);
            gather(x.k, b, t, count, group * x.keys, x.keys, &k[at]);
            if (decays.by_channel()) continue;
            transpose(C, n, &q[at], n, &q_columns[at], C);
            transpose(C, n, &k[at], n, &k_columns[at], C);
            multiply(C, C, x.keys, &q[at], n, 1, &k_columns[at], C, &pairs[j * C * C], C, REPLACE);
        }
        for (Room* room : {&grad_q, &grad_k, &grad_pairs}) std::fill(room->begin(), room->end(), 0.f);
    }

    // Write the gradients of q and k of the tile, summed over the heads.
    void end(int64_t piece, int64_t t, int64_t end) {
        for (int64_t j = 0; t < end; t += C, j++) {
            const int64_t count = std::min<int64_t>(C, end - t), at = j * C * n;
            float *to_q = &grad_q[at], *to_k = &grad_k[at];
            if (!decays.by_channel()) {
                const float* F = &grad_pairs[j * C * C];
                transpose(n, C, to_q, C, from_q.data(), n);
                transpose(n, C, to_k, C, from_k.data(), n);
                to_q = from_q.data(), to_k = from_k.data();
                multiply_lower(count, n, F, &k[at], n, to_q, n, ADD);
                multiply(count, n, count, F, 1, C, &q[at], n, to_k, n, ADD);
            }
            scatter(g.grad_q, piece * x.batch + b, t, count, group * x.keys, x.keys, to_q);
            scatter(g.grad_k, piece * x.batch + b, t, count, group * x.keys, x.keys, to_k);
        }
    }

    // The state of a head before the next chunk.
    void advance(int64_t h, int64_t t, int64_t j) {
        const float *S = &states[j * size], *keys = &k[j * C * n];
        float* next = &states[(j + 1) * size];
        decays.read_steps(b, t, C, h, a.data());
        read_values(x, b, t, C, h, given.data(), v.data());
        std::copy_n(S, size, next);
        if (decays.by_channel()) {
            std::copy_n(keys, C * n, k_out.data());
            channel_decays(a.data(), n, through.data());
            decay_to_end(a.data(), k_out.data(), n);
            multiply(x.keys, p, C, k_out.data(), 1, n, v.data(), p, next, p, {through.data(), 1});
        } else {
            head.set(a.data());
            scale_rows(v.data(), p, head.out());
            multiply(x.keys, p, C, keys, 1, n, v.data(), p, next, p, head.through());
        }
    }

    // One chunk of a head backwards: `adjoint` is the gradient of the state after it, and before it on return.
    void retreat(int64_t h, int64_t t, int64_t j, int64_t count, float* adjoint, float* sum_D) {
        read_values(x, b, t, count, h, given.data(), v.data(), -C);
        gather(g.grad, b, t, count, h * x.values, x.values, grad.data(), -C);
        transpose(C, p, v.data(), p, v_columns.data(), C);
        transpose(C, p, grad.data(), p, grad_columns.data(), C);
        decays.read_steps(b, t, count, h, a.data());
        multiply(C, C, x.values, grad.data(), p, 1, v_columns.data(), C, grad_scores, C, REPLACE);
        if (decays.by_channel())
            by_channel(h, t, j, count, adjoint);
        else
            by_head(h, t, j, count, adjoint);
        around(h, t, count, sum_D);
        scatter(g.grad_v, b, t, count, h * x.values, x.values, grad_v.data());
    }

    // From the gradient of values as they are written to that of values, dt and D.
    void around(int64_t h, int64_t t, int64_t count, float* sum_D) {
        for (int64_t c = 0; c < count && x.dt; c++) {
            const vf dt = all(number_at(x.dt, b, t + c, h));
            write(g.grad_dt, b, t + c, h, all(product(&given[c * p], &grad_v[c * p])), 1);
            for (int64_t i = 0; i < p; i += W) store(&grad_v[c * p + i], load(&grad_v[c * p + i]) * dt);
        }
        for (int64_t i = 0; i < p && x.D; i += W) {
            const vf D = skip(x, h, i, lanes(x.values, i));
            vf sum{};
            for (int64_t c = 0; c < count; c++) {
                const vf y = read(g.grad, b, t + c, h * x.values + i, lanes(x.values, i));
                sum += y * load(&given[c * p + i]);
                store(&grad_v[c * p + i], load(&grad_v[c * p + i]) + y * D);
            }
            store(sum_D + i, load(sum_D + i) + sum);
        }
    }

    void by_head(int64_t h, int64_t t, int64_t j, int64_t count, float* L) {
        const float *S = &states[j * size], *queries = &q[j * C * n], *keys = &k[j * C * n];
        head.set(a.data());
        for (int i = 0; i < C * C; i += W) {
            const vf pair = load(&pairs[j * C * C + i]), left = load(head.D + i), F = load(grad_scores + i) * left;
            float* sum = &grad_pairs[j * C * C + i];
            store(sum, load(sum) + F);
            store(grad_scores + i, F * pair);
            store(scores + i, left * pair);
        }
        multiply(count, p, x.keys, keys, n, 1, L, p, grad_v.data(), p, REPLACE);
        multiply(count, p, count, scores, 1, C, grad.data(), p, grad_v.data(), p,
                 {head.remains_out, 1});
        float read[C], written[C], grad_decay[C], through = 0.f;  // by the state before, and into the one after
        outer(S, grad_columns.data(), head.into, &q_columns[j * C * n], &grad_q[j * C * n], read);
        outer(L, v_columns.data(), head.out(), &k_columns[j * C * n], &grad_k[j * C * n], written);
        for (int64_t m = 0; m < x.keys && x.channels; m++) through += head.into[C - 1] * product(S + m * p, L + m * p);
        scale_rows(grad.data(), p, head.into);
        multiply(x.keys, p, count, queries, 1, n, grad.data(), p, L, p, head.through());
        if (!x.channels) return;
        float crossing[C] = {}, after = 0.f;  // from each source to all readers from a step on; read from a step on
        for (int c = C - 1; c >= 0; c--) {
            after += read[c];
            grad_decay[c] = after + through;
            for (int s = 0; s < c; s++) grad_decay[c] += crossing[s] += grad_scores[c * C + s];
        }
        write_decay(h, t, count, grad_decay, written);
    }

    // sums += [k p] times [p C], each step times its factor; and what that brings together with `with`, for each step.
    void outer(const float* of, const float* steps, const float* factor, const float* with, float* sums, float* brought) {
        multiply(x.keys, C, x.values, of, p, 1, steps, C, columns.data(), C, REPLACE);
        for (int i = 0; i < C; i += W) {
            vf sum{}, f = load(factor + i);
            for (int64_t m = 0; m < x.keys; m++) {
                const vf y = load(&columns[m * C + i]) * f;
                sum += y * load(with + m * C + i);
                store(sums + m * C + i, load(sums + m * C + i) + y);
            }
            store(brought + i, sum);
        }
    }

    float product(const float* one, const float* other) const {
        vf sum{};
        for (int64_t i = 0; i < p; i += W) sum += load(one + i) * load(other + i);
        return total(sum);
    }

    void write_decay(int64_t h, int64_t t, int64_t count, const float* from_later, const float* written) {
        float before = 0.f, whole = 0.f;
        for (int64_t c = 0; c < count; c++) {
            const float sum = from_later[c] + before;
            before += written[c], whole += sum;
            if (g.grad_decay.row) *reinterpret_cast<float*>(g.grad_decay.address(b, t + c, h)) = sum;
        }
        if (!g.grad_decay.row) *reinterpret_cast<float*>(g.grad_decay.address(b, t, h)) += whole;
    }

    void by_channel(int64_t h, int64_t t, int64_t j, int64_t count, float* L) {
        const float* S = &states[j * size];
        std::copy_n(&q[j * C * n], C * n, q_into.data());
        std::copy_n(&k[j * C * n], C * n, k_out.data());
        channel_decays(a.data(), n, through.data());
        decayed_scores(a.data(), q_into.data(), k_out.data(), n, scores);
        decay_from_begin(a.data(), q_into.data(), n);
        multiply(count, p, x.keys, k_out.data(), n, 1, L, p, grad_v.data(), p, REPLACE);
        multiply(count, p, count, scores, 1, C, grad.data(), p, grad_v.data(), p, ADD);
        multiply(x.keys, C, x.values, S, p, 1, grad_columns.data(), C, columns.data(), C, REPLACE);
        transpose(n, C, columns.data(), C, from_q.data(), n);
        multiply(x.keys, C, x.values, L, p, 1, v_columns.data(), C, columns.data(), C, REPLACE);
        transpose(n, C, columns.data(), C, from_k.data(), n);
        for (int64_t m = 0; m < x.keys; m++) carried[m] = factor_of(through[m]) * product(S + m * p, L + m * p);
        for (int64_t i = 0; i < n; i += W) channels(h, t, j, count, i);
        multiply(x.keys, p, count, q_into.data(), 1, n, grad.data(), p, L, p,
                 {through.data(), 1});
    }

    // What is done for each key channel by itself: the gradients of W channels of q, k and the log decays of a chunk.
    void channels(int64_t h, int64_t t, int64_t j, int64_t count, int64_t i) {
        const float *queries = &q[j * C * n + i], *keys = &k[j * C * n + i];
        float *to_q = &grad_q[j * C * n + i], *to_k = &grad_k[j * C * n + i];
        vf read[C], written[C], later[C] = {}, left = all(1.f);
        for (int c = 0; c < C; c++) {
            left *= load(&a[c * n + i]);
            const vf y = left * load(&from_q[c * n + i]);
            read[c] = y * load(queries + c * n);
            store(to_q + c * n, load(to_q + c * n) + y);
        }
        left = all(1.f);
        for (int c = C - 1; c >= 0; c--) {
            const vf y = left * load(&from_k[c * n + i]);
            written[c] = y * load(keys + c * n);
            store(to_k + c * n, load(to_k + c * n) + y);
            left *= load(&a[c * n + i]);
        }
        for (int s = 0; s < count; s++) {
            const vf key = load(keys + s * n);
            vf pair[C], sum{}, D = all(1.f);
            for (int c = s; c < count; c++) {
                if (c > s) D *= load(&a[c * n + i]);
                const vf y = D * all(grad_scores[c * C + s]);
                store(to_q + c * n, load(to_q + c * n) + y * key);
                pair[c] = y * load(queries + c * n);
                sum += pair[c];
            }
            store(to_k + s * n, load(to_k + s * n) + sum);
            vf crossing{};
            for (int c = int(count) - 1; c > s; c--) {
                crossing += pair[c];
                later[c] += crossing * key;
            }
        }
        vf after = load(&carried[i]), before{};
        for (int c = int(count) - 1; c >= 0; c--) later[c] += after += read[c];
        for (int c = 0; c < count; c++) {
            write(g.grad_decay, b, t + c, h * x.keys + i, later[c] + before, lanes(x.keys, i));
            before += written[c];
        }
    }
};

}  // namespace

void linear_attention_backward(const LinearAttentionBackward& g) {
    const LinearAttention& x = g.forward;
    const int64_t shared = x.heads / x.groups, pieces = (shared + HEADS - 1) / HEADS, state = x.keys * x.values;
#pragma omp parallel for schedule(static) num_threads(x.threads)
    for (int64_t job = 0; job < x.batch * x.groups * pieces; job++) {
        const FlushedToZero flushed;
        const int64_t piece = job % pieces, group = job / pieces % x.groups, b = job / pieces / x.groups;
        const int64_t first = group * shared + piece * HEADS, last = std::min(first + HEADS, (group + 1) * shared);
        Piece work(g, b, group, last - first);
        for (int64_t h = first; h < last; h++)
            widen_rows(g.grad_final + (b * x.heads + h) * state, x.keys, x.values, &work.adjoints[(h - first) * work.size]);
        for (int64_t tile = (x.length - 1) / x.tile; tile >= 0 && x.length; tile--) {
            const int64_t begin = tile * x.tile, end = std::min(begin + x.tile, x.length), chunks = (end - begin + C - 1) / C;
            work.begin(begin, end);
            for (int64_t h = first; h < last; h++) {
                widen_rows(x.kept + ((tile * x.batch + b) * x.heads + h) * state, x.keys, x.values, work.states.data());
                for (int64_t j = 0; j + 1 < chunks; j++) work.advance(h, begin + j * C, j);
                for (int64_t j = chunks - 1; j >= 0; j--)
                    work.retreat(h, begin + j * C, j, std::min<int64_t>(C, end - begin - j * C),
                                 &work.adjoints[(h - first) * work.size], &work.grad_D[(h - first) * work.p]);
            }
            work.end(piece, begin, end);
        }
        for (int64_t h = first; h < last && x.D; h++)
            narrow_rows(&work.grad_D[(h - first) * work.p], 1, x.values, g.grad_D + (b * x.heads + h) * x.values);
        for (int64_t h = first; h < last; h++)
            narrow_rows(&work.adjoints[(h - first) * work.size], x.keys, x.values, g.grad_initial + (b * x.heads + h) * state);
    }
}

}  // namespace longstate::ISA
