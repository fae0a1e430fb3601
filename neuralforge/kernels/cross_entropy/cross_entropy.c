/* One row of logits at a time: it stays in the cache between the passes over it. */

static inline float largest(const float *x, long n) {
    f m = SET_f(-__builtin_inff());
    long i = 0;
    for (; i + L <= n; i += L) m = maximum_f(m, load_f(x + i));
    float y = m[0];
    for (int j = 1; j < L; j++) y = y > m[j] || y != y ? y : m[j];
    for (; i < n; i++) y = y > x[i] || y != y ? y : x[i];
    return y;
}

/* Returns the first row whose target is out of range, or -1. */
long cross_entropy(const float *logits, const long *target, float *lse, float *loss, float *count, long N, long V, long ignore) {
    for (long row = 0; row < N; row++)
        if (target[row] != ignore && (target[row] < 0 || target[row] >= V)) return row;
    #pragma omp parallel for schedule(static)
    for (long row = 0; row < N; row++) {
        const float *x = logits + row * V;
        float top = largest(x, V);
        float shift = top == -__builtin_inff() ? 0 : top;
        f total = SET_f(0);
        long i = 0;
        for (; i + L <= V; i += L) total += exp_f(load_f(x + i) - shift);
        if (i < V) total += FIRST_f(exp_f(load_some_f(x + i, V - i) - shift), V - i);
        double sum = 0;
        for (int j = 0; j < L; j++) sum += total[j];
        lse[row] = shift + __builtin_log(sum);
    }
    double sum = 0;
    long n = 0;
    for (long row = 0; row < N; row++)
        if (target[row] != ignore) sum += (double)lse[row] - logits[row * V + target[row]], n++;
    *count = n;
    *loss = sum / n;
    return -1;
}

void cross_entropy_backward(const float *grad, const float *logits, const long *target, const float *lse, const float *count,
                            float *out, long N, long V, long ignore) {
    float scale = *grad / *count;
    #pragma omp parallel for schedule(static)
    for (long row = 0; row < N; row++) {
        const float *x = logits + row * V;
        float *y = out + row * V, shift = lse[row];
        if (target[row] == ignore) {
            __builtin_memset(y, 0, V * sizeof(float));
            continue;
        }
        long i = 0;
        for (; i + L <= V; i += L) store_f(y + i, exp_f(load_f(x + i) - shift) * scale);
        if (i < V) store_some_f(y + i, exp_f(load_some_f(x + i, V - i) - shift) * scale, V - i);
        y[target[row]] -= scale;
    }
}
