/* What fused kernels need beyond `vector.h`, which precedes this: half-width storage, rounding, folds of a vector,
   and the rarer functions. */

/* ---- bfloat16 and float16: stored so, computed with as float. NaN stays NaN; rounding is to nearest, ties to even. */

typedef unsigned short halves __attribute__((vector_size(L * 2)));
typedef unsigned short halves_any __attribute__((vector_size(L * 2), aligned(2)));
typedef unsigned int words __attribute__((vector_size(L * 4)));

INLINE f from_bf(halves h) { return (f)(__builtin_convertvector(h, words) << 16); }
INLINE halves to_bf(f x) {
    words w = (words)x, r = (w + 0x7fff + ((w >> 16) & 1)) >> 16, nan = (words)(x != x);
    return __builtin_convertvector((r & ~nan) | (nan & 0x7fc0), halves);
}
#if defined(__AVX512F__)
INLINE f from_h(halves h) { f y; __asm__("vcvtph2ps %1, %0" : "=v"(y) : "v"(h)); return y; }
INLINE halves to_h(f x) { halves y; __asm__("vcvtps2ph $0, %1, %0" : "=v"(y) : "v"(x)); return y; }
#elif defined(__AVX2__)
INLINE f from_h(halves h) { f y; __asm__("vcvtph2ps %1, %0" : "=x"(y) : "x"(h)); return y; }
INLINE halves to_h(f x) { halves y; __asm__("vcvtps2ph $0, %1, %0" : "=x"(y) : "x"(x)); return y; }
#else
INLINE f from_h(halves h) {
    f y;
    for (int j = 0; j < L; j++) { _Float16 v; __builtin_memcpy(&v, (unsigned short *)&h + j, 2); y[j] = (float)v; }
    return y;
}
INLINE halves to_h(f x) {
    halves y;
    for (int j = 0; j < L; j++) { _Float16 v = (_Float16)x[j]; __builtin_memcpy((unsigned short *)&y + j, &v, 2); }
    return y;
}
#endif
INLINE f round_bf(f x) { return from_bf(to_bf(x)); }
INLINE f round_h(f x) { return from_h(to_h(x)); }

#define HALF(S) \
    INLINE f load_##S(const unsigned short *p) { return from_##S(*(const halves_any *)p); } \
    INLINE void store_##S(unsigned short *p, f x) { *(halves_any *)p = to_##S(x); } \
    INLINE f load_some_##S(const unsigned short *p, long n) { halves h = {}; for (long j = 0; j < n; j++) h[j] = p[j]; return from_##S(h); } \
    INLINE void store_some_##S(unsigned short *p, f x, long n) { halves h = to_##S(x); for (long j = 0; j < n; j++) p[j] = h[j]; } \
    INLINE f load_apart_##S(const unsigned short *p, long s, long n) { halves h = {}; for (long j = 0; j < n; j++) h[j] = p[j * s]; return from_##S(h); } \
    INLINE f SET_ALL_##S(unsigned short v) { return from_##S((halves){} + v); }
HALF(bf)
HALF(h)

/* ---- folding the lanes of a vector; the first n lanes of x, and those of y behind them */

INLINE b BELOW(long n) { b m; for (int j = 0; j < L; j++) m[j] = j < n ? -1 : 0; return m; }
#define FOLD(T, S, I) \
    INLINE T LIMIT_##T(T x, T y, long n) { return SELECT_##T(BELOW(n), x, y); } \
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
EACH(d, expm1_d, __builtin_expm1)
EACH(d, log1p_d, __builtin_log1p)
EACH(d, log2_d, __builtin_log2)
EACH(d, exp2_d, __builtin_exp2)
INLINE f log2_f(f x) { return log_f(x) * 1.44269504088896341f; }
EACH(f, exp2_f, __builtin_exp2f)
EACH(f, floor_f, __builtin_floorf)
EACH(d, floor_d, __builtin_floor)
EACH(f, ceil_f, __builtin_ceilf)
EACH(d, ceil_d, __builtin_ceil)
EACH(f, trunc_f, __builtin_truncf)
EACH(d, trunc_d, __builtin_trunc)
EACH(f, round_f, __builtin_rintf)
EACH(d, round_d, __builtin_rint)

#define RARE(T) \
    INLINE T sign_##T(T x) { return SELECT_##T(MASK_##T(x > SET_##T(0)), SET_##T(1), SELECT_##T(MASK_##T(x < SET_##T(0)), SET_##T(-1), SET_##T(0))); } \
    INLINE T clamp_##T(T x, T low, T high) { return minimum_##T(maximum_##T(x, low), high); } \
    INLINE T leaky_relu_##T(T x, T slope) { return SELECT_##T(MASK_##T(x > SET_##T(0)), x, x * slope); } \
    INLINE T threshold_backward_##T(T g, T x, T limit) { return SELECT_##T(MASK_##T(x <= limit), SET_##T(0), g); } \
    INLINE T softplus_##T(T x, T beta, T limit) { \
        return SELECT_##T(MASK_##T(x * beta > limit), x, log1p_##T(exp_##T(x * beta)) / beta); } \
    INLINE T tanh_backward_##T(T g, T y) { return g * (1 - y * y); } \
    INLINE T sigmoid_backward_##T(T g, T y) { return g * (1 - y) * y; }
RARE(f)
RARE(d)
