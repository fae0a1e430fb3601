/* What fused kernels need beyond `vector.h`, which precedes this: rounding, folds of a vector, and the rarer
   functions. */

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
    INLINE T clamp_##T(T x, T low, T high) { return minimum_##T(maximum_##T(x, low), high); } \
    INLINE T leaky_relu_##T(T x, T slope) { return SELECT_##T(MASK_##T(x > SET_##T(0)), x, x * slope); } \
    INLINE T threshold_backward_##T(T g, T x, T limit) { return SELECT_##T(MASK_##T(x <= limit), SET_##T(0), g); } \
    INLINE T softplus_##T(T x, T beta, T limit) { \
        return SELECT_##T(MASK_##T(x * beta > limit), x, log1p_##T(exp_##T(x * beta)) / beta); } \
    INLINE T tanh_backward_##T(T g, T y) { return g * (1 - y * y); } \
    INLINE T sigmoid_backward_##T(T g, T y) { return g * (1 - y) * y; }
RARE(f)
RARE(d)
