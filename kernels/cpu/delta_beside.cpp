// The delta of delta.cpp, whose text stands before this and epilogue.h, in the region of the product y.
//
//     before   v = scale · A x, for some rows, one range, some planes
//     after    y += v B, for all rows, some columns, which the thread has just written
//
// Sums are those of delta.cpp, so y has the same bits.

// Rows of one slot that share a unit.
static const long CHUNK = 2 * TILE;

struct Beside {
    Call call;  // v is (active, RANGES, R); chunks of rows begin at `starts`, and end at the next one's
    int64_t chunks;
};

struct Planes {
    Call* call;
    int range, first, last;
};
template <int ROWS> INLINE void shrink_rows(const Planes* u, long p) {
    Call* c = u->call;
    const Args* g = c->args;
    const int slot = c->owner[p];
    float v[ROWS * R];
    Tile<X::T, ROWS> x((X::T*)g->x, g->x_rows, c->order + p, 0, K);
    if (no_room(c, x)) return;
    float scale = g->scales[(long)slot * G + SIBLING[u->range]];
    shrink<ROWS>(x.at, factor_a(g, slot, u->range), scale, v, u->first, u->last);
    for (int row = 0; row < ROWS; row++)
        memcpy(c->v + ((p + row) * RANGES + u->range) * R + u->first, v + row * R + u->first,
               (u->last - u->first) * sizeof *v);
}

static void before(void* context, int64_t unit) {
    Call* c = &((Beside*)context)->call;
    const int range = unit / PLANE_BLOCKS % RANGES, first = unit % PLANE_BLOCKS * 2 * PLANES;
    const int32_t* chunk = c->starts + unit / PLANE_BLOCKS / RANGES;
    const int rank = rank_of(c->args, c->owner[*chunk], range);
    const int most = 2 * PLANES, last = rank - first < most ? rank : first + most;
    const Planes planes = {c, range, first, last};
    if (first < rank) FOR_TILES(shrink_rows, &planes, chunk[0], chunk[1])
}

struct Part {  // columns [begin, end) of a range
    Call* call;
    int range;
    long begin, end;
};
template <int ROWS> INLINE void expand_rows(const Part* u, long p) {
    Call* c = u->call;
    const Args* g = c->args;
    const int slot = c->owner[p], rank = rank_of(g, slot, u->range);
    const long size = u->end - u->begin;
    if (!rank) return;
    float v[ROWS * R];
    for (int row = 0; row < ROWS; row++)
        memcpy(v + row * R, c->v + ((p + row) * RANGES + u->range) * R, rank * sizeof *v);
    Tile<Y::T, ROWS> y((Y::T*)g->y, g->y_rows, c->order + p, START[u->range] + u->begin, size);
    if (no_room(c, y)) return;
    expand<ROWS>(y.at, 0, factor_b(g, slot, u->range) + u->begin, v, rank, size);
    y.put_back();
}

static void after(void* context, int64_t begin, int64_t end) {
    Beside* b = (Beside*)context;
    for (int j = 0; j < RANGES; j++) {
        const long first = begin - START[j], last = end - START[j];
        const Part part = {&b->call, j, first < 0 ? 0 : first, last < SIZE[j] ? last : SIZE[j]};
        if (part.begin >= part.end) continue;
        for (int64_t i = 0; i < b->chunks; i++)
            FOR_TILES(expand_rows, &part, b->call.starts[i], b->call.starts[i + 1])
    }
}

// Fills in `e`; if the result is DONE, lorafx_end releases it.
extern "C" int32_t lorafx_begin(const Args* g, Epilogue* e) {
    const int64_t total = g->y_rows->count;
    if (total && g->n == 0) return BAD_SLOT;
    const size_t words = total * RANGES * R + 3 * total + 1 + sorting_space(g);
    Beside* b = (Beside*)malloc(sizeof *b + words * sizeof(int32_t));
    if (!b) return NO_MEMORY;
    float* v = (float*)(b + 1);
    int32_t* order = (int32_t*)(v + total * RANGES * R);
    *b = {{g, order, order + total, 0, v, order + 2 * total, 1, DONE}, 0};
    Call* c = &b->call;
    if (total) c->status = sort_rows(c, c->starts + total + 1);
    if (c->status != DONE) {
        const int32_t status = c->status;
        free(b);
        return status;
    }
    for (int64_t p = 0; p < c->active; p++) {
        const bool more = p && c->owner[p] == c->owner[p - 1];
        if (!more || p - c->starts[b->chunks - 1] == CHUNK) c->starts[b->chunks++] = p;
    }
    c->starts[b->chunks] = c->active;
    *e = {b, b->chunks * RANGES * PLANE_BLOCKS, before, after};
    return DONE;
}

extern "C" int32_t lorafx_end(Epilogue* e) {
    const int32_t status = ((Beside*)e->context)->call.status;
    free(e->context);
    return status;
}
