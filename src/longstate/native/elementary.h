// Elementary functions on vectors, each (but for silu) within 2 units in the last place of float32, right at ±inf, 0, denormals and NaN.
//
// Included once for each instruction set, inside namespace longstate::ISA.

static inline vf absolute(vf x) { return number(bits(x) & 0x7fffffff); }

// x 2^k; right among the denormals.
static inline vf scale(vf x, vi k) {
#if WIDTH == 16
    return _mm512_scalef_ps(x, whole(k));
#else
    vi half = k >> 1;
    return x * number((half + 127) << 23) * number((k - half + 127) << 23);
#endif
}

// e^x = 2^k e^r with |r| <= ln 2 / 2; what its last rounding dropped goes into `rest`.
static inline vf exp(vf x, vf& rest) {
    const vf magic = all(12582912.f);  // 1.5 * 2^23: adding it rounds to a whole number
    vf c = most(least(x, all(89.f)), all(-105.f));
    vf n = c * all(1.44269504089f) + magic;
    vi k = bits(n) - bits(magic);
    n -= magic;
    vf r = c - n * all(0.693359375f);  // the upper bits of ln 2: times n they are exact
    r = r - n * all(-2.12194440e-4f);
    vf p = all(1.9875691500e-4f);
    p = p * r + all(1.3981999507e-3f);
    p = p * r + all(8.3334519073e-3f);
    p = p * r + all(4.1665795894e-2f);
    p = p * r + all(1.6666665459e-1f);
    p = p * r + all(5.0000001201e-1f);
    vf q = p * (r * r) + r, y = q + all(1.f);
    rest = scale(q - (y - all(1.f)), k);
    return choose(x == x, scale(y, k), x);
}

static inline vf exp(vf x) {
    vf rest;
    return exp(x, rest);
}

// log x = k ln 2 + log m with m in [sqrt 1/2, sqrt 2).
static inline vf log(vf x) {
    vi small = x < all(1.17549435e-38f);
    vf y = choose(small, x * all(8388608.f), x);
    vu b = vu(bits(y)) - 0x3f3504f3;  // the bits of sqrt 1/2; unsigned, for there is no telling what is negative or NaN
    vi k = (vi(b) >> 23) - (small & 23);
    vf f = number(vi(b & 0x007fffff) + 0x3f3504f3) - all(1.f);
    vf p = all(7.0376836292e-2f);
    p = p * f + all(-1.1514610310e-1f);
    p = p * f + all(1.1676998740e-1f);
    p = p * f + all(-1.2420140846e-1f);
    p = p * f + all(1.4249322787e-1f);
    p = p * f + all(-1.6668057665e-1f);
    p = p * f + all(2.0000714765e-1f);
    p = p * f + all(-2.4999993993e-1f);
    p = p * f + all(3.3333331174e-1f);
    vf q = f * f, n = __builtin_convertvector(k, vf);
    vf z = f * q * p + n * all(-2.12194440e-4f) - q * all(0.5f) + f + n * all(0.693359375f);
    z = choose(x == all(INFINITY), x, z);
    z = choose(x == all(0.f), all(-INFINITY), z);
    return choose(x >= all(0.f), z, all(NAN));
}

// log(1 + e^x) = max(x, 0) + log(1 + e), e = e^-|x|; the rounding of 1 + e is known and comes back by the derivative.
static inline vf softplus(vf x) {
    vf rest, e = exp(-absolute(x), rest), w = all(1.f) + e;
    vf l = log(w) + (e - (w - all(1.f)) + rest) / w;
    vf y = most(x, all(0.f)) + l;
    return choose(x == x, y, x);
}

// 1 / (1 + e) or e / (1 + e), e = e^-|x|, and one step of Newton's with what was rounded.
static inline vf sigmoid(vf x) {
    vf rest, e = exp(-absolute(x), rest), w = all(1.f) + e;
    vi above = x >= all(0.f);
    vf inverse = all(1.f) / w, numerator = choose(above, all(1.f), e), r = numerator * inverse;
    vf dropped = e - (w - all(1.f)) + rest;
    r += (numerator - r * w + choose(above, all(0.f), rest) - r * dropped) * inverse;
    return choose(x == x, r, x);
}

// e^x for x in [-87, 88.5]; anything for others.
static inline vf exp_within(vf x) {
    const vf magic = all(12582912.f);
    vf n = x * all(1.44269504089f) + magic;
    vi k = bits(n) << 23;
    n -= magic;
    vf r = x - n * all(0.693359375f);
    r = r - n * all(-2.12194440e-4f);
    vf p = all(1.9875691500e-4f);
    p = p * r + all(1.3981999507e-3f);
    p = p * r + all(8.3334519073e-3f);
    p = p * r + all(4.1665795894e-2f);
    p = p * r + all(1.6666665459e-1f);
    p = p * r + all(5.0000001201e-1f);
    return number(bits(p * (r * r) + r + all(1.f)) + k);
}

// x / (1 + e^-x), within 3 units of the last place above -88, and less than 1e-36 below. NaN stays NaN: `most` and
// `least` return their second argument for it.
static inline vf silu(vf x) {
    x = most(all(-88.f), x);
    return x / (all(1.f) + exp_within(-least(all(87.f), x)));
}

// And its slope s + x s (1 - s), 1 - s = s e^-x, within 5 units of 1.
static inline vf silu(vf x, vf& slope) {
    x = most(all(-88.f), x);
    vf c = least(all(87.f), x), e = exp_within(-c), s = all(1.f) / (all(1.f) + e);
    slope = s * (all(1.f) + c * (e * s));
    return x * s;
}
