// How x is packed for tiles of vectors and of packed integers: row by row. Before this text stand the
// preamble that dense.cpp describes, vectors.h, epilogue.h, dense_args.h, dense_call.h and the tiles.

// Elements between rows of x: whole steps, and an odd number of lines of a cache. Rows that lie 4 KB
// apart would fight for the same few of them.
INLINE long row_stride(long K) {
    const long line = 64 / sizeof(E::T), whole = D::STEP > line ? (long)D::STEP : line;
    const long lines = (K + whole - 1) / whole * (whole / line);
    return (lines | 1) * line;
}
INLINE long place(const Call* c, long m) { return m * c->stride; }

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
