/* Intel's tiles: eight registers of 16 rows of 64 bytes, and products of two of them added to a third. */

#ifdef AMX
/* Programming: https://www.intel.com/content/www/us/en/developer/articles/code-sample/advanced-matrix-extensions-intrinsics-functions.html
   A thread's configuration may be another library's: it is put back after use. */
typedef struct { unsigned char palette, start[15]; unsigned short bytes[16]; unsigned char rows[16]; } Tiles;

INLINE Tiles begin_products(void) {
    Tiles before, own = {.palette = 1};
    for (int i = 0; i < 8; i++) own.bytes[i] = 64, own.rows[i] = 16;
    __asm__ volatile("sttilecfg %0" : "=m"(before));
    __asm__ volatile("ldtilecfg %0" :: "m"(own));
    return before;
}
INLINE void end_products(Tiles before) { __asm__ volatile("ldtilecfg %0" :: "m"(before)); }

#define ZERO(t) __asm__ volatile("tilezero %%tmm" #t ::: "memory")
#define LOAD(t, p, step) __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #t :: "r"(p), "r"((step) * 4l) : "memory")
#define STORE(t, p, step) __asm__ volatile("tilestored %%tmm" #t ", (%0,%1,1)" :: "r"(p), "r"((step) * 4l) : "memory")
#define MULTIPLY(c, a, b) __asm__ volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c ::: "memory")
#endif
