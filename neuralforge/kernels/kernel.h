/* At the head of every kernel's file, after `vector.h`: the type of the numbers in memory, and arithmetic of sizes. */

#ifdef BFLOAT16
typedef unsigned short stored;
#define STORED(name) name##_bf
INLINE float as_float(stored x) { unsigned wide = (unsigned)x << 16; float y; __builtin_memcpy(&y, &wide, 4); return y; }
#else
typedef float stored;
#define STORED(name) name##_f
INLINE float as_float(stored x) { return x; }
#endif

INLINE long least(long x, long y) { return x < y ? x : y; }
INLINE long most(long x, long y) { return x > y ? x : y; }
INLINE long parts(long x, long size) { return (x + size - 1) / size; } /* of that size, which hold x */
INLINE long up(long x, long size) { return parts(x, size) * size; }

