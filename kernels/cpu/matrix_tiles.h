// Tiles of a product in bfloat16 on a CPU with matrix tiles (AMX): 16 rows of W times up to 16 rows of x.
//
// A tile is 16 rows of 64 bytes. One of W is 32 columns of it, as they lie in memory if they are bfloat16,
// and one of x is 16 pairs of columns with all rows side by side; their product is 16 columns of y with all
// rows side by side.
//
// The CPU multiplies 16 rows faster than memory brings W, so fewer need no tiles of their own. Integers are widened into
// buffers, as is what is less than a tile. Before this text stand the preamble that dense.cpp describes,
// vectors.h, epilogue.h, dense_args.h, dense_call.h and amx.h.

// Columns of y computed at a time, in two tiles.
static const int GROUP = 32, MOST_GROUPS = 4;

// 0, 1: of W; 2, 3: sums; 4: of x
INLINE Shapes shapes_of(const Args* g) {
    const uint16_t narrow = 4 * tile_rows(g);
    return {1, 0, {}, {64, 64, narrow, narrow, narrow}, {16, 16, 16, 16, 16}};
}

// `size` rows of W from `n`, of which there may be less than 16, and columns from k
INLINE void widen_tile(const Args* g, E::T* tile, long n, int size, long k) {
    const long K = g->in_features, count = K - k < D::STEP ? K - k : (long)D::STEP;
    const long groups = GROUPED ? K / g->group : 0, at = GROUPED ? k / g->group : 0;
    auto row = [&](int i, bool whole) __attribute__((always_inline)) {
        const W::T* w = (const W::T*)g->w + (n + i) * g->w_stride + k;
        W::T last[D::STEP] = {};
        if (!whole) w = (const W::T*)memcpy(last, w, count * sizeof *w);
        const D::loaded step = weights(w, factors(g, (n + i) * groups + at));
        memcpy(tile + i * D::STEP, &step, sizeof step);
    };
    if (size < 16) memset(tile, 0, 16 * D::STEP * sizeof *tile);
    if (size < 16 || count < D::STEP)
        for (int i = 0; i < 16 && i < size; i++) row(i, false);
    else
        for (int i = 0; i < 16; i++) row(i, true);
}

// v[row * GROUP + n] = W[column + n] · x[row] for `rows` rows and `size` columns
template <int, int SHARES>  // as in planes.h
INLINE void dot_products(const Call* c, const E::T* x, int rows, long column, int size, float* v) {
    const Args* g = c->args;
    const long K = g->in_features, bytes = g->w_stride * sizeof(W::T), pairs = tile_rows(g);
    const W::T* w = (const W::T*)g->w + column * g->w_stride;
    // W streams from memory: what comes next, into the second cache and in the order of addresses
    const char* ahead = (const char*)(column + 2 * GROUP <= g->out_features ? w + GROUP * g->w_stride : w);
    E::T widened[2][2][16 * D::STEP];
    zero_tile<2>(), zero_tile<3>();
    for (long k = 0; k < K; k += D::STEP) {
        if (SHARES)
            UNROLL for (int i = 0; i < GROUP * D::STEP * (int)sizeof *w; i += 64)
                __builtin_prefetch(ahead + k * GROUP * sizeof *w + i, 0, LOCALITY);
        if (!STORED && size == GROUP && k + D::STEP <= K) {
            load_tile<0>(w + k, bytes);
            load_tile<1>((const char*)(w + k) + 16 * bytes, bytes);
        } else {
            E::T (*tiles)[16 * D::STEP] = widened[k / D::STEP % 2];
            widen_tile(g, tiles[0], column, size, k);
            widen_tile(g, tiles[1], column + 16, size - 16, k);
            load_tile<0>(tiles[0], 64);
            load_tile<1>(tiles[1], 64);
        }
        load_tile<4>(x + k * pairs, 4 * pairs);
        multiply_tiles<2, 0, 4>(), multiply_tiles<3, 1, 4>();
    }
    float sums[GROUP * TILE];
    store_tile<2>(sums, 4 * pairs);
    store_tile<3>(sums + 16 * pairs, 4 * pairs);
    for (int row = 0; row < rows; row++)
        for (int n = 0; n < GROUP; n++) v[row * GROUP + n] = sums[n * pairs + row];
}

// How x is packed: pairs of columns, up to TILE rows of each side by side.
INLINE long row_stride(long K) { return (K + D::STEP - 1) / D::STEP * D::STEP; }
INLINE long place(const Call* c, long m) { return m / TILE * TILE * c->stride + m % TILE * 2; }

INLINE void pack_row(const Call* c, long m, E::T* out) {
    const long K = c->args->in_features, apart = 2 * tile_rows(c->args);
    const X::T* x = (const X::T*)c->args->x + m * c->args->x_stride;
    long k = 0;
    for (; k + 2 <= K; k += 2, out += apart) memcpy(out, x + k, 2 * sizeof *out);
    for (; k < c->stride; k += 2, out += apart) out[0] = k < K ? x[k] : 0, out[1] = 0;
}
