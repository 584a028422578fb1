// The CPU's matrix tiles (AMX): eight registers of up to 16 rows of 64 bytes. Before this text stands vectors.h.
//
// A tile is known by its number. The compiler knows nothing of tiles, and keeps the order of what is
// volatile.

// The rows of each tile, and the bytes of each row, as the CPU reads them; palette 0 is a CPU without tiles.
struct Shapes {
    uint8_t palette, start, unused[14];
    uint16_t bytes[16];
    uint8_t rows[16];
};
// Other libraries set the shapes of a thread once and for all (ggml), so run_units gives them back.
INLINE Shapes shapes() {
    Shapes s;
    __asm__ volatile("sttilecfg %0" : "=m"(s));
    return s;
}
INLINE void set_shapes(const Shapes& s) { __asm__ volatile("ldtilecfg %0" : : "m"(s) : "memory"); }

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
