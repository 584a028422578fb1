// Sorted rows times the weights of their experts on a CPU: y[m] = W_e x[m] for rows m of expert e,
// W (E, N, K). For few rows an expert, where the time goes into reading W once. STORED: W is int8,
// with a scale for each of its rows.
//
// Before this text stand the generated preamble, vectors.h and tiles.h. The preamble sets the
// parameters: element types X, W, Y, all the same unless STORED; LANES; K, N; R, the columns of a
// unit of work; TILE and PLANES as in delta.cpp.

typedef void (*Body)(int64_t, int64_t, void*);
struct Args {  // mirrors grouped_mm.py
    void* y;        // (M, N), contiguous
    const void* x;  // (M, K), contiguous rows `x_stride` apart
    const void* w;
    const int32_t* ends;  // (E,), where the rows of each expert end, ascending
    const float* scales;  // (E, N), read if STORED
    int64_t x_stride, experts, threads;
    int32_t (*parallel)(int64_t, int64_t, int64_t, Body, void*);
};

struct Call {
    const Args* args;
    const int32_t* present;  // experts that have rows
};

static const long BLOCKS = (N + R - 1) / R;

struct Unit {  // columns [column, column + size) of one expert
    const Args* args;
    const W::T* w;
    const float* scales;
    long column;
    int size;
};

template <int ROWS> INLINE void product(const Unit* u, long m) {
    const Args* g = u->args;
    const X::T* x[ROWS];
    float v[ROWS * R];
    for (int row = 0; row < ROWS; row++) x[row] = (const X::T*)g->x + (m + row) * g->x_stride;
    shrink<ROWS>(x, u->w, 1, v, 0, u->size, u->w + u->size * K);
    for (int row = 0; row < ROWS; row++) {
        Y::T* y = (Y::T*)g->y + (m + row) * N + u->column;
        for (int n = 0; n < u->size; n += LANES) {
            const int count = u->size - n < LANES ? u->size - n : LANES;
            vec sums = load_raw<vec>(v + row * R + n);
            if (STORED) sums *= load_first<vec>(u->scales + n, count * sizeof(float));
            Y::raw part = Y::narrow(sums);
            memcpy(y + n, &part, count * sizeof *y);
        }
    }
}

static void run_units(int64_t begin, int64_t end, void* context) {
    const Call* c = (const Call*)context;
    const Args* g = c->args;
    for (int64_t unit = begin; unit < end; unit++) {
        const long e = c->present[unit / BLOCKS], column = unit % BLOCKS * R;
        const int size = N - column < R ? N - column : R;
        const W::T* w = (const W::T*)g->w + (e * N + column) * K;
        const Unit u = {g, w, STORED ? g->scales + e * N + column : 0, column, size};
        FOR_TILES(product, &u, e ? g->ends[e - 1] : 0, g->ends[e])
    }
}

extern "C" int32_t lorafx_kernel(const Args* g) {
    int32_t* present = (int32_t*)malloc((g->experts + 1) * sizeof *present);
    if (!present) return 1;
    int64_t count = 0;
    for (int64_t e = 0; e < g->experts; e++)
        if (g->ends[e] > (e ? g->ends[e - 1] : 0)) present[count++] = e;
    Call c = {g, present};
    const int64_t units = count * BLOCKS;
    const int64_t rows = count ? g->ends[present[count - 1]] : 0;
    if (g->threads == 1 || rows * K * N < SERIAL_WORK) run_units(0, units, &c);
    else g->parallel(0, units, 1, run_units, &c);
    free(present);
    return 0;
}
