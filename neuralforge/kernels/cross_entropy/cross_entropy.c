/* One row of logits at a time: it stays in the cache between the passes over it. Logits and their gradients are float or
   bfloat16 in memory, all else is float. */

/* Past the cache, to an address that is a multiple of a vector's size; after the last of them, STREAMED. */
#if defined(__AVX512F__) || defined(__AVX2__)
#define STREAM(T, p, x) __asm__("vmovntps %1, %0" : "=m"(*(T *)(p)) : REGISTER(x))
#define STREAMED __asm__ volatile("sfence" ::: "memory")
#else
#define STREAM(T, p, x) *(T *)(p) = x
#define STREAMED
#endif
INLINE void stream_f(float *p, f x) { STREAM(f, p, x); }
INLINE void stream_bf(unsigned short *p, f x) { halves h = to_bf(x); STREAM(halves, p, h); }
#define LARGE (16l << 20) /* bytes of gradients that no cache keeps: they are written past it */

/* The largest number; a NaN may be left out. */
INLINE float largest(const stored *x, long n) {
    f m = SET_f(-__builtin_inff());
    long i = 0;
    for (; i + L <= n; i += L) m = MAX_f(m, STORED(load)(x + i));
    float y = m[0];
    for (int j = 1; j < L; j++) y = y > m[j] ? y : m[j];
    for (; i < n; i++) y = y > as_float(x[i]) ? y : as_float(x[i]);
    return y;
}

/* The sum of exp(x - shift), which it keeps in e unless that is 0. */
INLINE double exponentials(const stored *x, long V, float shift, float *e) {
    f total = SET_f(0);
    long i = 0;
    for (; i + L <= V; i += L) {
        f y = exp_f(STORED(load)(x + i) - shift);
        if (e) store_f(e + i, y);
        total += y;
    }
    if (i < V) {
        f y = FIRST_f(exp_f(STORED(load_some)(x + i, V - i) - shift), V - i);
        if (e) store_some_f(e + i, y, V - i);
        total += y;
    }
    double sum = 0;
    for (int j = 0; j < L; j++) sum += total[j];
    return sum;
}

/* y = exp(x - shift) scale, of exponentials in e unless that is 0; less `picked` at the target. y may be x. */
INLINE f power(const stored *x, const float *e, float shift) { return e ? load_f(e) : exp_f(STORED(load)(x) - shift); }
INLINE f power_some(const stored *x, const float *e, float shift, long n) {
    return e ? load_some_f(e, n) : exp_f(STORED(load_some)(x, n) - shift);
}
INLINE void gradient(const stored *x, const float *e, stored *y, long V, long target, float shift, float scale, float picked, long large) {
    #define AT(i) x + (i), e ? e + (i) : 0, shift
    f at_target = target < 0 ? SET_f(0) : power_some(AT(target), 1) * scale - picked;
    long i = 0;
    if (large) {
        i = least(-((unsigned long)y / sizeof(stored)) % L, V);
        STORED(store_some)(y, power_some(AT(0), i) * scale, i);
        for (; i + L <= V; i += L) STORED(stream)(y + i, power(AT(i)) * scale);
    }
    for (; i + L <= V; i += L) STORED(store)(y + i, power(AT(i)) * scale);
    if (i < V) STORED(store_some)(y + i, power_some(AT(i), V - i) * scale, V - i);
    if (target >= 0) STORED(store_some)(y + target, at_target, 1);
}

/* The first row whose target is out of range, or -1. */
static long out_of_range(const long *target, long N, long V, long ignore) {
    for (long row = 0; row < N; row++)
        if (target[row] != ignore && (target[row] < 0 || target[row] >= V)) return row;
    return -1;
}

/* Losses and log-sum-exps, unless loss is 0; the gradient of the logits, unless out is 0: out may be logits, grad_lse may
   be 0. Returns the first row whose target is out of range, or -1. */
long cross_entropy(const stored *logits, const long *target, float *loss, float *lse, const float *grad,
                   const float *grad_lse, stored *out, long N, long V, long ignore) {
    long bad = loss ? out_of_range(target, N, V, ignore) : -1;
    if (bad >= 0) return bad;
    long large = out != logits && N * V * (long)sizeof(stored) > LARGE;
    #pragma omp parallel
    {
        float *e = loss && out ? __builtin_malloc(V * sizeof(float)) : 0; /* two cheap passes instead of exponentials anew */
        #pragma omp for schedule(static)
        for (long row = 0; row < N; row++) {
            const stored *x = logits + row * V;
            stored *y = out + row * V;
            long at = target[row] == ignore ? -1 : target[row];
            float picked = at < 0 || !out ? 0 : grad[row], scale = picked + (grad_lse ? grad_lse[row] : 0);
            double sum = 1;
            if (loss) {
                float top = largest(x, V), shift = top == -__builtin_inff() ? 0 : top;
                sum = exponentials(x, V, shift, e);
                lse[row] = shift + __builtin_log(sum);
                loss[row] = at < 0 ? 0 : (double)shift - as_float(x[at]) + __builtin_log(sum);
            }
            if (out && at < 0 && !grad_lse)
                __builtin_memset(y, 0, V * sizeof(stored));
            else if (e)
                gradient(x, e, y, V, at, 0, scale / sum, picked, large);
            else if (out)
                gradient(x, 0, y, V, at, lse[row], scale, picked, large);
        }
        STREAMED;
        __builtin_free(e);
    }
    return -1;
}
