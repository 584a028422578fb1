// One adapter on a CPU, factors as trained: y[m] += scale · (A x[m]) Bᵀ, A (R, K), B (N, R).
//
// Before this text stand the generated preamble, vectors.h and tiles.h. The preamble sets the
// parameters: element types X, W (factors), Y; LANES; K, R, N; PANEL, which is B_STRIDE; TILE, PLANES
// and PAIRS as in delta.cpp.
//
// B lies with its R planes innermost, so PANEL columns at a time are transposed into the cache; the
// tiles then find a panel as they find a bank. Few rows share out planes of A, then panels of B, so
// that each is read from memory by one thread; many rows share out rows.

// ---- panels ------------------------------------------------------------------------------------

typedef W::raw Line;  // LANES elements

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define HAS_ZIP 1
#endif
#endif

#if HAS_ZIP
template <int... I> struct Lanes {};
template <int COUNT, int... I> struct Range : Range<COUNT - 1, COUNT - 1, I...> {};
template <int... I> struct Range<0, I...> { typedef Lanes<I...> list; };

// a0 b0 a1 b1 ... of the low or the high halves
template <int HALF, int... I> INLINE Line zip(Line a, Line b, Lanes<I...>) {
    return __builtin_shufflevector(a, b, (I / 2 + HALF + I % 2 * LANES)...);
}

// A square in place. Zipping the first half of the lines with the second rotates the bits of every
// element's index by one, so log2(LANES) times swap line and lane.
INLINE void transpose(Line* square) {
    typedef typename Range<LANES>::list all;
    UNROLL for (int done = 1; done < LANES; done *= 2) {
        Line next[LANES];
        UNROLL for (int i = 0; i < LANES / 2; i++) {
            next[2 * i] = zip<0>(square[i], square[i + LANES / 2], all());
            next[2 * i + 1] = zip<LANES / 2>(square[i], square[i + LANES / 2], all());
        }
        UNROLL for (int i = 0; i < LANES; i++) square[i] = next[i];
    }
}
#endif

// panel[k][c] = b[c][k] for `columns` columns of B; the columns up to the next whole line are zero
__attribute__((noinline)) static void fill_panel(const W::T* b, long columns, W::T* panel) {
    for (long c = 0; c < columns; c += LANES) {
        const int count = columns - c < LANES ? columns - c : LANES;
        for (int k = 0; k < R; k += LANES) {
            const int planes = R - k < LANES ? R - k : LANES;
            const W::T* from = b + c * R + k;
#if HAS_ZIP
            Line square[LANES];
            if (count == LANES && planes == LANES) {
                UNROLL for (int i = 0; i < LANES; i++) square[i] = load_raw<Line>(from + i * R);
            } else {
                for (int i = 0; i < LANES; i++)
                    square[i] = i < count ? load_first<Line>(from + i * R, planes * sizeof *b) : Line{};
            }
            transpose(square);
            for (int i = 0; i < planes; i++)
                memcpy(panel + (k + i) * PANEL + c, square + i, sizeof(Line));
#else
            for (int i = 0; i < planes; i++)
                for (int j = 0; j < LANES; j++)
                    panel[(k + i) * PANEL + c + j] = j < count ? from[j * R + i] : 0;
#endif
        }
    }
}

// ---- rows --------------------------------------------------------------------------------------

typedef void (*Body)(int64_t, int64_t, void*);
struct Args {  // FactorArgs of dispatcher.cpp
    void* y;
    const void* x;
    const void* a;
    const void* b;
    double scale;
    int64_t m, y_stride, x_stride, threads;
    int32_t (*parallel)(int64_t, int64_t, int64_t, Body, void*);
};
enum Status { DONE = 0, NO_MEMORY = 3 };

struct Call {
    const Args* args;
    float* v;  // (m, R)
    long rows;  // of one unit of the expand
};

template <int ROWS> INLINE void shrink_rows(const Call* c, long m, int first, int last) {
    const Args* g = c->args;
    const X::T* x[ROWS];
    for (int row = 0; row < ROWS; row++) x[row] = (const X::T*)g->x + (m + row) * g->x_stride;
    shrink<ROWS>(x, (const W::T*)g->a, (float)g->scale, c->v + m * R, first, last);
}

template <int ROWS> INLINE void expand_rows(const Call* c, long m, long column, const W::T* panel,
                                            long columns) {
    const Args* g = c->args;
    Y::T* y[ROWS];
    for (int row = 0; row < ROWS; row++) y[row] = (Y::T*)g->y + (m + row) * g->y_stride;
    expand<ROWS>(y, column, panel, c->v + m * R, R, columns);
}

// CALL<ROWS>(c, m, ...) over rows [first, last), in tiles as large as fit
#define FOR_TILES(CALL, first, last, ...)                             \
    for (long m = first; m < last;) {                                 \
        if (last - m >= TILE) CALL<TILE>(c, m, __VA_ARGS__), m += TILE; \
        else if (TILE > 4 && last - m >= 4) CALL<4>(c, m, __VA_ARGS__), m += 4; \
        else if (TILE > 2 && last - m >= 2) CALL<2>(c, m, __VA_ARGS__), m += 2; \
        else CALL<1>(c, m, __VA_ARGS__), m += 1;                      \
    }

static void shrink_some_rows(int64_t begin, int64_t end, void* context) {
    Call* c = (Call*)context;
    FOR_TILES(shrink_rows, begin, end, 0, R)
}

static const long PLANE_BLOCK = 2 * PLANES, PLANE_BLOCKS = (R + PLANE_BLOCK - 1) / PLANE_BLOCK;

static void shrink_some_planes(int64_t begin, int64_t end, void* context) {
    Call* c = (Call*)context;
    for (int64_t block = begin; block < end; block++) {
        int first = block * PLANE_BLOCK, last = first + PLANE_BLOCK < R ? first + PLANE_BLOCK : R;
        FOR_TILES(shrink_rows, 0, c->args->m, first, last)
    }
}

static const long PANELS = (N + PANEL - 1) / PANEL;

// Unit u is the rows [u % blocks · rows, ...) of panel u / blocks, so neighbours share a panel.
static void expand_some(int64_t begin, int64_t end, void* context) {
    Call* c = (Call*)context;
    W::T panel[R * PANEL];
    long blocks = (c->args->m + c->rows - 1) / c->rows, filled = -1;
    for (int64_t unit = begin; unit < end; unit++) {
        long column = unit / blocks * PANEL, first = unit % blocks * c->rows;
        long last = first + c->rows < c->args->m ? first + c->rows : c->args->m;
        long columns = N - column < PANEL ? N - column : PANEL;
        if (filled != column)
            fill_panel((const W::T*)c->args->b + column * R, columns, panel), filled = column;
        FOR_TILES(expand_rows, first, last, column, panel, columns)
    }
}

extern "C" int32_t lorafx_kernel(const Args* g) {
    if (g->m == 0) return DONE;
    float small[4096];
    Call c = {g, small, g->m};
    if (g->m * R > 4096 && !(c.v = (float*)malloc(g->m * R * sizeof *c.v))) return NO_MEMORY;
    if (g->threads == 1 || g->m * R * (K + N) < SERIAL_WORK) {
        shrink_some_rows(0, g->m, &c);
        expand_some(0, PANELS, &c);
    } else {
        // units for all threads, of at least PANEL_ROWS rows: transposing must not cost more
        long wanted = (4 * g->threads + PANELS - 1) / PANELS, rows = (g->m + wanted - 1) / wanted;
        c.rows = rows > PANEL_ROWS ? rows : PANEL_ROWS < g->m ? PANEL_ROWS : g->m;
        if (g->m >= 2 * TILE * g->threads)
            g->parallel(0, g->m, 2 * TILE, shrink_some_rows, &c);
        else
            g->parallel(0, PLANE_BLOCKS, 1, shrink_some_planes, &c);
        g->parallel(0, PANELS * ((g->m + c.rows - 1) / c.rows), 1, expand_some, &c);
    }
    if (c.v != small) free(c.v);
    return DONE;
}
