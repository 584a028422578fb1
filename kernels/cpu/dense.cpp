// Few rows times a weight on a CPU: y[m] = W x[m] + b, W (N, K), for batches that are too small to hide
// the reading of W. A STORED weight is integers, W = (Q − zero) · scale, that are widened in registers;
// scale and zero are by row, or by row and group of columns.
//
// Before this text stand the generated preamble, vectors.h, epilogue.h, dense_args.h, dense_call.h, the tiles
// and how x is packed for them: planes.h and dense_rows.h, with MATRIX matrix_tiles.h behind amx.h; of a PACKED
// weight packed.h, with MATRIX behind amx.h, and dense_rows.h; with DIGITS digits.h. The preamble sets the
// parameters:
// element types X, W, Y; LANES; TILE, the rows of a full tile; BLOCK_ROWS, one or four tiles of rows that
// take turns at each of W's planes; ACCUMULATORS, the vectors of sums that registers hold; STREAMS, the
// planes of few rows; LOCALITY, for which cache W is prefetched; UNIT_BYTES, of W that a unit of work keeps
// in a cache; SERIAL_WORK; EPILOGUE_COLUMNS; SPINS. E is the type that rows are multiplied in, and with SPLIT
// that is float32 beside a W of bfloat16: a step of x is its even elements, then its odd ones, as W is
// widened. Of a STORED weight, W is the type of Q, and S and Z are those of scale and zero; with GROUPED they
// are applied to each number, else scale is applied to y, and there is no zero. All sizes come with the
// call, so one kernel serves every linear.
//
// The order of additions behind an element of y depends on K alone, never on the tile that computed
// it: a row's result is bit-equal whatever its neighbours are, and however many; but for one row alone of
// integers with DIGITS, unless the call is fixed.

#include <sched.h>

#if PACKED
// y for rows [m, m + rows), which begin at `x`, and columns [begin, end): a block
template <int ROWS, int SHARES>
__attribute__((noinline)) static void columns(const Call* c, const E::T* x, long m, int rows,
                                              long begin, long end) {
    const long size = end - begin;
    float totals[ROWS][BLOCK] = {};
#if DIGITS
    if (Digits* d = digits_of(c, x); d && size == BLOCK) multiply_digits(c->args, d, begin, *totals);
    else
#endif
#if MATRIX
    if (size == BLOCK) multiply_block<SHARES, true>(c, x, rows, begin, size, totals);
    else multiply_block<SHARES, false>(c, x, rows, begin, size, totals);
#else
    add_block<ROWS, SHARES>(c, x, begin, size, totals);
#endif
    for (int row = 0; row < rows; row++) store(c->args, m + row, begin, size, totals[row]);
}
#else
// y for rows [m, m + rows), which begin at `x`, and columns [begin, end)
template <int ROWS, int SHARES>
__attribute__((noinline)) static void columns(const Call* c, const E::T* x, long m, int rows,
                                              long begin, long end) {
    const Args* g = c->args;
    const long N = g->out_features;
    for (long column = begin; column < end; column += GROUP) {
        const int size = end - column < GROUP ? end - column : GROUP;
        float v[BLOCK_ROWS * GROUP + LANES];
#if DIGITS
        if (Digits* d = digits_of(c, x)) multiply_digits(g, d, column, size, v);
        else
#endif
            dot_products<ROWS, SHARES>(c, x, rows, column, size, v);
        for (int row = 0; row < rows; row++) {
            Y::T* y = (Y::T*)g->y + (m + row) * N + column;
            for (int i = 0; i < size; i += LANES) {
                const int count = size - i < LANES ? size - i : LANES;
                vec part = load_raw<vec>(v + row * GROUP + i);
#if STORED && !GROUPED
                const S::T* s = (const S::T*)g->scale + column + i;
                part *= S::widen(load_first<S::raw>(s, count * sizeof *s));
#endif
                if (g->bias) {
                    const Y::T* b = (const Y::T*)g->bias + column + i;
                    part += Y::widen(load_first<Y::raw>(b, count * sizeof *b));
                }
                Y::raw out = Y::narrow(part);
                memcpy(y + i, &out, count * sizeof *y);
            }
        }
    }
}
#endif

template <int ROWS>
INLINE void tile(const Call* c, const E::T* x, int rows, long m, long begin, long end) {
    if constexpr (ROWS > 0) {
        if constexpr (!MATRIX)
            if (rows < ROWS) return tile<ROWS - 1>(c, x, rows, m, begin, end);
        if (m) return columns<ROWS, 0>(c, x, m, rows, begin, end);
        if constexpr (ROWS == TILE && BLOCK_ROWS > TILE) {
            if (rows > 2 * ROWS) return columns<ROWS, 4>(c, x, m, rows, begin, end);
            if (rows > ROWS) return columns<ROWS, 2>(c, x, m, rows, begin, end);
        }
        columns<ROWS, 1>(c, x, m, rows, begin, end);
    }
}

// Rows of x that there is room for: matrix tiles are read whole.
INLINE long room(long M) { return MATRIX && M > TILE ? (M + TILE - 1) / TILE * TILE : M; }

INLINE void pack(const Call* c, long first, long last, E::T* x) {
    for (long m = first; m < last; m++) pack_row(c, m, x + place(c, m));
#if DIGITS
    if (by_digits(c->args)) write_digits(c, x);
#endif
}
static void pack_rows(int64_t first, int64_t last, void* context) {
    const Call* c = (const Call*)context;
    pack(c, first, last, c->x);
}

// Threads take units in order, so that none waits for a unit that no thread has begun.
static void run_before(Call* c, const Epilogue* e) {
    for (int64_t unit; (unit = __atomic_fetch_add(&c->begun, 1, __ATOMIC_RELAXED)) < e->units;) {
        e->before(e->context, unit);
        __atomic_fetch_add(&c->done, 1, __ATOMIC_RELEASE);
    }
}

static void run_after(Call* c, const Epilogue* e, long begin, long end) {
    for (int i = 0; __atomic_load_n(&c->done, __ATOMIC_ACQUIRE) < e->units; i++)
        if (i >= SPINS) sched_yield();
    e->after(e->context, begin, end);
}

static void run_units(int64_t first, int64_t last, void* context) {
    Call* c = (Call*)context;
    const Epilogue* e = c->args->epilogue;
    if (e) run_before(c, e);
    long pending = first * c->columns;  // the first column that the epilogue waits for
    const long M = c->args->rows, N = c->args->out_features;
    // A thread's range is at least its share of the units, so each has a copy of its own.
    E::T* x = c->x + first * c->copies / c->units * c->space;
    if (c->copies > 1) pack(c, 0, M, x);
#if MATRIX
    const Shapes before = shapes();
    set_shapes(shapes_of(c->args));
#endif
    for (int64_t unit = first; unit < last; unit++) {
        const long begin = unit * c->columns, end = begin + c->columns < N ? begin + c->columns : N;
        for (long m = 0; m < M; m += BLOCK_ROWS) {
            const int rows = M - m < BLOCK_ROWS ? M - m : BLOCK_ROWS;
            tile<TILE>(c, x + place(c, m), rows, m, begin, end);
        }
        if (e && unit + 1 == last) run_after(c, e, pending, end);
        else if (e && end - pending >= EPILOGUE_COLUMNS) {
            const long stop = end - (end - pending) % (2 * LANES);  // whole pairs of vectors
            run_after(c, e, pending, stop);
            pending = stop;
        }
    }
#if MATRIX
    set_shapes(before);
#endif
}

extern "C" int32_t lorafx_kernel(const Args* g) {
    const long M = g->rows, K = g->in_features, N = g->out_features;
    if (!M) return 0;
    const bool serial = g->threads == 1 || M * K * N < SERIAL_WORK;
    const long sums = PACKED ? K / g->group * sizeof(float) / sizeof(E::T) : 0;  // behind a row
    // Writing to lines of a cache that other threads have read takes longer than a copy: one for each.
    Call c = {g, 0, row_stride(K + sums), serial || M > 2 * TILE ? 1 : g->threads, 0, GROUP, 0, 0, 0};
    c.space = room(M) * c.stride;
#if DIGITS
    if (by_digits(g)) c.space = digits_at(&c) + digit_bytes(g) / sizeof(E::T);
#endif
    void* space = malloc(c.copies * c.space * sizeof(E::T) + 64);
    if (!space) return 1;
    c.x = (E::T*)(((uintptr_t)space + 63) & ~(uintptr_t)63);
    for (int i = MOST_GROUPS; i > 1; i--)  // as many columns as a cache and the threads allow
        if (i * GROUP * K * (long)sizeof(W::T) <= UNIT_BYTES && N >= 4 * g->threads * i * GROUP) {
            c.columns = i * GROUP;
            break;
        }
    c.units = (N + c.columns - 1) / c.columns;
    if (serial || (c.copies == 1 && M * K < SERIAL_WORK)) pack_rows(0, M, &c);
    else if (c.copies == 1) g->parallel(0, M, 1, pack_rows, &c);
    if (serial) run_units(0, c.units, &c);
    else g->parallel(0, c.units, 1, run_units, &c);
    free(space);
    return 0;
}

#if STORED
static void widen_rows(int64_t first, int64_t last, void* context) {
    const Args* g = (const Args*)context;
    const long K = g->in_features;
    for (int64_t n = first; n < last; n++) {
        const W::T* q = (const W::T*)g->w + n * g->w_stride;
        Y::T* out = (Y::T*)g->y + n * K;
        for (long begin = 0; begin < K; begin += g->group) {
            const Factors f = factors(g, n * (K / g->group) + begin / g->group);
            const long end = begin + g->group;
            for (long k = begin; k < end; k += LANES) {
                const long count = end - k < LANES ? end - k : LANES;
                const vec a = W::widen(load_first<W::raw>(q + k, count * sizeof *q));
                Y::raw w = Y::narrow((a - f.zero) * f.scale);
                memcpy(out + k, &w, count * sizeof *out);
            }
        }
    }
}

// y (N, K) = W
extern "C" void lorafx_widen(const Args* g) {
    g->parallel(0, g->out_features, 1 + SERIAL_WORK / (1 + g->in_features), widen_rows, (void*)g);
}
#endif
