// LoRA delta on a CPU: y[m, range j] += (scale · A[s, i_j] x[m]) B[s, :r, range j], s = slot of row m.
//
// Before this text stand the generated preamble, vectors.h, tiles.h, rows.h and delta_args.h. The
// preamble sets the parameters: element types X, W (bank), Y; LANES; K, R, G, COLUMNS; N; RANGES with SIBLING, OFFSET,
// SIZE, START; EMBEDDING; TILE (rows of a tile), PLANES and PAIRS (accumulators a row of a full tile).
// With ROUTED, row m is of expert e, and s is e · S + the slot of its request, S slots an expert.
//
// Sums are float32. Rows are sorted by slot, so that rows of one adapter share the loads of A and B;
// the order of additions behind one element of v or y depends on K and r alone, never on the
// shape of the tile that computed it, so a row's result is bit-equal whatever its neighbours are.

// ---- rows ----------------------------------------------------------------------------------------

struct Call {
    const Args* args;
    int32_t* order;  // active rows, sorted by slot
    int32_t* owner;  // owner[p] is the slot of row order[p]
    int64_t active;
    float* v;         // only when one row's work is split
    int32_t* starts;  // where each thread's share begins, and after the last its end
    int64_t parts;    // of a row that are shared out: its ranges one by one, or 1 for all together
    int32_t status;
};

template <class TILE_OF_ROWS> INLINE bool no_room(Call* c, const TILE_OF_ROWS& tile) {
    if (!tile.at[0]) c->status = NO_MEMORY;
    return !tile.at[0];
}

INLINE const W::T* factor_a(const Args* g, int slot, int range) {
    return (const W::T*)g->a + slot * g->slot_a + SIBLING[range] * K;
}
INLINE const W::T* factor_b(const Args* g, int slot, int range) {
    return (const W::T*)g->b + slot * g->slot_b + OFFSET[range];
}
INLINE int rank_of(const Args* g, int slot, int range) {
    int rank = g->ranks[(long)slot * G + SIBLING[range]];
    return rank < 0 ? 0 : rank > R ? R : rank;
}

// Whether the slot's adapter has factors for any of the ranges.
INLINE bool has_factors(const Args* g, int slot) {
    for (int j = 0; j < RANGES; j++)
        if (rank_of(g, slot, j)) return true;
    return false;
}

// The first range of equal v: its factors A, rank and scale are those of `range`.
INLINE int source_of(const Args* g, int slot, int range) {
#if ROUTED
    int alike = g->alike[(long)slot * G + SIBLING[range]];
    for (int j = 0; j < range; j++)
        if (SIBLING[j] == alike) return j;
#endif
    return range;
}

#if EMBEDDING
INLINE bool lookup(const Args* g, int slot, long m, int rank, float* v) {
    m = row_offset(g->x_rows, m);
    int64_t id = g->wide_ids ? ((const int64_t*)g->x)[m] : ((const int32_t*)g->x)[m];
    if (id < 0 || id >= g->vocabulary) return false;
    const W::T* a = (const W::T*)g->a + slot * g->slot_a + id * g->token_a;
    float scale = g->scales[(long)slot * G];
    for (int k = 0; k < rank; k++) v[k] = scale * W::one(a[k]);
    return true;
}
#endif

#if !EMBEDDING
// The A that is read after that of `range` for the row before order[p]; null if it is the same.
INLINE const W::T* next_a(const Call* c, long p, int range) {
    const Args* g = c->args;
    int slot = c->owner[p - 1];
    if (c->parts > 1 && p < c->active && c->owner[p] == slot) return 0;
    for (int j = range + 1; j < RANGES; j++)
        if (source_of(g, slot, j) == j) return factor_a(g, slot, j);
    return p < c->active && c->owner[p] != slot ? factor_a(g, c->owner[p], 0) : 0;
}
#endif

// ROWS rows from order[p] on, ranges [from, to)
template <int ROWS> INLINE void tile(Call* c, long p, int from, int to) {
    const Args* g = c->args;
    int slot = c->owner[p];
    float v[ROWS * R];
    Tile<Y::T, ROWS> ys((Y::T*)g->y, g->y_rows, c->order + p, 0, N);
    if (no_room(c, ys)) return;
    Y::T* const* y = ys.at;
#if EMBEDDING
    int rank = rank_of(g, slot, 0);
    for (int row = 0; row < ROWS; row++)
        if (!lookup(g, slot, c->order[p + row], rank, v + row * R)) {
            c->status = BAD_ID;
            return;
        }
    expand<ROWS>(y, 0, factor_b(g, slot, 0), v, rank, SIZE[0]);
#else
    Tile<X::T, ROWS> x((X::T*)g->x, g->x_rows, c->order + p, 0, K);
    if (no_room(c, x)) return;
    for (int j = from, computed = -1; j < to; j++) {
        int rank = rank_of(g, slot, j);
        if (!rank) continue;
        float scale = g->scales[(long)slot * G + SIBLING[j]];
        const W::T* b = factor_b(g, slot, j);
        if (ROWS <= PREFETCH_ROWS)  // the first columns, which expand_tile's prefetch misses
            for (int k = 0; k < rank; k++)
                for (int i = 0; i < AHEAD; i += 64)
                    __builtin_prefetch((const char*)(b + k * COLUMNS) + i, 0, 2);
        if (j == from || source_of(g, slot, j) != computed) {
            shrink<ROWS>(x.at, factor_a(g, slot, j), scale, v, 0, rank, next_a(c, p + ROWS, j));
            computed = j;
        }
        expand<ROWS>(y, START[j], b, v, rank, SIZE[j]);
    }
#endif
    ys.put_back();
}

// Runs as many rows as fit into a tile, of `count` rows of a slot; returns their number.
INLINE long run_tile(Call* c, long p, long count, int from, int to) {
    if (count >= TILE) return tile<TILE>(c, p, from, to), TILE;
    if (TILE > 4 && count >= 4) return tile<4>(c, p, from, to), 4;
    if (TILE > 2 && count >= 2) return tile<2>(c, p, from, to), 2;
    return tile<1>(c, p, from, to), 1;
}

static void run_rows(int64_t begin, int64_t end, void* context) {
    Call* c = (Call*)context;
    while (begin < end) {
        long stop = begin + 1;
        while (stop < end && stop - begin < TILE && c->owner[stop] == c->owner[begin]) stop++;
        begin += run_tile(c, begin, stop - begin, 0, RANGES);
    }
}

#if !EMBEDDING && !ROUTED
// Places [begin, end): all rows of the first slot with their first range, again with the second, ...
static void run_ranges(int64_t begin, int64_t end, void* context) {
    Call* c = (Call*)context;
    while (begin < end) {
        long first = begin / RANGES, last = first + 1;
        while (first > 0 && c->owner[first - 1] == c->owner[last - 1]) first--;
        while (last < c->active && c->owner[last] == c->owner[first]) last++;
        const long range = (begin - first * RANGES) / (last - first);
        const long row = first + (begin - first * RANGES) % (last - first);
        const long count = last - row < end - begin ? last - row : end - begin;
        begin += run_tile(c, row, count, range, range + 1);
    }
}
#endif

// Rows of one slot share a load of its factors, which costs as much as the work of LOAD_ROWS rows. In
// a step of decoding, some adapters have several rows and others one, so equal numbers of rows would
// be unequal work. With few slots, threads take them range by range.

// Deals rows to shares that each cost at most `most` rows; returns whether `shares` suffice.
static bool share_out(Call* c, int64_t shares, int64_t most) {
    int64_t share = 0, room = most, p = 0, at = 0;
    c->starts[0] = 0;
    while (p < c->active) {
        int64_t stop = p + 1;
        while (stop < c->active && c->owner[stop] == c->owner[p]) stop++;
        for (int64_t part = 0; part < c->parts; part++)
            for (int64_t left = stop - p; left > 0;) {
                if (room <= LOAD_ROWS) {
                    if (++share == shares) return false;
                    c->starts[share] = at;
                    room = most;
                }
                int64_t taken = left < room - LOAD_ROWS ? left : room - LOAD_ROWS;
                at += taken;
                left -= taken;
                room -= LOAD_ROWS + taken;
            }
        p = stop;
    }
    while (share < shares) c->starts[++share] = at;
    return true;
}

// Deals rows by the smallest `most` that suffices, found by bisection.
static void share_rows(Call* c, int64_t shares) {
    int64_t low = LOAD_ROWS + (c->active * c->parts + shares - 1) / shares, high = low;
    while (!share_out(c, shares, high)) low = high + 1, high *= 2;
    while (low < high) {
        int64_t most = (low + high) / 2;
        if (share_out(c, shares, most)) high = most;
        else low = most + 1;
    }
    share_out(c, shares, high);
}

static void run_shares(int64_t begin, int64_t end, void* context) {
    Call* c = (Call*)context;
    for (; begin < end; begin++) {
        const int64_t first = c->starts[begin], last = c->starts[begin + 1];
#if !EMBEDDING && !ROUTED
        if (c->parts > 1) run_ranges(first, last, context);
        else
#endif
            run_rows(first, last, context);
    }
}

#if !EMBEDDING
// For fewer rows than threads could share: threads take parts of a row's planes, then of its columns.
static const int PLANE_BLOCKS = (R + 2 * PLANES - 1) / (2 * PLANES);

static void run_planes(int64_t begin, int64_t end, void* context) {
    Call* c = (Call*)context;
    const Args* g = c->args;
    for (int64_t unit = begin; unit < end; unit++) {
        int block = unit % PLANE_BLOCKS, j = unit / PLANE_BLOCKS % RANGES;
        long p = unit / PLANE_BLOCKS / RANGES;
        int slot = c->owner[p], rank = rank_of(g, slot, j), first = block * 2 * PLANES;
        if (source_of(g, slot, j) != j) continue;
        int last = first + 2 * PLANES < rank ? first + 2 * PLANES : rank;
        Tile<X::T, 1> x((X::T*)g->x, g->x_rows, c->order + p, 0, K);
        if (no_room(c, x)) return;
        float scale = g->scales[(long)slot * G + SIBLING[j]];
        shrink<1>(x.at, factor_a(g, slot, j), scale, c->v + (p * RANGES + j) * R, first, last);
    }
}

static void run_columns(int64_t begin, int64_t end, void* context) {
    Call* c = (Call*)context;
    const Args* g = c->args;
    for (int64_t unit = begin; unit < end; unit++) {
        int j = 0;
        long p = unit / COLUMN_BLOCKS, block = unit % COLUMN_BLOCKS;
        while (block >= (SIZE[j] + BLOCK - 1) / BLOCK) block -= (SIZE[j++] + BLOCK - 1) / BLOCK;
        int slot = c->owner[p], rank = rank_of(g, slot, j);
        if (!rank) continue;
        long first = block * BLOCK, size = SIZE[j] - first < BLOCK ? SIZE[j] - first : BLOCK;
        Tile<Y::T, 1> y((Y::T*)g->y, g->y_rows, c->order + p, START[j] + first, size);
        if (no_room(c, y)) return;
        const float* v = c->v + (p * RANGES + source_of(g, slot, j)) * R;
        expand<1>(y.at, 0, factor_b(g, slot, j) + first, v, rank, size);
        y.put_back();
    }
}
#endif

#if ROUTED
// The expert of row m, or EXPERTS for none; m ascends between calls, and `e` is the last result.
INLINE int expert_of(const Args* g, int64_t m, int e) {
    if (!g->ends) {
        int64_t id = g->wide_experts ? ((const int64_t*)g->experts)[m] : ((const int32_t*)g->experts)[m];
        return id >= 0 && id < EXPERTS ? (int)id : (int)EXPERTS;
    }
    while (e < EXPERTS && (g->wide_experts ? ((const int64_t*)g->experts)[e]
                                           : ((const int32_t*)g->experts)[e]) <= m) e++;
    return e;
}

// Words of memory that sort_rows needs beside `order` and `owner`.
static int64_t sorting_space(const Args* g) {
    return 2 * g->y_rows->count + g->capacity / EXPERTS + EXPERTS + 2;
}

// Sorts the active rows by expert, those of an expert by slot: two counting sorts in turn, so that no
// table has slots times experts entries.
static int sort_rows(Call* c, int32_t* space) {
    const Args* g = c->args;
    const int64_t total = g->y_rows->count, slots = g->capacity / EXPERTS;
    int32_t *owner = space, *first = space + total, *by_slot = space + 2 * total;
    int32_t* by_expert = by_slot + slots + 1;
    if (g->rows == 0)
        for (int64_t j = 1; j < g->n; j++)
            if (g->slots[j] != g->slots[0]) return MIXED;
    memset(by_slot, 0, (slots + EXPERTS + 2) * sizeof *by_slot);
    const int64_t rows = g->rows ? g->rows : total;
    int e = 0;
    for (int64_t m = 0, j = 0; m < total; j = j + 1 == g->n ? 0 : j + 1)
        for (int64_t stop = m + rows < total ? m + rows : total; m < stop; m++) {
            int slot = g->slots[j];
            if (slot >= slots) return BAD_SLOT;
            e = expert_of(g, m, e);
            const bool routed = slot >= 0 && e < EXPERTS && has_factors(g, e * (int)slots + slot);
            owner[m] = routed ? e * (int)slots + slot : -1;
            if (owner[m] >= 0) by_slot[slot + 1]++, by_expert[e + 1]++;
        }
    for (int64_t s = 0; s < slots; s++) by_slot[s + 1] += by_slot[s];
    for (int64_t s = 0; s < EXPERTS; s++) by_expert[s + 1] += by_expert[s];
    c->active = by_slot[slots];
    for (int64_t m = 0; m < total; m++)
        if (owner[m] >= 0) first[by_slot[owner[m] % slots]++] = m;
    for (int64_t i = 0; i < c->active; i++) {
        int32_t m = first[i], p = by_expert[owner[m] / slots]++;
        c->order[p] = m;
        c->owner[p] = owner[m];
    }
    return DONE;
}
#else
static int64_t sorting_space(const Args* g) { return g->capacity + 1; }

// Sorts the active rows by slot: a counting sort over requests, `rows` rows at a time. Rows whose
// adapter has no factors here are not active, so a site that no adapter touches costs nothing more.
static int sort_rows(Call* c, int32_t* count) {
    const Args* g = c->args;
    const int64_t total = g->y_rows->count;
    int64_t rows = g->rows;
    if (rows == 0) {
        for (int64_t j = 1; j < g->n; j++)
            if (g->slots[j] != g->slots[0]) return MIXED;
        rows = total;
    }
    memset(count, 0, (g->capacity + 1) * sizeof *count);
    for (int pass = 0; pass < 2; pass++) {
        for (int64_t m = 0, j = 0; m < total; j = j + 1 == g->n ? 0 : j + 1) {
            int64_t stop = m + rows < total ? m + rows : total;
            int slot = g->slots[j];
            if (slot >= g->capacity) return BAD_SLOT;
            if (slot < 0 || !has_factors(g, slot)) m = stop;
            else if (pass == 0) count[slot + 1] += stop - m, m = stop;
            else for (; m < stop; m++) {
                int32_t p = count[slot]++;
                c->order[p] = m;
                c->owner[p] = slot;
            }
        }
        if (pass == 0)
            for (int64_t s = 0; s < g->capacity; s++) count[s + 1] += count[s];
        if (pass == 0) c->active = count[g->capacity];
    }
    return DONE;
}
#endif

extern "C" int32_t lorafx_kernel(const Args* g) {
    const int64_t total = g->y_rows->count;
    if (total == 0) return DONE;
    if (g->n == 0) return BAD_SLOT;
    Call c = {g, 0, 0, 0, 0, 0, 1, DONE};
    int32_t small[512];
    const int64_t shares = g->threads;
    size_t words = 2 * total + shares + 1 + sorting_space(g);
    int32_t* space = words <= 512 ? small : (int32_t*)malloc(words * sizeof *space);
    if (!space) return NO_MEMORY;
    c.order = space;
    c.owner = space + total;
    c.starts = space + 2 * total;
    c.status = sort_rows(&c, c.starts + shares + 1);
    if (c.status == DONE && c.active) {
        bool tiny = c.active * WORK < SERIAL_WORK || g->threads == 1;
#if !EMBEDDING
        if (!tiny && c.active < SPLIT_ROWS * g->threads)
            c.v = (float*)malloc(c.active * RANGES * R * sizeof *c.v);
        if (c.v) {
            g->parallel(0, c.active * RANGES * PLANE_BLOCKS, 1, run_planes, &c);
            g->parallel(0, c.active * COLUMN_BLOCKS, 1, run_columns, &c);
            free(c.v);
        } else
#endif
        if (tiny) run_rows(0, c.active, &c);
        else {
            if (!EMBEDDING && !ROUTED && c.active <= FEW_ROWS) c.parts = RANGES;
            share_rows(&c, shares);
            g->parallel(0, shares, 1, run_shares, &c);
        }
    }
    if (space != small) free(space);
    return c.status;
}
