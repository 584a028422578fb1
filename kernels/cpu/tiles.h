// Tiles of a generated CPU kernel: some rows times some planes of A, some rows times some columns.
//
//     shrink   v[row] = scale · A x[row]          expand   y[row] += v[row] B
//
// Before this text stand the generated preamble and vectors.h. A is (planes, K) and B (rank, ...),
// their planes A_STRIDE and B_STRIDE apart. Sums are float32. The order of additions behind one
// element of v or y depends on K and the rank alone, never on the shape of the tile that computed
// it, so a row's result is bit-equal whatever its neighbours are.

// v[row][plane] = scale · (A[plane] · x[row]) for ROWS × N planes, `apart` from one another; `ahead` are
// the N that come next, or null where the CPU prefetches them itself
template <int ROWS, int N>
INLINE void shrink_tile(const X::T* const* x, const W::T* a, const W::T* ahead, float scale,
                        float* v, long apart = 1) {
    typedef Dot<X, W> D;
    vec acc[ROWS][N] = {};
    long k = 0;
    for (; k + D::STEP <= K; k += D::STEP) {
        D::left xs[ROWS];
        UNROLL for (int row = 0; row < ROWS; row++) xs[row] = load_raw<D::left>(x[row] + k);
        UNROLL for (int n = 0; n < N; n++) {
            // A streams from memory: prefetch the next planes
            if (ahead && ROWS <= PREFETCH_ROWS)
                __builtin_prefetch(ahead + n * A_STRIDE + k, 0, N == 1 ? 3 : 2);
            D::right as = load_raw<D::right>(a + n * apart * A_STRIDE + k);
            UNROLL for (int row = 0; row < ROWS; row++)
                acc[row][n] = D::add(acc[row][n], xs[row], as);
        }
    }
    if (K % D::STEP) {
        const long tail = K % D::STEP;
        D::left xs[ROWS];
        UNROLL for (int row = 0; row < ROWS; row++)
            xs[row] = load_first<D::left>(x[row] + k, tail * sizeof(X::T));
        UNROLL for (int n = 0; n < N; n++) {
            D::right as = load_first<D::right>(a + n * apart * A_STRIDE + k, tail * sizeof(W::T));
            UNROLL for (int row = 0; row < ROWS; row++)
                acc[row][n] = D::add(acc[row][n], xs[row], as);
        }
    }
    UNROLL for (int row = 0; row < ROWS; row++) {
        int n = 0;
#if SUM_FOUR
        if (apart == 1)
            UNROLL for (; n + 4 <= N; n += 4) {
                vec* p = acc[row] + n;
                vec four = scale * sum_four(p[0], p[1], p[2], p[3]);
                memcpy(v + row * R + n, &four, 16);
            }
#endif
        for (; n < N; n++) v[row * R + n * apart] = scale * sum(acc[row][n]);
    }
}

// y[row][c] += Σ_k v[row][k] B[k][c] for ROWS × N pairs of vectors; `last` columns if not WHOLE.
// CHAINED: products are added to y one after another, so calls for parts of the rank have its bits.
template <int ROWS, int N, bool WHOLE>
INLINE void expand_tile(Y::T* const* y, long column, const W::T* b, const float* v, int rank,
                        long last) {
    typedef Columns<W, Y> C;
    const long bytes = WHOLE ? sizeof(typename C::part) : last * sizeof(Y::T);
    auto read = [&](int row, int n) __attribute__((always_inline)) {
        Y::T* p = y[row] + column + n * 2 * LANES;
        return C::widen(WHOLE ? load_raw<typename C::part>(p) : load_first<typename C::part>(p, bytes));
    };
    Pair acc[ROWS][N] = {};
    if (CHAINED)
        UNROLL for (int row = 0; row < ROWS; row++)
            UNROLL for (int n = 0; n < N; n++) acc[row][n] = read(row, n);
    for (int k = 0; k < rank; k++) {
        Pair bs[N];
        UNROLL for (int n = 0; n < N; n++) {
            const W::T* p = b + k * B_STRIDE + n * 2 * LANES;
            if (ROWS <= PREFETCH_ROWS)
                for (int line = 0; line < 2 * LANES * (int)sizeof *p; line += 64)
                    __builtin_prefetch((const char*)p + AHEAD + line, 0, 2);
            bs[n] = C::widen_bank(WHOLE ? load_raw<C::bank>(p)
                                        : load_first<C::bank>(p, last * sizeof *p));
        }
        UNROLL for (int row = 0; row < ROWS; row++) {
            UNROLL for (int n = 0; n < N; n++) {
                acc[row][n].first += v[row * R + k] * bs[n].first;
                acc[row][n].second += v[row * R + k] * bs[n].second;
            }
        }
    }
    UNROLL for (int row = 0; row < ROWS; row++) {
        UNROLL for (int n = 0; n < N; n++) {
            Pair old = CHAINED ? Pair{} : read(row, n), a = acc[row][n];
            C::part out = C::narrow(CHAINED ? a : Pair{old.first + a.first, old.second + a.second});
            memcpy(y[row] + column + n * 2 * LANES, &out, bytes);
        }
    }
}

// `next` is the A that is read after this, to be prefetched, or null.
template <int ROWS>
__attribute__((noinline)) static void shrink(const X::T* const* x, const W::T* a, float scale,
                                             float* v, int first, int rank,
                                             const W::T* next = 0) {
    const bool FEW = STREAMS && ROWS <= Dot<X, W>::STREAM;
    const int N = FEW ? 1 : ROWS * PLANES * 2 > TILE * PLANES ? PLANES : 2 * PLANES;  // the same registers
    int p = first;
    if constexpr (FEW && STREAMS > 1) {
        const int apart = (rank - first) / STREAMS;
        for (; p < first + apart; p++)
            shrink_tile<ROWS, STREAMS>(x, a + p * A_STRIDE, 0, scale, v + p, apart);
        p = first + apart * STREAMS;
    } else for (; p + N <= rank; p += N) {
        const long later = p + (FEW ? STREAM_AHEAD : N);
        const W::T* ahead = later < rank ? a + later * A_STRIDE
                            : next       ? next + (later - rank) * A_STRIDE
                                         : a + p * A_STRIDE;
        shrink_tile<ROWS, N>(x, a + p * A_STRIDE, ahead, scale, v + p);
    }
    for (; p < rank; p++)
        shrink_tile<ROWS, 1>(x, a + p * A_STRIDE, a + (p + 1) * A_STRIDE, scale, v + p);
}

template <int ROWS>
__attribute__((noinline)) static void expand(Y::T* const* y, long column, const W::T* b,
                                             const float* v, int rank, long size) {
    const long UNIT = 2 * LANES;
    long c = 0;
    for (; c + PAIRS * UNIT <= size; c += PAIRS * UNIT)
        expand_tile<ROWS, PAIRS, true>(y, column + c, b + c, v, rank, 0);
    for (; c + UNIT <= size; c += UNIT)
        expand_tile<ROWS, 1, true>(y, column + c, b + c, v, rank, 0);
    if (c < size) expand_tile<ROWS, 1, false>(y, column + c, b + c, v, rank, size - c);
}

// CALL<ROWS>(work, m) over rows [first, last), in tiles as large as fit
#define FOR_TILES(CALL, work, first, last)                                     \
    for (long m = first; m < last;) {                                          \
        if (last - m >= TILE) CALL<TILE>(work, m), m += TILE;                  \
        else if (TILE > 4 && last - m >= 4) CALL<4>(work, m), m += 4;          \
        else if (TILE > 2 && last - m >= 2) CALL<2>(work, m), m += 2;          \
        else CALL<1>(work, m), m += 1;                                         \
    }
