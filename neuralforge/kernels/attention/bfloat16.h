/* Products of blocks of bfloat16 into float, where the CPU has instructions for them: AMX's tiles, or dot products of vectors.
   c[i][j] is the sum over k, and the two numbers of a cell (see cells.h), of a[i][k] b[k][j]. All three are row-major, and
   padded: sums to 16 cells, rows and columns to 16. */

#ifdef CELLS
#ifdef AMX
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
