/* The gradient of a table of rows, from those of the tokens that read it. Tokens are sorted by row, in their order, so that
   one thread sums a row: no atomics, each number is written once, and the sums don't depend on the number of threads.
   Gradients are float or bfloat16 in memory and added up as float. */

void *malloc(unsigned long);
void free(void *);

enum { WIDE = 4, OK = -1, NO_MEMORY = -2 };

/* out[D] = factor * the sum of the rows g[order[i]] */
static void add_rows(const stored *g, long step, const long *order, long n, stored *out, long D, float factor) {
    long i = 0;
    for (; i + WIDE * L <= D; i += WIDE * L) {
        f sum[WIDE] = {};
        for (long k = 0; k < n; k++)
            for (int j = 0; j < WIDE; j++) sum[j] += STORED(load)(g + order[k] * step + i + j * L);
        for (int j = 0; j < WIDE; j++) STORED(store)(out + i + j * L, sum[j] * factor);
    }
    for (; i < D; i += L) {
        long width = D - i < L ? D - i : L;
        f sum = SET_f(0);
        for (long k = 0; k < n; k++) sum += STORED(load_some)(g + order[k] * step + i, width);
        STORED(store_some)(out + i, sum * factor, width);
    }
}

/* N gradients of D numbers, `step` apart; out: [V][D]. The row `padding` gets zero. Returns the first token that names no
   row, or OK. */
long embedding_backward(const stored *g, long step, const long *index, stored *out, long N, long V, long D, long padding,
                        long by_frequency) {
    for (long i = 0; i < N; i++)
        if (index[i] < 0 || index[i] >= V) return i;
    long *start = malloc((V + 2 + N) * sizeof(long)), *order = start + V + 2;
    if (!start) return NO_MEMORY;
    __builtin_memset(start, 0, (V + 2) * sizeof(long));
    for (long i = 0; i < N; i++) start[index[i] + 2]++;
    for (long row = 0; row < V; row++) start[row + 2] += start[row + 1];
    for (long i = 0; i < N; i++) order[start[index[i] + 1]++] = i; /* now start[row] is where a row's tokens begin */
    #pragma omp parallel for schedule(dynamic, 64) if (V * D > 32768)
    for (long row = 0; row < V; row++) {
        long n = start[row + 1] - start[row];
        if (n == 0 || row == padding) __builtin_memset(out + row * D, 0, D * sizeof(stored));
        else add_rows(g, step, order + start[row], n, out + row * D, D, by_frequency ? 1.0f / n : 1.0f);
    }
    free(start);
    return OK;
}
