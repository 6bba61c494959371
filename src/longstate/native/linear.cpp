// y = x Wᵀ + b for a few rows of x. All of them pass the weights at once, which are read row after row, each thread a run
// of rows: what bounds the time is reading them from memory.
#include "isa.h"

namespace longstate::ISA {

// Sums are in registers only where no loop over them is left.
#define UNROLLED _Pragma("GCC unroll 16")

constexpr int64_t SMALL = 1 << 16;  // bytes of W that are read sooner than other threads would begin
constexpr int64_t FAR = 16384, NEAR = 512;  // bytes ahead of what is read that are brought into the caches
constexpr int64_t NEXT = 8192;      // bytes of rows that are brought into the first cache while those before them are read
constexpr int64_t LINE = 64;        // bytes that memory gives at a time

// Numbers that begin where a line of the cache does: a vector across two of them takes twice as long to load.
namespace {  // names that other sources may have too
struct alignas(LINE) Line {
    char bytes[LINE];
};
template <class T>
struct Aligned {
    std::vector<Line> lines;
    explicit Aligned(int64_t count = 0) : lines((count * sizeof(T) + LINE - 1) / LINE) {}
    T* at(int64_t i) { return reinterpret_cast<T*>(lines.data()) + i; }
    const T* at(int64_t i) const { return reinterpret_cast<const T*>(lines.data()) + i; }
};

// Rows of x as float32.
struct Input {
    int64_t rows, width;  // width: from row to row
    Aligned<float> room;
    const float* at(int64_t row, int64_t i) const { return room.at(row * width + i); }
};
}  // namespace

static inline vf wide(vf x) { return x; }
static inline vf wide(vh x) { return widen(x); }
static inline vf wide(vb x) { return whole(lengthen(x)); }

template <class V>
static inline vf take(const char* p, int64_t count = W) {
    V x{};
    std::memcpy(&x, p, sizeof(V) / W * count);
    return wide(x);
}

// Rows that are read at once lie behind each other, so what comes next is as far from each of them as all are long.
static inline int64_t near(const Linear& g, int64_t rows, int64_t size) {
    const int64_t bytes = rows * g.weight_row * size;
    return bytes <= NEXT ? bytes : NEAR;
}

static inline void ask_for(const char* p, int64_t near) {
    __builtin_prefetch(p + FAR, 0, 2);  // the second cache has room for so much, the first not
    __builtin_prefetch(p + near);
}

// Outputs o … o + R − 1 of a row, each the total of a vector times a factor.
template <int R>
static inline void put(const Linear& g, int64_t row, int64_t o, const vf* sums, vf factors) {
    if (row >= g.batch * g.length) return;
    const int64_t b = g.length == 1 ? row : row / g.length;
    const int count = int(std::min<int64_t>(R, g.out - o));
    const vf bias = g.bias ? read(g.bias, 0, 0, o, count) : vf{};
    write(g.y, b, row - b * g.length, o, totals<R>(sums) * factors + bias, count);
}

// R rows of W, which are vectors V, with M rows of x.
template <class V, int R, int M>
static void pass(const Linear& g, const Input& x, int64_t first) {
    constexpr int64_t size = sizeof(V) / W, together = std::max<int64_t>(LINE / sizeof(V), 1);
    const int64_t ahead = near(g, R, size);
    const char* w[R];
    vf sum[M][R] = {};
    UNROLLED for (int r = 0; r < R; r++) w[r] = g.weight + std::min(first + r, g.out - 1) * g.weight_row * size;
    for (int64_t begin = 0, k = 0; begin < g.in; begin += g.group, k++) {
        const int64_t end = std::min(begin + g.group, g.in);
        vf part[R][M] = {};
        int64_t i = begin;
        for (; i + together * W <= end; i += together * W) {
            UNROLLED for (int r = 0; r < R; r++) {
                ask_for(w[r] + i * size, ahead);
                UNROLLED for (int j = 0; j < together; j++) {
                    const vf v = take<V>(w[r] + (i + j * W) * size);
                    UNROLLED for (int m = 0; m < M; m++) part[r][m] += v * load(x.at(m, i + j * W));
                }
            }
        }
        for (; i < end; i += W) {
            const int count = int(std::min<int64_t>(W, end - i));
            vf some[M];
            UNROLLED for (int m = 0; m < M; m++) some[m] = load_some(x.at(m, i), count);
            UNROLLED for (int r = 0; r < R; r++) {
                const vf v = count == W ? take<V>(w[r] + i * size) : take<V>(w[r] + i * size, count);
                UNROLLED for (int m = 0; m < M; m++) part[r][m] += v * some[m];
            }
        }
        UNROLLED for (int r = 0; r < R; r++) {
            const vf factor = all(g.scale ? number_at(g.scale, 0, std::min(first + r, g.out - 1), k) : 1.f);
            UNROLLED for (int m = 0; m < M; m++) sum[m][r] += part[r][m] * factor;
        }
    }
    UNROLLED for (int m = 0; m < M; m++) put<R>(g, m, first, sum[m], all(1.f));
}

template <int R, class Pass>
static void in_blocks(const Linear& g, int64_t size, const Pass& block) {
    for_jobs((g.out + R - 1) / R, g.out * g.in * size < SMALL ? 1 : g.threads, [&](int64_t i) { block(i * R); });
}

template <class V>
static void run(const Linear& g, const Input& x) {
    const int64_t size = sizeof(V) / W;
    if (x.rows == 1) return in_blocks<4>(g, size, [&](int64_t o) { pass<V, 4, 1>(g, x, o); });
    if (x.rows == 2) return in_blocks<4>(g, size, [&](int64_t o) { pass<V, 4, 2>(g, x, o); });
    if (x.rows == 4) return in_blocks<4>(g, size, [&](int64_t o) { pass<V, 4, 4>(g, x, o); });
    in_blocks<2>(g, size, [&](int64_t o) { pass<V, 2, 8>(g, x, o); });
}

#if WIDTH == 16
// With int8 weights and a scale for each row, the sums are of whole numbers, four products in an instruction: x is
// rounded to unit · (65536 c + 256 b + a), with digits from -128 to 127 and a power of 2 of which its largest number is
// 2^21 to 2^22 times as large. The instruction takes one factor without sign: the weight plus 128. What that adds is
// known from x.
#define VNNI __attribute__((target("avx512vnni")))
constexpr int DIGITS = 3;
constexpr int64_t LONGEST = 1 << 20;  // inputs whose sums stay within 32 bits

namespace {
struct Digits {
    int64_t width;       // bytes of a digit of one row
    Aligned<int8_t> at;     // [row digit width]
    Aligned<int32_t> less;  // [row digit 16]: −128 Σ digits, of each lane
    std::vector<float> unit;  // [row]
    explicit Digits(const Input& x)
        : width((x.width + LINE - 1) / LINE * LINE), at(x.rows * DIGITS * width), less(x.rows * DIGITS * W), unit(x.rows) {}
};
}  // namespace

// Whether there are such digits: not of infinities, NaN, or nothing but tiny numbers.
VNNI static bool write_digits(const Input& x, Digits& d) {
    for (int64_t row = 0; row < x.rows; row++) {
        vi sizes{};  // as whole numbers, infinity is more than any number, and what is no number still more
        for (int64_t i = 0; i < x.width; i += W) {
            const vi size = bits(absolute(load(x.at(row, i))));
            sizes = size > sizes ? size : sizes;
        }
        const int32_t most = _mm512_reduce_max_epi32(__m512i(sizes)), exponent = most >> 23;
        if (exponent == 255 || (most && exponent < 64)) return false;
        d.unit[row] = most ? number(vi{} + ((exponent - 21) << 23))[0] : 0.f;
        const vf inverse = number(vi{} + (most ? (275 - exponent) << 23 : 0));
        for (int64_t i = 0; i < x.width; i += W) {
            vi left = vi(_mm512_cvtps_epi32(__m512(load(x.at(row, i)) * inverse)));
            for (int k = 0; k < DIGITS; k++) {
                const vi digit = left << 24 >> 24;
                left = (left - digit) >> 8;
                const __m128i bytes = _mm512_cvtepi32_epi8(__m512i(digit));
                std::memcpy(d.at.at((row * DIGITS + k) * d.width + i), &bytes, W);
            }
        }
        for (int k = 0; k < DIGITS; k++) {
            __m512i more{};
            const int8_t* digits = d.at.at((row * DIGITS + k) * d.width);
            for (int64_t i = 0; i < d.width; i += LINE)
                more = _mm512_dpbusd_epi32(more, _mm512_set1_epi8(char(128)), _mm512_load_si512(digits + i));
            _mm512_store_si512(d.less.at((row * DIGITS + k) * W), _mm512_sub_epi32(__m512i{}, more));
        }
    }
    return true;
}

template <int R, int M>
VNNI static void pass_whole(const Linear& g, const Digits& d, int64_t first) {
    const int64_t ahead = near(g, R, 1);
    const char* w[R];
    __m512i sum[R][M][DIGITS];
    const __m512i offset = _mm512_set1_epi8(char(128));
    UNROLLED for (int r = 0; r < R; r++) {
        w[r] = g.weight + std::min(first + r, g.out - 1) * g.weight_row;
        UNROLLED for (int m = 0; m < M; m++)
            UNROLLED for (int k = 0; k < DIGITS; k++) sum[r][m][k] = _mm512_load_si512(d.less.at((m * DIGITS + k) * W));
    }
    for (int64_t i = 0; i < g.in; i += LINE) {
        const __mmask64 there = g.in - i >= LINE ? ~__mmask64(0) : (__mmask64(1) << (g.in - i)) - 1;
        UNROLLED for (int r = 0; r < R; r++) {
            ask_for(w[r] + i, ahead);
            const __m512i v = _mm512_xor_si512(_mm512_maskz_loadu_epi8(there, w[r] + i), offset);
            UNROLLED for (int m = 0; m < M; m++)
                UNROLLED for (int k = 0; k < DIGITS; k++) {
                    const __m512i digits = _mm512_load_si512(d.at.at((m * DIGITS + k) * d.width + i));
                    sum[r][m][k] = _mm512_dpbusd_epi32(sum[r][m][k], v, digits);
                }
        }
    }
    vf scales{};
    UNROLLED for (int r = 0; r < R; r++) scales[r] = number_at(g.scale, 0, std::min(first + r, g.out - 1), 0);
    UNROLLED for (int m = 0; m < M; m++) {
        vf sums[R];
        UNROLLED for (int r = 0; r < R; r++) {
            const vf high = whole(vi(sum[r][m][2])), middle = whole(vi(sum[r][m][1])), low = whole(vi(sum[r][m][0]));
            sums[r] = (high * all(256.f) + middle) * all(256.f) + low;
        }
        put<R>(g, m, first, sums, all(d.unit[m]) * scales);
    }
}

static bool run_whole(const Linear& g, const Input& x) {
    static const bool there = __builtin_cpu_supports("avx512vnni");
    Digits d(x);
    if (!there || g.group < g.in || g.in > LONGEST || !write_digits(x, d)) return false;
    if (x.rows == 1)
        in_blocks<4>(g, 1, [&](int64_t o) { pass_whole<4, 1>(g, d, o); });
    else if (x.rows == 2)
        in_blocks<4>(g, 1, [&](int64_t o) { pass_whole<4, 2>(g, d, o); });
    else if (x.rows == 4)
        in_blocks<2>(g, 1, [&](int64_t o) { pass_whole<2, 4>(g, d, o); });
    else
        in_blocks<1>(g, 1, [&](int64_t o) { pass_whole<1, 8>(g, d, o); });
    return true;
}
#else
static bool run_whole(const Linear&, const Input&) { return false; }
#endif

void linear(const Linear& g) {
    const int64_t rows = g.batch * g.length, room = rows <= 2 ? rows : rows <= 4 ? 4 : 8, width = (g.in + W - 1) / W * W;
    Input x{room, width, Aligned<float>(room * width)};
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = 0; i < g.in; i += W) {
            const int count = int(std::min<int64_t>(W, g.in - i));
            store(x.room.at(row * width + i), read(g.x, row / g.length, row % g.length, i, count));
        }
    if (g.kind == 0) return run<vf>(g, x);
    if (g.kind == 1) return run<vh>(g, x);
    if (!run_whole(g, x)) run<vb>(g, x);
}

// The sum of all numbers, as fast as memory gives them: what a kernel's speed is to be compared with.
void read_memory(const ReadMemory& g) {
    const int64_t pieces = (g.count + PIECE * W - 1) / (PIECE * W);
    std::vector<float> sums(pieces);
#pragma omp parallel for schedule(static) num_threads(g.threads)
    for (int64_t piece = 0; piece < pieces; piece++) {
        vf sum[4] = {};
        const float *p = g.x + piece * PIECE * W, *end = g.x + std::min((piece + 1) * PIECE * W, g.count / (4 * W) * 4 * W);
        for (; p < end; p += 4 * W)
            for (int i = 0; i < 4; i++) sum[i] += load(p + i * W);
        sums[piece] = total((sum[0] + sum[1]) + (sum[2] + sum[3]));
    }
    *g.sum = 0;
    for (const float x : sums) *g.sum += x;
}

}  // namespace longstate::ISA
