/* Intel's tiles in memory, one set a thread, for CPUs that have none: in place of kernels/amx.h. Products as the instruction
   makes them, but for the order of sums and for numbers below the normal ones. */

#ifdef AMX
typedef int Tiles;
static __thread unsigned char tile_registers[8][16][64] __attribute__((aligned(64)));

INLINE Tiles begin_products(void) { return 0; }
INLINE void end_products(Tiles before) { (void)before; }

static void tile_load(int t, const void *from, long step) {
    for (int i = 0; i < 16; i++) __builtin_memcpy(tile_registers[t][i], (const char *)from + i * step, 64);
}
static void tile_store(int t, void *to, long step) {
    for (int i = 0; i < 16; i++) __builtin_memcpy((char *)to + i * step, tile_registers[t][i], 64);
}
static void tile_multiply(int c, int a, int b) {
    for (int i = 0; i < 16; i++) {
        f sum = load_f((float *)tile_registers[c][i]);
        for (int k = 0; k < 16; k++) {
            unsigned pair;
            __builtin_memcpy(&pair, tile_registers[a][i] + 4 * k, 4);
            words x = (words){} + pair, y = *(words *)tile_registers[b][k];
            sum += (f)(x << 16) * (f)(y << 16) + (f)(x & 0xffff0000) * (f)(y & 0xffff0000);
        }
        store_f((float *)tile_registers[c][i], sum);
    }
}
#define ZERO(t) __builtin_memset(tile_registers[t], 0, sizeof tile_registers[t])
#define LOAD(t, p, step) tile_load(t, p, (step) * 4l)
#define STORE(t, p, step) tile_store(t, p, (step) * 4l)
#define MULTIPLY(c, a, b) tile_multiply(c, a, b)
#endif
