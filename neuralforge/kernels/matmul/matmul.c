/* C = A B in blocks (Goto & van de Geijn 2008, https://doi.org/10.1145/1356052.1356053; Van Zee & van de Geijn 2015,
   https://doi.org/10.1145/2764454). B is packed into panels NR columns wide, by all threads, as much of it as SHARED
   holds; then tiles of C are handed out. A thread packs the rows of A that its tile needs into panels MR high, and
   updates the tile MR x NR numbers at a time, in registers. Packing takes any strides, so that one code serves all
   transposes. Sums are in float, and a result in bfloat16 is rounded once.

   What registers hold, and how operands are packed for them, is in vectors.h and tiles.h. */

#define SHARED (2 << 20)           /* cells of packed B, */
#define DEEP 3072                  /* of so much of k, if it can't be of all */
#define SERIAL 65536               /* multiplications that one thread does alone */

/* A block of numbers, rows `down` apart; `padded` up to whole tiles of registers. */
struct block { void *at; long down; int narrow, padded; };

/* Where the next part of A lies, to be fetched to the L2 cache in the meantime: rows of `bytes`, `apart` each other. */
struct ahead { const char *at; long bytes, apart; };

/* rows x columns of `to` = `from`, if it isn't null, + a b, which are packed `depth` deep. */
static void tile(const cell *a, const cell *b, const float *from, long from_down, struct block to, long rows, long columns,
                 long depth, struct ahead next) {
    long panels = parts(rows, MR), call = 0, lines = next.bytes ? parts(next.bytes, 64) : 1;
    long size = to.narrow ? sizeof(stored) : sizeof(float);
    for (long j = 0; j < columns; j += NR)
        for (long i = 0; i < rows; i += MR, call++) {
            float part[MR * NR];
            long height = least(MR, rows - i), wide = least(NR, columns - j), down = from_down;
            int whole = to.padded || height == MR && wide == NR;
            const float *begin = from ? from + i * down + j : 0;
            char *end = (char *)to.at + (i * to.down + j) * size;
            if (!whole && begin == (float *)end) {
                for (long r = 0; r < height; r++) __builtin_memcpy(part + r * NR, begin + r * down, wide * size);
                begin = part, down = NR;
            }
            registers(a + i * depth, b + j * depth, depth, begin, down, whole ? end : (void *)part, whole ? to.down : NR,
                      to.narrow, b + (j + NR) * depth + i / MR * NR * depth / panels,
                      next.at + call / lines * MR * next.apart + call % lines * 64, next.apart);
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
/* A multiple of 4 where there are many, for threads to have equal shares. */
long matmul_blocks(long M) { long n = parts(M, MC); return n < 3 ? n : parts(n, 4) * 4; }
/* The most columns of a tile: an epilogue on no more gets whole rows. */
long matmul_columns(void) { return NC; }

int omp_get_num_threads(void);
struct operand { const stored *at; long down, across; };
struct tiles { stored *c; long ldc, add; epilogue finish; void *context; };

/* Adds to c the products with what pack_a and pack_b left out, numbers that only ordinary arithmetic handles: rows x columns
   of c, k numbers along the sum. */
static void add_special(struct operand a, struct operand b, struct block c, long rows, long columns, long k) {
    for (long p = 0; p < k; p++, a.at += a.across, b.at += b.down)
        for (long i = 0; i < rows; i++) {
            stored x = a.at[i * a.down];
            int all = special(x);
            for (long j = 0; j < columns; j++) {
                stored y = b.at[j * b.across];
                if (all || special(y)) ((float *)c.at)[i * c.down + j] += as_float(x) * as_float(y);
            }
        }
}

static void one(struct operand a, struct operand b, const stored *bias, struct tiles to, long M, long N, long K) {
    if (M == 0 || N == 0) return;
    /* Partial sums are in c, if that is of floats, else in a tile of the thread's own; with an epilogue, the results too. */
    int narrow = sizeof(stored) < sizeof(float), direct = !to.finish && !narrow, special_b = 0;
    long padded = up(N, NR), deep = K == 0 ? 1 : to.finish || K < DEEP ? K : DEEP, most = SHARED / cells_of(deep);
    long wide = least(padded, up(most < NC ? NC : most, NR));
    int several = deep < K && !direct; /* shares of k: sums of all tiles have to be kept */
    void *shared_memory, *sums_memory = 0;
    cell *shared = aligned(&shared_memory, cells_of(deep) * wide * sizeof(cell) + (bias ? padded * sizeof(float) : 0));
    float *first = bias ? (float *)(shared + cells_of(deep) * wide) : 0;
    float *all = several ? aligned(&sums_memory, up(M, MR) * padded * sizeof(float)) : 0;
    for (long j = 0; first && j < padded; j++) first[j] = j < N ? as_float(bias[j]) : 0;
    #pragma omp parallel if ((double)M * N * K > SERIAL)
    {
        Tiles before = begin_products();
        int threads = omp_get_num_threads();
        void *own_memory;
        cell *own = aligned(&own_memory, MC * cells_of(KC) * sizeof(cell) + (direct || several ? 0 : MC * NC * sizeof(float)));
        for (long n = 0; n < N; n += wide)
            for (long k = 0; k == 0 || k < K; k += deep) {
                long depth = least(deep, K - k), width = least(wide, N - n), panels = parts(width, NR);
                /* packed: blocks of KC deep one after the other, panels within them */
                long slices = parts(depth, SLICE), groups = parts(width, GROUP);
                #pragma omp for schedule(dynamic, 1) reduction(|:special_b)
                for (long task = 0; task < slices * groups; task++) {
                    long from = task / groups * SLICE, j = task % groups * GROUP, block = from / KC * KC;
                    long high = cells_of(least(KC, depth - block)), begin = k + from;
                    special_b |= pack_b(b.at + begin * b.down + (n + j) * b.across, b.across, b.down, least(GROUP, width - j),
                        least(SLICE, depth - from), high, shared + cells_of(block) * panels * NR + j * high + cells_of(from - block) * NR);
                }
                long blocks = matmul_blocks(M), across = parts(width, NC), rows = parts(M, MR);
                #pragma omp for schedule(dynamic, 1)
                for (long task = 0; task < blocks * across; task++) {
                    long i = task % blocks, j = task / blocks;
                    long top = rows * i / blocks * MR, bottom = least(M, rows * (i + 1) / blocks * MR);
                    long left = panels * j / across * NR, right = least(width, panels * (j + 1) / across * NR);
                    long height = bottom - top, down = up(right - left, NR);
                    struct block c = {to.c + top * to.ldc + n + left, to.ldc, narrow}, sums = {own + MC * cells_of(KC), down, 0, 1};
                    if (several) sums = (struct block){all + top * padded + n + left, padded, 0, 1};
                    /* the narrow results of a tile are written over sums already read */
                    if (to.finish) c = (struct block){sums.at, narrow ? 2 * down : down, narrow, 1};
                    if (direct) sums = c;
                    for (long block = 0; block == 0 || block < depth; block += KC) {
                        long deeper = least(KC, depth - block), high = cells_of(deeper), begin = k + block;
                        int more = begin > 0 || to.add, last = begin + deeper >= K;
                        struct operand a_here = {a.at + top * a.down + begin * a.across, a.down, a.across};
                        struct operand b_here = {b.at + begin * b.down + (n + left) * b.across, b.down, b.across};
                        int special_a = pack_a(a_here.at, a.down, a.across, height, deeper, high, own);
                        /* of this task, or of one that this thread may get next */
                        long then = begin + deeper, row = top;
                        if (block + deeper >= depth) then = k, row = least(rows - 1, rows * ((task + threads) % blocks) / blocks) * MR;
                        struct ahead next = {(char *)(a.at + row * a.down + then * a.across), least(KC, K - then) * sizeof(stored), a.down * sizeof(stored)};
                        if (a.down == 1) next.bytes = least(height, M - row) * sizeof(stored), next.apart = a.across * sizeof(stored);
                        tile(own, shared + cells_of(block) * panels * NR + left * high, more ? sums.at : first ? first + n + left : 0,
                             more ? sums.down : 0, last ? c : sums, height, right - left, high, next);
                        if (special_a || special_b) add_special(a_here, b_here, last ? c : sums, height, right - left, deeper);
                    }
                    if (to.finish) to.finish(to.context, c.at, c.down, i, top, height, n + left, right - left);
                }
            }
        __builtin_free(own_memory);
        end_products(before);
    }
    __builtin_free(shared_memory);
    __builtin_free(sums_memory);
}

/* For each of `batch` products c (M x N, rows ldc apart) = a (M x K) b (K x N) + bias (N, or 0). The numbers are batch, M,
   N, K, and the distances in memory: of a from one to the next, down and across; so of b; of c from one to the next and
   down; and whether to add to what is in c, of floats, without a bias. With an epilogue (batch 1) there is no c. */
void matmul(const stored *a, const stored *b, const stored *bias, stored *c, const long *numbers, epilogue finish,
            void *context) {
    const long *n = numbers;
    #define ONE(i) one((struct operand){a + i * n[4], n[5], n[6]}, (struct operand){b + i * n[7], n[8], n[9]}, bias, \
        (struct tiles){c + i * n[10], n[11], n[12], finish, context}, n[1], n[2], n[3])
    if (n[0] < 4)
        for (long i = 0; i < n[0]; i++) ONE(i);
    else {
        #pragma omp parallel for schedule(dynamic, 1)
        for (long i = 0; i < n[0]; i++) ONE(i); /* each on one thread */
    }
}
