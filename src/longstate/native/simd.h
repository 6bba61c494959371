// Vectors of WIDTH floats by the compiler's own extension: one source for AVX-512, AVX2, NEON and plain code.
//
// Included once for each instruction set, inside namespace longstate::ISA.

typedef float vf __attribute__((vector_size(4 * WIDTH)));
typedef int32_t vi __attribute__((vector_size(4 * WIDTH)));
constexpr int W = WIDTH;

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
    if (count >= W) return load(p);
    vf x{};
    std::memcpy(&x, p, 4 * count);
    return x;
}
static inline void store_some(float* p, vf x, int count) { std::memcpy(p, &x, 4 * (count < W ? count : W)); }

// bfloat16 is the upper half of a float32; rounding is to nearest, ties to even, and NaN stays NaN.
static inline float widen(uint16_t x) {
    uint32_t y = uint32_t(x) << 16;
    float z;
    std::memcpy(&z, &y, 4);
    return z;
}
static inline uint16_t narrow(float x) {
    uint32_t y;
    std::memcpy(&y, &x, 4);
    if ((y & 0x7fffffff) > 0x7f800000) return uint16_t((y >> 16) | 0x40);
    return uint16_t((y + 0x7fff + ((y >> 16) & 1)) >> 16);
}
