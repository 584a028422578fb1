// The CPU's matrix tiles (AMX): eight registers of up to 16 rows of 64 bytes. Before this text stands vectors.h.
//
// A tile is known by its number. The compiler knows nothing of tiles, and keeps the order of what is
// volatile.

struct Shapes {
    int of[8];
};
// The rows of each tile, and the bytes of each row.
INLINE void configure(const Shapes& rows, const Shapes& bytes) {
    struct {
        uint8_t palette, start, unused[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } shapes = {1};
    for (int i = 0; i < 8; i++) shapes.rows[i] = rows.of[i], shapes.bytes[i] = bytes.of[i];
    __asm__ volatile("ldtilecfg %0" : : "m"(shapes));
}
INLINE void end_tiles() { __asm__ volatile("tilerelease" : : : "memory"); }

template <int I> INLINE void zero_tile() { __asm__ volatile("tilezero %%tmm%c0" : : "i"(I)); }
template <int I> INLINE void load_tile(const void* p, long apart) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(apart), "i"(I) : "memory");
}
template <int I> INLINE void store_tile(void* p, long apart) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(apart), "i"(I) : "memory");
}
// C[n][m] += Σ_p A[n][2p] B[p][2m] + A[n][2p + 1] B[p][2m + 1], A and B in bfloat16, C in float32
template <int C, int A, int B> INLINE void multiply_tiles() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}
