// What the tiles of dense.cpp work on: a call, and W as it is multiplied, a step at a time. Before this text
// stand the preamble that dense.cpp describes, vectors.h, epilogue.h and dense_args.h.

struct Call {
    const Args* args;
    E::T* x;  // `copies` of all rows, as pack_row writes them
    long stride, copies, space;  // elements of a row; copies; elements of a copy
    long columns, units;  // columns of a unit of work, and how many units there are
    int64_t begun, done;  // units of the epilogue
};

#if MATRIX
// Rows of x in a tile.
INLINE long tile_rows(const Args* g) { return g->rows < TILE ? g->rows : TILE; }
#endif

#if !PACKED
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
