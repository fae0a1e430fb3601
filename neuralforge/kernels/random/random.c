/* Random words from counters: rows of 4 L words at a time, L counters in a vector. */

/* Words first .. first + 4 L of a row, those before `count` to `out`. */
static void draw(int *out, long count, long first, unsigned row, unsigned lead, unsigned offset, long seed) {
    u x[4], at;
    for (int j = 0; j < L; j++) at[j] = j;
    x[0] = at + (unsigned)(first / 4), x[1] = (u){} + row, x[2] = (u){} + lead, x[3] = (u){} + offset;
    philox(x, seed);
    int skip = first % 4;
    for (int j = 0; j < L; j++)
        for (int w = 0; w < 4; w++) {
            long i = 4 * j + w - skip;
            if (i >= 0 && i < count) out[i] = x[w][j] ^ 0x80000000u;
        }
}

/* Of a contiguous tensor of n dimensions (2 or more), which is a part of one of sizes `whole`, from `start` on. */
void random_bits(int *out, const long *key, long offset, long n, const long *shape, const long *start, const long *whole) {
    long width = shape[n - 1], height = shape[n - 2], rows = 1, skip = start[n - 1] % 4;
    long across = parts(width + skip, 4 * L);
    for (long i = 0; i < n - 1; i++) rows *= shape[i];
#pragma omp parallel for if (rows * width > 32768)
    for (long job = 0; job < rows * across; job++) {
        long row = job / across, part = job % across;
        long lead = 0, rest = row / height, stride = 1;
        for (long i = n - 3; i >= 0; i--) {
            lead += (start[i] + rest % shape[i]) * stride;
            rest /= shape[i], stride *= whole[i];
        }
        long from = part ? part * 4 * L - skip : 0; /* the first word of the part that is wanted */
        long to = (part + 1) * 4 * L - skip;
        draw(out + row * width + from, (to < width ? to : width) - from, start[n - 1] + from,
             start[n - 2] + row % height, lead, key[1] + offset, key[0]);
    }
}
