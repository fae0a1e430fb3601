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
#define SET_f(x) ((float)(x) - (f){}) /* not + (f){}, which makes 0.0 of -0.0 */
#define SET_d(x) ((double)(x) - (d){})
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
    INLINE T load_apart_##T(const S *p, long s, long n) { T x = {}; for (long j = 0; j < n; j++) x[j] = p[j * s]; return x; }
#define LOAD_SOME(T, S) INLINE T load_some_##T(const S *p, long n) { T x = {}; for (long j = 0; j < n; j++) x[j] = p[j]; return x; }
#define STORE_SOME(T, S) INLINE void store_some_##T(S *p, T x, long n) { for (long j = 0; j < n; j++) p[j] = x[j]; }
MEMORY(f, float)
MEMORY(d, double)
MEMORY(l, long)
LOAD_SOME(d, double)
STORE_SOME(d, double)
LOAD_SOME(l, long)
STORE_SOME(l, long)

/* A number for each lane, and the mask that is true in the first n. */
#if L == 16
#define LANES(E, s) (b){E(0, s), E(1, s), E(2, s), E(3, s), E(4, s), E(5, s), E(6, s), E(7, s), \
                        E(8, s), E(9, s), E(10, s), E(11, s), E(12, s), E(13, s), E(14, s), E(15, s)}
#elif L == 8
#define LANES(E, s) (b){E(0, s), E(1, s), E(2, s), E(3, s), E(4, s), E(5, s), E(6, s), E(7, s)}
#else
#define LANES(E, s) (b){E(0, s), E(1, s), E(2, s), E(3, s)}
#endif
#define ITSELF(j, s) (j)
#define UNTIL(n) (LANES(ITSELF, 0) < (b){} + (int)(n))
/* Lanes one by one would go through memory, and the vector made of them wait for it: rows of 100 took three times as long as rows
   of 96. */
#if defined(__AVX512F__)
typedef unsigned short lanes;
INLINE lanes until(long n) { return n > 0 ? (1u << n) - 1 : 0; }
INLINE f load_some_f(const float *p, long n) {
    f x;
    __asm__("vmovups %1, %0%{%2%}%{z%}" : "=v"(x) : "m"(*(const f_any *)p), "Yk"(until(n)));
    return x;
}
INLINE void store_some_f(float *p, f x, long n) { __asm__("vmovups %1, %0%{%2%}" : "+m"(*(f_any *)p) : "v"(x), "Yk"(until(n))); }
#elif defined(__AVX2__)
INLINE f load_some_f(const float *p, long n) {
    f x;
    __asm__("vmaskmovps %1, %2, %0" : "=x"(x) : "m"(*(const f_any *)p), "x"(UNTIL(n)));
    return x;
}
STORE_SOME(f, float) /* Zen 3 takes 40 operations for a masked store */
#else
LOAD_SOME(f, float)
STORE_SOME(f, float)
#endif
#if defined(__AVX512F__) /* gcc converts bytes one by one */
INLINE b load_b(const unsigned char *p) { b x; __asm__("vpmovzxbd %1, %0" : "=v"(x) : "m"(*(const b_any *)p)); return -x; }
INLINE void store_b(unsigned char *p, b x) { __asm__("vpmovdb %1, %0" : "=m"(*(b_any *)p) : "v"(-x)); }
#elif defined(__AVX2__)
INLINE b load_b(const unsigned char *p) { b x; __asm__("vpmovzxbd %1, %0" : "=x"(x) : "m"(*(const b_any *)p)); return -x; }
INLINE void store_b(unsigned char *p, b x) { *(b_any *)p = __builtin_convertvector(-x, bytes); }
#else
INLINE b load_b(const unsigned char *p) { return -__builtin_convertvector(*(const b_any *)p, b); }
INLINE void store_b(unsigned char *p, b x) { *(b_any *)p = __builtin_convertvector(-x, bytes); }
#endif
#if defined(__AVX512F__)
INLINE b load_some_b(const unsigned char *p, long n) {
    b x;
    __asm__("vpmovzxbd %1, %0%{%2%}%{z%}" : "=v"(x) : "m"(*(const b_any *)p), "Yk"(until(n)));
    return -x;
}
INLINE void store_some_b(unsigned char *p, b x, long n) { __asm__("vpmovdb %1, %0%{%2%}" : "+m"(*(b_any *)p) : "v"(-x), "Yk"(until(n))); }
#else
INLINE b load_some_b(const unsigned char *p, long n) { b x = {}; for (long j = 0; j < n; j++) x[j] = -(int)p[j]; return x; }
INLINE void store_some_b(unsigned char *p, b x, long n) { for (long j = 0; j < n; j++) p[j] = x[j] != 0; }
#endif
INLINE b load_apart_b(const unsigned char *p, long s, long n) { b x = {}; for (long j = 0; j < n; j++) x[j] = -(int)p[j * s]; return x; }

/* ---- bfloat16 and float16: stored so, computed with as float. NaN stays NaN; rounding is to nearest, ties to even. */

typedef unsigned short halves __attribute__((vector_size(L * 2)));
typedef unsigned short halves_any __attribute__((vector_size(L * 2), aligned(2)));
typedef unsigned int words __attribute__((vector_size(L * 4)));

#if defined(__AVX512F__)
INLINE f from_bf(halves h) { words w; __asm__("vpmovzxwd %1, %0" : "=v"(w) : "vm"(h)); return (f)(w << 16); }
#elif defined(__AVX2__)
INLINE f from_bf(halves h) { words w; __asm__("vpmovzxwd %1, %0" : "=x"(w) : "xm"(h)); return (f)(w << 16); }
#else
INLINE f from_bf(halves h) { return (f)(__builtin_convertvector(h, words) << 16); }
#endif
INLINE halves round_to_bf(f x) {
    words w = (words)x, r = ((w + 0x7fff + ((w >> 16) & 1)) | (words)(x != x)) >> 16;
#if defined(__AVX2__) && !defined(__AVX512F__)
    words packed; /* 128 bits at a time */
    __asm__("vpackusdw %1, %1, %0\n\tvpermq $8, %0, %0" : "=x"(packed) : "x"(r));
    halves h;
    __builtin_memcpy(&h, &packed, sizeof h);
    return h;
#else
    return __builtin_convertvector(r, halves);
#endif
}
#if defined(AVX512_BF16)
INLINE halves to_bf(f x) { /* the instruction takes what is below the normal numbers, class 32, for zero */
    halves h;
    unsigned tiny;
    __asm__("vcvtneps2bf16 %1, %0" : "=v"(h) : "v"(x));
    __asm__("vfpclassps $32, %1, %%k1\n\tkmovw %%k1, %0" : "=r"(tiny) : "v"(x) : "k1");
    return __builtin_expect(tiny, 0) ? round_to_bf(x) : h;
}
#else
INLINE halves to_bf(f x) { return round_to_bf(x); }
#endif
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

#if defined(__AVX512F__)
INLINE halves load_some_halves(const unsigned short *p, long n) {
    halves h;
    __asm__("vmovdqu16 %1, %0%{%2%}%{z%}" : "=v"(h) : "m"(*(const halves_any *)p), "Yk"(until(n)));
    return h;
}
INLINE void store_some_halves(unsigned short *p, halves h, long n) {
    __asm__("vmovdqu16 %1, %0%{%2%}" : "+m"(*(halves_any *)p) : "v"(h), "Yk"(until(n)));
}
#else
LOAD_SOME(halves, unsigned short)
STORE_SOME(halves, unsigned short)
#endif
#define HALF(S) \
    INLINE f load_##S(const unsigned short *p) { return from_##S(*(const halves_any *)p); } \
    INLINE void store_##S(unsigned short *p, f x) { *(halves_any *)p = to_##S(x); } \
    INLINE f load_some_##S(const unsigned short *p, long n) { return from_##S(load_some_halves(p, n)); } \
    INLINE void store_some_##S(unsigned short *p, f x, long n) { store_some_halves(p, to_##S(x), n); } \
    INLINE f load_apart_##S(const unsigned short *p, long s, long n) { halves h = {}; for (long j = 0; j < n; j++) h[j] = p[j * s]; return from_##S(h); } \
    INLINE f SET_ALL_##S(unsigned short v) { return from_##S((halves){} + v); }
HALF(bf)
HALF(h)

/* The first n lanes, zero in the others. */
INLINE f FIRST_f(f x, long n) { return SELECT_f(UNTIL(n), x, SET_f(0)); }
INLINE d FIRST_d(d x, long n) { return SELECT_d(UNTIL(n), x, SET_d(0)); }

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
/* Vectors of doubles fill two registers; gcc compares these lane by lane. */
#define HALVES(name, instruction) \
    INLINE d name(d x, d y) { \
        f a[2], b[2]; \
        __builtin_memcpy(a, &x, sizeof x), __builtin_memcpy(b, &y, sizeof y); \
        for (int i = 0; i < 2; i++) __asm__(instruction " %1, %0, %0" : "+" REGISTER(a[i]) : REGISTER(b[i])); \
        __builtin_memcpy(&x, a, sizeof x); \
        return x; \
    }
HALVES(MIN_d, "vminpd")
HALVES(MAX_d, "vmaxpd")
#else
EACH(f, sqrt_f, __builtin_sqrtf)
INLINE f MIN_f(f x, f y) { return SELECT_f((b)(x < y), x, y); }
INLINE f MAX_f(f x, f y) { return SELECT_f((b)(x > y), x, y); }
INLINE d MIN_d(d x, d y) { return SELECT_d(MASK_d(x < y), x, y); }
INLINE d MAX_d(d x, d y) { return SELECT_d(MASK_d(x > y), x, y); }
#endif
EACH(d, sqrt_d, __builtin_sqrt)

INLINE f abs_f(f x) { return (f)((b)x & 0x7fffffff); }
INLINE d abs_d(d x) { return (d)((l)x & 0x7fffffffffffffffL); }
/* As in PyTorch, a NaN on either side wins. */
INLINE f maximum_f(f x, f y) { return SELECT_f((b)(x != x), x, MAX_f(x, y)); }
INLINE d maximum_d(d x, d y) { return (d)((l)MAX_d(x, y) | (l)MAX_d(y, x)); } /* the same, unless one is a NaN */
INLINE f minimum_f(f x, f y) { return SELECT_f((b)(x != x), x, MIN_f(x, y)); }
INLINE d minimum_d(d x, d y) { return (d)((l)MIN_d(x, y) | (l)MIN_d(y, x)); }
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

/* Results below the normal range come out right; zeros aren't computed that way, as underflow is slow and masks make
   many of them. */
#if defined(__AVX512F__)
INLINE f exp_f(f x) {
    f t = MIN_f(SET_f(89.0f), x);
    EXP_POLYNOMIAL
    p = p * (r * r) + r + 1.0f;
    f y; /* p 2^n unless x < -104 */
    __asm__("vcmpps $5, %3, %1, %%k1\n\tvscalefps %4, %2, %0%{%%k1%}%{z%}" : "=v"(y) : "v"(x), "v"(p), "v"(SET_f(-104.0f)), "v"(n) : "k1");
    return y;
}
#else
INLINE f exp_f(f x) {
    b zero = (b)(x < SET_f(-104.0f));
    f t = (f)((b)MIN_f(SET_f(89.0f), x) & ~zero);
    EXP_POLYNOMIAL
    p = p * (r * r) + r + 1.0f;
    b half = whole >> 1; /* in two factors */
    return (f)((b)(p * (f)((half + 127) << 23) * (f)((whole - half + 127) << 23)) & ~zero);
}
#endif

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
    f y = SELECT_f((b)(a >= SET_f(0.625f)), large, p * s * a + a);
    return (f)((b)y | ((b)x & (int)0x80000000)); /* also of zeros */
}

INLINE f sigmoid_f(f x) { return 1.0f / (1.0f + exp_f(-x)); }

/* log x: mantissa in [sqrt 1/2, sqrt 2), Cephes. */
#define LOG_POLYNOMIAL \
    f z = m * m; \
    f p = SET_f(7.0376836292e-2f); \
    p = p * m - 1.1514610310e-1f; \
    p = p * m + 1.1676998740e-1f; \
    p = p * m - 1.2420140846e-1f; \
    p = p * m + 1.4249322787e-1f; \
    p = p * m - 1.6668057665e-1f; \
    p = p * m + 2.0000714765e-1f; \
    p = p * m - 2.4999993993e-1f; \
    p = p * m + 3.3333331174e-1f;

#if defined(__AVX512F__)
INLINE f log_f(f x) { /* the instructions know what is below the normal numbers, infinite, negative or no number */
    f e, m;
    __asm__("vgetexpps %1, %0" : "=v"(e) : "v"(x));
    __asm__("vgetmantps $8, %1, %0" : "=v"(m) : "v"(x)); /* in [1, 2) */
    b high = (b)(m > SET_f(1.41421356237309504880f));
    e = e + SELECT_f(high, SET_f(1.0f), SET_f(0));
    m = m * SELECT_f(high, SET_f(0.5f), SET_f(1.0f)) - 1.0f;
    LOG_POLYNOMIAL
    return 6.93145751953125e-1f * e + (p * m * z + 1.42860682030941723e-6f * e - 0.5f * z + m);
}
#else
INLINE f log_f(f x) {
    f tiny = SELECT_f((b)(x < SET_f(1.17549435e-38f)), SET_f(8388608.0f), SET_f(1.0f));
    f scaled = x * tiny;
    b bits = (b)scaled;
    f e = __builtin_convertvector(((bits >> 23) & 255) - 126, f) - SELECT_f((b)(tiny != SET_f(1.0f)), SET_f(23.0f), SET_f(0));
    f m = (f)((bits & 0x007fffff) | 0x3f000000);
    b low = (b)(m < SET_f(0.707106781186547524f));
    e = e - SELECT_f(low, SET_f(1.0f), SET_f(0));
    m = m + SELECT_f(low, m, SET_f(0)) - 1.0f;
    LOG_POLYNOMIAL
    f y = p * m * z - 2.12194440e-4f * e - 0.5f * z + m + 0.693359375f * e;
    f inf = SET_f(__builtin_inff());
    y = SELECT_f((b)(x == inf), inf, y);
    y = SELECT_f((b)(x == SET_f(0)), -inf, y);
    return SELECT_f((b)((x < SET_f(0)) | (x != x)), SET_f(__builtin_nanf("")), y);
}

#endif

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

/* ---- double: the exponential, of which softmax and sigmoid are made; the rest is the C library's, lane by lane */

/* As for float: a Taylor polynomial of 13 terms, and a power of two in two factors. A NaN stays one. In halves, which are registers:
   limits by MIN_d and MAX_d, through memory, take three times as long. */
typedef double half_d __attribute__((vector_size(L * 4)));
typedef long half_l __attribute__((vector_size(L * 4)));
INLINE half_d exp_half(half_d x) {
    half_l above = x > 710.0, below = x < -746.0;
    half_d t = (half_d)(((half_l)x & ~(above | below)) | ((half_l)(710.0 - (half_d){}) & above) | ((half_l)(-746.0 - (half_d){}) & below));
    half_d shift = 6755399441055744.0 - (half_d){}, whole = t * 1.44269504088896340736 + shift, n = whole - shift; /* 1.5 * 2^52 */
    half_d r = t - n * 6.93147180369123816490e-01 - n * 1.90821492927058770002e-10, p = 1.0 / 6227020800 - (half_d){};
    p = p * r + 1.0 / 479001600;
    p = p * r + 1.0 / 39916800;
    p = p * r + 1.0 / 3628800;
    p = p * r + 1.0 / 362880;
    p = p * r + 1.0 / 40320;
    p = p * r + 1.0 / 5040;
    p = p * r + 1.0 / 720;
    p = p * r + 1.0 / 120;
    p = p * r + 1.0 / 24;
    p = p * r + 1.0 / 6;
    p = p * r + 0.5;
    p = p * (r * r) + r + 1.0;
    half_l power = (half_l)whole - (half_l)shift, half = power >> 1;
    return p * (half_d)((half + 1023) << 52) * (half_d)((power - half + 1023) << 52);
}
INLINE d exp_d(d x) {
    half_d y[2];
    __builtin_memcpy(y, &x, sizeof x);
    y[0] = exp_half(y[0]), y[1] = exp_half(y[1]);
    __builtin_memcpy(&x, y, sizeof x);
    return x;
}
EACH(d, log_d, __builtin_log)
EACH(d, tanh_d, __builtin_tanh)
EACH(d, erf_d, __builtin_erf)
EACH(d, sin_d, __builtin_sin)
EACH(d, cos_d, __builtin_cos)
EACH2(d, pow_d, __builtin_pow)
INLINE d sigmoid_d(d x) { return 1.0 / (1.0 + exp_d(-x)); }

/* ---- activations, in both types */

/* The normal distribution: its integral up to x, and its density there. Below 0 the one is exp(-x^2 / 2) times a polynomial
   in t = 1 / (1 + p |x|) (form: Abramowitz & Stegun 7.1.26), fitted to float's precision for small x, and to a few times
   that beyond, where 1 + erf would cancel; above, it is 1 less that. */
INLINE f normal_f(f x, f *density) {
    f e = exp_f(x * x * -0.5f), t = 1.0f / (0.300520390f * abs_f(x) + 1.0f);
    f p = SET_f(3.67000587e-2f);
    p = p * t - 1.60403356e-1f;
    p = p * t + 2.10073635e-1f;
    p = p * t - 5.70795052e-2f;
    p = p * t + 1.30260497e-1f;
    p = p * t + 9.95800197e-2f;
    p = p * t + 1.21036448e-1f;
    p = p * t + 1.19832203e-1f;
    *density = e * 0.398942280f;
    p = p * t * e;
    return SELECT_f((b)(x > SET_f(0)), 1.0f - p, p);
}
INLINE d normal_d(d x, d *density) {
    *density = exp_d(x * x * -0.5) * 0.39894228040143267794;
    return 0.5 * (1 + erf_d(x * 0.70710678118654752440));
}

#define ACTIVATIONS(T) \
    INLINE T silu_backward_##T(T g, T x) { T s = sigmoid_##T(x); return g * s * (1 + x * (1 - s)); } \
    INLINE T gelu_##T(T x) { T density; return x * normal_##T(x, &density); } \
    INLINE T gelu_backward_##T(T g, T x) { T density, integral = normal_##T(x, &density); return g * (integral + x * density); } \
    /* (1 + tanh u) / 2 is sigmoid 2u, which needs no second formula near 0 */ \
    INLINE T gelu_tanh_##T(T x) { return x * sigmoid_##T(x * (SET_##T(1.59576912160573071) + SET_##T(0.07135481627260025) * x * x)); } \
    INLINE T gelu_backward_tanh_##T(T g, T x) { \
        T s = x * x, y = sigmoid_##T(x * (SET_##T(1.59576912160573071) + SET_##T(0.07135481627260025) * s)); \
        return g * y * (1 + x * (1 - y) * (SET_##T(1.59576912160573071) + SET_##T(0.21406444881780075) * s)); }
ACTIVATIONS(f)
ACTIVATIONS(d)
