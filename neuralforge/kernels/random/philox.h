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

