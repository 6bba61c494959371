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
    const int64_t b, group, n, p, size;             // n, p: keys and values in whole vectors; size of a state
    const int64_t steps;                            // of a tile, in whole chunks
    const bool by_channel;
    std::vector<Chunk> chunks;                      // of a head
    Room q, k, grad_q, grad_k;                      // [chunks C n]
    Room q_columns, k_columns;                      // [chunks n C]
    Room qk, kk, grad_qk, grad_kk;                  // [chunks C C]: products, and their gradients of all heads
    Room states, adjoints, sums_D;                  // [chunks k p] [heads k p] [heads p]
    Room v, written;                                // [chunks C p]
    Room grad, grad_v, erased, written_columns, grad_columns, erased_columns;  // [C p], [p C]
    Room carried, columns, from_q, from_reader, from_k;
    Square grad_scores, grad_own;

    Piece(const LinearAttentionBackward& g, int64_t b, int64_t group, int64_t heads)
        : g(g), x(g.forward), b(b), group(group), n(filled(x.keys)), p(filled(x.values)), size(x.keys * p),
          steps((std::min(x.tile, x.length) + C - 1) / C * C), by_channel(x.channels > 1), chunks(steps / C, Chunk(x)),
          q(steps * n), k(q), grad_q(q), grad_k(q), q_columns(q), k_columns(q), qk(steps * C), kk(qk), grad_qk(qk),
          grad_kk(qk), states(chunks.size() * size), adjoints(heads * size), sums_D(heads * p), v(steps * p), written(v),
          grad(C * p), grad_v(grad), erased(grad), written_columns(grad), grad_columns(grad), erased_columns(grad),
          carried(n), columns(n * C), from_q(columns), from_reader(columns), from_k(columns) {}

    // The shared part of the tile of steps [t, end).
    APART void begin(int64_t t, int64_t end) {
        for (int64_t j = 0; t < end; t += C, j++) {
            const int64_t count = std::min<int64_t>(C, end - t), at = j * C * n;
            gather(x.q, b, t, count, group * x.keys, x.keys, &q[at]);
            gather(x.k, b, t, count, group * x.keys, x.keys, &k[at]);
            if (by_channel) continue;
            transpose(C, n, &q[at], n, &q_columns[at], C);
            transpose(C, n, &k[at], n, &k_columns[at], C);
            multiply(C, C, x.keys, &q[at], n, 1, &k_columns[at], C, &qk[j * C * C], C, REPLACE);
            if (x.erases) multiply(C, C, x.keys, &k[at], n, 1, &k_columns[at], C, &kk[j * C * C], C, REPLACE);
        }
        for (Room* room : {&grad_q, &grad_k, &grad_qk, &grad_kk}) std::fill(room->begin(), room->end(), 0.f);
    }

    // Write the gradients of q and k of the tile, summed over the heads.
    APART void end(int64_t piece, int64_t t, int64_t end) {
        for (int64_t j = 0; t < end; t += C, j++) {
            const int64_t count = std::min<int64_t>(C, end - t), at = j * C * n;
            float *to_q = &grad_q[at], *to_k = &grad_k[at];
            if (!by_channel) {
                const float *of_qk = &grad_qk[j * C * C], *of_kk = &grad_kk[j * C * C];
                transpose(n, C, to_q, C, from_q.data(), n);
                transpose(n, C, to_k, C, from_k.data(), n);
                to_q = from_q.data(), to_k = from_k.data();
                multiply_lower(count, n, of_qk, &k[at], n, to_q, n, ADD);
                multiply(count, n, count, of_qk, 1, C, &q[at], n, to_k, n, ADD);
                if (x.erases) {
                    multiply_lower(count, n, of_kk, &k[at], n, to_k, n, ADD);
                    multiply(count, n, count, of_kk, 1, C, &k[at], n, to_k, n, ADD);
                }
            }
            scatter(g.grad_q, piece * x.batch + b, t, count, group * x.keys, x.keys, to_q);
            scatter(g.grad_k, piece * x.batch + b, t, count, group * x.keys, x.keys, to_k);
        }
    }

    // What a chunk of a head writes, and the state after it unless it is the tile's last.
    APART void advance(int64_t h, int64_t t, int64_t j, int64_t count, bool last) {
        Chunk& chunk = chunks[j];
        const float* keys = &k[j * C * n];
        float *S = &states[j * size], *values = &v[j * C * p], *own = &written[j * C * p];
        gather(x.v, b, t, count, h * x.values, x.values, values);
        chunk.begin(b, t, count, h, &q[j * C * n], keys, &qk[j * C * C], &kk[j * C * C]);
        chunk.write(S, keys, chunk.decays.before_start(b, t, count), values, own);
        if (last) return;
        std::copy_n(S, size, S + size);
        std::copy_n(own, C * p, grad_v.data());
        chunk.advance(S + size, keys, count, grad_v.data());
    }

    // One chunk of a head backwards: `adjoint` is the gradient of the state after it, and before it on return.
    void retreat(int64_t h, int64_t t, int64_t j, int64_t count, float* L, float* sum_D) {
        Chunk& chunk = chunks[j];
        const float* keys = by_channel ? chunk.k_out.data() : &k[j * C * n];
        gather(g.grad, b, t, count, h * x.values, x.values, grad.data(), -C);
        transpose(C, p, &written[j * C * p], p, written_columns.data(), C);
        transpose(C, p, grad.data(), p, grad_columns.data(), C);
        multiply(C, C, x.values, grad.data(), p, 1, written_columns.data(), C, grad_scores, C, REPLACE);
        multiply(count, p, x.keys, keys, n, 1, L, p, grad_v.data(), p, REPLACE);
        multiply(count, p, count, chunk.scores, 1, C, grad.data(), p, grad_v.data(), p,
                 by_channel ? ADD : Remains{chunk.head.remains_out, 1});
        if (x.erases) restore(chunk, count);
        if (by_channel)
            retreat_by_channel(h, t, j, count, L);
        else
            retreat_by_head(h, t, j, count, L);
        around(h, t, j, count, sum_D);
        scatter(g.grad_v, b, t, count, h * x.values, x.values, grad_v.data());
    }

    // From the gradient of what is written to that of dt e: a later step's e holds - own_ts of it. `erased` is, for each
    // step, the gradient of what its key found.
    APART void restore(const Chunk& chunk, int64_t count) {
        std::fill(erased.begin(), erased.end(), 0.f);
        for (int64_t c = count - 1; c >= 0; c--)
            for (int64_t i = 0; i < p; i += W) {
                vf sum = load(&grad_v[c * p + i]);
                for (int64_t s = c + 1; s < count; s++) sum += all(chunk.own[s * C + c]) * load(&erased[s * p + i]);
                store(&grad_v[c * p + i], sum);
                store(&erased[c * p + i], -sum * all(chunk.dt[c]));
            }
        transpose(C, p, erased.data(), p, erased_columns.data(), C);
        multiply(C, C, x.values, erased.data(), p, 1, written_columns.data(), C, grad_own, C, REPLACE);
        for (int c = 0; c < C; c++) grad_own[c * C + c] = 0.f;
    }

    // From the gradient of what stands for v_t, times dt_t, to that of values, dt and D.
    APART void around(int64_t h, int64_t t, int64_t j, int64_t count, float* sum_D) {
        const float* values = &v[j * C * p];
        for (int64_t c = 0; c < count && x.dt; c++) {
            write(g.grad_dt, b, t + c, h, all(product(values + c * p, &grad_v[c * p])), 1);
            for (int64_t i = 0; i < p; i += W)
                store(&grad_v[c * p + i], load(&grad_v[c * p + i]) * all(chunks[j].dt[c]));
        }
        for (int64_t i = 0; i < p && x.D; i += W) {
            const vf D = skip(x, h, i);
            vf sum{};
            for (int64_t c = 0; c < count; c++) {
                const vf y = read(g.grad, b, t + c, h * x.values + i, lanes(x.values, i));
                sum += y * load(values + c * p + i);
                store(&grad_v[c * p + i], load(&grad_v[c * p + i]) + y * D);
            }
            store(sum_D + i, load(sum_D + i) + sum);
        }
    }

    APART void retreat_by_head(int64_t h, int64_t t, int64_t j, int64_t count, float* L) {
        const float *S = &states[j * size], *queries = &q_columns[j * C * n], *keys = &k_columns[j * C * n];
        const HeadDecays& head = chunks[j].head;
        for (int i = 0; i < C * C; i += W) {
            const vf left = load(head.D + i), of_qk = load(grad_scores + i) * left;
            store(&grad_qk[j * C * C + i], load(&grad_qk[j * C * C + i]) + of_qk);
            vf crossing = of_qk * load(&qk[j * C * C + i]);
            if (x.erases) {
                const vf of_kk = load(grad_own + i) * left;
                store(&grad_kk[j * C * C + i], load(&grad_kk[j * C * C + i]) + of_kk);
                crossing += of_kk * load(&kk[j * C * C + i]);
            }
            store(grad_scores + i, crossing);
        }
        float read[C] = {}, from[C] = {}, through = 0.f;  // what is read of the state before, goes into the one after, or both
        outer(S, grad_columns.data(), head.into, queries, &grad_q[j * C * n], read);
        if (x.erases) outer(S, erased_columns.data(), head.into, keys, &grad_k[j * C * n], read);
        outer(L, written_columns.data(), head.out(), keys, &grad_k[j * C * n], from);
        for (int64_t m = 0; m < x.keys && x.channels; m++) through += head.into[C - 1] * product(S + m * p, L + m * p);
        scale_rows(grad.data(), p, head.into);
        multiply(x.keys, p, count, &q[j * C * n], 1, n, grad.data(), p, L, p, head.through());
        if (x.erases) {
            scale_rows(erased.data(), p, head.into);
            multiply(x.keys, p, count, &k[j * C * n], 1, n, erased.data(), p, L, p, ADD);
        }
        if (x.channels) write_decay(h, t, count, read, from, through);
    }

    // sums += [k p] times [p C], each step times its factor; `brought` += what that brings together with `with`.
    void outer(const float* of, const float* steps, const float* factor, const float* with, float* sums, float* brought) {
        multiply(x.keys, C, x.values, of, p, 1, steps, C, columns.data(), C, REPLACE);
        for (int i = 0; i < C; i += W) {
            vf sum = load(brought + i), f = load(factor + i);
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

    // The gradient of a step's log decay: all that crosses it.
    void write_decay(int64_t h, int64_t t, int64_t count, const float* read, const float* from, float through) {
        float crossing[C] = {}, gradient[C], after = 0.f, before = 0.f, whole = 0.f;
        for (int c = C - 1; c >= 0; c--) {
            after += read[c];
            gradient[c] = after + through;
            for (int s = 0; s < c; s++) gradient[c] += crossing[s] += grad_scores[c * C + s];
        }
        for (int64_t c = 0; c < count; c++) {
            gradient[c] += before;
            before += from[c], whole += gradient[c];
            if (g.grad_decay.row) *reinterpret_cast<float*>(g.grad_decay.address(b, t + c, h)) = gradient[c];
        }
        if (!g.grad_decay.row) *reinterpret_cast<float*>(g.grad_decay.address(b, t, h)) += whole;
    }

    APART void retreat_by_channel(int64_t h, int64_t t, int64_t j, int64_t count, float* L) {
        const float* S = &states[j * size];
        Chunk& chunk = chunks[j];
        rows_of(S, grad_columns.data(), from_q.data());
        if (x.erases) rows_of(S, erased_columns.data(), from_reader.data());
        rows_of(L, written_columns.data(), from_k.data());
        for (int64_t m = 0; m < x.keys; m++) carried[m] = factor_of(chunk.through[m]) * product(S + m * p, L + m * p);
        for (int64_t i = 0; i < n; i += W)
            x.erases ? channels<true>(h, t, j, count, i) : channels<false>(h, t, j, count, i);
        multiply(x.keys, p, count, chunk.q_into.data(), 1, n, grad.data(), p, L, p, {chunk.through.data(), 1});
        if (x.erases) multiply(x.keys, p, count, chunk.k_into.data(), 1, n, erased.data(), p, L, p, ADD);
    }

    // [k p] times [p C], as rows of steps.
    void rows_of(const float* of, const float* steps, float* to) {
        multiply(x.keys, C, x.values, of, p, 1, steps, C, columns.data(), C, REPLACE);
        transpose(n, C, columns.data(), C, to, n);
    }

    // What is done for each key channel by itself: the gradients of W channels of q, k and the log decays of a chunk.
    template <bool ERASES>
    APART void channels(int64_t h, int64_t t, int64_t j, int64_t count, int64_t i) {
        const float *a = &chunks[j].g[i], *queries = &q[j * C * n + i], *keys = &k[j * C * n + i];
        float *to_q = &grad_q[j * C * n + i], *to_k = &grad_k[j * C * n + i];
        const auto add = [](float* to, vf y) { store(to, load(to) + y); };
        vf read[C], from[C], gradient[C] = {}, left = all(1.f);
        for (int c = 0; c < C; c++) {
            left *= load(a + c * n);
            const vf y = left * load(&from_q[c * n + i]), z = ERASES ? left * load(&from_reader[c * n + i]) : vf{};
            read[c] = y * load(queries + c * n) + z * load(keys + c * n);
            add(to_q + c * n, y);
            if (ERASES) add(to_k + c * n, z);
        }
        left = all(1.f);
        for (int c = C - 1; c >= 0; c--) {
            const vf y = left * load(&from_k[c * n + i]);
            from[c] = y * load(keys + c * n);
            add(to_k + c * n, y);
            left *= load(a + c * n);
        }
        for (int s = 0; s < count; s++) {
            const vf key = load(keys + s * n);
            vf pair[C], sum{}, D = all(1.f), crossing{};
            for (int c = s; c < count; c++) {
                if (c > s) D *= load(a + c * n);
                const vf y = D * all(grad_scores[c * C + s]), z = ERASES ? D * all(grad_own[c * C + s]) : vf{};
                add(to_q + c * n, y * key);
                if (ERASES) add(to_k + c * n, z * key);
                pair[c] = y * load(queries + c * n) + z * load(keys + c * n);
                sum += pair[c];
            }
            add(to_k + s * n, sum);
            for (int c = int(count) - 1; c > s; c--) {
                crossing += pair[c];
                gradient[c] += crossing * key;
            }
        }
        vf after = load(&carried[i]), before{};
        for (int c = int(count) - 1; c >= 0; c--) gradient[c] += after += read[c];
        for (int c = 0; c < count; c++) {
            write(g.grad_decay, b, t + c, h * x.keys + i, gradient[c] + before, lanes(x.keys, i));
            before += from[c];
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
        const int64_t first = group * shared + piece * HEADS, heads = std::min(HEADS, (group + 1) * shared - first);
        Piece work(g, b, group, heads);
        for (int64_t h = 0; h < heads && g.grad_final; h++)
            widen_rows(g.grad_final + (b * x.heads + first + h) * state, x.keys, x.values, &work.adjoints[h * work.size]);
        for (int64_t tile = (x.length + x.tile - 1) / x.tile - 1; tile >= 0; tile--) {
            const int64_t begin = tile * x.tile, end = std::min(begin + x.tile, x.length), chunks = (end - begin + C - 1) / C;
            const auto count = [&](int64_t j) { return std::min<int64_t>(C, end - begin - j * C); };
            work.begin(begin, end);
            for (int64_t h = 0; h < heads; h++) {
                const int64_t at = (b * x.heads + first + h) * state;
                widen_rows(x.kept + tile * x.batch * x.heads * state + at, x.keys, x.values, work.states.data());
                for (int64_t j = 0; j < chunks; j++) work.advance(first + h, begin + j * C, j, count(j), j + 1 == chunks);
                for (int64_t j = chunks - 1; j >= 0; j--)
                    work.retreat(first + h, begin + j * C, j, count(j), &work.adjoints[h * work.size], &work.sums_D[h * work.p]);
            }
            work.end(piece, begin, end);
        }
        for (int64_t h = 0; h < heads; h++) {
            const int64_t at = b * x.heads + first + h;
            narrow_rows(&work.adjoints[h * work.size], x.keys, x.values, g.grad_initial + at * state);
            if (x.D) narrow_rows(&work.sums_D[h * work.p], 1, x.values, g.grad_D + at * x.values);
        }
    }
}

}  // namespace longstate::ISA
