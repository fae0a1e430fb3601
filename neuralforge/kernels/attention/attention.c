/* Flash attention (Dao et al. 2022, https://arxiv.org/abs/2205.14135) for vectors of L floats.

   Queries run along the vectors: a block of scores is kept transposed, [key][query], so that the softmax needs no
   horizontal operation, and one product kernel serves all seven products, forward and backward. A query t sees the
   keys t - left <= s <= t + right: full, causal and sliding windows are all such bands, and what a row of a tile can't
   see isn't computed.

   T queries and S keys of K numbers; H heads of queries, G of keys and values; P: K rounded up to whole vectors. */

void *aligned_alloc(unsigned long, unsigned long);
void free(void *);
int omp_get_max_threads(void);

enum {
    MR = 4,                                       /* rows of a register tile */
    NV = L == 16 ? 4 : L == 8 ? 3 : 2,            /* and its columns, in vectors */
    BQ = 64,                                      /* queries in a block */
    BK = 64,                                      /* keys in a block */
};
#define LOG2E 1.44269504088896340736f
#define LN2 0.69314718055994530942
#define INF __builtin_inff()

INLINE long least(long a, long b) { return a < b ? a : b; }
INLINE long most(long a, long b) { return a > b ? a : b; }
INLINE long clamp(long x, long low, long high) { return most(low, least(x, high)); }
INLINE long up(long x, long unit) { return (x + unit - 1) / unit * unit; }

typedef struct { float *at; long b, h, t; } Tensor; /* [batch][head][time][contiguous], strides in elements */
typedef struct {
    long B, H, G, T, S, K, left, right;
    Tensor mask; /* null without one */
    long mask_s;
    const long *seed; /* and offset; null without dropout */
    float scale, kept; /* kept: 1 / (1 - dropout); a weight is kept whose number is at least the threshold */
    unsigned threshold;
} Shape;
typedef struct { Tensor q, k, v, out, lse, g, g_lse, dq, dk, dv; } Arrays; /* g_lse may be null */

INLINE float *row(Tensor x, long b, long h, long t) { return x.at + b * x.b + h * x.h + t * x.t; }

/* ---- vectors */

#if defined(__AVX512F__)
INLINE f max_f(f x, f y) { f z; __asm__("vmaxps %2, %1, %0" : "=v"(z) : "v"(x), "v"(y)); return z; }
#elif defined(__AVX2__)
INLINE f max_f(f x, f y) { f z; __asm__("vmaxps %2, %1, %0" : "=x"(z) : "x"(x), "x"(y)); return z; }
#else
INLINE f max_f(f x, f y) { return SELECT_f((b)(x > y), x, y); }
#endif

/* 2^x for x <= 127 to 2 ulp; zero below the normal numbers. The polynomial is the best of 2^r for |r| <= 1/2. */
INLINE f exp2_f(f x) {
    f z = x + 12582912.0f, r = x - (z - 12582912.0f); /* 1.5 * 2^23: adding it rounds to a whole number */
    f p = SET_f(1.535336344e-4f);
    p = p * r + 1.339887444e-3f;
    p = p * r + 9.618437351e-3f;
    p = p * r + 5.550332471e-2f;
    p = p * r + 2.402264791e-1f;
    p = p * r + 6.931472029e-1f;
    p = p * r + 1.0f;
    f y = p * (f)(((b)z << 23) + (127 << 23));
    return (f)((b)y & ~(b)(x < SET_f(-126.0f)));
}

#define FROM(j, s) ((j) & (s) ? (j) - (s) + L : (j))
#define ABOVE(j, s) ((j) & (s) ? (j) + L : (j) + (s))
#if L == 16
#define LANES(E, s) (b){E(0, s), E(1, s), E(2, s), E(3, s), E(4, s), E(5, s), E(6, s), E(7, s), \
                        E(8, s), E(9, s), E(10, s), E(11, s), E(12, s), E(13, s), E(14, s), E(15, s)}
#elif L == 8
#define LANES(E, s) (b){E(0, s), E(1, s), E(2, s), E(3, s), E(4, s), E(5, s), E(6, s), E(7, s)}
#else
#define LANES(E, s) (b){E(0, s), E(1, s), E(2, s), E(3, s)}
#endif
#define ITSELF(j, s) (j)
#define SWAP(s) \
    _Pragma("GCC unroll 16") for (int i = 0; i < L; i++) if (!(i & s)) { \
        f lower = __builtin_shuffle(x[i], x[i + s], LANES(FROM, s)); \
        x[i + s] = __builtin_shuffle(x[i], x[i + s], LANES(ABOVE, s)); \
        x[i] = lower; \
    }

/* A square of L rows, transposed. */
INLINE void transpose(f *x) {
    SWAP(1)
    SWAP(2)
#if L >= 8
    SWAP(4)
#endif
#if L >= 16
    SWAP(8)
#endif
}

INLINE f load_part(const float *p, long n) { return n >= L ? load_f(p) : load_some_f(p, n); }

/* Rows [n][K], `step` apart, as [n][P], zeros at the end of each. */
static void copy_in(float *to, const float *from, long step, long n, long K, long P) {
    for (long t = 0; t < n; t++, to += P, from += step)
        for (long i = 0; i < P; i += L) store_f(to + i, load_part(from + i, K - i));
}

/* Rows [n][K] times `factor` as [P][BQ], zeros in the last columns. */
static void transpose_in(float *to, const float *from, long step, long n, long K, long P, float factor) {
    for (long t = 0; t < up(n, L); t += L)
        for (long i = 0; i < P; i += L) {
            f x[L];
            #pragma GCC unroll 16
            for (long j = 0; j < L; j++) x[j] = t + j < n ? load_part(from + (t + j) * step + i, K - i) * factor : SET_f(0);
            transpose(x);
            #pragma GCC unroll 16
            for (long j = 0; j < L; j++) store_f(to + (i + j) * BQ + t, x[j]);
        }
}

/* Rows [n][K] of [n][P] times `factor` (by row if `each`). */
static void copy_out(float *to, long step, const float *from, long n, long K, long P, const float *each, float factor) {
    for (long t = 0; t < n; t++, to += step, from += P) {
        float y = each ? each[t] : factor;
        for (long i = 0; i < K; i += L)
            if (K - i >= L) store_f(to + i, load_f(from + i) * y);
            else store_some_f(to + i, load_f(from + i) * y, K - i);
    }
}

/* ---- products: MR rows of c = beta c + a b, with a[i, k] at a[i ai + k ak]; beta, one for each row, null for 0 */

INLINE void tile(const int N, long n, const float *a, long ai, long ak, const float *b, long ldb, float *c, long ldc,
                 const float *beta) {
    f x[MR][NV] = {};
    for (long k = 0; k < n; k++, a += ak, b += ldb) {
        f y[NV];
        #pragma GCC unroll 4
        for (int j = 0; j < N; j++) y[j] = load_f(b + j * L);
        #pragma GCC unroll 4
        for (int i = 0; i < MR; i++) {
            f s = a[i * ai] - (f){}; /* a broadcast */
            #pragma GCC unroll 4
            for (int j = 0; j < N; j++) x[i][j] += s * y[j];
        }
    }
    #pragma GCC unroll 4
    for (int i = 0; i < MR; i++)
        #pragma GCC unroll 4
        for (int j = 0; j < N; j++)
            store_f(c + i * ldc + j * L, beta ? load_f(c + i * ldc + j * L) * beta[i] + x[i][j] : x[i][j]);
}

/* As many columns as `width`, a multiple of L. */
static void product(long width, long n, const float *a, long ai, long ak, const float *b, long ldb, float *c, long ldc,
                    const float *beta) {
    for (; width >= NV * L; width -= NV * L, b += NV * L, c += NV * L) tile(NV, n, a, ai, ak, b, ldb, c, ldc, beta);
    switch (width / L) {
#if L >= 16
    case 3: tile(3, n, a, ai, ak, b, ldb, c, ldc, beta); break;
#endif
#if L >= 8
    case 2: tile(2, n, a, ai, ak, b, ldb, c, ldc, beta); break;
#endif
    case 1: tile(1, n, a, ai, ak, b, ldb, c, ldc, beta);
    }
}

/* ---- a block of scores: queries q .. q + nq against keys k .. k + nk */

typedef struct { long q, nq, k, nk; } Block;

/* The queries that see any of the keys i .. i + n, and the keys that any of the queries i .. i + n sees; counted from
   the block's start. */
INLINE long first_query(const Shape *z, Block w, long i) { return clamp(w.k + i - z->right - w.q, 0, w.nq); }
INLINE long last_query(const Shape *z, Block w, long i, long n) { return clamp(w.k + i + n + z->left - w.q, 0, w.nq); }
INLINE long first_key(const Shape *z, Block w, long i) { return clamp(w.q + i - z->left - w.k, 0, w.nk); }
INLINE long last_key(const Shape *z, Block w, long i, long n) { return clamp(w.q + i + n + z->right - w.k, 0, w.nk); }

/* s[key][query] = a . b, a: [nk][P] keys or values, b: [P][BQ] queries or gradients. */
static void scores(const Shape *z, Block w, const float *a, long P, const float *b, float *s) {
    for (long i = 0; i < w.nk; i += MR) {
        long from = first_query(z, w, i) / L * L, to = up(last_query(z, w, i, MR), L);
        if (from < to) product(to - from, z->K, a + i * P, P, 1, b + from, BQ, s + i * BQ + from, BQ, 0);
    }
}

/* c[query] = beta c[query] + sum of s[key][query] x[key] */
static void to_queries(const Shape *z, Block w, const float *s, const float *x, long P, float *c, const float *beta) {
    for (long i = 0; i < w.nq; i += MR) {
        long from = first_key(z, w, i), n = most(0, last_key(z, w, i, MR) - from);
        product(P, n, s + from * BQ + i, 1, BQ, x + from * P, P, c + i * P, P, beta ? beta + i : 0);
    }
}

/* c[key] += sum of s[key][query] x[query] */
static void to_keys(const Shape *z, Block w, const float *s, const float *x, long P, float *c) {
    static const float one[MR] = {1, 1, 1, 1};
    for (long i = 0; i < w.nk; i += MR) {
        long from = first_query(z, w, i), n = last_query(z, w, i, MR) - from;
        if (n > 0) product(P, n, s + i * BQ + from, BQ, 1, x + from * P, P, c + i * P, P, one);
    }
}

/* The rows in which any query of column j, a vector of queries, sees a key, in whole tiles; -inf where it sees none. */
INLINE void band(const Shape *z, long head, Block w, long j, float *s, long *from, long *to) {
    *from = first_key(z, w, j) / MR * MR, *to = least(w.nk, up(last_key(z, w, j, L), MR));
    long low = clamp(w.q + j + L - 1 - z->left - w.k, *from, *to), high = clamp(w.q + j + z->right + 1 - w.k, low, *to);
    b lane = LANES(ITSELF, 0);
    for (long i = *from; i < *to; i++) {
        if (i == low) i = high;
        if (i >= *to) break;
        b distance = (int)(w.k + i - w.q - j) - lane; /* key minus query */
        b out = (b)(distance > (int)least(z->right, 1 << 30)) | (b)(distance < -(int)least(z->left, 1 << 30));
        store_f(s + i * BQ + j, SELECT_f(out, SET_f(-INF), load_f(s + i * BQ + j)));
    }
    const float *mask = z->mask.at ? row(z->mask, head / z->H, head % z->H, 0) : 0;
    if (mask)
        for (long t = 0; t < least(L, w.nq - j); t++)
            for (long i = *from; i < *to; i++)
                s[i * BQ + j + t] += mask[(w.q + j + t) * z->mask.t + (w.k + i) * z->mask_s] * LOG2E;
}

/* ---- dropout: a weight's place is the counter, so that backward draws the same numbers */

typedef unsigned u __attribute__((vector_size(L * 4)));
typedef unsigned long wide __attribute__((vector_size(L * 4)));

/* The products of the lower halves of each 64 bits. */
#if defined(__AVX512F__)
INLINE wide multiply(wide x, wide y) { wide z; __asm__("vpmuludq %2, %1, %0" : "=v"(z) : "v"(x), "v"(y)); return z; }
#elif defined(__AVX2__)
INLINE wide multiply(wide x, wide y) { wide z; __asm__("vpmuludq %2, %1, %0" : "=x"(z) : "x"(x), "x"(y)); return z; }
#else
INLINE wide multiply(wide x, wide y) { return (x & 0xffffffffUL) * (y & 0xffffffffUL); }
#endif

/* Philox 4x32, 7 rounds: the fewest that pass all tests (Salmon et al. 2011, https://doi.org/10.1145/2063384.2063405). */
INLINE void philox(u *x, long seed) {
    unsigned key0 = seed, key1 = (unsigned long)seed >> 32;
    wide low = (wide){} + 0xffffffffUL;
    for (int n = 0; n < 7; n++, key0 += 0x9E3779B9u, key1 += 0xBB67AE85u) {
        wide a = (wide){} + 0xD2511F53UL, b = (wide){} + 0xCD9E8D57UL;
        wide even0 = multiply((wide)x[0], a), odd0 = multiply((wide)x[0] >> 32, a);
        wide even1 = multiply((wide)x[2], b), odd1 = multiply((wide)x[2] >> 32, b);
        u high0 = (u)((even0 >> 32) | (odd0 & ~low)), high1 = (u)((even1 >> 32) | (odd1 & ~low));
        x[0] = high1 ^ x[1] ^ key0, x[2] = high0 ^ x[3] ^ key1;
        x[1] = (u)((even1 & low) | (odd1 << 32)), x[3] = (u)((even0 & low) | (odd0 << 32));
    }
}

/* For the rows from .. to of column j: 0 or `kept` in keep[key][L]. */
static void draw(const Shape *z, long head, Block w, long j, long from, long to, float *keep) {
    f kept = z->kept - (f){};
    u x[4], query = (u)LANES(ITSELF, 0) + (unsigned)(w.q + j);
    for (long i = from; i < to; i++) {
        long key = w.k + i;
        if (i == from || key % 4 == 0) {
            x[0] = (u){} + (unsigned)(key / 4), x[1] = query, x[2] = (u){} + (unsigned)head, x[3] = (u){} + (unsigned)z->seed[1];
            philox(x, z->seed[0]);
        }
        store_f(keep + i * L, (f)((b)kept & (b)(x[key % 4] >= (u){} + z->threshold)));
    }
}

/* ---- forward */

/* Scores to weights relative to the greatest score so far (`top`, in units of ln 2); `total` of the weights, and
   `decay`, by which what came before shrinks. */
static void weights(const Shape *z, long head, Block w, float *s, float *top, float *total, float *decay, float *keep) {
    for (long j = 0; j < w.nq; j += L) {
        long from, to, i;
        band(z, head, w, j, s, &from, &to);
        f m = load_f(top + j), m1 = m, m2 = m, m3 = m, before = m;
        for (i = from; i + 4 <= to; i += 4) {
            m = max_f(m, load_f(s + i * BQ + j)), m1 = max_f(m1, load_f(s + (i + 1) * BQ + j));
            m2 = max_f(m2, load_f(s + (i + 2) * BQ + j)), m3 = max_f(m3, load_f(s + (i + 3) * BQ + j));
        }
        for (; i < to; i++) m = max_f(m, load_f(s + i * BQ + j));
        m = max_f(max_f(m, m1), max_f(m2, m3));
        store_f(top + j, m);
        m = SELECT_f((b)(m == SET_f(-INF)), SET_f(0), m); /* nothing seen so far */
        f shrink = exp2_f(before - m), sum = SET_f(0);
        for (i = from; i < to; i++) {
            f p = exp2_f(load_f(s + i * BQ + j) - m);
            store_f(s + i * BQ + j, p);
            sum += p;
        }
        if (z->seed) {
            draw(z, head, w, j, from, to, keep);
            for (i = from; i < to; i++) store_f(s + i * BQ + j, load_f(s + i * BQ + j) * load_f(keep + i * L));
        }
        store_f(decay + j, shrink);
        store_f(total + j, load_f(total + j) * shrink + sum);
    }
}

INLINE float *take(float **memory, long n) { float *p = *memory; *memory += up(n, 16); return p; }

/* The queries q .. q + nq of a head. Keys and values are copied when first needed, side by side. */
static void forward_part(const Shape *z, const Arrays *x, long b, long h, long q, long nq, float *memory) {
    long K = z->K, P = up(K, L), g = h / (z->H / z->G), head = b * z->H + h, first = most(0, q - z->left), ready = first;
    int once = nq <= BQ; /* no copy serves again */
    float *qt = take(&memory, P * BQ), *s = take(&memory, BK * BQ), *o = take(&memory, BQ * P);
    float *top = take(&memory, BQ), *total = take(&memory, BQ), *decay = take(&memory, BQ);
    float *keys = take(&memory, up(z->S, BK) * P), *values = take(&memory, up(z->S, BK) * P), *keep = take(&memory, BK * L);
    for (long i = q; i < q + nq; i += BQ) {
        long n = least(BQ, q + nq - i), end = least(z->S, i + n + z->right);
        transpose_in(qt, row(x->q, b, h, i), x->q.t, n, K, P, z->scale * LOG2E);
        for (long t = 0; t < BQ; t++) top[t] = -INF, total[t] = 0;
        __builtin_memset(o, 0, BQ * P * sizeof(float));
        for (long k = first + most(0, i - z->left - first) / BK * BK; k < end; k += BK) {
            Block w = {i, n, k, least(BK, end - k)};
            float *key = keys + (once ? 0 : (k - first) * P), *value = values + (once ? 0 : (k - first) * P);
            if (k >= ready) {
                ready = least(k + BK, z->S);
                copy_in(key, row(x->k, b, g, k), x->k.t, ready - k, K, P);
                copy_in(value, row(x->v, b, g, k), x->v.t, ready - k, K, P);
            }
            scores(z, w, key, P, qt, s);
            weights(z, head, w, s, top, total, decay, keep);
            to_queries(z, w, s, value, P, o, decay);
        }
        for (long t = 0; t < n; t++) {
            *row(x->lse, b, h, i + t) = total[t] == 0 ? -INF : (double)top[t] * LN2 + __builtin_log(total[t]);
            total[t] = total[t] == 0 ? 0 : 1 / total[t];
        }
        copy_out(row(x->out, b, h, i), x->out.t, o, n, K, P, total, 0);
    }
}

/* A part for each head; for parts of heads, where those are few for the threads. Returns nonzero without memory. */
long attention_forward(const Shape *z, const Arrays *x) {
    long P = up(z->K, L), heads = z->B * z->H, blocks = up(z->T, BQ) / BQ, failed = 0;
    long run = clamp(blocks * heads / (6 * omp_get_max_threads()), 1, blocks), parts = up(blocks, run) / run;
    long size = 2 * BQ * P + 2 * up(z->S, BK) * P + BK * (BQ + L) + 3 * BQ + 9 * 16;
    #pragma omp parallel reduction(| : failed)
    {
        float *memory = aligned_alloc(64, size * sizeof(float));
        failed |= !memory;
        #pragma omp for schedule(dynamic)
        for (long n = 0; n < parts * heads; n++) {
            long head = n % heads, q = (parts - 1 - n / heads) * run * BQ; /* causal: the longest first */
            if (memory) forward_part(z, x, head / z->H, head % z->H, q, least(run * BQ, z->T - q), memory);
        }
        free(memory);
    }
    return failed;
}

/* ---- backward: the weights are computed again */

/* s: scores to weights, after dropout; d: their gradients to those of the scores. `lse` in units of ln 2. */
static void weights_backward(const Shape *z, long head, Block w, float *s, float *d, const float *lse, const float *delta,
                             float *keep) {
    for (long j = 0; j < w.nq; j += L) {
        long from, to;
        band(z, head, w, j, s, &from, &to);
        if (z->seed) draw(z, head, w, j, from, to, keep);
        f shift = load_f(lse + j), mean = load_f(delta + j);
        for (long i = from; i < to; i++) {
            f p = exp2_f(load_f(s + i * BQ + j) - shift), dropped = p, dp = load_f(d + i * BQ + j);
            if (z->seed) dropped *= load_f(keep + i * L), dp *= load_f(keep + i * L);
            store_f(s + i * BQ + j, dropped);
            store_f(d + i * BQ + j, p * (dp - mean));
        }
    }
}

/* delta[query] = the sum of g * out over a row, each [n][P] */
static void row_products(const float *g, const float *out, long out_t, long n, long K, long P, float *delta) {
    for (long t = 0; t < n; t += L) {
        f x[L] = {}, sum = SET_f(0);
        for (long j = 0; j < least(L, n - t); j++)
            for (long i = 0; i < K; i += L) x[j] += load_f(g + (t + j) * P + i) * load_part(out + (t + j) * out_t + i, K - i);
        transpose(x);
        for (int j = 0; j < L; j++) sum += x[j];
        store_f(delta + t, sum);
    }
}

/* What the queries q .. q + nq of the heads h .. h + nh and the keys k .. k + nk of their group give each other:
   dq of these queries if `queries`, dk and dv of these keys if `keys`. */
static void backward_part(const Shape *z, const Arrays *x, long b, long h, long nh, long q, long nq, long k, long nk, int queries,
                          int keys, float *memory) {
    long K = z->K, P = up(K, L), g = h / (z->H / z->G);
    float *key = take(&memory, up(nk, MR) * P), *value = take(&memory, up(nk, MR) * P);
    float *dk = take(&memory, up(nk, MR) * P), *dv = take(&memory, up(nk, MR) * P);
    float *qt = take(&memory, P * BQ), *gt = take(&memory, P * BQ), *qn = take(&memory, BQ * P), *gn = take(&memory, BQ * P);
    float *dq = take(&memory, BQ * P), *s = take(&memory, BK * BQ), *d = take(&memory, BK * BQ);
    float *lse = take(&memory, BQ), *delta = take(&memory, BQ), *one = take(&memory, BQ), *keep = take(&memory, BK * L);
    copy_in(key, row(x->k, b, g, k), x->k.t, nk, K, P);
    copy_in(value, row(x->v, b, g, k), x->v.t, nk, K, P);
    if (keys) {
        __builtin_memset(dk, 0, nk * P * sizeof(float));
        __builtin_memset(dv, 0, nk * P * sizeof(float));
    }
    for (long i = 0; i < BQ; i++) one[i] = 1;
    for (long head = h; head < h + nh; head++)
        for (long i = q; i < q + nq; i += BQ) {
            long n = least(BQ, q + nq - i), start = most(k, i - z->left), end = k + least(nk, up(most(0, i + n + z->right - k), MR));
            if (start < end) {
                transpose_in(qt, row(x->q, b, head, i), x->q.t, n, K, P, z->scale * LOG2E);
                transpose_in(gt, row(x->g, b, head, i), x->g.t, n, K, P, 1);
                copy_in(gn, row(x->g, b, head, i), x->g.t, n, K, P);
                if (keys) copy_in(qn, row(x->q, b, head, i), x->q.t, n, K, P);
                row_products(gn, row(x->out, b, head, i), x->out.t, n, K, P, delta);
                for (long t = 0; t < up(n, L); t++) {
                    float y = t < n ? *row(x->lse, b, head, i + t) * LOG2E : INF;
                    lse[t] = y == -INF ? INF : y; /* a query that sees nothing: no weights */
                    if (x->g_lse.at && t < n) delta[t] -= *row(x->g_lse, b, head, i + t);
                }
            }
            __builtin_memset(dq, 0, BQ * P * sizeof(float));
            start = k + (start - k) / BK * BK;
            for (long j = start; j < end; j += BK) {
                Block w = {i, n, j, least(BK, end - j)};
                scores(z, w, key + (j - k) * P, P, qt, s);
                scores(z, w, value + (j - k) * P, P, gt, d);
                weights_backward(z, b * z->H + head, w, s, d, lse, delta, keep);
                if (keys) {
                    to_keys(z, w, s, gn, P, dv + (j - k) * P);
                    to_keys(z, w, d, qn, P, dk + (j - k) * P);
                }
                if (queries) to_queries(z, w, d, key + (j - k) * P, P, dq, one);
            }
            if (queries) copy_out(row(x->dq, b, head, i), x->dq.t, dq, n, K, P, 0, z->scale);
        }
    if (keys) {
        copy_out(row(x->dk, b, g, k), x->dk.t, dk, nk, K, P, 0, z->scale);
        copy_out(row(x->dv, b, g, k), x->dv.t, dv, nk, K, P, 0, 1);
    }
}

/* Where there are groups enough for the threads, each is one part, five products. Else one part for each block of
   queries and one for each block of keys, seven products. */
long attention_backward(const Shape *z, const Arrays *x) {
    long P = up(z->K, L), groups = z->B * z->G, threads = omp_get_max_threads(), failed = 0, share = z->H / z->G;
    int whole = groups >= 3 * threads || groups % threads == 0;
    long q_parts = up(z->T, BQ) / BQ, k_parts = up(z->S, BK) / BK;
    long parts = whole ? groups : z->B * z->H * q_parts + groups * k_parts;
    long size = 4 * up(z->S, MR) * P + 5 * BQ * P + BK * (2 * BQ + L) + 3 * BQ + 15 * 16;
    #pragma omp parallel reduction(| : failed)
    {
        float *memory = aligned_alloc(64, size * sizeof(float));
        failed |= !memory;
        #pragma omp for schedule(dynamic)
        for (long n = 0; n < parts; n++) {
            if (!memory) continue;
            if (whole) {
                backward_part(z, x, n / z->G, n % z->G * share, share, 0, z->T, 0, z->S, 1, 1, memory);
            } else if (n < z->B * z->H * q_parts) {
                long head = n / q_parts, i = n % q_parts * BQ;
                backward_part(z, x, head / z->H, head % z->H, 1, i, least(BQ, z->T - i), 0, z->S, 1, 0, memory);
            } else {
                long part = n - z->B * z->H * q_parts, group = part / k_parts, i = part % k_parts * BK;
                backward_part(z, x, group / z->G, group % z->G * share, share, 0, z->T, i, least(BK, z->S - i), 0, 1, memory);
            }
        }
        free(memory);
    }
    return failed;
}
