/* C = A B in blocks (Goto & van de Geijn 2008, https://doi.org/10.1145/1356052.1356053; Van Zee & van de Geijn 2015,
   https://doi.org/10.1145/2764454). B is packed into panels NR columns wide, by all threads, as much of it as SHARED
   holds; then tiles of C are handed out. A thread packs the rows of A that its tile needs into panels MR high, and
   updates the tile MR x NR numbers at a time, in registers. Packing takes any strides, so that one code serves all
   transposes. Sums are in float, and a result in bfloat16 is rounded once.

   What registers hold, and how operands are packed for them, is in vectors.h and tiles.h. */

#define SHARED (2 << 20)           /* cells of packed B, */
#define DEEP (3072 / KC)           /* of so many blocks of k, if it can't be of all */
#define ITS_OWN ((MC + NR - 1) / NR * NR) /* rows or columns that a thread packs for itself, */
#define MOST (ITS_OWN > GROUP * NR ? ITS_OWN : GROUP * NR) /* and that are packed at once */
#define SERIAL 65536               /* multiplications that one thread does alone */
#define MADE 128                   /* numbers along k that are made at once */

/* A block of numbers, rows `down` apart; `padded` up to whole tiles of registers. */
struct block { void *at; long down; int narrow, padded; };

/* Where the next part of A lies, to be fetched to the L2 cache in the meantime: rows of `bytes`, `apart` each other. */
struct ahead { const char *at; long bytes, apart; };

/* rows x columns of `to` = `from`, if it isn't null, + a b, which are packed `depth` deep. Of one of them, b if `across`,
   this is one panel after the other, each of which meets all of the other's. */
static void tile(const cell *a, const cell *b, int across, const float *from, long from_down, struct block to, long rows,
                 long columns, long depth, struct ahead next) {
    long high = parts(rows, MR), inner = across ? high : parts(columns, NR), lines = next.bytes ? parts(next.bytes, 128) : 1;
    long size = to.narrow ? sizeof(stored) : sizeof(float), width = (across ? NR : MR) * depth;
    for (long call = 0; call < high * parts(columns, NR); call++) {
        float part[MR * NR] __attribute__((aligned(64)));
        long outer = call / inner, turn = call % inner, i = MR * (across ? turn : outer), j = NR * (across ? outer : turn);
        long height = least(MR, rows - i), wide = least(NR, columns - j), down = from_down;
#ifdef ROUNDED_LATER
        int whole = !to.narrow && (to.padded || height == MR && wide == NR), narrow = 0;
#else
        int whole = to.padded || height == MR && wide == NR, narrow = to.narrow;
#endif
        const float *begin = from ? from + i * down + j : 0;
        char *end = (char *)to.at + (i * to.down + j) * size;
        if (!whole && begin == (float *)end) {
            for (long r = 0; r < height; r++) __builtin_memcpy(part + r * NR, begin + r * down, wide * sizeof *part);
            begin = part, down = NR;
        }
        registers(a + i * depth, b + j * depth, depth, begin, down, whole ? end : (void *)part, whole ? to.down : NR,
                  parts(wide, L), narrow, (across ? b : a) + (outer + 1) * width + turn * width / inner,
                  next.at + call / lines * MR * next.apart + call % lines * 128, next.apart);
#ifdef ROUNDED_LATER
        for (long r = 0; to.narrow && r < height; r++) {
            stored *row = (stored *)end + r * to.down;
            for (long l = 0; l < wide; l += L) {
                f x = load_f(part + r * NR + l);
                if (l + L <= wide) store_bf(row + l, x);
                else store_some_bf(row + l, x, wide - l);
            }
        }
        if (to.narrow) continue;
#endif
        if (!whole)
            for (long r = 0; r < height; r++)
                __builtin_memcpy(end + r * to.down * size, (char *)part + r * NR * size, wide * size);
    }
}

static void *aligned(void **memory, long bytes) {
    *memory = __builtin_malloc(bytes + 64);
    return (void *)(((unsigned long)*memory + 63) / 64 * 64);
}

/* What is done with a finished tile, rows x columns with rows `stride` apart, before it leaves the cache. `block` numbers
   the rows' blocks, of which there are matmul_blocks(M). */
typedef void (*epilogue)(void *context, stored *tile, long stride, long block, long row, long rows, long column, long columns);
/* What makes an operand that isn't in memory, a matrix with contiguous rows: `make` writes some of its rows and columns to a tile
   with rows `stride` apart. Meanwhile the caches fetch from `ahead`, a matrix of the same shape, of numbers of `size` bytes. */
struct prologue {
    void (*make)(void **pointers, const long *sizes, stored *tile, long stride, long row, long rows, long column, long columns);
    void **pointers;
    const long *sizes;
    const char *ahead;
    long size;
};
/* Rows of a, or columns of b, `apart` each other, their numbers along k `step` apart; there are `count`, and pack_* takes them
   `width` at a time. Or they are made, and this is the part of them from number `first` and `deep` on. */
struct operand { const stored *at; long apart, step, count, width; const struct prologue *made; long first, deep; };

INLINE struct operand part_of(struct operand x, long from, long to, long k) {
    if (x.made) x.first += from, x.deep += k;
    else x.at += from * x.apart + k * x.step;
    x.count = to - from;
    return x;
}

/* `x`, k along the sum, made in `part`, its rows `stride` apart. */
static struct operand made(struct operand x, long k, stored *part, long stride) {
    const struct prologue *p = x.made;
    if (x.step == 1) p->make(p->pointers, p->sizes, part, stride, x.first, x.count, x.deep, k);
    else p->make(p->pointers, p->sizes, part, stride, x.deep, k, x.first, x.count);
    return (struct operand){part, x.step == 1 ? stride : 1, x.step == 1 ? 1 : stride, x.count, x.width};
}

/* `x`, k along the sum, packed as a, or as b, into panels `depth` cells deep, of which this is a part. Are there special
   numbers in it? */
static int pack(int as_a, struct operand x, long k, long depth, cell *out) {
    if (!x.made)
        return as_a ? pack_a(x.at, x.apart, x.step, x.count, k, depth, out) : pack_b(x.at, x.apart, x.step, x.count, k, depth, out);
    stored part[MADE * MOST] __attribute__((aligned(64)));
    int found = 0;
    for (long j = 0; j < k; j += MADE)
        found |= pack(as_a, made(part_of(x, 0, x.count, j), least(MADE, k - j), part, x.step == 1 ? MADE : MOST), least(MADE, k - j),
                      depth, out + cells_of(j) * x.width);
    return found;
}

/* Two if they aren't tiny, a multiple of 4 where there are many: for threads to have equal shares. */
long matmul_blocks(long M) { long n = most(parts(M, MC), least(2, M / 64)); return n < 3 ? n : parts(n, 4) * 4; }
/* The most columns of a tile: an epilogue on no more gets whole rows. */
long matmul_columns(void) { return NC; }

int omp_get_num_threads(void), omp_get_max_threads(void);
struct tiles { stored *c; long ldc, add; epilogue finish; void *context; float *sums; };

/* Adds to c the products with what pack_a and pack_b left out, numbers that only ordinary arithmetic handles; k along the sum.
   After a NaN nothing else matters to its row or column, so that this is quick where nothing but NaN is left. */
static void add_special(struct operand a, struct operand b, struct block to, long k) {
    float *c = to.at;
    stored *made_a = a.made ? __builtin_malloc(a.count * k * sizeof(stored)) : 0;
    stored *made_b = b.made ? __builtin_malloc(b.count * k * sizeof(stored)) : 0;
    if (a.made) a = made(a, k, made_a, a.step == 1 ? k : a.count);
    if (b.made) b = made(b, k, made_b, b.step == 1 ? k : b.count);
    #define AT(x, i, p) ((x).at[(i) * (x).apart + (p) * (x).step])
    for (long i = 0; i < a.count; i++)
        for (long p = 0; p < k; p++) {
            stored x = AT(a, i, p);
            if (!special(x)) continue;
            for (long j = 0; j < b.count; j++) c[i * to.down + j] += as_float(x) * as_float(AT(b, j, p));
            if (as_float(x) != as_float(x)) break;
        }
    for (long j = 0; j < b.count; j++)
        for (long p = 0; p < k; p++) {
            stored y = AT(b, j, p);
            if (!special(y)) continue;
            for (long i = 0; i < a.count; i++)
                if (!special(AT(a, i, p))) c[i * to.down + j] += as_float(AT(a, i, p)) * as_float(y);
            if (as_float(y) != as_float(y)) break;
        }
    __builtin_free(made_a);
    __builtin_free(made_b);
}

/* sums[i] = the i-th vector's, begun anew or added to. */
static void add_up(struct operand x, long k, float *sums, int anew) {
    float part[MOST] = {};
    for (long p = 0; p < k; p++) {
        const stored *at = x.at + p * x.step;
        long i = 0;
        for (; x.apart == 1 && i + L <= x.count; i += L) store_f(part + i, load_f(part + i) + STORED(load)(at + i));
        for (; i < x.count; i++) part[i] += as_float(at[i * x.apart]);
    }
    for (long i = 0; i < x.count; i++) sums[i] = anew ? part[i] : sums[i] + part[i];
}

/* What a product needs. One operand is packed by all threads, as much of it as SHARED holds. That is b, but for a flat
   product: the fewer vectors it has, the oftener each is used while it is in a cache. Epilogues get rows as long as can be, and sums of rows all of a.
   Partial sums are in c, if that is of floats, else in a tile of the thread's own; with an epilogue, the results too.
   k is taken in blocks of equal depth.
   Bytes: `shared` and `sums` once, `own` for each thread, the first of them `packed`. */
struct needs { int flat, direct, several, threads; long block, deep, wide, shared, sums, packed, own; };

static struct needs needs_of(long M, long N, long K, int finish, int sums) {
    struct needs x = {.flat = !finish && !sums && 2 * M <= N, .direct = !finish && sizeof(stored) == sizeof(float)};
    x.block = most(UNIT, up(parts(K, most(1, parts(K, KC))), UNIT));
    x.deep = K == 0 ? 1 : finish || K <= DEEP * x.block ? K : DEEP * x.block;
    x.several = x.deep < K && !x.direct; /* shares of k: sums of all tiles have to be kept */
    long width = x.flat ? MR : NR, fit = SHARED / cells_of(x.deep);
    x.wide = least(up(x.flat ? M : N, width), up(most(fit, NC), width));
    x.shared = cells_of(x.deep) * x.wide * sizeof(cell) + up(N, NR) * sizeof(float);
    x.sums = x.several ? up(M, MR) * up(N, NR) * sizeof(float) : 0;
    x.threads = (double)M * N * K > SERIAL ? omp_get_max_threads() : 1;
    long vectors = least(ITS_OWN, x.flat ? up(N, NR) : up(M, MR));
    x.packed = up(vectors * cells_of(x.block) * sizeof(cell), 64);
    x.own = x.packed + (x.direct || x.several ? 0 : vectors * (least(NC, x.flat ? M : N) + NR) * sizeof(float));
    return x;
}

static void one(struct operand a, struct operand b, const stored *bias, struct tiles to, long K) {
    long M = a.count, N = b.count, padded = up(N, NR);
    if (M == 0 || N == 0) return;
    struct needs x = needs_of(M, N, K, to.finish != 0, to.sums != 0);
    int flat = x.flat, direct = x.direct, narrow = sizeof(stored) < sizeof(float), special_all = 0;
    struct operand all = flat ? a : b, each = flat ? b : a;
    void *shared_memory, *sums_memory = 0;
    cell *shared = aligned(&shared_memory, x.shared);
    float *first = bias ? (float *)(shared + cells_of(x.deep) * x.wide) : 0, *whole = x.several ? aligned(&sums_memory, x.sums) : 0;
    for (long j = 0; first && j < padded; j++) first[j] = j < N ? as_float(bias[j]) : 0;
    #pragma omp parallel num_threads(x.threads)
    {
        Tiles before = begin_products();
        int threads = omp_get_num_threads();
        void *own_memory;
        cell *own = aligned(&own_memory, x.own);
        for (long n = 0; n < all.count; n += x.wide)
            for (long k = 0; k == 0 || k < K; k += x.deep) {
                long depth = least(x.deep, K - k), width = least(x.wide, all.count - n), panels = parts(width, all.width);
                /* packed: blocks one after the other, panels within them */
                long slice = up(parts(x.block, SLICES), UNIT), slices = SLICES * parts(depth, x.block), groups = parts(width, GROUP * all.width);
                #pragma omp for schedule(dynamic, 1) reduction(|:special_all)
                for (long task = 0; task < slices * groups; task++) {
                    long block = task / groups / SLICES * x.block, within = task / groups % SLICES * slice, from = block + within;
                    long j = task % groups * GROUP * all.width, high = cells_of(least(x.block, depth - block));
                    if (from >= depth) continue;
                    struct operand some = part_of(all, n + j, n + least(width, j + GROUP * all.width), k + from);
                    special_all |= pack(flat, some, least(least(slice, x.block - within), depth - from), high,
                        shared + cells_of(block) * panels * all.width + j * high + cells_of(within) * all.width);
                }
                long blocks = matmul_blocks(each.count), rows = parts(each.count, each.width);
                /* more tasks where there are many threads; an epilogue may need whole rows */
                long across = most(parts(width, NC), to.finish ? 1 : least(panels, parts(2 * threads, blocks)));
                #pragma omp for schedule(dynamic, 1)
                for (long task = 0; task < blocks * across; task++) {
                    long i = task % blocks, j = task / blocks;
                    long top = rows * i / blocks * each.width, bottom = least(each.count, rows * (i + 1) / blocks * each.width);
                    long left = panels * j / across * all.width, right = least(width, panels * (j + 1) / across * all.width);
                    long row = flat ? n + left : top, column = flat ? top : n + left;
                    long down = up(flat ? bottom - top : right - left, NR);
                    struct block c = {to.c + row * to.ldc + column, to.ldc, narrow}, sums = {(char *)own + x.packed, down, 0, 1};
                    if (x.several) sums = (struct block){whole + row * padded + column, padded, 0, 1};
                    /* the narrow results of a tile are written over sums already read */
                    if (to.finish) c = (struct block){sums.at, narrow ? 2 * down : down, narrow, 1};
                    if (direct) sums = c;
                    for (long block = 0; block == 0 || block < depth; block += x.block) {
                        long deeper = least(x.block, depth - block), high = cells_of(deeper), begin = k + block;
                        int more = begin > 0 || to.add, last = begin + deeper >= K;
                        struct operand mine = part_of(each, top, bottom, begin), theirs = part_of(all, n + left, n + right, begin);
                        int special_mine = pack(!flat, mine, deeper, high, own);
                        if (to.sums && n + left == 0) add_up(mine, deeper, to.sums + top, begin == 0);
                        /* of this task, or of one that this thread may get next */
                        long then = begin + deeper, at = top;
                        if (block + deeper >= depth) then = k, at = least(rows - 1, rows * ((task + threads) % blocks) / blocks) * each.width;
                        const char *from = each.made ? each.made->ahead : (char *)each.at;
                        long size = each.made ? each.made->size : sizeof(stored);
                        struct ahead next = {from + (at * each.apart + then * each.step) * size, least(x.block, K - then) * size, each.apart * size};
                        if (each.apart == 1) next.bytes = least(mine.count, each.count - at) * size, next.apart = each.step * size;
                        cell *packed = shared + cells_of(block) * panels * all.width + left * high;
                        struct operand rows_here = flat ? theirs : mine, columns_here = flat ? mine : theirs;
                        tile(flat ? packed : own, flat ? own : packed, !flat, more ? sums.at : first ? first + column : 0,
                             more ? sums.down : 0, last ? c : sums, rows_here.count, columns_here.count, high, next);
                        if (special_all | special_mine) add_special(rows_here, columns_here, last ? c : sums, deeper);
                    }
                    if (to.finish) to.finish(to.context, c.at, c.down, i, top, bottom - top, n + left, right - left);
                }
            }
        __builtin_free(own_memory);
        end_products(before);
    }
    __builtin_free(shared_memory);
    __builtin_free(sums_memory);
}

#define ALONE 4 /* products of a batch, or more, are made by one thread each */
/* Bytes allocated for a while. */
long matmul_scratch(long batch, long M, long N, long K, long finish, long sums) {
    struct needs x = needs_of(M, N, K, finish, sums);
    return batch < ALONE ? x.sums + x.shared + x.own * x.threads : (x.sums + x.shared + x.own) * omp_get_max_threads();
}

/* Is the operand that is packed once, by all threads, a? The other is packed once for each matmul_columns() vectors of it. */
long matmul_flat(long M, long N, long finish, long sums) { return needs_of(M, N, 1, finish, sums).flat; }

/* For each of `batch` products c (M x N, rows ldc apart) = a (M x K) b (K x N) + bias (N, or 0). The numbers are batch, M,
   N, K, and the distances in memory: of a from one to the next, down and across; so of b; of c from one to the next and
   down; and whether to add to what is in c, of floats, without a bias. With an epilogue (batch 1) there is no c. `sums` of
   a's rows (batch 1, a in memory), or 0. What makes a and b (batch 1), or 0. */
void matmul(const stored *a, const stored *b, const stored *bias, stored *c, const long *numbers, epilogue finish,
            void *context, float *sums, const struct prologue *made_a, const struct prologue *made_b) {
    const long *n = numbers;
    #define ONE(i) one((struct operand){a + i * n[4], n[5], n[6], n[1], MR, made_a}, (struct operand){b + i * n[7], n[9], n[8], n[2], NR, made_b}, \
        bias, (struct tiles){c + i * n[10], n[11], n[12], finish, context, sums}, n[3])
    if (n[0] < ALONE)
        for (long i = 0; i < n[0]; i++) ONE(i);
    else {
        #pragma omp parallel for schedule(dynamic, 1)
        for (long i = 0; i < n[0]; i++) ONE(i); /* each on one thread */
    }
}
