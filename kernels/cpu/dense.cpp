// Few rows times a weight on a CPU: y[m] = W x[m] + b, W (N, K), for batches that are too small to hide
// the reading of W. A STORED weight is integers, W = (Q − zero) · scale, that are widened in registers;
// scale and zero are by row, or by row and group of columns.
//
// Before this text stand the generated preamble, vectors.h, epilogue.h and dense_args.h. The preamble
// sets the parameters: element types X, W, Y; LANES; TILE, the rows of a full tile; BLOCK_ROWS, one or four
// tiles of rows that take turns at each of W's planes; ACCUMULATORS, the vectors of sums that registers
// hold; STREAMS, the planes of few rows; UNIT_BYTES, of W that a unit of work keeps in a cache;
// SERIAL_WORK; EPILOGUE_COLUMNS; SPINS. E is the type that rows are multiplied in, and with SPLIT that is
// float32 beside a W of bfloat16: a step of x is its even elements, then its odd ones, as W is widened. Of
// a STORED weight, W is the type of Q, and S and Z are those of scale and zero; with GROUPED they are
// applied to each number, else scale is applied to y, and there is no zero. The tiles of a PACKED weight
// are those of packed.h. All sizes come with the call, so one kernel serves every linear.
//
// The order of additions behind an element of y depends on K alone, never on the tile that computed
// it: a row's result is bit-equal whatever its neighbours are, and however many.

#include <sched.h>

#if !PACKED
// Columns computed at a time, a multiple of every tile's number of planes.
static const int GROUP = 24, MOST_GROUPS = 4;
static const int PITCH = 8;  // between rows of sums
// SHARES: among how many tiles the prefetching of W is divided, so that memory is idle in none of them; 0
// where W is in a cache.
template <int ROWS, int SHARES> struct Planes {
    static const bool FEW = SHARES == 1 && !STORED && ROWS <= (SPLIT ? 2 : Dot<E, W>::STREAM);
    // Whether planes of a tile lie far apart, each a stream that the CPU itself prefetches.
    static const bool FAR = FEW && STREAMS > 1;
    // 16 registers hold sums, the planes and a row; of 32 there are enough for what is not a sum.
    static const int FIT = LANES == 16 ? ACCUMULATORS / ROWS : 15 / (ROWS + 1), MOST = LANES == 16 ? 8 : 4;
    static const int VALUE = FEW ? STREAMS : FIT < MOST ? FIT : MOST;
    static const int AHEAD = FEW ? STREAM_AHEAD : STORED ? 2 * VALUE : VALUE;  // planes, to be prefetched
};
#endif

struct Call {
    const Args* args;
    E::T* x;  // `copies` of all rows `stride` apart, as pack_rows writes them
    long stride, copies;
    long columns, units;  // columns of a unit of work, and how many units there are
    int64_t begun, done;  // units of the epilogue
};

#if !PACKED
INLINE void put_four(float* v, vec four) { memcpy(v, &four, 16); }

#if SPLIT
struct D {
    static const int STEP = 2 * LANES, PARTS = 2;
    typedef vec left, right;
    typedef bits loaded;
    INLINE vec part(bits a, int i) { return i ? odd(a) : even(a); }
    INLINE vec add(vec acc, left x, right a) { return fused(acc, x, a); }
};
#else
#if STORED
struct D : Dot<E, E> {
#else
struct D : Dot<E, W> {
#endif
    static const int PARTS = 1;
    typedef right loaded;
    INLINE right part(right a, int) { return a; }
};
#endif

#if STORED
struct Factors {
    float scale, zero;
};
INLINE Factors factors(const Args* g, long at) {
    return {S::one(((const S::T*)g->scale)[at]), HAS_ZERO ? Z::one(((const Z::T*)g->zero)[at]) : 0};
}
INLINE vec numbers(const W::T* q, const Factors& f) {
    vec a = W::at(q);
    if (HAS_ZERO) a -= f.zero;
    return GROUPED ? a * f.scale : a;
}
INLINE D::loaded weights(const W::T* q, const Factors& f) {  // of a step
    vec a[D::STEP / LANES];
    UNROLL for (int i = 0; i < D::STEP / LANES; i++) a[i] = numbers(q + i * LANES, f);
    D::loaded step;
    narrow_step(&step, a);
    return step;
}
#else
struct Factors {};
INLINE Factors factors(const Args*, long) { return {}; }
INLINE D::loaded weights(const W::T* w, const Factors&) { return load_raw<D::loaded>(w); }
#endif
#endif

// Elements between rows of x: whole steps, and an odd number of lines of a cache. Rows that lie 4 KB
// apart would fight for the same few of them.
INLINE long row_stride(long K) {
    const long line = 64 / sizeof(E::T), whole = D::STEP > line ? (long)D::STEP : line;
    const long lines = (K + whole - 1) / whole * (whole / line);
    return (lines | 1) * line;
}

#if !PACKED
// One step of a tile, or a half of it. Registers hold the rows or the planes, whichever are fewer.
template <int ROWS, int N>
INLINE void step(vec* acc, const E::T* x, long stride, const D::right* ws) {
    if (ROWS <= N) {
        D::left xs[ROWS];
        UNROLL for (int row = 0; row < ROWS; row++) xs[row] = load_raw<D::left>(x + row * stride);
        UNROLL for (int n = 0; n < N; n++)
            UNROLL for (int row = 0; row < ROWS; row++)
                acc[row * N + n] = D::add(acc[row * N + n], xs[row], ws[n]);
    } else {
        UNROLL for (int row = 0; row < ROWS; row++) {
            D::left xs = load_raw<D::left>(x + row * stride);
#if LANES == 16 && !STORED
            if (N > 1) __asm__("" : "+v"(xs));  // GCC 12 loads it again for each plane
#endif
            UNROLL for (int n = 0; n < N; n++)
                acc[row * N + n] = D::add(acc[row * N + n], xs, ws[n]);
        }
    }
}

// Planes of W: where they begin, how far they lie apart, and where their factors are.
struct Source {
    const W::T *w, *ahead;  // `ahead` are those that come later
    long stride, factors, groups;
};

// v[row][n] = W[n] · x[row] for ROWS × N pairs
template <int ROWS, int N, int SHARES>
INLINE void dense_tile(const Call* c, const E::T* x, const Source& s, float* v) {
    const long LINE = 64 / sizeof(W::T), AT_ONCE = LINE < D::STEP ? (long)D::STEP : LINE;
    const long K = c->args->in_features, group = GROUPED ? c->args->group : K;
    const long whole = K - K % D::STEP;
    const bool AHEAD = SHARES && !Planes<ROWS, SHARES>::FAR;
    W::T last[N * D::STEP];
    vec acc[ROWS * N] = {};
    Factors f[N];
    long next = 0, at = s.factors;  // the next group, and its factors for the first plane
    for (long k = 0, stop; k < K; k = stop) {
        const W::T* w = s.w + k;
        long apart = s.stride;
        if (k < whole) {
            stop = AT_ONCE == D::STEP || k + AT_ONCE < whole ? k + AT_ONCE : whole;
            // W streams from memory: tiles prefetch planes ahead, into the first cache and in the order
            // of addresses unless x fills that cache
            if (AHEAD && (SHARES > 1 || ROWS * sizeof(E::T) <= 24))
                UNROLL for (int n = 0; n * SHARES < N; n++)
                    __builtin_prefetch(s.ahead + k * N / SHARES + n * LINE, 0, 3);
            else if (AHEAD)
                UNROLL for (int n = 0; n < N; n++) __builtin_prefetch(s.ahead + n * s.stride + k, 0, 2);
        } else {  // less than a step: filled up with zeros
            memset(last, 0, sizeof last);
            for (int n = 0; n < N; n++) memcpy(last + n * D::STEP, w + n * apart, (K - k) * sizeof *w);
            w = last, apart = D::STEP, stop = k + D::STEP;
        }
        for (long i = k; i < stop; i += D::STEP, w += D::STEP) {
            if (GROUPED && i == next) {
                UNROLL for (int n = 0; n < N; n++) f[n] = factors(c->args, at + n * s.groups);
                next += group, at++;
            }
            const W::T* again = w;
            UNROLL for (int part = 0; part < D::PARTS; part++) {
                D::right ws[N];
                UNROLL for (int n = 0; n < N; n++) ws[n] = D::part(weights(again + n * apart, f[n]), part);
                step<ROWS, N>(acc, x + i + part * LANES, c->stride, ws);
                // The next part loads W again: there are no registers for it.
                if (D::PARTS > 1) __asm__("" : "+r"(again));
            }
        }
    }
    UNROLL for (int row = 0; row < ROWS; row++) {
        const vec* a = acc + row * N;
        int n = 0;
#if SUM_FOUR
        UNROLL for (; n + 2 < N; n += 4)
            put_four(v + row * PITCH + n, sum_four(a[n], a[n + 1], a[n + 2], a[n + 3 < N ? n + 3 : n]));
#endif
        UNROLL for (; n < N; n++) v[row * PITCH + n] = sum(a[n]);
    }
}

template <int ROWS, int N, int SHARES>
INLINE void some_rows(const Call* c, const E::T* x, int rows, const Source& s, float* v) {
    if constexpr (ROWS > 0) {
        if (rows >= ROWS) dense_tile<ROWS, N, SHARES>(c, x, s, v);
        else some_rows<ROWS - 1, N, SHARES>(c, x, rows, s, v);
    }
}

// y for rows [m, m + rows), which begin at `x`, in tiles of ROWS, and columns [begin, end)
template <int ROWS, int SHARES>
__attribute__((noinline)) static void columns(const Call* c, const E::T* x, long m, int rows,
                                              long begin, long end) {
    const Args* g = c->args;
    const long K = g->in_features, N = g->out_features, groups = GROUPED ? K / g->group : 0;
    typedef Planes<ROWS, SHARES> P;
    const int PLANES = P::VALUE, AHEAD = P::AHEAD;
    for (long column = begin; column < end; column += GROUP) {
        const int size = end - column < GROUP ? end - column : GROUP;
        float v[BLOCK_ROWS * GROUP + LANES], sums[BLOCK_ROWS * PITCH];
        const int apart = P::FAR ? size / PLANES : 1;
        for (int n = 0, next; n < size; n = next) {
            // Columns behind the last whole tile are one plane each, PLANES times.
            const bool whole = P::FAR ? n < apart : n + PLANES <= size;
            const bool more = column + n + AHEAD + PLANES <= N;
            const W::T* w = (const W::T*)g->w + (column + n) * g->w_stride;
            Source s = {w, more ? w + AHEAD * g->w_stride : w, whole ? apart * g->w_stride : 0,
                        (column + n) * groups, whole ? apart * groups : 0};
            if constexpr (ROWS < TILE || SHARES == 1)
                dense_tile<ROWS, PLANES, SHARES>(c, x, s, sums);
            else
                for (int row = 0; row < rows; row += ROWS) {
                    some_rows<ROWS, PLANES, SHARES>(c, x + row * c->stride, rows - row, s,
                                                    sums + row * PITCH);
                    s.ahead += PLANES * K / (SHARES ? SHARES : 1);
                }
            for (int row = 0; row < rows; row++)
                for (int i = 0; i < (whole ? PLANES : 1); i++)
                    v[row * GROUP + n + i * apart] = sums[row * PITCH + i];
            next = n + (whole && !P::FAR ? PLANES : 1);
            if (P::FAR && next == apart) next *= PLANES;
        }
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
        if (rows < ROWS) return tile<ROWS - 1>(c, x, rows, m, begin, end);
        if (m) return columns<ROWS, 0>(c, x, m, rows, begin, end);
        if constexpr (ROWS == TILE && BLOCK_ROWS > TILE) {
            if (rows > 2 * ROWS) return columns<ROWS, 4>(c, x, m, rows, begin, end);
            if (rows > ROWS) return columns<ROWS, 2>(c, x, m, rows, begin, end);
        }
        columns<ROWS, 1>(c, x, m, rows, begin, end);
    }
}

// x in the type that it is multiplied in, its rows filled up with zeros.
INLINE void pack_row(const Call* c, long m, E::T* out) {
    const long K = c->args->in_features;
    const X::T* x = (const X::T*)c->args->x + m * c->args->x_stride;
    long k = 0;
#if SPLIT
    for (; k < K; k += D::STEP) {
        const bool whole = k + D::STEP <= K;
        const bits both = whole ? load_raw<bits>(x + k) : load_first<bits>(x + k, (K - k) * sizeof *x);
        const vec parts[] = {even(both), odd(both)};
        memcpy(out + k, parts, sizeof parts);
    }
#elif WIDENED
    for (; k + LANES <= K; k += LANES) {
        vec part = X::widen(load_raw<X::raw>(x + k));
        memcpy(out + k, &part, sizeof part);
    }
    for (; k < K; k++) out[k] = X::one(x[k]);
#else
    memcpy(out, x, K * sizeof *x);
    k = K;
#endif
    memset(out + k, 0, (c->stride - k) * sizeof *out);
#if PACKED
    sum_groups(c->args, out, (float*)(out + K));
#endif
}
static void pack_rows(int64_t first, int64_t last, void* context) {
    const Call* c = (const Call*)context;
    for (int64_t m = first; m < last; m++) pack_row(c, m, c->x + m * c->stride);
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
    E::T* x = c->x + first * c->copies / c->units * M * c->stride;
    if (c->copies > 1)
        for (long m = 0; m < M; m++) pack_row(c, m, x + m * c->stride);
    for (int64_t unit = first; unit < last; unit++) {
        const long begin = unit * c->columns, end = begin + c->columns < N ? begin + c->columns : N;
        for (long m = 0; m < M; m += BLOCK_ROWS) {
            const int rows = M - m < BLOCK_ROWS ? M - m : BLOCK_ROWS;
            tile<TILE>(c, x + m * c->stride, rows, m, begin, end);
        }
        if (e && unit + 1 == last) run_after(c, e, pending, end);
        else if (e && end - pending >= EPILOGUE_COLUMNS) {
            const long stop = end - (end - pending) % (2 * LANES);  // whole pairs of vectors
            run_after(c, e, pending, stop);
            pending = stop;
        }
    }
}

extern "C" int32_t lorafx_kernel(const Args* g) {
    const long M = g->rows, K = g->in_features, N = g->out_features;
    if (!M) return 0;
    const bool serial = g->threads == 1 || M * K * N < SERIAL_WORK;
    const long sums = PACKED ? K / g->group * sizeof(float) / sizeof(E::T) : 0;  // behind a row
    // Writing to lines of a cache that other threads have read takes longer than a copy: one for each.
    Call c = {g, 0, row_stride(K + sums), serial || M > 2 * TILE ? 1 : g->threads, GROUP, 0, 0, 0};
    void* space = malloc(c.copies * M * c.stride * sizeof(E::T) + 64);
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
