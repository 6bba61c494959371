// What kernels that take time in chunks are made of: small matrix products, out of tiles that stay in the registers.
//
// Included once for each instruction set, inside namespace longstate::ISA. Matrices are float32, their rows whole
// vectors, filled up with zeros.

constexpr int C = 16;  // steps of a chunk: work within it grows with C, traffic to and from the state falls
static_assert(C % W == 0);

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int ACROSS = 4;  // vectors of a tile of four rows: thirty-two registers
#else
constexpr int ACROSS = 2;
#endif

static inline int64_t filled(int64_t width) { return (width + W - 1) / W * W; }

typedef std::vector<float> Room;

// For a function that stays one: where the compiler puts all of a kernel into one function, it takes minutes to find
// registers for it, at least with sanitizers.
#define APART __attribute__((noinline))

// What remains of what stood in a result, for each row by the number f at `at` + row * `step`: f > 0 stands for the factor
// f, f <= 0 for 1 + f. A factor near 1 would lose its digits otherwise, and the same ones in chunk after chunk.
struct Remains {
    const float* at;
    int64_t step;
};
static const float NOTHING = -1.f, ALL = 0.f;
constexpr Remains REPLACE{&NOTHING, 0}, ADD{&ALL, 0};

static inline float factor_of(float f) { return f > 0.f ? f : 1.f + f; }

template <int M, int N>
static inline void tile(int64_t depth, const float* a, int64_t a_row, int64_t a_depth, const float* b, int64_t b_row,
                        float* to, int64_t to_row, Remains remains, int64_t first) {
    vf sum[M][N];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
        const float f = remains.at[(first + m) * remains.step];
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) {
            const vf old = f == -1.f ? vf{} : load(to + m * to_row + n * W);  // gone, be it a number or not
            sum[m][n] = f <= 0.f ? old + old * all(f) : old * all(f);
        }
    }
    for (int64_t k = 0; k < depth; k++) {
        vf y[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) y[n] = load(b + k * b_row + n * W);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            const vf x = all(a[m * a_row + k * a_depth]);
#pragma GCC unroll 4
            for (int n = 0; n < N; n++) sum[m][n] += x * y[n];
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) store(to + m * to_row + n * W, sum[m][n]);
}

template <int M, int N>
static inline void stripe(int64_t rows, int64_t depth, const float* a, int64_t a_row, int64_t a_depth, const float* b,
                          int64_t b_row, float* to, int64_t to_row, Remains remains) {
    const int64_t whole = rows / M * M;
    for (int64_t m = 0; m < whole; m += M)
        tile<M, N>(depth, a + m * a_row, a_row, a_depth, b, b_row, to + m * to_row, to_row, remains, m);
    for (int64_t m = whole; m < rows; m++)
        tile<1, N>(depth, a + m * a_row, a_row, a_depth, b, b_row, to + m * to_row, to_row, remains, m);
}

// to[m][n] = what remains of it + sum_k a[m][k] b[k][n]; the numbers of `a` lie at any distance, those of a row of `b`
// and of `to` side by side. `width` is a number of whole vectors.
APART static void multiply(int64_t rows, int64_t width, int64_t depth, const float* a, int64_t a_row, int64_t a_depth,
                     const float* b, int64_t b_row, float* to, int64_t to_row, Remains remains) {
    int64_t n = 0;
    for (; n + ACROSS * W <= width; n += ACROSS * W)
        stripe<4, ACROSS>(rows, depth, a, a_row, a_depth, b + n, b_row, to + n, to_row, remains);
    if (ACROSS > 2)
        for (; n + 2 * W <= width; n += 2 * W)
            stripe<4, 2>(rows, depth, a, a_row, a_depth, b + n, b_row, to + n, to_row, remains);
    for (; n < width; n += W) stripe<8, 1>(rows, depth, a, a_row, a_depth, b + n, b_row, to + n, to_row, remains);
}

// The same with a[t][s] = 0 where s > t, both at most C: rows four by four need only what is not zero.
static inline void multiply_lower(int64_t rows, int64_t width, const float* a, const float* b, int64_t b_row, float* to,
                                  int64_t to_row, Remains remains) {
    for (int64_t t = 0; t < rows; t += 4) {
        const Remains own{remains.at + t * remains.step, remains.step};
        const int64_t some = std::min<int64_t>(4, rows - t);
        multiply(some, width, t + some, a + t * C, C, 1, b, b_row, to + t * to_row, to_row, own);
    }
}

#if WIDTH == 16
#define LOWER(a, b) __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define UPPER(a, b) __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#elif WIDTH == 8
#define LOWER(a, b) __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define UPPER(a, b) __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#else
#define LOWER(a, b) __builtin_shufflevector(a, b, 0, 4, 1, 5)
#define UPPER(a, b) __builtin_shufflevector(a, b, 2, 6, 3, 7)
#endif

// to[n][m] = from[m][n]; rows and width are numbers of whole vectors. Each round of interleaving turns the bits of a
// number's place (row, lane) by one.
APART static void transpose(int64_t rows, int64_t width, const float* from, int64_t from_row, float* to,
                             int64_t to_row) {
    for (int64_t m = 0; m < rows; m += W)
        for (int64_t n = 0; n < width; n += W) {
            vf x[W], y[W];
#pragma GCC unroll 16
            for (int i = 0; i < W; i++) x[i] = load(from + (m + i) * from_row + n);
#pragma GCC unroll 4
            for (int round = 1; round < W; round *= 2) {
#pragma GCC unroll 8
                for (int i = 0; i < W / 2; i++) {
                    y[2 * i] = LOWER(x[i], x[i + W / 2]);
                    y[2 * i + 1] = UPPER(x[i], x[i + W / 2]);
                }
#pragma GCC unroll 16
                for (int i = 0; i < W; i++) x[i] = y[i];
            }
#pragma GCC unroll 16
            for (int i = 0; i < W; i++) store(to + (n + i) * to_row + m, x[i]);
        }
}

// The numbers [at, at + width) of `count` rows from step t on, as float32, with zeros for the rest of a chunk. The rows
// `ahead` of them, which lie too far apart for the processor to guess, are sent for.
APART static void gather(const Rows& x, int64_t b, int64_t t, int64_t count, int64_t at, int64_t width, float* to,
                          int64_t ahead = C) {
    const int64_t row = filled(width);
    for (int64_t c = 0; c < count; c++) {
        for (int64_t i = 0; i < width; i += W)
            store(to + c * row + i, read(x, b, t + c, at + i, int(std::min<int64_t>(W, width - i))));
        for (int64_t i = 0; i < width; i += 16) __builtin_prefetch(x.address(b, t + c + ahead, at + i));
    }
    std::fill_n(to + count * row, (C - count) * row, 0.f);
}

APART static void scatter(const Rows& x, int64_t b, int64_t t, int64_t count, int64_t at, int64_t width,
                           const float* from) {
    const int64_t row = filled(width);
    for (int64_t c = 0; c < count; c++)
        for (int64_t i = 0; i < width; i += W)
            write(x, b, t + c, at + i, load(from + c * row + i), int(std::min<int64_t>(W, width - i)));
}

// A matrix whose rows lie one after the other, into rows of whole vectors; and back.
static inline void widen_rows(const float* from, int64_t rows, int64_t width, float* to) {
    const int64_t row = filled(width);
    for (int64_t m = 0; m < rows; m++)
        for (int64_t i = 0; i < width; i += W)
            store(to + m * row + i, load_some(from + m * width + i, int(std::min<int64_t>(W, width - i))));
}

static inline void narrow_rows(const float* from, int64_t rows, int64_t width, float* to) {
    const int64_t row = filled(width);
    for (int64_t m = 0; m < rows; m++)
        for (int64_t i = 0; i < width; i += W)
            store_some(to + m * width + i, load(from + m * row + i), int(std::min<int64_t>(W, width - i)));
}
