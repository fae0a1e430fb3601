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

/* As many sums as there are registers for, in rows of three vectors, of which a step takes 11 loads for 24 multiplications (7 for
   12). 14 rows of two vectors take 16 for 28: as fast on a core of one's own, but 7 to 9 % slower where a neighbour has half of
   its loads, as on most rented machines. */
#if defined(__AVX512F__)
#define MR 8
#define REG(n) "%%zmm" #n
#define ROWS(DO) DO(0, 0, 1, 2) DO(1, 3, 4, 5) DO(2, 6, 7, 8) DO(3, 9, 10, 11) DO(4, 12, 13, 14) DO(5, 15, 16, 17) DO(6, 18, 19, 20) DO(7, 21, 22, 23)
#define B_LEFT "%%zmm24"
#define B_MIDDLE "%%zmm25"
#define B_RIGHT "%%zmm26"
#define EVEN "%%zmm27"
#define EVEN_HALF "%%ymm27"
#define ZERO(n) "vpxord " REG(n) ", " REG(n) ", " REG(n) "\n\t"
#define VECTOR "64"
#define PANEL_A "32"
#define PANEL_B "192"
#define LINES(FETCH) FETCH("0") FETCH("64") FETCH("128") FETCH("188")
#define CLOBBERED "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", \
    "xmm12", "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23", \
    "xmm24", "xmm25", "xmm26", "xmm27"
#elif defined(__AVX2__)
#define MR 4
#define REG(n) "%%ymm" #n
#define ROWS(DO) DO(0, 0, 1, 2) DO(1, 3, 4, 5) DO(2, 6, 7, 8) DO(3, 9, 10, 11)
#define B_LEFT "%%ymm12"
#define B_MIDDLE "%%ymm13"
#define B_RIGHT "%%ymm14"
#define EVEN "%%ymm15"
#define ZERO(n) "vpxor " REG(n) ", " REG(n) ", " REG(n) "\n\t"
#define VECTOR "32"
#define PANEL_A "16"
#define PANEL_B "96"
#define LINES(FETCH) FETCH("0") FETCH("64") FETCH("92")
#define CLOBBERED "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", \
    "xmm12", "xmm13", "xmm14", "xmm15"
#else
#define MR 4
#endif
#define NR (3 * L)

#if L == 16
#define ZIP_LOW(x, y) __builtin_shuffle(x, y, (b){0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23})
#define ZIP_HIGH(x, y) __builtin_shuffle(x, y, (b){8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31})
#elif L == 8
#define ZIP_LOW(x, y) __builtin_shuffle(x, y, (b){0, 8, 1, 9, 2, 10, 3, 11})
#define ZIP_HIGH(x, y) __builtin_shuffle(x, y, (b){4, 12, 5, 13, 6, 14, 7, 15})
#else
#define ZIP_LOW(x, y) __builtin_shuffle(x, y, (b){0, 4, 1, 5})
#define ZIP_HIGH(x, y) __builtin_shuffle(x, y, (b){2, 6, 3, 7})
#endif

#define KC (384 * UNIT)            /* of k at once: panels of A and B in the L1 cache, or so, */
#define MC 112                     /* rows of a tile: its part of A in the L2 cache, */
#define NC 1536                    /* and columns. */
#define SLICES 3                   /* of a block of B, packed by one thread at once */
#define GROUP 4                    /* of so many panels */
#define TOGETHER 8                 /* rows of memory that are packed into one panel, and then the next */

/* Cells that hold k numbers of a row or a column. */
INLINE long cells_of(long k) { return parts(k, UNIT); }

typedef int Tiles;
INLINE Tiles begin_products(void) { return 0; }
INLINE void end_products(Tiles before) { (void)before; }

/* A tile of registers, MR x NR: `to` = `from` + a b over k cells; `from`, which may be null for zeros, and `to` have their
   rows `from_down` and `to_down` apart. Only the first `vectors` of b's three count. `narrow`: `to` is of bfloat16, unless that is
   ROUNDED_LATER. Meanwhile the caches fetch, for later: part of the next panel of b, rows of `to`, and two lines each of as many
   rows of A, `ahead_down` bytes apart. All of it is spread over the loop: with a dozen lines under way a core waits. */
#ifdef ROWS
#define LOAD(at, n, b) "vmovups " at "*" PANEL_B "+" #n "*" VECTOR "(%[b]), " b "\n\t"
#define BY(b, sum) MULTIPLY EVEN ", " b ", " REG(sum) "\n\t"
#define ROW(at, i, MULTIPLIED) "vbroadcastss " at "*" PANEL_A "+4*" #i "(%[a]), " EVEN "\n\t" MULTIPLIED
#define ROW_OF_THREE(at, i, left, middle, right) ROW(at, i, BY(B_LEFT, left) BY(B_MIDDLE, middle) BY(B_RIGHT, right))
#define ROW0(i, left, middle, right) ROW_OF_THREE("0", i, left, middle, right)
#define ROW1(i, left, middle, right) ROW_OF_THREE("1", i, left, middle, right)
#define ROW2(i, left, middle, right) ROW_OF_THREE("2", i, left, middle, right)
#define ROW3(i, left, middle, right) ROW_OF_THREE("3", i, left, middle, right)
#define STEP(at) LOAD(#at, 0, B_LEFT) LOAD(#at, 1, B_MIDDLE) LOAD(#at, 2, B_RIGHT) ROWS(ROW##at)
#define ROW_OF_TWO(i, left, middle, right) ROW("0", i, BY(B_LEFT, left) BY(B_MIDDLE, middle))
#define ROW_OF_ONE(i, left, middle, right) ROW("0", i, BY(B_LEFT, left))
#define NEXT(steps) "add $" #steps "*" PANEL_A ", %[a]\n\tadd $" #steps "*" PANEL_B ", %[b]\n\tdec %[count]\n\t"
#define CLEAR(i, left, middle, right) ZERO(left) ZERO(middle) ZERO(right)
#define FETCH_LINE(at) "prefetcht0 " at "(%[p])\n\t"
#define FETCH_ROW LINES(FETCH_LINE) "add %[to_down], %[p]\n\t" \
    "prefetcht1 (%[ahead])\n\tprefetcht1 64(%[ahead])\n\tadd %[ahead_down], %[ahead]\n\t"
#define FETCH_PANEL "prefetcht1 (%[next])\n\tadd $64, %[next]\n\t"
#define ADD(i, left, middle, right) "vaddps (%[p]), " REG(left) ", " REG(left) "\n\tvaddps " VECTOR "(%[p]), " REG(middle) ", " REG(middle) "\n\t" \
    "vaddps 2*" VECTOR "(%[p]), " REG(right) ", " REG(right) "\n\tadd %[from_down], %[p]\n\t"
#define STORE(i, left, middle, right) "vmovups " REG(left) ", (%[p])\n\tvmovups " REG(middle) ", " VECTOR "(%[p])\n\t" \
    "vmovups " REG(right) ", 2*" VECTOR "(%[p])\n\tadd %[to_down], %[p]\n\t"
#ifdef PAIRS
#define NARROW(i, left, middle, right) "vcvtne2ps2bf16 " REG(left) ", " REG(middle) ", " EVEN "\n\tvmovups " EVEN ", (%[p])\n\t" \
    "vcvtneps2bf16 " REG(right) ", " EVEN_HALF "\n\tvmovups " EVEN_HALF ", 64(%[p])\n\tadd %[to_down], %[p]\n\t"
#define STORE_NARROW "test %[narrow], %[narrow]\n\tjz 7f\n\t" ROWS(NARROW) "jmp 70f\n7:\n\t"
#else
#define STORE_NARROW
#endif
static void registers(const cell *a, const cell *b, long k, const float *from, long from_down, void *to, long to_down,
                      long vectors, long narrow, const cell *next, const char *ahead, long ahead_down) {
    long count = vectors == 3 ? k / 4 : k, rest = vectors == 3 ? k % 4 : 0, every = k / 4 / MR + 1, wait = 1;
    void *p = to;
    __asm__ volatile(
        ROWS(CLEAR)
        "test %[count], %[count]\n\tjz 4f\n\tcmpq $2, %[vectors]\n\tje 2f\n\tja 3f\n"
        "1:\n\t" LOAD("0", 0, B_LEFT) ROWS(ROW_OF_ONE) NEXT(1) "jnz 1b\n\tjmp 5f\n"
        "2:\n\t" LOAD("0", 0, B_LEFT) LOAD("0", 1, B_MIDDLE) ROWS(ROW_OF_TWO) NEXT(1) "jnz 2b\n\tjmp 5f\n"
        ".p2align 4\n3:\n\tdec %[wait]\n\tjnz 30f\n\t" FETCH_ROW "mov %[every], %[wait]\n30:\n\t" FETCH_PANEL
        STEP(0) STEP(1) STEP(2) STEP(3) NEXT(4) "jnz 3b\n"
        "4:\n\tmov %[rest], %[count]\n\ttest %[count], %[count]\n\tjz 5f\n40:\n\t" STEP(0) NEXT(1) "jnz 40b\n"
        "5:\n\tmov %[from], %[p]\n\ttest %[p], %[p]\n\tjz 6f\n\t" ROWS(ADD)
        "6:\n\tmov %[to], %[p]\n\t" STORE_NARROW ROWS(STORE) "70:\n\t"
        : [a] "+&r"(a), [b] "+&r"(b), [count] "+&r"(count), [p] "+&r"(p), [next] "+&r"(next), [ahead] "+&r"(ahead),
          [wait] "+&r"(wait)
        : [rest] "m"(rest), [every] "m"(every), [ahead_down] "m"(ahead_down), [from] "m"(from), [to] "m"(to), [vectors] "m"(vectors),
          [from_down] "r"(from_down * 4), [to_down] "r"(to_down * (narrow ? 2 : 4)), [narrow] "r"(narrow)
        : "memory", "cc", CLOBBERED);
}
#else
static void registers(const cell *a, const cell *b, long k, const float *from, long from_down, void *to, long to_down, long vectors,
                      long narrow, const cell *next, const char *ahead, long ahead_down) {
    f sum[MR][3] = {};
    for (; k--; a += MR, b += NR) {
        f left = load_f(b), middle = load_f(b + L), right = load_f(b + 2 * L);
        #pragma GCC unroll 4
        for (int i = 0; i < MR; i++) sum[i][0] += a[i] * left, sum[i][1] += a[i] * middle, sum[i][2] += a[i] * right;
    }
    float *c = to;
    #pragma GCC unroll 4
    for (int i = 0; i < MR; i++, c += to_down, from += from ? from_down : 0)
        #pragma GCC unroll 3
        for (int j = 0; j < 3; j++) store_f(c + j * L, from ? load_f(from + j * L) + sum[i][j] : sum[i][j]);
}
#endif

#ifdef PAIRS
typedef f f_stored __attribute__((aligned(sizeof(stored)), may_alias));
INLINE f load_row(const stored *x) { return *(const f_stored *)x; }
#else
INLINE f load_row(const stored *x) { return STORED(load)(x); }
#endif

/* The next L cells of L vectors, `apart` each other, into part of a panel. */
INLINE void pack_square(const stored *x, long apart, const long width, cell *out) {
    f v[L];
    #pragma GCC unroll 16
    for (long j = 0; j < L; j++) v[j] = load_row(x + j * apart);
    transpose(v);
    #pragma GCC unroll 16
    for (long j = 0; j < L; j++) store_f((float *)(out + j * width), v[j]);
}

/* The next L cells of MR vectors, into a panel of that width: the first of them all, the second of them all, ... */
INLINE void pack_comb(const stored *x, long apart, cell *out) {
    f v[MR], w[MR];
    #pragma GCC unroll 8
    for (long j = 0; j < MR; j++) v[j] = load_row(x + j * apart);
    #pragma GCC unroll 3
    for (long zipped = 1; zipped < MR; zipped *= 2) {
        #pragma GCC unroll 4
        for (long j = 0; j < MR / 2; j++) w[2 * j] = ZIP_LOW(v[j], v[j + MR / 2]), w[2 * j + 1] = ZIP_HIGH(v[j], v[j + MR / 2]);
        __builtin_memcpy(v, w, sizeof v);
    }
    #pragma GCC unroll 8
    for (long j = 0; j < MR; j++) store_f((float *)(out + j * L), v[j]);
}

/* Cells that lie along the rows of memory, `width` of them. */
INLINE void pack_row(const stored *x, long step, long k, long width, cell *out) {
#if defined(PAIRS)
    typedef stored eight __attribute__((vector_size(16)));
    typedef stored eight_any __attribute__((vector_size(16), aligned(2)));
    #define ZIP(x, y, i) __builtin_shuffle(x, y, (eight){i, 8 + i, 1 + i, 9 + i, 2 + i, 10 + i, 3 + i, 11 + i})
    for (long l = 0; l < width; l += 8) {
        eight even = *(eight_any *)(x + l), odd = {};
        if (k > 1) odd = *(eight_any *)(x + step + l);
        *(eight_any *)(out + l) = ZIP(even, odd, 0);
        *(eight_any *)(out + l + 4) = ZIP(even, odd, 4);
    }
#elif defined(BFLOAT16)
    typedef stored four __attribute__((vector_size(8)));
    typedef unsigned wide __attribute__((vector_size(16)));
    typedef four four_any __attribute__((aligned(2), may_alias));
    typedef wide wide_any __attribute__((aligned(4), may_alias));
    for (long l = 0; width % L == 0 && l < width; l += L) store_f(out + l, load_bf(x + l));
    for (long l = 0; width % L && l < width; l += 4)
        *(wide_any *)(out + l) = __builtin_convertvector(*(const four_any *)(x + l), wide) << 16;
#else
    __builtin_memcpy(out, x, width * sizeof *out);
#endif
}

/* `count` vectors, `apart` each other, their elements `step` apart, into panels of `width`: first the first cells of
   `width` vectors, then their second, ... up to k numbers. Panels are `depth` cells deep, of which these are a part. The
   last panel is filled up with zeros, and so is the last cell. */
INLINE void pack_panels(const stored *x, long apart, long step, long count, long k, long width, long depth, cell *out) {
    const long unit = least(width, L);
    long whole = apart == 1 || step == 1 ? count / unit * unit : 0, last = whole / width * width;
    #define AT(i, j) out + (i) / width * width * depth + (i) % width + (j) / UNIT * width
    if (apart == 1)
        for (long j = 0; j < k; j += TOGETHER * UNIT) {
            const long end = least(k, j + TOGETHER * UNIT);
            for (long r = end; r < end + TOGETHER * UNIT; r++)
                for (long i = 0; i < whole; i += 64 / sizeof *x) __builtin_prefetch(x + r * step + i);
            for (long i = 0; i < last; i += width)
                for (long r = j; r < end; r += UNIT) pack_row(x + r * step + i, step, k - r, width, AT(i, r));
            for (long i = last; i < whole; i += unit)
                for (long r = j; r < end; r += UNIT) pack_row(x + r * step + i, step, k - r, unit, AT(i, r));
        }
    else
        for (long i = 0; i < whole; i += unit) {
            long j = 0;
            for (; j + L * UNIT <= k; j += L * UNIT) {
                if (width < L) pack_comb(x + i * apart + j, apart, AT(i, j));
                else pack_square(x + i * apart + j, apart, width, AT(i, j));
            }
            for (; j < k; j += UNIT)
                for (long l = 0; l < unit; l++) *(AT(i + l, j)) = cell_at(x + (i + l) * apart + j, 1, k - j);
        }
    for (; last < count; last += width)
        for (long j = 0; j < k; j += UNIT)
            for (long l = most(0, whole - last); l < width; l++)
                *(AT(last + l, j)) = last + l < count ? cell_at(x + (last + l) * apart + j * step, step, k - j) : (cell){0};
    #undef AT
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
