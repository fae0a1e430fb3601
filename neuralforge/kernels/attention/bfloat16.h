/* Blocks of bfloat16 and their products into float, where the CPU has instructions for them: AMX's tiles, or dot products
   of vectors.

   A cell is two neighbours along the sum of a product: c[i][j] is the sum over k, and the two numbers of a cell, of
   a[i][k] b[k][j]. All three are row-major, so that rows of numbers are rows of cells as they are, their transpose is that
   of cells, and where the sum runs over rows, cells are pairs of rows. Blocks are padded with zeros: sums to 16 cells,
   rows and columns to 16. */

#if defined(AMX) || defined(BFLOAT16_DOT)
#define CELLS

typedef unsigned cell;
typedef words cells __attribute__((aligned(2), may_alias)); /* as rows of numbers may be */
typedef unsigned short pairs __attribute__((vector_size(L * 4)));
typedef halves half_cells __attribute__((aligned(2), may_alias));

/* The next L cells of a row of which n numbers are left, and the next L pairs of two rows. */
INLINE words load_cells(const unsigned short *p, long n) {
    words x = {};
    if (n >= 2 * L) return *(const cells *)p;
    if (n > 0) __builtin_memcpy(&x, p, n * sizeof *p);
    return x;
}
INLINE words load_pairs(const unsigned short *even, const unsigned short *odd, long n) {
    f x = n >= L ? load_bf(even) : load_some_bf(even, n), y = {};
    if (odd) y = n >= L ? load_bf(odd) : load_some_bf(odd, n);
    return (words)x >> 16 | (words)y;
}

/* Rows [n][K], `step` apart, as [rows][P / 2], zero where there is nothing. */
static void cells_in(cell *to, const unsigned short *from, long step, long n, long rows, long K, long P) {
    for (long t = 0; t < rows; t++, to += P / 2, from += step)
        for (long i = 0; i < P / 2; i += L) *(cells *)(to + i) = t < n ? load_cells(from + 2 * i, K - 2 * i) : (words){};
}

/* As [P / 2][width], columns up to whole vectors. */
static void transpose_cells(cell *to, long width, const unsigned short *from, long step, long n, long K, long P) {
    for (long t = 0; t < n; t += L)
        for (long i = 0; i < P / 2; i += L) {
            f x[L];
            #pragma GCC unroll 16
            for (long j = 0; j < L; j++) x[j] = t + j < n ? (f)load_cells(from + (t + j) * step + 2 * i, K - 2 * i) : SET_f(0);
            transpose(x);
            #pragma GCC unroll 16
            for (long j = 0; j < L; j++) *(cells *)(to + (i + j) * width + t) = (words)x[j];
        }
}

/* Pairs of rows as [rows / 2][P]. */
static void pairs_in(cell *to, const unsigned short *from, long step, long n, long rows, long K, long P) {
    for (long t = 0; t < rows; t += 2, to += P, from += 2 * step)
        for (long i = 0; i < P; i += L)
            *(cells *)(to + i) = t < n ? load_pairs(from + i, t + 1 < n ? from + step + i : 0, K - i) : (words){};
}

/* Pairs of rows as [P][rows / 2]. */
static void transpose_pairs(cell *to, const unsigned short *from, long step, long n, long rows, long K, long P) {
    for (long t = 0; t < rows; t += 2 * L)
        for (long i = 0; i < P; i += L) {
            f x[L];
            #pragma GCC unroll 16
            for (long j = 0; j < L; j++) {
                const unsigned short *row = from + (t + 2 * j) * step + i;
                x[j] = t + 2 * j < n ? (f)load_pairs(row, t + 2 * j + 1 < n ? row + step : 0, K - i) : SET_f(0);
            }
            transpose(x);
            #pragma GCC unroll 16
            for (long j = 0; j < L; j++) *(cells *)(to + (i + j) * (rows / 2) + t / 2) = (words)x[j];
        }
}

/* Rounded to bfloat16: L numbers of x, then L of y. What is below the normal numbers becomes zero. */
INLINE pairs round_two(f x, f y) {
    pairs z;
    __asm__("vcvtne2ps2bf16 %1, %2, %0" : "=v"(z) : "v"(x), "v"(y));
    return z;
}
INLINE pairs interleave(pairs z) {
    return __builtin_shuffle(z, (pairs){0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                                        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31});
}

/* Pairs of rows of floats; rows of cells, in place of the floats they are made of. */
INLINE void store_pairs(cell *to, f even, f odd) { *(cells *)to = (words)interleave(round_two(even, odd)); }
INLINE void store_row(void *row, long j, f x) {
    halves h;
    __asm__("vcvtneps2bf16 %1, %0" : "=v"(h) : "v"(x));
    *(half_cells *)((unsigned short *)row + j) = h;
}

#ifdef AMX
/* Programming: https://www.intel.com/content/www/us/en/developer/articles/code-sample/advanced-matrix-extensions-intrinsics-functions.html
   A tile is 16 rows of 64 bytes. A thread's configuration may be another library's: it is put back after use. */
typedef struct { unsigned char palette, start[15]; unsigned short bytes[16]; unsigned char rows[16]; } Tiles;

INLINE Tiles begin_products(void) {
    Tiles before, own = {.palette = 1};
    for (int i = 0; i < 8; i++) own.bytes[i] = 64, own.rows[i] = 16;
    __asm__ volatile("sttilecfg %0" : "=m"(before));
    __asm__ volatile("ldtilecfg %0" :: "m"(own));
    return before;
}
INLINE void end_products(Tiles before) { __asm__ volatile("ldtilecfg %0" :: "m"(before)); }

#define ZERO(t) __asm__ volatile("tilezero %%tmm" #t ::: "memory")
#define LOAD(t, p, step) __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #t :: "r"(p), "r"((step) * 4) : "memory")
#define STORE(t, p, step) __asm__ volatile("tilestored %%tmm" #t ", (%0,%1,1)" :: "r"(p), "r"((step) * 4) : "memory")
#define MULTIPLY(c, a, b) __asm__ volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c ::: "memory")

/* `down` times `across` tiles of c, 1 or 2 each. */
INLINE void tiles(const int down, const int across, long n, const cell *a, long lda, const cell *b, long ldb, float *c, long ldc,
                  int add) {
    float *low = c + 16 * ldc;
    if (add) {
        LOAD(0, c, ldc);
        if (across > 1) LOAD(1, c + 16, ldc);
        if (down > 1) LOAD(2, low, ldc);
        if (down > 1 && across > 1) LOAD(3, low + 16, ldc);
    } else {
        ZERO(0);
        ZERO(1);
        ZERO(2);
        ZERO(3);
    }
    for (long k = 0; k < n; k += 16) {
        LOAD(4, a + k, lda);
        LOAD(6, b + k * ldb, ldb);
        MULTIPLY(0, 4, 6);
        if (across > 1) { LOAD(7, b + k * ldb + 16, ldb); MULTIPLY(1, 4, 7); }
        if (down > 1) { LOAD(5, a + 16 * lda + k, lda); MULTIPLY(2, 5, 6); }
        if (down > 1 && across > 1) MULTIPLY(3, 5, 7);
    }
    STORE(0, c, ldc);
    if (across > 1) STORE(1, c + 16, ldc);
    if (down > 1) STORE(2, low, ldc);
    if (down > 1 && across > 1) STORE(3, low + 16, ldc);
}

/* c[rows][width] = a . b, sums of n cells, or c += if `add`. */
static void cell_product(long rows, long width, long n, const cell *a, long lda, const cell *b, long ldb, float *c, long ldc,
                         int add) {
    for (long i = 0; i < rows; i += 32, a += 32 * lda, c += 32 * ldc)
        for (long j = 0; j < width; j += 32)
            if (rows - i >= 32 && width - j >= 32) tiles(2, 2, n, a, lda, b + j, ldb, c + j, ldc, add);
            else if (rows - i >= 32) tiles(2, 1, n, a, lda, b + j, ldb, c + j, ldc, add);
            else if (width - j >= 32) tiles(1, 2, n, a, lda, b + j, ldb, c + j, ldc, add);
            else tiles(1, 1, n, a, lda, b + j, ldb, c + j, ldc, add);
}
#else
typedef int Tiles;
INLINE Tiles begin_products(void) { return 0; }
INLINE void end_products(Tiles before) { (void)before; }

/* 4 rows of c, N vectors wide. */
INLINE void dots(const int N, long n, const cell *a, long lda, const cell *b, long ldb, float *c, long ldc, int add) {
    f x[4][4];
    #pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        #pragma GCC unroll 4
        for (int j = 0; j < N; j++) x[i][j] = add ? load_f(c + i * ldc + j * L) : SET_f(0);
    for (long k = 0; k < n; k++, b += ldb) {
        #pragma GCC unroll 4
        for (int j = 0; j < N; j++) {
            words y = *(const cells *)(b + j * L);
            #pragma GCC unroll 4
            for (int i = 0; i < 4; i++)
                __asm__("vdpbf16ps %1%{1to16%}, %2, %0" : "+v"(x[i][j]) : "m"(a[i * lda + k]), "v"(y));
        }
    }
    #pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        #pragma GCC unroll 4
        for (int j = 0; j < N; j++) store_f(c + i * ldc + j * L, x[i][j]);
}

/* c[rows][width] = a . b, sums of n cells, or c += if `add`. */
static void cell_product(long rows, long width, long n, const cell *a, long lda, const cell *b, long ldb, float *c, long ldc,
                         int add) {
    for (long i = 0; i < rows; i += 4, a += 4 * lda, c += 4 * ldc)
        for (long j = 0; j < width; j += 4 * L)
            switch (width - j >= 4 * L ? 4 : (width - j) / L) {
            case 4: dots(4, n, a, lda, b + j, ldb, c + j, ldc, add); break;
            case 3: dots(3, n, a, lda, b + j, ldb, c + j, ldc, add); break;
            case 2: dots(2, n, a, lda, b + j, ldb, c + j, ldc, add); break;
            case 1: dots(1, n, a, lda, b + j, ldb, c + j, ldc, add);
            }
}
#endif
#endif
