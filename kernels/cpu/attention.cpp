// Attention on a CPU: each query reads the keys and values of its own request, from a paged cache or
// from tensors.
//
//     out[t, h] = Σ_j p[j] V[j],   p = softmax(cap(scale · q[t, h] · K[j]) + mask[t, j]),   j of seen[t]
//
// Adjacent rows are a run, a page at most: its keys are planes of shrink, its values of expand
// (tiles.h). Sums and softmax are float32, run after run with the largest score so far taken off; a run
// that is hidden from all queries is not read. FIXED: scores are computed twice, for their largest and
// then for the weights, which are added key after key. Then a query's bits depend on the keys that it
// sees alone: not on runs, pages, hidden keys or the queries beside it.
//
// Before this text stand the generated preamble, vectors.h, tiles.h and attention_args.h. The preamble
// sets the parameters: element types X = W, Y = F32; LANES; D = K, numbers a head; HEADS of keys; GROUP,
// queries' heads of each; A_STRIDE and B_STRIDE, between rows of keys and of values; RUN = R, rows of a
// run at most; MOST, rows of queries and heads of a unit of work; CAPPED; FIXED; HIDDEN, from which on down
// the mask hides. In a paged cache ROW = HEADS · D = A_STRIDE = B_STRIDE; for tensors HEADS is 1.
extern "C" float tanhf(float);

struct Args {  // mirrors attention.py
    void* out;           // (T, H, D), contiguous
    const void* query;   // rows of D numbers, `query_head` and `query_token` apart
    const void* mask;    // (T, N), rows `mask_row` apart
    void *keys, *values; // of the layer, in the cache: rows of ROW numbers, `key_rows`, `value_rows`
    const void *new_keys, *new_values;  // (T, ROW), contiguous
    const int64_t *read, *write, *seen; // (N,), (T,), (T, 2)
    const float* sinks;                 // (H,) or none
    int64_t tokens, count, key_rows, value_rows, query_head, query_token, mask_row, sentinel, ring;
    int64_t threads;
    float scale, cap;
    int32_t (*parallel)(int64_t, int64_t, int64_t, Body, void*);
};

struct Unit {  // queries [token, token + tokens), keys [begin, end), heads of keys [head, head + heads)
    int64_t token, tokens, begin, end, head, heads;
    const X::T *query, *mask;  // of the first query; no mask is null
    const W::T *keys, *values;
    X::T* out;
};

struct Call {
    const Args* args;
    const Unit* units;
    const int64_t* places;  // (N,), rows of the cache, -1 - t for the new token t; null for tensors
    int64_t out_token;      // between queries' results
    bool causal;            // query t sees keys up to t
};

struct State {  // of the rows of a unit: heads of keys, tokens, heads of a group
    const X::T* x[MOST];
    float* sums[MOST];
    vec total[MOST];  // to be added up
    float top[MOST], bias[MOST * RUN], scores[MOST * RUN], acc[MOST * D];
};

struct Tile {  // rows [·] of one head with one run
    State* s;
    const W::T *keys, *values, *next;
    float scale;
    int size;
};

// e^x for x ≤ 0, relative error 2e-7; below -87 it is 0
INLINE vec exp_of(vec x) {
    const vec magic = (vec){} + 12582912.0f;
    vec near = x < -87.0f ? (vec){} - 87.0f : x;
    vec shifted = near * 1.44269504f + magic;
    vec whole = shifted - magic;
    vec r = near - whole * 0.693359375f + whole * 2.12194440e-4f;
    vec p = 1.0f + r * (1.0f + r * (0.5f + r * (1.66666667e-1f + r * (4.16666667e-2f +
            r * (8.33333333e-3f + r * 1.38888889e-3f)))));
    vec e = p * (vec)(((bits)shifted << 23) + 0x3f800000);
    return x < -87.0f ? (vec){} : e;
}

INLINE float largest(vec a) {
#if SUM_FOUR && LANES == 16
#define HALVED(...)                                            \
    {                                                          \
        vec b = __builtin_shufflevector(a, a, __VA_ARGS__);    \
        a = b > a ? b : a;                                     \
    }
    HALVED(8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7)
    HALVED(4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11)
    HALVED(2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13)
    HALVED(1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14)
    return a[0];
#endif
    float most[LANES];
    memcpy(most, &a, sizeof a);
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int i = 0; i < width; i++)
            most[i] = most[i + width] > most[i] ? most[i + width] : most[i];
    return most[0];
}

template <int ROWS> INLINE void scores_of(const Tile* c, long m) {
    shrink<ROWS>(c->s->x + m, c->keys, c->scale, c->s->scores + m * RUN, 0, c->size, c->next);
}

template <int ROWS> INLINE void add_values(const Tile* c, long m) {
    expand<ROWS>(c->s->sums + m, 0, c->values, c->s->scores + m * RUN, c->size, D);
}

// Turns the scores of a row into weights, and rescales its earlier sums to them; or finds the largest alone.
static void weigh(State* s, long row, const float* bias, int size, float cap, bool find) {
    float* p = s->scores + row * RUN;
#if CAPPED
    for (int i = 0; i < size; i++) p[i] = cap * tanhf(p[i] / cap);
#endif
    for (int i = size; i % LANES; i++) p[i] = 0;  // where the bias is -infinity
    vec most = (vec){} - __builtin_inff();
    for (int i = 0; i < size; i += LANES) {
        vec score = load_raw<vec>(p + i) + load_raw<vec>(bias + i);
        memcpy(p + i, &score, sizeof score);
        most = score > most ? score : most;
    }
    const float before = s->top[row], found = largest(most), top = found > before ? found : before;
    if (top > before) {
        const float less = exp_of((vec){} + (before - top))[0];
        s->top[row] = top;
        s->total[row] *= less;
        for (long i = 0; i < D && !find; i++) s->sums[row][i] *= less;
    }
    if (find) return;
    for (int i = 0; i < size; i += LANES) {
        vec score = load_raw<vec>(p + i);  // NaN stays NaN, whatever `top` is
        vec weight = score == -__builtin_inff() ? (vec){} : exp_of(score - top);
        memcpy(p + i, &weight, sizeof weight);
        if (!FIXED) s->total[row] += weight;
    }
    for (int i = 0; FIXED && i < size; i++) s->total[row][0] += p[i];
}

// The mask of the unit's tokens for keys [j, j + size); the tokens [first, last) that see one of them.
static void bias_of(const Call* c, const Unit* u, State* s, int64_t j, int size, long* first,
                    long* last) {
    *first = u->tokens, *last = 0;
    for (long t = 0; t < u->tokens; t++) {
        const int64_t visible = c->causal ? u->token + t + 1 - j : size;
        float* bias = s->bias + t * RUN;
        bool seen = false;
        for (int i = 0; i < size; i += LANES) {
            const int left = size - i < LANES ? size - i : LANES;
            vec part = {};
            if (u->mask) {
                const X::T* mask = u->mask + t * c->args->mask_row + j + i;
                part = X::widen(left == LANES ? load_raw<X::raw>(mask)
                                              : load_first<X::raw>(mask, left * sizeof *mask));
            }
            memcpy(bias + i, &part, sizeof part);
            for (int k = left < visible - i ? left : visible - i < 0 ? 0 : visible - i; k < LANES; k++)
                bias[i + k] = -__builtin_inff();
            for (int k = 0; k < left; k++) seen |= !(bias[i + k] <= HIDDEN);
        }
        if (!seen) continue;
        if (*first > t) *first = t;
        *last = t + 1;
    }
}

// Adds the keys that the rows see, or finds the largest scores alone.
static void visit(const Call* c, const Unit* u, State* s, long rows, bool find) {
    const Args* g = c->args;
    for (int64_t j = u->begin, size; j < u->end; j += size) {
        const int64_t place = c->places ? c->places[j] : j, step = place < 0 ? -1 : 1;
        const int64_t most = u->end - j < RUN ? u->end - j : RUN;
        for (size = c->places ? 1 : most; size < most && c->places[j + size] == place + step * size;)
            size++;
        long first, last;
        bias_of(c, u, s, j, size, &first, &last);
        if (first >= last) continue;
        const int64_t row = place < 0 ? -1 - place : place;
        const W::T* keys = place < 0 ? (const W::T*)g->new_keys : u->keys;
        const W::T* values = place < 0 ? (const W::T*)g->new_values : u->values;
        keys += row * A_STRIDE + u->head * D, values += row * B_STRIDE + u->head * D;
        for (long h = 0; h < u->heads; h++, keys += D, values += D) {
            const Tile tile = {s, keys, values, h + 1 < u->heads ? keys + D : 0, g->scale, (int)size};
            const long begin = h * rows + first * GROUP, end = h * rows + last * GROUP;
            FOR_TILES(scores_of, &tile, begin, end)
            for (long row = begin; row < end; row++)
                weigh(s, row, s->bias + (row - h * rows) / GROUP * RUN, size, g->cap, find);
            if (!find) FOR_TILES(add_values, &tile, begin, end)
        }
    }
}

static void attend(const Call* c, const Unit* u, State* s) {
    const Args* g = c->args;
    const long rows = u->tokens * GROUP;
    for (long h = 0, row = 0; h < u->heads; h++)
        for (long t = 0; t < u->tokens; t++)
            for (long i = 0; i < GROUP; i++, row++) {
                const long head = (u->head + h) * GROUP + i;
                s->x[row] = u->query + head * g->query_head + t * g->query_token;
                s->sums[row] = s->acc + row * D;
                s->top[row] = g->sinks ? g->sinks[head] : -__builtin_inff();
                s->total[row] = (vec){};
                if (g->sinks && !FIXED) s->total[row][0] = 1;
            }
    memset(s->acc, 0, u->heads * rows * D * sizeof(float));
    if (FIXED) visit(c, u, s, rows, true);
    visit(c, u, s, rows, false);
    for (long h = 0, row = 0; h < u->heads; h++)
        for (long t = 0; t < u->tokens; t++)
            for (long i = 0; i < GROUP; i++, row++) {
                const long head = (u->head + h) * GROUP + i;
                X::T* out = u->out + t * c->out_token + head * D;
                float total = sum(s->total[row]);
                if (FIXED && g->sinks) total += exp_of((vec){} + (g->sinks[head] - s->top[row]))[0];
                const float share = total == 0 ? 0 : 1 / total;
                for (long k = 0; k < D; k += LANES) {
                    const long bytes = (D - k < LANES ? D - k : LANES) * sizeof(float);
                    vec part = load_first<vec>(s->sums[row] + k, bytes) * share;
                    X::raw narrow = X::narrow(part);
                    memcpy(out + k, &narrow, bytes / sizeof(float) * sizeof *out);
                }
            }
}

static void run_units(int64_t begin, int64_t end, void* context) {
    const Call* c = (const Call*)context;
    State* s = (State*)aligned_alloc(alignof(State), sizeof *s);
    for (int64_t unit = begin; s && unit < end; unit++) attend(c, c->units + unit, s);
    if (!s) __atomic_store_n((int64_t*)&c->args->threads, -1, __ATOMIC_RELAXED);
    free(s);
}

// Tiles of queries of a request, with as many heads as fit, or fewer if there are few requests.
static int64_t units_of(const Args* g, Unit* units) {
    int64_t found = 0, requests = 0;
    for (int64_t t = 0; t < g->tokens; t++)
        requests += !t || g->seen[2 * t] != g->seen[2 * t - 2] || g->seen[2 * t + 1] != g->seen[2 * t - 1];
    const int64_t shares = requests < 4 * g->threads ? 4 * g->threads / requests : 1;
    for (int64_t t = 0, next; t < g->tokens; t = next) {
        const int64_t begin = g->seen[2 * t], end = g->seen[2 * t + 1];
        for (next = t + 1; next < g->tokens && g->seen[2 * next] == begin && g->seen[2 * next + 1] == end;)
            next++;
        const int64_t fit = MOST / GROUP;
        for (int64_t token = t, size; token < next; token += size) {
            size = next - token < fit ? next - token : fit;
            int64_t heads = fit / size, most = (HEADS + shares - 1) / shares;
            heads = heads > most ? most : heads;
            for (int64_t head = 0; head < HEADS; head += heads) {
                const int64_t left = HEADS - head < heads ? HEADS - head : heads;
                if (units)
                    units[found] = {token, size, begin, end, head, left,
                                    (const X::T*)g->query + token * g->query_token,
                                    (const X::T*)g->mask + token * g->mask_row,
                                    (const W::T*)g->keys, (const W::T*)g->values,
                                    (X::T*)g->out + token * HEADS * GROUP * D};
                found++;
            }
        }
    }
    return found;
}

static void write_new(const Args* g) {
    const size_t row = ROW * sizeof(W::T);
    for (int64_t t = 0; t < g->tokens; t++) {
        memcpy((char*)g->keys + g->write[t] * row, (const char*)g->new_keys + t * row, row);
        memcpy((char*)g->values + g->write[t] * row, (const char*)g->new_values + t * row, row);
    }
}

// Returns 1 out of memory, 2 for a row or a query's range outside of the cache or of `read`.
extern "C" int32_t lorafx_kernel(Args* g) {
    const int64_t rows = g->key_rows < g->value_rows ? g->key_rows : g->value_rows;
    if (!g->tokens) return 0;
    int64_t work = 0, fresh = 0;
    for (int64_t t = 0; t < g->tokens; t++) {
        const int64_t begin = g->seen[2 * t], end = g->seen[2 * t + 1];
        if (g->write[t] < 0 || g->write[t] >= rows || begin < 0 || begin > end || end > g->count) return 2;
        work += (end - begin) * ROW * GROUP;
    }
    int64_t* places = (int64_t*)malloc((g->count + 1) * sizeof *places);
    if (!places) return 1;
    int32_t status = 0;
    for (int64_t j = 0; j < g->count && !status; j++) {
        const bool is_new = g->ring && g->read[j] == g->sentinel;
        if (is_new ? fresh >= g->tokens : g->read[j] < 0 || g->read[j] >= rows) status = 2;
        places[j] = is_new ? -1 - fresh++ : g->read[j];
    }
    Unit* units = status ? 0 : (Unit*)malloc((units_of(g, 0) + 1) * sizeof *units);
    if (units) {
        if (!g->ring) write_new(g);
        Call c = {g, units, places, HEADS * GROUP * D, false};
        const int64_t count = units_of(g, units);
        if (g->threads == 1 || work < SERIAL_WORK) run_units(0, count, &c);
        else g->parallel(0, count, 1, run_units, &c);
        if (g->ring) write_new(g);  // over rows that were just read
    }
    if (!status && (!units || g->threads < 0)) status = 1;
    free(units);
    free(places);
    return status;
}

// Returns 1 out of memory.
extern "C" int32_t lorafx_attention(const Tensors* a) {
    const int64_t fit = MOST / GROUP, tiles = (a->tokens + fit - 1) / fit;
    const int64_t count = a->requests * a->heads * tiles, out_token = a->heads * GROUP * D;
    Unit* units = (Unit*)malloc((count + 1) * sizeof *units);
    if (!units) return 1;
    for (int64_t i = 0; i < count; i++) {
        const int64_t token = i % tiles * fit, head = i / tiles % a->heads, b = i / tiles / a->heads;
        const X::T* mask = (const X::T*)a->mask;
        if (mask) mask += b * a->mask_request + head * a->mask_head + token * a->mask_row;
        const int64_t size = a->tokens - token < fit ? a->tokens - token : fit, last = token + size;
        units[i] = {token, size, 0, a->causal && last < a->count ? last : a->count, 0, 1,
                    (const X::T*)a->query + b * a->query_request + head * GROUP * a->query_head +
                        token * a->query_token,
                    mask, (const W::T*)a->keys + b * a->key_request + head * a->key_head,
                    (const W::T*)a->values + b * a->value_request + head * a->value_head,
                    (X::T*)a->out + (b * a->tokens + token) * out_token + head * GROUP * D};
    }
    Args g = {};
    g.query_head = a->query_head, g.query_token = a->query_token, g.mask_row = a->mask_row;
    g.threads = a->threads, g.scale = a->scale;
    Call c = {&g, units, 0, out_token, a->causal != 0};
    const int64_t work = a->requests * a->heads * GROUP * a->tokens * a->count * D;
    if (a->threads == 1 || work < SERIAL_WORK) run_units(0, count, &c);
    else a->parallel(0, count, 1, run_units, &c);
    free(units);
    return g.threads < 0;
}
