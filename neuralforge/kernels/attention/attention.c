/* Flash attention (Dao et al. 2022, https://arxiv.org/abs/2205.14135) for vectors of L floats.

   Queries run along the vectors: a block of scores is kept transposed, [key][query], so that the softmax needs no
   horizontal operation, and one product kernel serves all seven products, forward and backward. A query t sees the
   keys t - left <= s <= t + right: full, causal and sliding windows are all such bands, and what a row of a tile can't
   see isn't computed.

   Queries, keys, values, outputs and their gradients are float or bfloat16 in memory. In the blocks they are float; where
   the CPU multiplies bfloat16 (CELLS, see bfloat16.h), they stay so, and weights and their gradients are rounded to it
   for the products. The rest is float.

   Packed sequences lie one after the other in a batch of one, and see only their own.

   T queries and S keys of K numbers; H heads of queries, G of keys and values; P: K rounded up to whole vectors; W: that in
   items, of two numbers where they are cells. */

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

INLINE long clamp(long x, long low, long high) { return most(low, least(x, high)); }

#ifdef CELLS
typedef cell item; /* of a block's operands */
enum { NUMBERS = 2, ROWS = 16, COLUMNS = 32 }; /* numbers in an item; rows and columns that products take at a time */
#else
typedef float item;
enum { NUMBERS = 1, ROWS = MR, COLUMNS = L };
#endif
typedef struct { void *at; long b, h, t; } Tensor; /* [batch][head][time][contiguous], strides in elements */

/* Rows that the caches fetch while products run, a few lines with each: those of a head lie far apart, and no CPU foresees them.
   First what is to be written, then what this thread may read next; at most FETCHED of each. */
typedef struct { const char *at; long step, rows; int written; } Rows;
typedef struct { Rows part[8]; int count, now; long bytes, at, lines; } Ahead; /* bytes of a row; lines with a product */
enum { FETCHED = 512 };

typedef struct {
    long B, H, G, T, S, K, left, right;
    Tensor mask; /* null without one */
    long mask_s;
    long sequences; /* packed one after the other in a batch of one; T and S are the longest ones' then */
    const long *q_starts, *k_starts; /* where they begin, and the last one ends; null where nothing is packed */
    long q0, k0; /* where the sequence at hand begins */
    const long *seed; /* and offset; null without dropout */
    Ahead *ahead; /* never null within a part of the work */
    float scale, kept; /* kept: 1 / (1 - dropout); a weight is kept whose number is at least the threshold */
    unsigned threshold;
} Shape;
typedef struct { Tensor q, k, v, out, lse, g, g_lse, dq, dk, dv; } Arrays; /* g_lse may be null */

INLINE stored *row(Tensor x, long b, long h, long t) { return (stored *)x.at + b * x.b + h * x.h + t * x.t; }
INLINE float *row_f(Tensor x, long b, long h, long t) { return (float *)x.at + b * x.b + h * x.h + t * x.t; }

/* At this rate the rows of a head of 256 tokens come while causal attention works on another: `products` of each block of scores. */
INLINE Ahead nothing_ahead(const Shape *z, int products) {
    long bytes = z->K * sizeof(stored), height = NUMBERS == 1 ? ROWS : COLUMNS;
    return (Ahead){.bytes = bytes, .lines = parts(bytes * height, 40 * products)};
}
INLINE void foresee(Ahead *a, Tensor x, long b, long h, long t, long rows, int written) {
    if (rows > 0) a->part[a->count++] = (Rows){(char *)row(x, b, h, t), x.t * sizeof(stored), least(rows, FETCHED), written};
}
INLINE void fetch(Ahead *a) {
    for (long i = 0; i < a->lines && a->now < a->count; i++) {
        Rows *x = a->part + a->now;
        if (x->written) __builtin_prefetch(x->at + a->at, 1, 2);
        else __builtin_prefetch(x->at + a->at, 0, 2);
        if ((a->at += 64) < a->bytes) continue;
        a->at = 0, x->at += x->step;
        if (--x->rows == 0) a->now++;
    }
}

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

INLINE f load_part(const stored *p, long n) { return n >= L ? STORED(load)(p) : STORED(load_some)(p, n); }

/* ---- a block's operands: queries, keys, values or gradients, rows [n][K] that lie `step` apart, padded with zeros

   rows_in        [n][W]     keys and values, for `scores`
   transpose_in   [W][BQ]    queries and gradients, for `scores`
   keys_in        [n][P]     for `to_queries`; of cells [P][BK / 2], pairs of keys
   queries_in     [n][P]     for `to_keys`; of cells [BQ / 2][P], pairs of queries */

#ifdef CELLS
static void rows_in(item *to, const stored *from, long step, long n, long K, long P) {
    cells_in(to, from, step, n, up(n, ROWS), K, P);
}
static void transpose_in(item *to, const stored *from, long step, long n, long K, long P, float factor) {
    transpose_cells(to, BQ, from, step, n, K, P); /* the scores are multiplied by the factor */
}
static void keys_in(item *to, const stored *from, long step, long n, long K, long P) {
    for (; n > 0; n -= BK, to += P * BK / 2, from += BK * step) transpose_pairs(to, from, step, least(n, BK), BK, K, P);
}
static void queries_in(item *to, const stored *from, long step, long n, long K, long P) {
    pairs_in(to, from, step, n, up(n, COLUMNS), K, P);
}
#else
static void rows_in(float *to, const stored *from, long step, long n, long K, long P) {
    for (long t = 0; t < n; t++, to += P, from += step)
        for (long i = 0; i < P; i += L) store_f(to + i, load_part(from + i, K - i));
}

static void keys_in(item *to, const stored *from, long step, long n, long K, long P) { rows_in(to, from, step, n, K, P); }
static void queries_in(item *to, const stored *from, long step, long n, long K, long P) { rows_in(to, from, step, n, K, P); }
static void transpose_in(float *to, const stored *from, long step, long n, long K, long P, float factor) {
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
#endif

/* Rows [n][K] of [n][P] times `factor` (by row if `each`). */
static void copy_out(stored *to, long step, const float *from, long n, long K, long P, const float *each, float factor) {
    for (long t = 0; t < n; t++, to += step, from += P) {
        float y = each ? each[t] : factor;
        for (long i = 0; i < K; i += L)
            if (K - i >= L) STORED(store)(to + i, load_f(from + i) * y);
            else STORED(store_some)(to + i, load_f(from + i) * y, K - i);
    }
}

/* What `to_queries` makes, [BQ][P] or of cells its transpose, as rows [n][K]. */
static void queries_out(stored *to, long step, float *from, long n, long K, long P, const float *each, float factor) {
#ifdef CELLS
    for (long t = 0; t < n; t += L)
        for (long i = 0; i < K; i += L) {
            f x[L], y = each ? load_f(each + t) : SET_f(factor);
            #pragma GCC unroll 16
            for (long j = 0; j < L; j++) x[j] = load_f(from + (i + j) * BQ + t) * y;
            transpose(x);
            #pragma GCC unroll 16
            for (long j = 0; j < L; j++)
                if (t + j >= n) break;
                else if (K - i >= L) STORED(store)(to + (t + j) * step + i, x[j]);
                else STORED(store_some)(to + (t + j) * step + i, x[j], K - i);
        }
#else
    copy_out(to, step, from, n, K, P, each, factor);
#endif
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

/* The rows in which any query of column j, a vector of queries, sees a key, in whole tiles; none where to <= from. */
INLINE void seen(const Shape *z, Block w, long j, long *from, long *to) {
    *from = clamp(w.q + j - z->left - w.k, 0, up(w.nk, MR)) / MR * MR, *to = least(w.nk, up(last_key(z, w, j, L), MR));
}

#ifdef CELLS
/* s[key][query] = factor a . b, a: [nk][W] keys or values, b: [W][BQ] queries or gradients. */
static void scores(const Shape *z, Block w, const item *a, long P, const item *b, float factor, float *s) {
    for (long i = 0; i < w.nk; i += COLUMNS) {
        long rows = least(COLUMNS, up(w.nk - i, ROWS));
        long from = first_query(z, w, i) / L * L, to = up(last_query(z, w, i, COLUMNS), L);
        if (from >= to) continue;
        fetch(z->ahead);
        cell_product(rows, to - from, P / 2, a + i * P / 2, P / 2, b + from, BQ, s + i * BQ + from, BQ, 0);
        if (factor == 1) continue;
        for (long t = i; t < i + rows; t++)
            for (long j = from; j < to; j += L) store_f(s + t * BQ + j, load_f(s + t * BQ + j) * factor);
    }
}

/* Floats s[key][query] rounded to operands of to_queries, pairs of keys, and of to_keys, in place; zeros where nothing is
   seen, which products of whole tiles read too. */
static const item *paired_keys(const Shape *z, Block w, const float *s, item *pairs) {
    for (long j = 0; j < w.nq; j += L) {
        long from, to;
        seen(z, w, j, &from, &to);
        for (long i = 0; i < up(w.nk, COLUMNS); i += 2)
            if (from <= i && i < to) {
                f next = i + 1 < to ? load_f(s + (i + 1) * BQ + j) : SET_f(0);
                store_pairs(pairs + i / 2 * BQ + j, load_f(s + i * BQ + j), next);
            } else {
                *(cells *)(pairs + i / 2 * BQ + j) = (words){};
            }
    }
    return pairs;
}
static const item *paired_queries(const Shape *z, Block w, float *s) {
    for (long j = 0; j < up(w.nq, COLUMNS); j += L) {
        long from, to;
        seen(z, w, j, &from, &to);
        if (j >= w.nq) to = 0;
        for (long i = 0; i < up(w.nk, ROWS); i++)
            store_row(s + i * BQ, j, from <= i && i < to ? load_f(s + i * BQ + j) : SET_f(0));
    }
    return (const item *)s;
}

/* c[][query] = beta c[][query] + sum of s[key][query] x[key] */
static void to_queries(const Shape *z, Block w, const item *s, const item *x, long P, float *c, const float *beta) {
    for (long j = 0; j < w.nq; j += COLUMNS) {
        long width = least(COLUMNS, up(w.nq - j, L));
        for (long i = j; i < j + width; i += L) {
            f y = load_f(beta + i);
            int same = 1;
            for (int t = 0; t < L; t++) same &= beta[i + t] == 1;
            if (!same) for (long k = 0; k < P; k++) store_f(c + k * BQ + i, load_f(c + k * BQ + i) * y);
        }
        long from = first_key(z, w, j) / 32 * 32, to = up(last_key(z, w, j, COLUMNS), 32);
        fetch(z->ahead);
        if (from < to) cell_product(P, width, (to - from) / 2, x + from / 2, BK / 2, s + from / 2 * BQ + j, BQ, c + j, BQ, 1);
    }
}

/* c[key] += sum of s[key][query] x[query] */
static void to_keys(const Shape *z, Block w, const item *s, const item *x, long P, float *c) {
    for (long i = 0; i < w.nk; i += COLUMNS) {
        long from = first_query(z, w, i) / 32 * 32, to = up(last_query(z, w, i, COLUMNS), 32);
        long rows = least(COLUMNS, up(w.nk - i, ROWS));
        fetch(z->ahead);
        if (from < to) cell_product(rows, P, (to - from) / 2, s + i * BQ + from / 2, BQ, x + from / 2 * P, P, c + i * P, P, 1);
    }
}
#else
typedef int Tiles;
INLINE Tiles begin_products(void) { return 0; }
INLINE void end_products(Tiles before) { (void)before; }
/* s[key][query] = a . b, a: [nk][P] keys or values, b: [P][BQ] queries or gradients, multiplied by the factor already. */
static void scores(const Shape *z, Block w, const item *a, long P, const item *b, float factor, float *s) {
    for (long i = 0; i < w.nk; i += MR) {
        long from = first_query(z, w, i) / L * L, to = up(last_query(z, w, i, MR), L);
        fetch(z->ahead);
        if (from < to) product(to - from, z->K, a + i * P, P, 1, b + from, BQ, s + i * BQ + from, BQ, 0);
    }
}

INLINE const item *paired_keys(const Shape *z, Block w, const float *s, item *pairs) { return s; }
INLINE const item *paired_queries(const Shape *z, Block w, float *s) { return s; }

/* c[query] = beta c[query] + sum of s[key][query] x[key] */
static void to_queries(const Shape *z, Block w, const float *s, const float *x, long P, float *c, const float *beta) {
    for (long i = 0; i < w.nq; i += MR) {
        long from = first_key(z, w, i), n = most(0, last_key(z, w, i, MR) - from);
        fetch(z->ahead);
        product(P, n, s + from * BQ + i, 1, BQ, x + from * P, P, c + i * P, P, beta ? beta + i : 0);
    }
}

/* c[key] += sum of s[key][query] x[query] */
static void to_keys(const Shape *z, Block w, const float *s, const float *x, long P, float *c) {
    static const float one[MR] = {1, 1, 1, 1};
    for (long i = 0; i < w.nk; i += MR) {
        long from = first_query(z, w, i), n = last_query(z, w, i, MR) - from;
        fetch(z->ahead);
        if (n > 0) product(P, n, s + i * BQ + from, BQ, 1, x + from * P, P, c + i * P, P, one);
    }
}
#endif

/* The same rows, and -inf in them where a query doesn't see the key. */
INLINE void band(const Shape *z, long head, Block w, long j, float *s, long *from, long *to) {
    seen(z, w, j, from, to);
    long low = clamp(w.q + j + L - 1 - z->left - w.k, *from, *to), high = clamp(w.q + j + z->right + 1 - w.k, low, *to);
    b lane = LANES(ITSELF, 0);
    for (long i = *from; i < *to; i++) {
        if (i == low) i = high;
        if (i >= *to) break;
        b distance = (int)(w.k + i - w.q - j) - lane; /* key minus query */
        b out = (b)(distance > (int)least(z->right, 1 << 30)) | (b)(distance < -(int)least(z->left, 1 << 30));
        store_f(s + i * BQ + j, SELECT_f(out, SET_f(-INF), load_f(s + i * BQ + j)));
    }
    const float *mask = z->mask.at ? row_f(z->mask, head / z->H, head % z->H, 0) : 0;
    if (mask)
        for (long t = 0; t < least(L, w.nq - j); t++)
            for (long i = *from; i < *to; i++)
                s[i * BQ + j + t] += mask[(w.q + j + t) * z->mask.t + (w.k + i) * z->mask_s] * LOG2E;
}

/* ---- dropout: a weight's place is the counter, so that backward draws the same numbers */

/* For the rows from .. to of column j: 0 or `kept` in keep[key][L]. */
static void draw(const Shape *z, long head, Block w, long j, long from, long to, float *keep) {
    f kept = z->kept - (f){};
    u x[4], query = (u)LANES(ITSELF, 0) + (unsigned)(z->q0 + w.q + j);
    for (long i = from; i < to; i++) {
        long key = z->k0 + w.k + i;
        if (i == from || key % 4 == 0) {
            x[0] = (u){} + (unsigned)(key / 4), x[1] = query, x[2] = (u){} + (unsigned)head, x[3] = (u){} + (unsigned)z->seed[1];
            philox(x, z->seed[0]);
        }
        store_f(keep + i * L, (f)((b)kept & (b)(x[key % 4] >= (u){} + z->threshold)));
    }
}

/* ---- packed sequences */

INLINE void skip(Tensor *x, long t, long size) { if (x->at) x->at = (char *)x->at + t * x->t * size; }

/* Row n of the batch, or the n-th of packed sequences as a batch of one. Returns the row to take in `own_x`. */
static long sequence(const Shape *z, const Arrays *x, long n, Shape *own, Arrays *own_x) {
    *own = *z, *own_x = *x;
    if (!z->q_starts) return n;
    own->q0 = z->q_starts[n], own->T = z->q_starts[n + 1] - own->q0;
    own->k0 = z->k_starts[n], own->S = z->k_starts[n + 1] - own->k0;
    Tensor *queries[] = {&own_x->q, &own_x->out, &own_x->g, &own_x->dq}, *keys[] = {&own_x->k, &own_x->v, &own_x->dk, &own_x->dv};
    for (int i = 0; i < 4; i++) skip(queries[i], own->q0, sizeof(stored)), skip(keys[i], own->k0, sizeof(stored));
    skip(&own_x->lse, own->q0, sizeof(float)), skip(&own_x->g_lse, own->q0, sizeof(float));
    return 0;
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

INLINE void *take(float **memory, long n) { float *p = *memory; *memory += up(n, 16); return p; }

/* The queries q .. q + nq of a head. Keys and values are copied when first needed, side by side. */
static void forward_part(const Shape *z, const Arrays *x, long b, long h, long q, long nq, float *memory) {
    long K = z->K, P = up(K, NUMBERS * L), W = P / NUMBERS, g = h / (z->H / z->G), head = b * z->H + h;
    long first = most(0, q - z->left), ready = first;
    int once = nq <= BQ; /* no copy serves again */
    float *s = take(&memory, BK * BQ), *o = take(&memory, BQ * P);
    float *top = take(&memory, BQ), *total = take(&memory, BQ), *decay = take(&memory, BQ), *keep = take(&memory, BK * L);
    item *qt = take(&memory, W * BQ), *pairs = take(&memory, BK * BQ / 2);
    item *keys = take(&memory, up(z->S, BK) * W), *values = take(&memory, up(z->S, BK) * W);
    for (long i = q; i < q + nq; i += BQ) {
        long n = least(BQ, q + nq - i), end = least(z->S, i + n + z->right);
        transpose_in(qt, row(x->q, b, h, i), x->q.t, n, K, P, z->scale * LOG2E);
        for (long t = 0; t < BQ; t++) top[t] = -INF, total[t] = 0;
        __builtin_memset(o, 0, BQ * P * sizeof(float));
        for (long k = first + most(0, i - z->left - first) / BK * BK; k < end; k += BK) {
            Block w = {i, n, k, least(BK, end - k)};
            item *key = keys + (once ? 0 : (k - first) * W), *value = values + (once ? 0 : (k - first) * W);
            if (k >= ready) {
                ready = least(k + BK, z->S);
                rows_in(key, row(x->k, b, g, k), x->k.t, ready - k, K, P);
                keys_in(value, row(x->v, b, g, k), x->v.t, ready - k, K, P);
            }
            scores(z, w, key, P, qt, z->scale * LOG2E, s);
            weights(z, head, w, s, top, total, decay, keep);
            to_queries(z, w, paired_keys(z, w, s, pairs), value, P, o, decay);
        }
        for (long t = 0; t < n; t++) {
            *row_f(x->lse, b, h, i + t) = total[t] == 0 ? -INF : (double)top[t] * LN2 + __builtin_log(total[t]);
            total[t] = total[t] == 0 ? 0 : 1 / total[t];
        }
        queries_out(row(x->out, b, h, i), x->out.t, o, n, K, P, total, 0);
    }
}

/* The n-th part of the work: a head's queries q .. q + nq, `run` blocks of them; of causal heads the longest first. */
typedef struct { Shape z; Arrays x; long b, h, g, q, nq; } Part;

static Part forward_of(const Shape *z, const Arrays *x, long n, long heads, long run) {
    Part p = {.h = n % z->H, .g = n % z->H / (z->H / z->G)};
    p.b = sequence(z, x, n % heads / z->H, &p.z, &p.x);
    p.q = (parts(p.z.T, run * BQ) - 1 - n / heads) * run * BQ;
    p.nq = p.q < 0 ? 0 : least(run * BQ, p.z.T - p.q);
    return p;
}

/* A part for each head; for parts of heads, where those are few for the threads. Returns nonzero without memory. */
long attention_forward(const Shape *z, const Arrays *x) {
    long P = up(z->K, NUMBERS * L), heads = (z->q_starts ? z->sequences : z->B) * z->H, blocks = up(z->T, BQ) / BQ, failed = 0;
    long threads = omp_get_max_threads(), run = clamp(blocks * heads / (6 * threads), 1, blocks), all = parts(blocks, run) * heads;
    long size = 2 * BQ * P + 2 * up(z->S, BK) * P / NUMBERS + BK * (BQ + BQ / 2 + L) + 3 * BQ + 10 * 16;
    #pragma omp parallel reduction(| : failed)
    {
        float *memory = aligned_alloc(64, size * sizeof(float));
        failed |= !memory;
        Tiles before = begin_products();
        #pragma omp for schedule(dynamic)
        for (long n = 0; n < all; n++) {
            Part own = forward_of(z, x, n, heads, run);
            if (!memory || own.nq == 0) continue;
            Ahead ahead = nothing_ahead(z, 2);
            foresee(&ahead, own.x.out, own.b, own.h, own.q, own.nq, 1);
            if (n + threads < all) {
                Part then = forward_of(z, x, n + threads, heads, run);
                long first = most(0, then.q - z->left), seen = least(then.z.S, then.q + then.nq + z->right) - first;
                foresee(&ahead, then.x.q, then.b, then.h, then.q, then.nq, 0);
                foresee(&ahead, then.x.k, then.b, then.g, first, seen, 0);
                foresee(&ahead, then.x.v, then.b, then.g, first, seen, 0);
            }
            own.z.ahead = &ahead;
            forward_part(&own.z, &own.x, own.b, own.h, own.q, own.nq, memory);
        }
        end_products(before);
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

/* delta[query] = the sum of g * out over a row */
static void row_products(const stored *g, long g_t, const stored *out, long out_t, long n, long K, float *delta) {
    for (long t = 0; t < n; t += L) {
        f x[L] = {}, sum = SET_f(0);
        for (long j = 0; j < least(L, n - t); j++)
            for (long i = 0; i < K; i += L)
                x[j] += load_part(g + (t + j) * g_t + i, K - i) * load_part(out + (t + j) * out_t + i, K - i);
        transpose(x);
        for (int j = 0; j < L; j++) sum += x[j];
        store_f(delta + t, sum);
    }
}

/* What the queries q .. q + nq of the heads h .. h + nh and the keys k .. k + nk of their group give each other:
   dq of these queries if `queries`, dk and dv of these keys if `keys`. */
static void backward_part(const Shape *z, const Arrays *x, long b, long h, long nh, long q, long nq, long k, long nk, int queries,
                          int keys, float *memory) {
    long K = z->K, P = up(K, NUMBERS * L), W = P / NUMBERS, g = h / (z->H / z->G);
    float *dk = take(&memory, up(nk, ROWS) * P), *dv = take(&memory, up(nk, ROWS) * P), *dq = take(&memory, BQ * P);
    float *s = take(&memory, BK * BQ), *d = take(&memory, BK * BQ), *keep = take(&memory, BK * L);
    float *lse = take(&memory, BQ), *delta = take(&memory, BQ), *one = take(&memory, BQ);
    item *qt = take(&memory, W * BQ), *gt = take(&memory, W * BQ), *qn = take(&memory, BQ * W), *gn = take(&memory, BQ * W);
    item *key = take(&memory, up(nk, ROWS) * W), *value = take(&memory, up(nk, ROWS) * W), *pairs = take(&memory, BK * BQ / 2);
    item *summed = NUMBERS == 1 ? key : take(&memory, up(nk, BK) * W); /* the keys, for dq */
    rows_in(key, row(x->k, b, g, k), x->k.t, nk, K, P);
    rows_in(value, row(x->v, b, g, k), x->v.t, nk, K, P);
    if (summed != key && queries) keys_in(summed, row(x->k, b, g, k), x->k.t, nk, K, P);
    if (keys) {
        __builtin_memset(dk, 0, up(nk, ROWS) * P * sizeof(float));
        __builtin_memset(dv, 0, up(nk, ROWS) * P * sizeof(float));
    }
    for (long i = 0; i < BQ; i++) one[i] = 1;
    for (long head = h; head < h + nh; head++)
        for (long i = q; i < q + nq; i += BQ) {
            long n = least(BQ, q + nq - i), start = most(k, i - z->left), end = k + least(nk, up(most(0, i + n + z->right - k), MR));
            if (start < end) {
                transpose_in(qt, row(x->q, b, head, i), x->q.t, n, K, P, z->scale * LOG2E);
                transpose_in(gt, row(x->g, b, head, i), x->g.t, n, K, P, 1);
                if (keys) queries_in(gn, row(x->g, b, head, i), x->g.t, n, K, P);
                if (keys) queries_in(qn, row(x->q, b, head, i), x->q.t, n, K, P);
                row_products(row(x->g, b, head, i), x->g.t, row(x->out, b, head, i), x->out.t, n, K, delta);
                for (long t = 0; t < up(n, L); t++) {
                    float y = t < n ? *row_f(x->lse, b, head, i + t) * LOG2E : INF;
                    lse[t] = y == -INF ? INF : y; /* a query that sees nothing: no weights */
                    if (x->g_lse.at && t < n) delta[t] -= *row_f(x->g_lse, b, head, i + t);
                }
            }
            __builtin_memset(dq, 0, BQ * P * sizeof(float));
            start = k + (start - k) / BK * BK;
            for (long j = start; j < end; j += BK) {
                Block w = {i, n, j, least(BK, end - j)};
                scores(z, w, key + (j - k) * W, P, qt, z->scale * LOG2E, s);
                scores(z, w, value + (j - k) * W, P, gt, 1, d);
                weights_backward(z, b * z->H + head, w, s, d, lse, delta, keep);
                if (queries) to_queries(z, w, paired_keys(z, w, d, pairs), summed + (j - k) * W, P, dq, one);
                if (keys) {
                    to_keys(z, w, paired_queries(z, w, s), gn, P, dv + (j - k) * P);
                    to_keys(z, w, paired_queries(z, w, d), qn, P, dk + (j - k) * P);
                }
            }
            if (queries) queries_out(row(x->dq, b, head, i), x->dq.t, dq, n, K, P, 0, z->scale);
        }
    if (keys) {
        copy_out(row(x->dk, b, g, k), x->dk.t, dk, nk, K, P, 0, z->scale);
        copy_out(row(x->dv, b, g, k), x->dv.t, dv, nk, K, P, 0, 1);
    }
}

/* Where there are groups enough for the threads, each is one part, five products. Else one part for each block of
   queries and one for each block of keys, seven products. */
long attention_backward(const Shape *z, const Arrays *x) {
    long batch = z->q_starts ? z->sequences : z->B, threads = omp_get_max_threads(), failed = 0;
    long P = up(z->K, NUMBERS * L), groups = batch * z->G, heads = batch * z->H, share = z->H / z->G;
    int whole = groups >= 3 * threads || groups % threads == 0;
    long q_parts = up(z->T, BQ) / BQ, k_parts = up(z->S, BK) / BK;
    long parts = whole ? groups : heads * q_parts + groups * k_parts;
    long size = 4 * up(z->S, BK) * P + 5 * BQ * P + BK * (2 * BQ + BQ / 2 + L) + 3 * BQ + 17 * 16;
    #pragma omp parallel reduction(| : failed)
    {
        float *memory = aligned_alloc(64, size * sizeof(float));
        failed |= !memory;
        Tiles before = begin_products();
        #pragma omp for schedule(dynamic)
        for (long n = 0; n < parts; n++) {
            Shape own;
            Arrays own_x;
            if (!memory) continue;
            Ahead ahead = nothing_ahead(z, 5);
            Shape given = *z;
            given.ahead = &ahead;
            if (whole) {
                long b = sequence(&given, x, n / z->G, &own, &own_x), g = n % z->G, h = g * share;
                foresee(&ahead, own_x.dq, b, h, 0, own.T, 1);
                foresee(&ahead, own_x.dk, b, g, 0, own.S, 1);
                foresee(&ahead, own_x.dv, b, g, 0, own.S, 1);
                if (n + threads < parts) {
                    Shape then;
                    Arrays then_x;
                    long b = sequence(z, x, (n + threads) / z->G, &then, &then_x), g = (n + threads) % z->G, h = g * share;
                    foresee(&ahead, then_x.k, b, g, 0, then.S, 0);
                    foresee(&ahead, then_x.v, b, g, 0, then.S, 0);
                    foresee(&ahead, then_x.q, b, h, 0, then.T, 0);
                    foresee(&ahead, then_x.g, b, h, 0, then.T, 0);
                    foresee(&ahead, then_x.out, b, h, 0, then.T, 0);
                }
                backward_part(&own, &own_x, b, h, share, 0, own.T, 0, own.S, 1, 1, memory);
            } else if (n < heads * q_parts) {
                long head = n / q_parts, i = n % q_parts * BQ, b = sequence(&given, x, head / z->H, &own, &own_x);
                if (i < own.T) backward_part(&own, &own_x, b, head % z->H, 1, i, least(BQ, own.T - i), 0, own.S, 1, 0, memory);
            } else {
                long part = n - heads * q_parts, group = part / k_parts, i = part % k_parts * BK;
                long b = sequence(&given, x, group / z->G, &own, &own_x), h = group % z->G * share;
                if (i < own.S) backward_part(&own, &own_x, b, h, share, 0, own.T, i, least(BK, own.S - i), 0, 1, memory);
            }
        }
        end_products(before);
        free(memory);
    }
    return failed;
}
