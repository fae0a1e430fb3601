/* A square of vectors, transposed; whole numbers. */

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
