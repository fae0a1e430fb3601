/* A square of vectors, transposed; whole numbers. */

#define FROM(j, s) ((j) & (s) ? (j) - (s) + L : (j))
#define ABOVE(j, s) ((j) & (s) ? (j) + L : (j) + (s))
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
