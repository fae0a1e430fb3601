/* The tile of registers, MR x NR, by vectors of multiply-adds, and its operands' form in packed memory: panels of MR rows of
   a, or NR columns of b, first the first cells of all of them, then their second, ... A cell is what one lane multiplies
   and adds at once: a float, or two bfloat16 that are neighbours along k, for the dot product of pairs. Where the CPU has no
   fast one, bfloat16 is widened as it is packed. The loop over k is in assembly: compilers spill accumulators to memory. */

#ifndef AMX
#if defined(BFLOAT16) && defined(BFLOAT16_DOT)
#define PAIRS
#define UNIT 2
#define MULTIPLY "vdpbf16ps "
INLINE cell cell_at(const stored *x, long step, long k) { return k > 1 ? x[0] | (cell)x[step] << 16 : x[0]; }
#else
typedef float cell;
#define UNIT 1
#define MULTIPLY "vfmadd231ps "
INLINE cell cell_at(const stored *x, long step, long k) { return as_float(*x); }
#ifdef BFLOAT16
#define ROUNDED_LATER
#endif
#endif

#if defined(__AVX512F__)
#define MR 14
#define REG(n) "%%zmm" #n
#define ROWS(DO) DO(0, 0, 1) DO(1, 2, 3) DO(2, 4, 5) DO(3, 6, 7) DO(4, 8, 9) DO(5, 10, 11) DO(6, 12, 13) \
    DO(7, 14, 15) DO(8, 16, 17) DO(9, 18, 19) DO(10, 20, 21) DO(11, 22, 23) DO(12, 24, 25) DO(13, 26, 27)
#define B_LOW "%%zmm28"
#define B_HIGH "%%zmm29"
#define EVEN "%%zmm30"
#define ZERO(n) "vpxord " REG(n) ", " REG(n) ", " REG(n) "\n\t"
#define WIDTH "64"
#define PANEL_A "56"
#define PANEL_B "128"
#define CLOBBERED "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", \
    "xmm12", "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23", \
    "xmm24", "xmm25", "xmm26", "xmm27", "xmm28", "xmm29", "xmm30", "xmm31"
#elif defined(__AVX2__)
#define MR 6
#define REG(n) "%%ymm" #n
#define ROWS(DO) DO(0, 0, 1) DO(1, 2, 3) DO(2, 4, 5) DO(3, 6, 7) DO(4, 8, 9) DO(5, 10, 11)
#define B_LOW "%%ymm12"
#define B_HIGH "%%ymm13"
#define EVEN "%%ymm14"
#define ZERO(n) "vpxor " REG(n) ", " REG(n) ", " REG(n) "\n\t"
#define WIDTH "32"
#define PANEL_A "24"
#define PANEL_B "64"
#define CLOBBERED "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", \
    "xmm12", "xmm13", "xmm14", "xmm15"
#else
#define MR 4
#endif
#define NR (2 * L)

#define KC (384 * UNIT)            /* of k at once: a panel of B stays in the L1 cache, */
#define MC (112 / MR * MR)         /* rows of a tile: its part of A in the L2 cache, */
#define NC 768                     /* and columns. */
#define SLICES 3                   /* of a block of B, packed by one thread at once */
#define GROUP 4                    /* of so many panels */

/* Cells that hold k numbers of a row or a column. */
INLINE long cells_of(long k) { return parts(k, UNIT); }

typedef int Tiles;
INLINE Tiles begin_products(void) { return 0; }
INLINE void end_products(Tiles before) { (void)before; }

/* A tile of registers, MR x NR: `to` = `from` + a b over k cells; `from`, which may be null for zeros, and `to` have their
   rows `from_down` and `to_down` apart. `narrow`: `to` is of bfloat16 (not where that is ROUNDED_LATER). Meanwhile the caches fetch, for later: part of the
   next panel of b, rows of `to`, and two lines each of as many rows of A, `ahead_down` bytes apart. All of it is spread over
   the loop: with a dozen lines under way a core waits. */
#ifdef ROWS
#define STEP_ROW(at, i, low, high) \
    "vbroadcastss " at "*" PANEL_A "+4*" #i "(%[a]), " EVEN "\n\t" \
    MULTIPLY EVEN ", " B_LOW ", " REG(low) "\n\t" MULTIPLY EVEN ", " B_HIGH ", " REG(high) "\n\t"
#define STEP0(i, low, high) STEP_ROW("0", i, low, high)
#define STEP1(i, low, high) STEP_ROW("1", i, low, high)
#define STEP2(i, low, high) STEP_ROW("2", i, low, high)
#define STEP3(i, low, high) STEP_ROW("3", i, low, high)
#define STEP(at) "vmovups " #at "*" PANEL_B "(%[b]), " B_LOW "\n\tvmovups " #at "*" PANEL_B "+" WIDTH "(%[b]), " B_HIGH "\n\t" ROWS(STEP##at)
#define CLEAR(i, low, high) ZERO(low) ZERO(high)
#define FETCH_ROW "prefetcht0 (%[p])\n\tprefetcht0 " PANEL_B "-4(%[p])\n\tadd %[to_down], %[p]\n\t" \
    "prefetcht1 (%[ahead])\n\tprefetcht1 64(%[ahead])\n\tadd %[ahead_down], %[ahead]\n\t"
#define FETCH_PANEL "prefetcht1 (%[next])\n\tadd $64, %[next]\n\t"
#define ADD(i, low, high) "vaddps (%[p]), " REG(low) ", " REG(low) "\n\tvaddps " WIDTH "(%[p]), " REG(high) ", " REG(high) "\n\tadd %[from_down], %[p]\n\t"
#define STORE(i, low, high) "vmovups " REG(low) ", (%[p])\n\tvmovups " REG(high) ", " WIDTH "(%[p])\n\tadd %[to_down], %[p]\n\t"
#ifdef PAIRS
#define NARROW(i, low, high) "vcvtne2ps2bf16 " REG(low) ", " REG(high) ", " EVEN "\n\tvmovups " EVEN ", (%[p])\n\tadd %[to_down], %[p]\n\t"
#define STORE_NARROW "test %[narrow], %[narrow]\n\tjz 6f\n\t" ROWS(NARROW) "jmp 7f\n6:\n\t"
#else
#define STORE_NARROW
#endif
static void registers(const cell *a, const cell *b, long k, const float *from, long from_down, void *to, long to_down,
                      long narrow, const cell *next, const char *ahead, long ahead_down) {
    long fours = k / 4, rest = k % 4, every = fours / MR + 1, wait = 1;
    void *p = to;
    __asm__ volatile(
        ROWS(CLEAR)
        "test %[fours], %[fours]\n\tjz 2f\n\t"
        ".p2align 4\n1:\n\tdec %[wait]\n\tjnz 8f\n\t" FETCH_ROW "mov %[every], %[wait]\n8:\n\t" FETCH_PANEL
        STEP(0) STEP(1) STEP(2) STEP(3)
        "add $4*" PANEL_A ", %[a]\n\tadd $4*" PANEL_B ", %[b]\n\tdec %[fours]\n\tjnz 1b\n"
        "2:\n\tmov %[rest], %[fours]\n\ttest %[fours], %[fours]\n\tjz 4f\n"
        "3:\n\t" STEP(0) "add $" PANEL_A ", %[a]\n\tadd $" PANEL_B ", %[b]\n\tdec %[fours]\n\tjnz 3b\n"
        "4:\n\tmov %[from], %[p]\n\ttest %[p], %[p]\n\tjz 5f\n\t" ROWS(ADD)
        "5:\n\tmov %[to], %[p]\n\t" STORE_NARROW ROWS(STORE) "7:\n\t"
        : [a] "+&r"(a), [b] "+&r"(b), [fours] "+&r"(fours), [p] "+&r"(p), [next] "+&r"(next), [ahead] "+&r"(ahead),
          [wait] "+&r"(wait)
        : [rest] "m"(rest), [every] "m"(every), [ahead_down] "m"(ahead_down), [from] "m"(from), [to] "m"(to),
          [from_down] "r"(from_down * 4), [to_down] "r"(to_down * (narrow ? 2 : 4)), [narrow] "r"(narrow)
        : "memory", "cc", CLOBBERED);
}
#else
static void registers(const cell *a, const cell *b, long k, const float *from, long from_down, void *to, long to_down,
                      long narrow, const cell *next, const char *ahead, long ahead_down) {
    f sum[MR][2] = {};
    for (; k--; a += MR, b += NR) {
        f low = load_f(b), high = load_f(b + L);
        #pragma GCC unroll 4
        for (int i = 0; i < MR; i++) sum[i][0] += a[i] * low, sum[i][1] += a[i] * high;
    }
    float *c = to;
    #pragma GCC unroll 4
    for (int i = 0; i < MR; i++, c += to_down, from += from ? from_down : 0) {
        store_f(c, from ? load_f(from) + sum[i][0] : sum[i][0]);
        store_f(c + L, from ? load_f(from + L) + sum[i][1] : sum[i][1]);
    }
}
#endif

/* `n` vectors, `apart` each other, each of k neighbours, into a panel of `width`: squares transposed in registers. Of fewer than L
   the last is taken again; what is too much of a row is written over by the next one, but for the last of a square. */
#ifdef PAIRS
typedef f f_stored __attribute__((aligned(sizeof(stored)), may_alias));
INLINE f load_row(const stored *x) { return *(const f_stored *)x; }
#else
INLINE f load_row(const stored *x) { return STORED(load)(x); }
#endif
INLINE void pack_square(const stored *x, long apart, const long n, long k, const long width, cell *out) {
    for (; k >= L * UNIT; k -= L * UNIT, x += L * UNIT, out += L * width) {
        f v[L];
        #pragma GCC unroll 16
        for (long j = 0; j < L; j++) v[j] = load_row(x + least(j, n - 1) * apart);
        transpose(v);
        #pragma GCC unroll 16
        for (long j = 0; j < L - 1; j++) store_f((float *)(out + j * width), v[j]);
        __builtin_memcpy(out + (L - 1) * width, &v[L - 1], n * sizeof *out);
    }
    for (; k > 0; k -= UNIT, x += UNIT, out += width)
        for (long j = 0; j < n; j++) out[j] = cell_at(x + j * apart, 1, k);
}

/* Cells that lie along the rows of memory, `width` of them. */
INLINE void pack_row(const stored *x, long step, long k, long width, cell *out) {
#if defined(PAIRS)
    typedef stored eight __attribute__((vector_size(16)));
    typedef stored eight_any __attribute__((vector_size(16), aligned(2)));
    #define ZIP(x, y, i) __builtin_shuffle(x, y, (eight){i, 8 + i, 1 + i, 9 + i, 2 + i, 10 + i, 3 + i, 11 + i})
    for (long l = 0; l < width; l += 8) {
        long at = least(l, width - 8); /* the last eight may overlap */
        eight even = *(eight_any *)(x + at), odd = {};
        if (k > 1) odd = *(eight_any *)(x + step + at);
        *(eight_any *)(out + at) = ZIP(even, odd, 0);
        *(eight_any *)(out + at + 4) = ZIP(even, odd, 4);
    }
#elif defined(BFLOAT16)
    typedef stored four __attribute__((vector_size(8)));
    typedef unsigned wide __attribute__((vector_size(16)));
    typedef four four_any __attribute__((aligned(2), may_alias));
    typedef wide wide_any __attribute__((aligned(4), may_alias));
    for (long l = 0; width % L == 0 && l < width; l += L) store_f(out + l, load_bf(x + l));
    for (long l = 0; width % L && l < width; l += 4) {
        long at = least(l, width - 4); /* the last four may overlap */
        *(wide_any *)(out + at) = __builtin_convertvector(*(const four_any *)(x + at), wide) << 16;
    }
#else
    __builtin_memcpy(out, x, width * sizeof *out);
#endif
}

/* `count` vectors, `apart` each other, their elements `step` apart, into panels of `width`: first the first cells of
   `width` vectors, then their second, ... up to k numbers. Panels are `depth` cells deep, of which these are a part. The
   last panel is filled up with zeros, and so is the last cell. */
INLINE void pack_panels(const stored *x, long apart, long step, long count, long k, long width, long depth, cell *out) {
    long whole = count / width * width, n = count - whole;
    if (apart == 1)
        for (long j = 0; j < k; j += UNIT) {
            for (long r = 0; r < UNIT; r++)
                for (long i = 0; i < whole; i += 64 / sizeof *x) __builtin_prefetch(x + (j + r + 8 * UNIT) * step + i);
            for (long i = 0; i < whole; i += width)
                pack_row(x + j * step + i, step, k - j, width, out + i * depth + j / UNIT * width);
        }
    else
        for (long i = 0; i < whole; i += width) {
            const stored *from = x + i * apart;
            cell *to = out + i * depth;
            if (step == 1)
                for (long l = 0; l < width; l += L) pack_square(from + l * apart, apart, least(L, width - l), k, width, to + l);
            else
                for (long j = 0; j < k; j += UNIT, to += width)
                    for (long l = 0; l < width; l++) to[l] = cell_at(from + l * apart + j * step, step, k - j);
        }
    out += whole * depth;
    for (long j = 0; n && j < k; j += UNIT, out += width)
        for (long l = 0; l < width; l++)
            out[l] = l < n ? cell_at(x + (whole + l) * apart + j * step, step, k - j) : (cell){0};
}

/* The same for a and for b. They leave no numbers out. */
INLINE int special(stored x) { return 0; }
INLINE int pack_a(const stored *x, long apart, long step, long count, long k, long depth, cell *out) {
    pack_panels(x, apart, step, count, k, MR, depth, out);
    return 0;
}
INLINE int pack_b(const stored *x, long apart, long step, long count, long k, long depth, cell *out) {
    pack_panels(x, apart, step, count, k, NR, depth, out);
    return 0;
}
#endif
