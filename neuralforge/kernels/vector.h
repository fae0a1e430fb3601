/* Vectors of L lanes in each type, conversions, and elementary functions. At the head of every C file.
   A bool is a vector of int masks, all bits or none. Compiled as C with GCC's vector extensions; no headers, which
   would cost more compile time than the kernels. */

typedef float f __attribute__((vector_size(L * 4)));
typedef double d __attribute__((vector_size(L * 8)));
typedef long l __attribute__((vector_size(L * 8)));
typedef int b __attribute__((vector_size(L * 4)));
typedef unsigned char bytes __attribute__((vector_size(L)));
typedef float f_any __attribute__((vector_size(L * 4), aligned(4)));
typedef double d_any __attribute__((vector_size(L * 8), aligned(8)));
typedef long l_any __attribute__((vector_size(L * 8), aligned(8)));
typedef unsigned char b_any __attribute__((vector_size(L), aligned(1)));

#define INLINE static inline __attribute__((always_inline))
#define SET_f(x) ((f){} + (float)(x))
#define SET_d(x) ((d){} + (double)(x))
#define SET_l(x) ((l){} + (long)(x))
#define SET_ALL_f SET_f
#define SET_ALL_d SET_d
#define SET_ALL_l SET_l
#define SET_ALL_b(x) ((x) ? TRUE : FALSE)
#define FALSE ((b){})
#define TRUE (~(b){})
#define MASK_f(m) ((b)(m))
#define MASK_b(m) ((b)(m))
#define MASK_d(m) __builtin_convertvector((l)(m), b)
#define MASK_l(m) __builtin_convertvector((l)(m), b)

INLINE f f_from_f(f x) { return x; }
INLINE d d_from_d(d x) { return x; }
INLINE l l_from_l(l x) { return x; }
INLINE b b_from_b(b x) { return x; }
INLINE f f_from_d(d x) { return __builtin_convertvector(x, f); }
INLINE f f_from_l(l x) { return __builtin_convertvector(x, f); }
INLINE f f_from_b(b x) { return __builtin_convertvector(-x, f); }
INLINE d d_from_f(f x) { return __builtin_convertvector(x, d); }
INLINE d d_from_l(l x) { return __builtin_convertvector(x, d); }
INLINE d d_from_b(b x) { return __builtin_convertvector(-x, d); }
INLINE l l_from_f(f x) { return __builtin_convertvector(x, l); }
INLINE l l_from_d(d x) { return __builtin_convertvector(x, l); }
INLINE l l_from_b(b x) { return __builtin_convertvector(-x, l); }
INLINE b b_from_f(f x) { return MASK_f(x != SET_f(0)); }
INLINE b b_from_d(d x) { return MASK_d(x != SET_d(0)); }
INLINE b b_from_l(l x) { return MASK_l(x != SET_l(0)); }

INLINE f SELECT_f(b m, f x, f y) { return (f)(((b)x & m) | ((b)y & ~m)); }
INLINE d SELECT_d(b m, d x, d y) { l w = __builtin_convertvector(m, l); return (d)(((l)x & w) | ((l)y & ~w)); }
INLINE l SELECT_l(b m, l x, l y) { l w = __builtin_convertvector(m, l); return (x & w) | (y & ~w); }

/* Memory: whole vectors, the last n lanes of a row, and strided gathers. */
#define MEMORY(T, S) \
    INLINE T load_##T(const S *p) { return *(const T##_any *)p; } \
    INLINE void store_##T(S *p, T x) { *(T##_any *)p = x; } \
    INLINE T load_some_##T(const S *p, long n) { T x = {}; for (long j = 0; j < n; j++) x[j] = p[j]; return x; } \
    INLINE void store_some_##T(S *p, T x, long n) { for (long j = 0; j < n; j++) p[j] = x[j]; } \
    INLINE T load_apart_##T(const S *p, long s, long n) { T x = {}; for (long j = 0; j < n; j++) x[j] = p[j * s]; return x; }
MEMORY(f, float)
MEMORY(d, double)
MEMORY(l, long)
INLINE b load_b(const unsigned char *p) { return -__builtin_convertvector(*(const b_any *)p, b); }
INLINE void store_b(unsigned char *p, b x) { *(b_any *)p = __builtin_convertvector(-x, bytes); }
INLINE b load_some_b(const unsigned char *p, long n) { b x = {}; for (long j = 0; j < n; j++) x[j] = -(int)p[j]; return x; }
INLINE void store_some_b(unsigned char *p, b x, long n) { for (long j = 0; j < n; j++) p[j] = x[j] != 0; }
INLINE b load_apart_b(const unsigned char *p, long s, long n) { b x = {}; for (long j = 0; j < n; j++) x[j] = -(int)p[j * s]; return x; }

/* The first n lanes, zero in the others. */
INLINE f FIRST_f(f x, long n) { f y = {}; for (long j = 0; j < n; j++) y[j] = x[j]; return y; }
INLINE d FIRST_d(d x, long n) { d y = {}; for (long j = 0; j < n; j++) y[j] = x[j]; return y; }

#define EACH(T, name, call) INLINE T name(T x) { T y; for (int j = 0; j < L; j++) y[j] = call(x[j]); return y; }
#define EACH2(T, name, call) INLINE T name(T x, T z) { T y; for (int j = 0; j < L; j++) y[j] = call(x[j], z[j]); return y; }

/* MIN and MAX give y if either is a NaN. */
#if defined(__AVX512F__) || defined(__AVX2__)
#ifdef __AVX512F__
#define REGISTER "v"
#else
#define REGISTER "x"
#endif
INLINE f sqrt_f(f x) { f y; __asm__("vsqrtps %1, %0" : "=" REGISTER(y) : REGISTER(x)); return y; }
INLINE f MIN_f(f x, f y) { f z; __asm__("vminps %2, %1, %0" : "=" REGISTER(z) : REGISTER(x), REGISTER(y)); return z; }
INLINE f MAX_f(f x, f y) { f z; __asm__("vmaxps %2, %1, %0" : "=" REGISTER(z) : REGISTER(x), REGISTER(y)); return z; }
#else
EACH(f, sqrt_f, __builtin_sqrtf)
INLINE f MIN_f(f x, f y) { return SELECT_f((b)(x < y), x, y); }
INLINE f MAX_f(f x, f y) { return SELECT_f((b)(x > y), x, y); }
#endif
EACH(d, sqrt_d, __builtin_sqrt)

INLINE f abs_f(f x) { return (f)((b)x & 0x7fffffff); }
INLINE d abs_d(d x) { return (d)((l)x & 0x7fffffffffffffffL); }
/* As in PyTorch, a NaN on either side wins. */
INLINE f maximum_f(f x, f y) { return SELECT_f((b)(x != x), x, MAX_f(x, y)); }
INLINE d maximum_d(d x, d y) { return SELECT_d(MASK_d((x > y) | (x != x)), x, y); }
INLINE f minimum_f(f x, f y) { return SELECT_f((b)(x != x), x, MIN_f(x, y)); }
INLINE d minimum_d(d x, d y) { return SELECT_d(MASK_d((x < y) | (x != x)), x, y); }
INLINE f relu_f(f x) { return SELECT_f((b)(x < SET_f(0)), SET_f(0), x); }
INLINE d relu_d(d x) { return SELECT_d(MASK_d(x < SET_d(0)), SET_d(0), x); }

/* ---- float: polynomials, at most 2 ulp */

/* e^x = 2^n e^r, |r| <= ln 2 / 2; coefficients of the Cephes library (Moshier 1989). */
#define EXP_POLYNOMIAL \
    f shift = SET_f(12582912.0f); /* 1.5 * 2^23: adding it rounds to a whole number */ \
    f n = (t * 1.44269504088896341f + shift) - shift; \
    f r = t - n * 0.693359375f + n * 2.12194440e-4f; \
    f p = SET_f(1.9875691500e-4f); \
    p = p * r + 1.3981999507e-3f; \
    p = p * r + 8.3334519073e-3f; \
    p = p * r + 4.1665795894e-2f; \
    p = p * r + 1.6666665459e-1f; \
    p = p * r + 5.0000001201e-1f; \
    b whole = __builtin_convertvector(n, b);

/* 2^n in two factors, so that results below the normal range come out right; zeros aren't computed that way, as
   underflow is slow and masks make many of them. */
INLINE f exp_f(f x) {
    b zero = (b)(x < SET_f(-104.0f)), half;
    f t = (f)((b)MIN_f(SET_f(89.0f), x) & ~zero);
    EXP_POLYNOMIAL
    p = p * r * r + r + 1.0f;
    half = whole >> 1;
    return (f)((b)(p * (f)((half + 127) << 23) * (f)((whole - half + 127) << 23)) & ~zero);
}

/* e^t - 1 without special cases, for t between -87 and 87. */
INLINE f expm1_within_f(f t) {
    EXP_POLYNOMIAL
    f scale = (f)((whole + 127) << 23);
    return (p * r * r + r) * scale + (scale - 1.0f);
}

/* tanh x = 1 - 2 / (e^2x + 1); an odd polynomial (Cephes) where that would cancel. */
INLINE f tanh_f(f x) {
    f a = abs_f(x), s = x * x;
    f p = SET_f(-5.70498872745e-3f);
    p = p * s + 2.06390887954e-2f;
    p = p * s - 5.37397155531e-2f;
    p = p * s + 1.33314422036e-1f;
    p = p * s - 3.33332819422e-1f;
    f large = 1.0f - 2.0f / (expm1_within_f(MIN_f(a + a, SET_f(20.0f))) + 2.0f);
    large = (f)((b)large | ((b)x & (int)0x80000000));
    return SELECT_f((b)(a >= SET_f(0.625f)), large, p * s * x + x);
}

INLINE f sigmoid_f(f x) { return 1.0f / (1.0f + exp_f(-x)); }

/* log x: mantissa in [sqrt 1/2, sqrt 2), Cephes. */
INLINE f log_f(f x) {
    f tiny = SELECT_f((b)(x < SET_f(1.17549435e-38f)), SET_f(8388608.0f), SET_f(1.0f));
    f scaled = x * tiny;
    b bits = (b)scaled;
    f e = __builtin_convertvector(((bits >> 23) & 255) - 126, f) - SELECT_f((b)(tiny != SET_f(1.0f)), SET_f(23.0f), SET_f(0));
    f m = (f)((bits & 0x007fffff) | 0x3f000000);
    b low = (b)(m < SET_f(0.707106781186547524f));
    e = e - SELECT_f(low, SET_f(1.0f), SET_f(0));
    m = m + SELECT_f(low, m, SET_f(0)) - 1.0f;
    f z = m * m;
    f p = SET_f(7.0376836292e-2f);
    p = p * m - 1.1514610310e-1f;
    p = p * m + 1.1676998740e-1f;
    p = p * m - 1.2420140846e-1f;
    p = p * m + 1.4249322787e-1f;
    p = p * m - 1.6668057665e-1f;
    p = p * m + 2.0000714765e-1f;
    p = p * m - 2.4999993993e-1f;
    p = p * m + 3.3333331174e-1f;
    f y = p * m * z - 2.12194440e-4f * e - 0.5f * z + m + 0.693359375f * e;
    f inf = SET_f(__builtin_inff());
    y = SELECT_f((b)(x == inf), inf, y);
    y = SELECT_f((b)(x == SET_f(0)), -inf, y);
    return SELECT_f((b)((x < SET_f(0)) | (x != x)), SET_f(__builtin_nanf("")), y);
}

/* erf x: an odd polynomial; where erf is near 1, 1 - e^q(|x|) (N. Juffa's coefficients, below 1 ulp each). */
INLINE f erf_f(f x) {
    f a = abs_f(x), s = x * x;
    f q = SET_f(-1.72853470e-5f) * a + 3.83197126e-4f, u = SET_f(-3.88396438e-3f) * a + 2.42546219e-2f;
    q = q * s + u;
    q = q * a - 1.06777877e-1f;
    q = q * a - 6.34846687e-1f;
    q = q * a - 1.28717512e-1f;
    q = q * a - a;
    f large = -expm1_within_f(MAX_f(q, SET_f(-17.0f)));
    large = (f)((b)large | ((b)x & (int)0x80000000));
    f p = SET_f(-5.96761703e-4f);
    p = p * s + 4.99119423e-3f;
    p = p * s - 2.67681349e-2f;
    p = p * s + 1.12819925e-1f;
    p = p * s - 3.76125336e-1f;
    p = p * s + 1.28379166e-1f;
    return SELECT_f((b)(a > SET_f(0.927734375f)), large, p * x + x);
}
EACH(f, sin_f, __builtin_sinf)
EACH(f, cos_f, __builtin_cosf)
EACH2(f, pow_f, __builtin_powf)

/* ---- double: the C library's, lane by lane */

EACH(d, exp_d, __builtin_exp)
EACH(d, log_d, __builtin_log)
EACH(d, tanh_d, __builtin_tanh)
EACH(d, erf_d, __builtin_erf)
EACH(d, sin_d, __builtin_sin)
EACH(d, cos_d, __builtin_cos)
EACH2(d, pow_d, __builtin_pow)
INLINE d sigmoid_d(d x) { return 1.0 / (1.0 + exp_d(-x)); }

/* ---- activations, in both types */

#define ACTIVATIONS(T) \
    INLINE T silu_backward_##T(T g, T x) { T s = sigmoid_##T(x); return g * s * (1 + x * (1 - s)); } \
    INLINE T gelu_##T(T x) { return x * SET_##T(0.5) * (1 + erf_##T(x * SET_##T(0.70710678118654752440))); } \
    INLINE T gelu_backward_##T(T g, T x) { \
        T cdf = SET_##T(0.5) * (1 + erf_##T(x * SET_##T(0.70710678118654752440))); \
        T pdf = exp_##T(x * x * SET_##T(-0.5)) * SET_##T(0.39894228040143267794); \
        return g * (cdf + x * pdf); } \
    INLINE T gelu_tanh_##T(T x) { \
        T u = SET_##T(0.79788456080286535588) * (x + SET_##T(0.044715) * x * x * x); \
        return SET_##T(0.5) * x * (1 + tanh_##T(u)); } \
    INLINE T gelu_backward_tanh_##T(T g, T x) { \
        T s = x * x, u = SET_##T(0.79788456080286535588) * (x + SET_##T(0.044715) * s * x), t = tanh_##T(u); \
        T du = SET_##T(0.79788456080286535588) * (1 + SET_##T(3 * 0.044715) * s); \
        return g * SET_##T(0.5) * ((1 + t) + x * (1 - t * t) * du); }
ACTIVATIONS(f)
ACTIVATIONS(d)
