// Vectors of WIDTH floats by the compiler's own extension: one source for AVX-512, AVX2, NEON and plain code.
//
// Included once for each instruction set, inside namespace longstate::ISA.

typedef float vf __attribute__((vector_size(4 * WIDTH)));
typedef int32_t vi __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t vu __attribute__((vector_size(4 * WIDTH)));
typedef double vd __attribute__((vector_size(4 * WIDTH)));
constexpr int W = WIDTH, D = WIDTH / 2;

static inline vf all(float x) { return x - vf{}; }
static inline vf load(const float* p) {
    vf x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
static inline void store(float* p, vf x) { std::memcpy(p, &x, sizeof x); }
static inline vi bits(vf x) {
    vi y;
    std::memcpy(&y, &x, sizeof y);
    return y;
}
static inline vf number(vi x) {
    vf y;
    std::memcpy(&y, &x, sizeof y);
    return y;
}
static inline vf choose(vi mask, vf a, vf b) { return mask ? a : b; }
static inline vf least(vf a, vf b) { return a < b ? a : b; }
static inline vf most(vf a, vf b) { return a > b ? a : b; }

// The first `count` lanes; the others are zero.
static inline vf load_some(const float* p, int count) {
    if (__builtin_expect(count >= W, 1)) return load(p);
#if WIDTH == 16
    return _mm512_maskz_loadu_ps(__mmask16((1 << count) - 1), p);
#else
    vf x{};
    for (int i = 0; i < count; i++) x[i] = p[i];
    return x;
#endif
}
static inline void store_some(float* p, vf x, int count) {
    if (__builtin_expect(count >= W, 1)) return store(p, x);
#if WIDTH == 16
    _mm512_mask_storeu_ps(p, __mmask16((1 << count) - 1), x);
#else
    for (int i = 0; i < count; i++) p[i] = x[i];
#endif
}

// One call of `body` for each vector of a row, with its first number and its count; all but the last are known to be full.
template <class Body>
static inline void for_vectors(int64_t width, const Body& body) {
    int64_t i = 0;
    for (; i + W <= width; i += W) body(i, W);
    if (i < width) body(i, int(width - i));
}

typedef uint16_t vh __attribute__((vector_size(2 * WIDTH)));
typedef int8_t vb __attribute__((vector_size(WIDTH)));

// Short numbers as long ones and back. One instruction each, where compilers make many of what the extension calls them.
#if WIDTH == 16
static inline vi lengthen(vh x) { return vi(_mm512_cvtepu16_epi32(__m256i(x))); }
static inline vi lengthen(vb x) { return vi(_mm512_cvtepi8_epi32(__m128i(x))); }
static inline vh shorten(vu x) { return vh(_mm512_cvtepi32_epi16(__m512i(x))); }
#elif WIDTH == 8
static inline vi lengthen(vh x) { return vi(_mm256_cvtepu16_epi32(__m128i(x))); }
static inline vi lengthen(vb x) {
    int64_t bytes;
    std::memcpy(&bytes, &x, 8);
    return vi(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(bytes)));
}
static inline vh shorten(vu x) {
    const __m256i pairs = _mm256_packus_epi32(__m256i(x), __m256i(x));  // within each half
    return vh(_mm256_castsi256_si128(_mm256_permute4x64_epi64(pairs, 0x08)));
}
#else
static inline vi lengthen(vh x) { return __builtin_convertvector(x, vi); }
static inline vi lengthen(vb x) {
    typedef int16_t vs __attribute__((vector_size(2 * WIDTH)));
    return __builtin_convertvector(__builtin_convertvector(x, vs), vi);
}
static inline vh shorten(vu x) { return __builtin_convertvector(x, vh); }
#endif
static inline vf whole(vi x) { return __builtin_convertvector(x, vf); }

// bfloat16 is the upper half of a float32; rounding is to nearest, ties to even, and NaN stays NaN.
static inline vf widen(vh x) { return number(lengthen(x) << 16); }
static inline vh narrow(vf x) {
    vu b;
    std::memcpy(&b, &x, sizeof b);
    return shorten(x == x ? (b + 0x7fff + ((b >> 16) & 1)) >> 16 : (b >> 16) | 0x40);
}
static inline float widen(float x) { return x; }
static inline float widen(uint16_t x) {
    const uint32_t y = uint32_t(x) << 16;
    float z;
    std::memcpy(&z, &y, 4);
    return z;
}

// The numbers [i, i + count) of a row; the other lanes are zero.
static inline vf read(const Rows& x, int64_t b, int64_t t, int64_t i, int count = W) {
    const char* p = x.address(b, t, i);
    if (!x.narrow) return load_some(reinterpret_cast<const float*>(p), count);
    vh y{};
    if (__builtin_expect(count >= W, 1))
        std::memcpy(&y, p, sizeof y);
    else
        std::memcpy(&y, p, 2 * count);
    return widen(y);
}
static inline void write(const Rows& x, int64_t b, int64_t t, int64_t i, vf value, int count = W) {
    char* p = x.address(b, t, i);
    if (!x.narrow) return store_some(reinterpret_cast<float*>(p), value, count);
    const vh y = narrow(value);
    if (__builtin_expect(count >= W, 1))
        std::memcpy(p, &y, sizeof y);
    else
        std::memcpy(p, &y, 2 * count);
}

static inline float number_at(const Rows& x, int64_t b, int64_t t, int64_t i) {
    const char* p = x.address(b, t, i);
    return x.narrow ? widen(*reinterpret_cast<const uint16_t*>(p)) : *reinterpret_cast<const float*>(p);
}

// The same rows without the first numbers of each.
static inline Rows from(const Rows& x, int64_t first) {
    Rows y = x;
    y.at = x.address(0, 0, first);
    return y;
}

// One row as float32, wherever it was: itself if it is, else widened into `room`.
static inline const float* read_row(const Rows& x, int64_t b, int64_t t, int64_t width, float* room) {
    if (!x.narrow) return reinterpret_cast<const float*>(x.address(b, t, 0));
    for (int64_t i = 0; i < width; i += W) {
        const int count = int(std::min<int64_t>(W, width - i));
        store_some(room + i, read(x, b, t, i, count), count);
    }
    return room;
}

static inline float total(vf x) {
#if WIDTH == 16
    return _mm512_reduce_add_ps(x);
#else
    float lanes[W];
    store(lanes, x);
    for (int half = W / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
#endif
}

// Lanes of a, and from number W on of b.
static inline vf pick(vf a, vf b, vi lanes) {
#ifdef __clang__
    vf y;
    for (int i = 0; i < W; i++) y[i] = lanes[i] < W ? a[lanes[i]] : b[lanes[i] - W];
    return y;
#else
    return __builtin_shuffle(a, b, lanes);
#endif
}

// The sums over the lanes of R vectors, R a power of 2: of vector i in lane i, i + R, ...
template <int R, int BLOCK = 1>
static inline vf totals(const vf* x) {
    vi lanes;
    if constexpr (BLOCK == R) {
        vf y = x[0];
        for (int s = R; s < W; s *= 2) {
            for (int i = 0; i < W; i++) lanes[i] = (i + s) % W;
            y += pick(y, y, lanes);
        }
        return y;
    } else {
        for (int i = 0; i < W; i++) lanes[i] = i / (2 * BLOCK) * (2 * BLOCK) + i % BLOCK + (i / BLOCK % 2 ? W : 0);
        vf y[R / (2 * BLOCK)];
        for (int i = 0; i < R / (2 * BLOCK); i++)
            y[i] = pick(x[2 * i], x[2 * i + 1], lanes) + pick(x[2 * i], x[2 * i + 1], lanes + BLOCK);
        return totals<R, 2 * BLOCK>(y);
    }
}

// While one lives, its thread's results below 2^-126 are zero: on smaller numbers processors take a hundred times as long,
// and whatever decays comes by them.
struct FlushedToZero {
#if defined(__x86_64__)
    const unsigned before = __builtin_ia32_stmxcsr();
    FlushedToZero() { __builtin_ia32_ldmxcsr(before | 0x8040); }
    ~FlushedToZero() { __builtin_ia32_ldmxcsr(before); }
#elif defined(__aarch64__)
    uint64_t before;
    FlushedToZero() {
        asm volatile("mrs %0, fpcr" : "=r"(before));
        asm volatile("msr fpcr, %0" ::"r"(before | 1 << 24));
    }
    ~FlushedToZero() { asm volatile("msr fpcr, %0" ::"r"(before)); }
#endif
};
