// Tiles of a product on a CPU: some rows of x times some planes of W, whose sums are vectors. Before this
// text stand the preamble that dense.cpp describes, vectors.h, epilogue.h, dense_args.h and dense_call.h.

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

INLINE void put_four(float* v, vec four) { memcpy(v, &four, 16); }

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
            // W streams from memory: tiles prefetch planes ahead, in the order of addresses unless x
            // fills the first cache
            if (AHEAD && (SHARES > 1 || ROWS * sizeof(E::T) <= 24))
                UNROLL for (int n = 0; n * SHARES < N; n++)
                    __builtin_prefetch(s.ahead + k * N / SHARES + n * LINE, 0, LOCALITY);
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

// v[row * GROUP + n] = W[column + n] · x[row] for `rows` rows, in tiles of ROWS, and `size` columns
template <int ROWS, int SHARES>
INLINE void dot_products(const Call* c, const E::T* x, int rows, long column, int size, float* v) {
    const Args* g = c->args;
    const long K = g->in_features, N = g->out_features, groups = GROUPED ? K / g->group : 0;
    typedef Planes<ROWS, SHARES> P;
    const int PLANES = P::VALUE, AHEAD = P::AHEAD;
    float sums[BLOCK_ROWS * PITCH];
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
}
