// One adapter on a CPU, factors as trained: y[m] += scale · (A x[m]) Bᵀ, A (R, K), B (N, R).
//
// Before this text stand the generated preamble, vectors.h, tiles.h and rows.h. The preamble sets the
// parameters: element types X, W (factors), Y; LANES; K, R, N; PANEL, which is B_STRIDE; TILE, PLANES
// and PAIRS as in delta.cpp.
//
// B lies with its R planes innermost, so PANEL columns at a time are transposed into the cache; the
// tiles then find a panel as they find a bank. Threads share out the rows, in one parallel region:
// with two, that first shared out planes and then panels, 8 rows on two threads took 10 µs in place
// of the 6.3 of one thread (bfloat16, K = N = 1024, R = 16).

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

// What unpack and lane shuffles do in one instruction: patterns within groups of 16 bytes, and of
// whole groups. With permutations across groups 8 rows took 20.3 µs in place of 19.0 (float32, one
// thread, K = 1024, N = 2816).
static const int GROUP = LANES * sizeof(W::T) > 16 ? 16 / sizeof(W::T) : LANES;
static const int GROUPS = LANES / GROUP;

template <int HALF> struct Zip {  // in each group a0 b0 a1 b1 ... of the low or the high halves
    static constexpr int from(int i) {
        return i / GROUP * GROUP + HALF * GROUP / 2 + i % GROUP / 2 + i % 2 * LANES;
    }
};
template <int ODD> struct Unzip {  // the even or the odd groups of a, then those of b
    static constexpr int from(int i) {
        return (i / GROUP * 2 + ODD) % GROUPS * GROUP + i % GROUP + i * 2 / LANES * LANES;
    }
};
template <class PATTERN, int... I> INLINE Line pick(Line a, Line b, Lanes<I...>) {
    return __builtin_shufflevector(a, b, PATTERN::from(I)...);
}

// A square in place. Zipping the first half of some lines with the second rotates the bits of every
// element's index by one, so log2 of their number times swap line and place; unzipping rotates back.
// First the places in the groups of GROUP lines each, then groups of lines with groups of places.
INLINE void transpose(Line* square) {
    typedef typename Range<LANES>::list all;
    Line next[LANES];
    UNROLL for (int done = 1; done < GROUP; done *= 2) {
        UNROLL for (int i = 0; i < LANES / 2; i++) {
            const int first = i / (GROUP / 2) * GROUP, line = first + i % (GROUP / 2);
            const int to = first + i % (GROUP / 2) * 2;
            next[to] = pick<Zip<0>>(square[line], square[line + GROUP / 2], all());
            next[to + 1] = pick<Zip<1>>(square[line], square[line + GROUP / 2], all());
        }
        UNROLL for (int i = 0; i < LANES; i++) square[i] = next[i];
    }
    UNROLL for (int done = 1; done < GROUPS; done *= 2) {
        UNROLL for (int i = 0; i < LANES / 2; i++) {
            const int from = i / GROUP * 2 * GROUP + i % GROUP;
            next[i] = pick<Unzip<0>>(square[from], square[from + GROUP], all());
            next[i + LANES / 2] = pick<Unzip<1>>(square[from], square[from + GROUP], all());
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
    int64_t threads;
    int32_t (*parallel)(int64_t, int64_t, int64_t, Body, void*);
    const Rows *y_rows, *x_rows;
};
enum Status { DONE = 0, NO_MEMORY = 3 };

struct Call {
    const Args* args;
    float* v;  // (m, R)
    int32_t status;
};

struct Work {
    const Args* args;
    float* v;
    long column, columns;
    const W::T* panel;
    bool failed;
};

struct Following {  // rows m, m + 1, ...
    long m;
    long operator[](int row) const { return m + row; }
};

template <int ROWS> INLINE void shrink_rows(Work* w, long m) {
    const Args* g = w->args;
    Tile<X::T, ROWS> x((X::T*)g->x, g->x_rows, Following{m}, 0, K);
    if (x.at[0]) shrink<ROWS>(x.at, (const W::T*)g->a, (float)g->scale, w->v + m * R, 0, R);
    else w->failed = true;
}

template <int ROWS> INLINE void expand_rows(Work* w, long m) {
    const Args* g = w->args;
    Tile<Y::T, ROWS> y((Y::T*)g->y, g->y_rows, Following{m}, w->column, w->columns);
    if (y.at[0]) expand<ROWS>(y.at, 0, w->panel, w->v + m * R, R, w->columns), y.put_back();
    else w->failed = true;
}

// Rows [first, last) of columns [begin, end).
static void add(Call* c, float* v, long first, long last, long begin, long end) {
    const Args* g = c->args;
    W::T panel[R * PANEL];
    Work w = {g, v, begin, 0, panel, false};
    FOR_TILES(shrink_rows, &w, first, last)
    for (; w.column < end; w.column += PANEL) {
        w.columns = end - w.column < PANEL ? end - w.column : PANEL;
        fill_panel((const W::T*)g->b + w.column * R, w.columns, panel);
        FOR_TILES(expand_rows, &w, first, last)
    }
    if (w.failed) c->status = NO_MEMORY;
}

static void add_rows(int64_t begin, int64_t end, void* context) {
    Call* c = (Call*)context;
    add(c, c->v, begin, end, 0, N);
}

static const long BLOCK = 64;  // columns of a unit of work

static void add_columns(int64_t begin, int64_t end, void* context) {
    Call* c = (Call*)context;
    float v[SMALL];
    long last = end * BLOCK < N ? end * BLOCK : N;
    add(c, v, 0, c->args->y_rows->count, begin * BLOCK, last);
}

extern "C" int32_t lorafx_kernel(const Args* g) {
    const long m = g->y_rows->count;
    if (m == 0) return DONE;
    const bool serial = g->threads == 1 || m * R * (K + N) < SERIAL_WORK;
    // Fewer rows than threads, and enough to do: columns are shared out, and each thread computes all
    // of v. One row at K = N = 1024, R = 16 is faster on one thread (3.5 µs against 4.0 on two).
    if (m < g->threads && m * R <= SMALL && m * R * (K + N) >= 4 * SERIAL_WORK) {
        Call c = {g, 0, DONE};
        g->parallel(0, (N + BLOCK - 1) / BLOCK, 1, add_columns, &c);
        return c.status;
    }
    float small[SMALL];
    Call c = {g, small, DONE};
    if (m * R > SMALL && !(c.v = (float*)malloc(m * R * sizeof *c.v))) return NO_MEMORY;
    if (serial) add_rows(0, m, &c);
    else g->parallel(0, m, 1, add_rows, &c);
    if (c.v != small) free(c.v);
    return c.status;
}
