/* What fused kernels need beyond `vector.h`, which precedes this: rounding, folds of a vector, and the rarer
   functions. */

/* ---- folding the lanes of a vector; the first n lanes of x, and those of y behind them */

#define FOLD(T, S, I) \
    INLINE T LIMIT_##T(T x, T y, long n) { return SELECT_##T(UNTIL(n), x, y); } \
    INLINE T SWAP_##T(T x, int w) { I at; for (int j = 0; j < L; j++) at[j] = j ^ w; return __builtin_shuffle(x, at); } \
    INLINE double FOLD_sum_##T(T x) { for (int w = L / 2; w; w /= 2) x += SWAP_##T(x, w); return x[0]; } \
    INLINE S FOLD_maximum_##T(T x) { for (int w = L / 2; w; w /= 2) x = maximum_##T(x, SWAP_##T(x, w)); return x[0]; } \
    INLINE S FOLD_minimum_##T(T x) { for (int w = L / 2; w; w /= 2) x = minimum_##T(x, SWAP_##T(x, w)); return x[0]; }
FOLD(f, float, b)
FOLD(d, double, l)

/* ---- functions */

INLINE l maximum_l(l x, l y) { return SELECT_l(MASK_l(x > y), x, y); }
INLINE l minimum_l(l x, l y) { return SELECT_l(MASK_l(x < y), x, y); }
INLINE l relu_l(l x) { return maximum_l(x, (l){}); }
INLINE l abs_l(l x) { return maximum_l(x, -x); }

/* From the nearer end, as in PyTorch: from the other one, what is left of a great x would drown y. */
#define LERP(T) \
    INLINE T lerp_##T(T x, T y, T w) { \
        T way = y - x; \
        return SELECT_##T(MASK_##T(abs_##T(w) < SET_##T(0.5)), x + w * way, y - way * (SET_##T(1) - w)); \
    }
LERP(f)
LERP(d)

/* e^x - 1 = 2^n (e^r - 1) + (2^n - 1), with 2^n halved lest it overflow before the result does. */
INLINE f expm1_f(f x) {
    f t = MAX_f(SET_f(-18.0f), MIN_f(SET_f(89.0f), x));
    EXP_POLYNOMIAL
    p = p * r * r + r;
    f half = (f)((whole + 126) << 23);
    f y = SELECT_f((b)(n == SET_f(0)), p, 2.0f * (p * half + (half - 0.5f)));
    return SELECT_f((b)(x == SET_f(0)) | (b)(x != x), x, y); /* -0 */
}
/* Kahan's: the rounding of 1 + x divides out. */
INLINE f log1p_f(f x) {
    f u = 1.0f + x, w = u - 1.0f;
    f y = log_f(u) * (x / w);
    y = SELECT_f((b)(w == SET_f(0)), x, y);
    return SELECT_f((b)((x == SET_f(__builtin_inff())) | (x == SET_f(-1.0f))), log_f(u), y);
}
INLINE int any(b m) {
#if defined(__AVX512F__)
    unsigned short bits;
    __asm__("vptestmd %1, %1, %0" : "=Yk"(bits) : "v"(m));
    return bits != 0;
#elif defined(__AVX2__)
    int bits;
    __asm__("vmovmskps %1, %0" : "=r"(bits) : "x"(m));
    return bits;
#else
    int found = 0;
    for (int j = 0; j < L; j++) found |= m[j];
    return found;
#endif
}

/* x = n pi / 2 + r, by double, in which n times the first 33 bits of pi / 2 is exact; polynomials of Cephes. Where a number is too
   great for that, as where it isn't finite, the C library. */
INLINE f turn(f x, int quarters) {
    f shift = SET_f(12582912.0f), n = (x * 0.636619772367581343f + shift) - shift;
    d turns = d_from_f(n);
    f r = f_from_d(d_from_f(x) - turns * 1.57079632673412561417e+00 - turns * 6.07710050650619224932e-11), z = r * r;
    b q = __builtin_convertvector(n, b) + quarters;
    f sine = SET_f(-1.9515295891e-4f), cosine = SET_f(2.443315711809948e-5f);
    sine = sine * z + 8.3321608736e-3f;
    sine = sine * z - 1.6666654611e-1f;
    sine = SELECT_f((b)(r == SET_f(0)), r, sine * z * r + r); /* -0 */
    cosine = cosine * z - 1.388731625493765e-3f;
    cosine = cosine * z + 4.166664568298827e-2f;
    cosine = cosine * (z * z) - 0.5f * z + 1.0f;
    f y = SELECT_f((b)((q & 1) != 0), cosine, sine);
    return (f)((b)y ^ (q << 30 & (int)0x80000000));
}
#define TURN(name, quarters) \
    EACH(f, name##_each, __builtin_##name##f) \
    INLINE f name##_f(f x) { \
        return __builtin_expect(any(~(b)(abs_f(x) < SET_f(1e5f))), 0) ? name##_each(x) : turn(x, quarters); }
TURN(sin, 0)
TURN(cos, 1)

/* 2^(y log2 |x|), the logarithm by double: 2 atanh s of the mantissa in [sqrt 1/2, sqrt 2), s = (m - 1) / (m + 1). Subnormal numbers and
   those that aren't finite are left to the C library. */
EACH2(f, pow_each, __builtin_powf)
INLINE f pow_f(f x, f y) {
    f a = abs_f(x), inf = SET_f(__builtin_inff());
    b zero = (b)(x == SET_f(0));
    if (__builtin_expect(any(~(((b)(a >= SET_f(1.17549435e-38f)) | zero) & (b)(a < inf) & (b)(abs_f(y) < inf))), 0)) return pow_each(x, y);
    f m = (f)(((b)a & 0x007fffff) | 0x3f800000);
    b high = (b)(m > SET_f(1.41421356237309504880f));
    d exponent = d_from_f(__builtin_convertvector((((b)a >> 23) & 255) - 127 - high, f));
    d w = d_from_f(SELECT_f(high, 0.5f * m, m)), s = (w - 1.0) / (w + 1.0), s2 = s * s, p = SET_d(2.88539008177792681472 / 13);
    p = p * s2 + 2.88539008177792681472 / 11;
    p = p * s2 + 2.88539008177792681472 / 9;
    p = p * s2 + 2.88539008177792681472 / 7;
    p = p * s2 + 2.88539008177792681472 / 5;
    p = p * s2 + 2.88539008177792681472 / 3;
    p = p * s2 + 2.88539008177792681472;
    d t = d_from_f(y) * (exponent + p * s);
    f shift = SET_f(12582912.0f), n = (MAX_f(SET_f(-200.0f), MIN_f(SET_f(200.0f), f_from_d(t))) + shift) - shift;
    b whole = __builtin_convertvector(n, b), half = whole >> 1;
    f z = exp_f(f_from_d(t - d_from_f(n)) * 0.693147180559945309f) * (f)((half + 127) << 23) * (f)((whole - half + 127) << 23);
    z = SELECT_f(zero, SELECT_f((b)(y > SET_f(0)), SET_f(0), inf), z);
    z = SELECT_f((b)(y == SET_f(0)), SET_f(1), z);
    f c = MAX_f(SET_f(-16777216.0f), MIN_f(SET_f(16777216.0f), y)); /* from there on all numbers are even */
    b near = __builtin_convertvector(c, b), entire = (b)(__builtin_convertvector(near, f) == c);
    z = (f)((b)z ^ ((b)x & entire & near << 31));
    return SELECT_f((b)(x < SET_f(0)) & ~entire, SET_f(__builtin_nanf("")), z);
}
EACH(d, expm1_d, __builtin_expm1)
EACH(d, log1p_d, __builtin_log1p)
EACH(d, log2_d, __builtin_log2)
EACH(d, exp2_d, __builtin_exp2)
INLINE f log2_f(f x) { return log_f(x) * 1.44269504088896341f; }
INLINE f exp2_f(f x) {
    f t = MAX_f(SET_f(-151.0f), MIN_f(SET_f(129.0f), x));
    f whole = (t + 12582912.0f) - 12582912.0f, r = (t - whole) * 0.693147180559945309f;
    f p = exp_f(r);
    b n = __builtin_convertvector(whole, b), half = n >> 1;
    return p * (f)((half + 127) << 23) * (f)((n - half + 127) << 23);
}

/* To whole numbers: to nearest, down, up, towards zero. */
#if defined(__AVX512F__)
#define WHOLE(name, mode, builtin) \
    INLINE f name##_f(f x) { f y; __asm__("vrndscaleps $" #mode ", %1, %0" : "=v"(y) : "v"(x)); return y; } \
    EACH(d, name##_d, builtin)
#elif defined(__AVX2__)
#define WHOLE(name, mode, builtin) \
    INLINE f name##_f(f x) { f y; __asm__("vroundps $" #mode ", %1, %0" : "=x"(y) : "x"(x)); return y; } \
    EACH(d, name##_d, builtin)
#else
#define WHOLE(name, mode, builtin) EACH(f, name##_f, builtin##f) EACH(d, name##_d, builtin)
#endif
WHOLE(round, 8, __builtin_rint)
WHOLE(floor, 9, __builtin_floor)
WHOLE(ceil, 10, __builtin_ceil)
WHOLE(trunc, 11, __builtin_trunc)

#define RARE(T) \
    INLINE T sign_##T(T x) { return SELECT_##T(MASK_##T(x > SET_##T(0)), SET_##T(1), SELECT_##T(MASK_##T(x < SET_##T(0)), SET_##T(-1), SET_##T(0))); } \
    INLINE T clamp_##T(T x, T low, T high) { return minimum_##T(high, maximum_##T(low, x)); } \
    INLINE T leaky_relu_##T(T x, T slope) { return SELECT_##T(MASK_##T(x > SET_##T(0)), x, x * slope); } \
    INLINE T threshold_backward_##T(T g, T x, T limit) { return SELECT_##T(MASK_##T(x <= limit), SET_##T(0), g); } \
    INLINE T softplus_##T(T x, T beta, T limit) { \
        return SELECT_##T(MASK_##T(x * beta > limit), x, log1p_##T(exp_##T(x * beta)) / beta); } \
    INLINE T tanh_backward_##T(T g, T y) { return g * (1 - y * y); } \
    INLINE T sigmoid_backward_##T(T g, T y) { return g * (1 - y) * y; }
RARE(f)
RARE(d)
