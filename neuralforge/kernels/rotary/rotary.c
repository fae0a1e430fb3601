/* Rotary positions: the numbers of a row are pairs, x1 and x2, and each is turned by its own angle.

       y1 = x1 cos1 - x2 sin1        transposed:  y1 = x1 cos1 + x2 sin2
       y2 = x2 cos2 + x1 sin2                     y2 = x2 cos2 - x1 sin1

   The second number of a pair is `apart` from the first: half a row, or 1 where pair follows pair. So it is in the tables, or
   0 where both numbers share an entry. Rows are float or bfloat16 in memory, the tables of cosines and sines likewise; all is
   computed as float. */

#ifdef BFLOAT16_TABLES
typedef unsigned short table;
#define TABLE(name) name##_bf
#else
typedef float table;
#define TABLE(name) name##_f
#endif

typedef struct { f first, second; } pairs;

/* Of two vectors of pair after pair; the compiler makes constants of the indices. */
INLINE pairs divide(f low, f high) {
    b even, odd;
    #pragma GCC unroll 16
    for (int j = 0; j < L; j++) even[j] = 2 * j, odd[j] = 2 * j + 1;
    return (pairs){__builtin_shuffle(low, high, even), __builtin_shuffle(low, high, odd)};
}

/* The vector of pair after pair that begins with the one at `from`. */
INLINE f join(pairs x, const int from) {
    b index;
    #pragma GCC unroll 16
    for (int j = 0; j < L; j++) index[j] = from + j / 2 + j % 2 * L;
    return __builtin_shuffle(x.first, x.second, index);
}

/* The first n pairs at p, or n numbers. */
#define READ(T, S) \
    INLINE f read_##T(const T *p, long n) { return n == L ? S(load)(p) : S(load_some)(p, n); } \
    INLINE pairs read_pairs_##T(const T *p, long apart, long n) { \
        if (apart == 1) return divide(read_##T(p, least(2 * n, L)), read_##T(p + L, most(2 * n - L, 0))); \
        f first = read_##T(p, n); \
        return (pairs){first, apart ? read_##T(p + apart, n) : first}; \
    }
READ(stored, STORED)
READ(table, TABLE)

INLINE void write(stored *p, f y, long n) {
    if (n == L) STORED(store)(p, y);
    else STORED(store_some)(p, y, n);
}
INLINE void write_pairs(stored *p, pairs y, long apart, long n) {
    if (apart == 1) {
        write(p, join(y, 0), least(2 * n, L));
        write(p + L, join(y, L / 2), most(2 * n - L, 0));
    } else {
        write(p, y.first, n);
        write(p + apart, y.second, n);
    }
}

/* n pairs, all read before any is written: y may be where x or a table of x's shape is. */
INLINE void turn(const stored *x, const table *cos, const table *sin, stored *y, long apart, long second, long transposed, long n) {
    pairs a = read_pairs_stored(x, apart, n), c = read_pairs_table(cos, second, n), s = read_pairs_table(sin, second, n);
    pairs forward = {a.first * c.first - a.second * s.first, a.second * c.second + a.first * s.second};
    pairs back = {a.first * c.first + a.second * s.second, a.second * c.second - a.first * s.first};
    write_pairs(y, transposed ? back : forward, apart, n);
}

INLINE void turn_row(const stored *x, const table *cos, const table *sin, stored *y, long half, long apart, long second, long transposed) {
    long step = apart == 1 ? 2 : 1, wide = second == 1 ? 2 : 1, i = 0;
    for (; i + L <= half; i += L) turn(x + i * step, cos + i * wide, sin + i * wide, y + i * step, apart, second, transposed, L);
    if (i < half) turn(x + i * step, cos + i * wide, sin + i * wide, y + i * step, apart, second, transposed, half - i);
}

/* Rows of `half` pairs along three dimensions, of the strides `sx`, ... */
void rotary(const stored *x, const table *cos, const table *sin, stored *y, const long *size, const long *sx, const long *sc,
            const long *ss, const long *sy, long half, long apart, long shared, long transposed) {
    #pragma omp parallel for collapse(2) schedule(static) if (size[0] * size[1] * size[2] * half > 16384)
    for (long i = 0; i < size[0]; i++)
        for (long j = 0; j < size[1]; j++)
            for (long k = 0; k < size[2]; k++) {
                #define AT(p, s) p + i * s[0] + j * s[1] + k * s[2]
                #define TURN(...) turn_row(AT(x, sx), AT(cos, sc), AT(sin, ss), AT(y, sy), half, __VA_ARGS__)
                #define ROW(apart, second) (transposed ? TURN(apart, second, 1) : TURN(apart, second, 0))
                if (apart == 1) shared ? ROW(1, 0) : ROW(1, 1);
                else shared ? ROW(apart, 0) : ROW(apart, apart);
            }
}
