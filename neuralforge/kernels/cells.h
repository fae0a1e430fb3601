/* Numbers of bfloat16 in cells: two neighbours along the sum of a product, as the CPU's instructions for such products take
   them. Rows of numbers are rows of cells as they are, their transpose is that of cells, and where the sum runs over rows,
   cells are pairs of rows. Blocks are padded with zeros. */

#if defined(AMX) || defined(BFLOAT16_DOT) && defined(BFLOAT16)
#define CELLS

typedef unsigned cell;
typedef words cells __attribute__((aligned(2), may_alias)); /* as rows of numbers may be */
typedef unsigned short pairs __attribute__((vector_size(L * 4)));
typedef pairs pairs_any __attribute__((aligned(2), may_alias));
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
#endif
