/* Rotary positions: of a row of K numbers x1 and x2 are the halves, and each pair of them is turned by its own angle.

       y1 = x1 cos1 - x2 sin1        transposed:  y1 = x1 cos1 + x2 sin2
       y2 = x2 cos2 + x1 sin2                     y2 = x2 cos2 - x1 sin1

   Rows are float or bfloat16 in memory, the tables of cosines and sines likewise; all is computed as float. */

#ifdef BFLOAT16_TABLES
typedef unsigned short table;
#define TABLE(name) name##_bf
#else
typedef float table;
#define TABLE(name) name##_f
#endif

INLINE f number(const stored *p, long n) { return n == L ? STORED(load)(p) : STORED(load_some)(p, n); }
INLINE f entry(const table *p, long n) { return n == L ? TABLE(load)(p) : TABLE(load_some)(p, n); }
INLINE void put(stored *p, f y, long n) {
    if (n == L) STORED(store)(p, y);
    else STORED(store_some)(p, y, n);
}

/* n pairs, all read before any is written: y may be where x or a table of x's shape is. */
INLINE void turn(const stored *x, const table *cos, const table *sin, stored *y, long half, long second, long transposed, long n) {
    f x1 = number(x, n), x2 = number(x + half, n);
    f cos1 = entry(cos, n), cos2 = entry(cos + second, n), sin1 = entry(sin, n), sin2 = entry(sin + second, n);
    put(y, transposed ? x1 * cos1 + x2 * sin2 : x1 * cos1 - x2 * sin1, n);
    put(y + half, transposed ? x2 * cos2 - x1 * sin1 : x2 * cos2 + x1 * sin2, n);
}

INLINE void turn_row(const stored *x, const table *cos, const table *sin, stored *y, long half, long second, long transposed) {
    long i = 0;
    for (; i + L <= half; i += L) turn(x + i, cos + i, sin + i, y + i, half, second, transposed, L);
    if (i < half) turn(x + i, cos + i, sin + i, y + i, half, second, transposed, half - i);
}

/* Rows along three dimensions, of the strides `sx`, ...; `second` is where in a table's row the second half of the entries
   begins, 0 if they are those of the first. */
void rotary(const stored *x, const table *cos, const table *sin, stored *y, const long *size, const long *sx, const long *sc,
            const long *ss, const long *sy, long half, long second, long transposed) {
    #pragma omp parallel for collapse(2) schedule(static) if (size[0] * size[1] * size[2] * half > 16384)
    for (long i = 0; i < size[0]; i++)
        for (long j = 0; j < size[1]; j++)
            for (long k = 0; k < size[2]; k++) {
                #define AT(p, s) p + i * s[0] + j * s[1] + k * s[2]
                if (transposed) turn_row(AT(x, sx), AT(cos, sc), AT(sin, ss), AT(y, sy), half, second, 1);
                else turn_row(AT(x, sx), AT(cos, sc), AT(sin, ss), AT(y, sy), half, second, 0);
            }
}
