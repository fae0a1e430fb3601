/* The tile of registers, MR x NR, by Intel's tiles (amx.h), which multiply bfloat16 and sum up in float. Floats are multiplied
   too, several times as fast as by vectors and no less accurately: each is the sum of TERMS numbers of bfloat16 of 8 bits,
   exactly, and of the nine products of terms the three below 2^-25 of the whole are left out (Henry, Tang & Heinecke 2019,
   https://doi.org/10.1109/ARITH.2019.00019). Infinities and NaN don't split, and products of great numbers may overflow: zeros
   are packed in their place, and add_special follows. Numbers below 2^-126 count as zero, and so do terms.

   Packed memory: panels of MR rows or NR columns, UNIT numbers of k at a time; of these the terms, largest first; of each
   term two tiles: of a, 16 rows of 16 cells; of b, 16 rows of cells of 16 columns. */

#ifdef AMX
#define MR 32
#define NR 32
#define UNIT 32
#ifdef BFLOAT16
#define TERMS 1
#else
#define TERMS 3
#endif
#define KC 384
#define MC 384
#define NC 1536
#define SLICES 1
#define GROUP 1

INLINE long cells_of(long k) { return parts(k, UNIT) * 16 * TERMS; }

/* `to` = `from`, if it isn't null, + a b over k cells of a row; rows of both are `from_down` and `to_down` apart. `narrow`:
   `to` is of bfloat16. Four tiles of sums leave two for a and two for b; each is loaded anew as soon as it has been read,
   to be there again one or two products later. Meanwhile the caches fetch part of the panel at `next`, and rows of `to`, one
   line after the other: all at once they would hold up the loads of tiles. */
static void registers(const cell *a, const cell *b, long k, const float *from, long from_down, void *to, long to_down,
                      long vectors, long narrow, const cell *next, const char *ahead, long ahead_down) {
    float wide[16 * NR] __attribute__((aligned(64)));
    const char *row = to;
    if (from) {
        LOAD(0, from, from_down);
        LOAD(1, from + 16, from_down);
        LOAD(2, from + 16 * from_down, from_down);
        LOAD(3, from + 16 * from_down + 16, from_down);
    } else {
        ZERO(0);
        ZERO(1);
        ZERO(2);
        ZERO(3);
    }
    /* Half a microsecond without an operation on vectors, and their units are switched off, the stores of tiles with them: it
       takes 0.2 us to have them back (measured on a Granite Rapids). */
    #define WAKE __asm__ volatile("vaddps %%zmm0, %%zmm0, %%zmm0" ::: "xmm0")
    #define FETCH_PANEL __builtin_prefetch(next, 0, 2); next += 16;
    #define FETCH_ROW __asm__ volatile("prefetchw (%0)\n\tprefetchw 64(%0)" :: "r"(row)); row += to_down * (narrow ? sizeof(stored) : 4);
    #define A_HIGH(term) LOAD(4, a + 512 * (term), 16)
    #define A_LOW(term) LOAD(5, a + 512 * (term) + 256, 16)
    #define B_LEFT(term) LOAD(6, b + 512 * (term), 16)
    #define B_RIGHT(term) LOAD(7, b + 512 * (term) + 256, 16)
    #define HIGH_LEFT MULTIPLY(0, 4, 6)
    #define HIGH_RIGHT MULTIPLY(1, 4, 7)
    #define LOW_LEFT MULTIPLY(2, 5, 6)
    #define LOW_RIGHT MULTIPLY(3, 5, 7)
    if (k) { A_HIGH(0); B_LEFT(TERMS - 1); A_LOW(0); B_RIGHT(TERMS - 1); }
    while (k) {
        WAKE;
#if TERMS == 3
        HIGH_LEFT; FETCH_PANEL LOW_LEFT; B_LEFT(1); HIGH_RIGHT; FETCH_PANEL LOW_RIGHT; B_RIGHT(1); FETCH_ROW
        HIGH_LEFT; FETCH_PANEL LOW_LEFT; HIGH_RIGHT; FETCH_PANEL A_HIGH(1); LOW_RIGHT; A_LOW(1);
        HIGH_LEFT; FETCH_PANEL HIGH_RIGHT; LOW_LEFT; FETCH_PANEL B_LEFT(0); LOW_RIGHT; B_RIGHT(0); FETCH_ROW
        HIGH_LEFT; FETCH_PANEL LOW_LEFT; HIGH_RIGHT; FETCH_PANEL A_HIGH(0); LOW_RIGHT; A_LOW(0);
        HIGH_LEFT; FETCH_PANEL HIGH_RIGHT; A_HIGH(2); LOW_LEFT; FETCH_PANEL LOW_RIGHT; A_LOW(2); FETCH_ROW
        FETCH_PANEL FETCH_PANEL
#else
        FETCH_PANEL FETCH_PANEL FETCH_PANEL FETCH_PANEL FETCH_ROW FETCH_ROW FETCH_ROW
#endif
        k -= 16 * TERMS;
        if (k) a += MR * 16 * TERMS, b += NR * 16 * TERMS;
        HIGH_LEFT; HIGH_RIGHT; A_HIGH(0); LOW_LEFT; B_LEFT(TERMS - 1); LOW_RIGHT; A_LOW(0); B_RIGHT(TERMS - 1);
    }
    if (!narrow) {
        float *c = to;
        STORE(0, c, to_down);
        STORE(1, c + 16, to_down);
        STORE(2, c + 16 * to_down, to_down);
        STORE(3, c + 16 * to_down + 16, to_down);
        return;
    }
    stored *c = to;
    STORE(0, wide, NR);
    STORE(1, wide + 16, NR);
    for (int i = 0; i < 16; i++, c += to_down) *(pairs_any *)c = round_two(load_f(wide + i * NR), load_f(wide + i * NR + 16));
    STORE(2, wide, NR);
    STORE(3, wide + 16, NR);
    for (int i = 0; i < 16; i++, c += to_down) *(pairs_any *)c = round_two(load_f(wide + i * NR), load_f(wide + i * NR + 16));
}

#ifdef BFLOAT16
INLINE int special(stored x) { return 0; }

/* A tile of `out`, from n vectors, `apart` each other, of k numbers, `step` apart; its rows are vectors, or pairs of k. */
INLINE int pack_tile(const int by_k, const stored *x, long apart, long step, long n, long k, cell *out) {
    stored part[16 * UNIT];
    if (step != 1 && apart != 1) {
        for (long i = 0; i < n; i++)
            for (long j = 0; j < k; j++) part[i * UNIT + j] = x[i * apart + j * step];
        x = part, apart = UNIT, step = 1;
    }
    if (step == 1 && by_k) transpose_cells(out, 16, x, apart, n, k, UNIT);
    else if (step == 1) cells_in(out, x, apart, n, 16, k, UNIT);
    else if (by_k) pairs_in(out, x, step, k, UNIT, n, 16);
    else transpose_pairs(out, x, step, k, UNIT, n, 16);
    return 0;
}
#else
INLINE words bits_of(f x) { return (words)x & 0x7fffffff; }
#define GREAT 0x5b800000u /* 2^56: of greater numbers, terms of either sign may overflow where their sum doesn't */
INLINE int special(stored x) { unsigned w; __builtin_memcpy(&w, &x, 4); return (w & 0x7fffffff) >= GREAT; }

/* A row of the tile of each term: cells of `even` and `odd` numbers. Rounding halves away from zero loses nothing: what is
   left after two terms has 8 bits. */
INLINE void split(f even, f odd, cell *out) {
    #pragma GCC unroll 3
    for (int term = 0; term < TERMS; term++, out += 512) {
        words x = ((words)even + 0x8000) & 0xffff0000, y = ((words)odd + 0x8000) & 0xffff0000;
        *(words *)out = x >> 16 | y;
        even -= (f)x, odd -= (f)y;
    }
}

INLINE f either(f x, f y, const int odd) {
    return odd ? __builtin_shuffle(x, y, (b){1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31})
               : __builtin_shuffle(x, y, (b){0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30});
}

INLINE int pack_tile(const int by_k, const stored *x, long apart, long step, long n, long k, cell *out) {
    stored part[16 * UNIT];
    f even[16], odd[16];
    if (n < 16 || k < UNIT || step != 1 && apart != 1) {
        for (long i = 0; i < 16; i++)
            for (long j = 0; j < UNIT; j++) part[i * UNIT + j] = i < n && j < k ? x[i * apart + j * step] : 0;
        x = part, apart = UNIT, step = 1;
    }
    if (step == 1) {
        for (int i = 0; i < 16; i++) {
            __builtin_prefetch(x + i * apart + UNIT), __builtin_prefetch(x + i * apart + UNIT + 16);
            f low = load_f(x + i * apart), high = load_f(x + i * apart + L);
            even[i] = either(low, high, 0), odd[i] = either(low, high, 1);
        }
    } else
        for (int i = 0; i < 16; i++) {
            __builtin_prefetch(x + (UNIT + 2 * i) * step), __builtin_prefetch(x + (UNIT + 2 * i + 1) * step);
            even[i] = load_f(x + 2 * i * step), odd[i] = load_f(x + (2 * i + 1) * step);
        }
    words large = {}; /* the highest bit tells */
    for (int i = 0; i < 16; i++) large |= (bits_of(even[i]) + (0x80000000u - GREAT)) | (bits_of(odd[i]) + (0x80000000u - GREAT));
    int found = 0;
    for (int i = 0; i < 16; i++) found |= large[i] >> 31;
    for (int i = 0; found && i < 16; i++) {
        even[i] = (f)((words)even[i] & (words)(bits_of(even[i]) < GREAT));
        odd[i] = (f)((words)odd[i] & (words)(bits_of(odd[i]) < GREAT));
    }
    if ((step == 1) == by_k) transpose(even), transpose(odd);
    for (int i = 0; i < 16; i++) split(even[i], odd[i], out + 16 * i);
    return found;
}
#endif

INLINE int pack_panels(const int by_k, const stored *x, long apart, long step, long count, long k, long depth, cell *out) {
    int found = 0;
    unsigned control = __builtin_ia32_stmxcsr();
    __builtin_ia32_ldmxcsr(control | 0x8040); /* terms below the normal numbers: zero at once, which is quicker */
    long panels = parts(count, 32), units = parts(k, UNIT);
    for (long turn = 0; turn < panels * units; turn++) { /* along the rows that are in memory */
        long i = 32 * (step == 1 ? turn / units : turn % panels), j = UNIT * (step == 1 ? turn % units : turn / panels);
        for (int half = 0; half < 2; half++, i += 16)
            found |= pack_tile(by_k, x + i * apart + j * step, apart, step, most(0, least(16, count - i)), least(UNIT, k - j),
                               out + i / 32 * 32 * depth + cells_of(j) * 32 + 256 * half);
    }
    __builtin_ia32_ldmxcsr(control);
    return found;
}

/* `count` vectors, `apart` each other, of k numbers, `step` apart, into panels `depth` cells deep, of which these are a part.
   Are there special numbers among them? */
static int pack_a(const stored *x, long apart, long step, long count, long k, long depth, cell *out) {
    return pack_panels(0, x, apart, step, count, k, depth, out);
}
static int pack_b(const stored *x, long apart, long step, long count, long k, long depth, cell *out) {
    return pack_panels(1, x, apart, step, count, k, depth, out);
}
#endif
