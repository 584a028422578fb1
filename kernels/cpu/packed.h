// Tiles of a product on a CPU with packed integers of four bits, in the layout and with the numbers of
// aten::_weight_int4pack_mm_for_cpu:
//
//     W[n, k] = (q[n, k] − 8) · scale[g, n] + zero[g, n]        g: the group of k
//
// BLOCK rows of W are a block, which has a line of BLOCK / 2 bytes for each k: byte j holds row j in its
// lower half and row j + BLOCK / 2 in the upper one. If the last block has fewer rows, byte j holds 2j
// and 2j + 1. Rows of W are lanes, and scale and zero are applied to the sums of a group:
//
//     y[m, n] = Σ_g scale[g, n] · Σ_k (q[n, k] − 8) x[m, k] + zero[g, n] · Σ_k x[m, k]
//
// Before this text stand the preamble that dense.cpp describes, vectors.h, epilogue.h, dense_args.h and
// dense_call.h, and amx.h with MATRIX. In Args, w is the packed integers and scale is (G, N, 2), scale and zero of each group and row.

typedef Dot<E, E> D;
typedef uint8_t byte_lanes __attribute__((vector_size(LANES)));
static const int HALF = BLOCK / 2, GROUP = BLOCK, MOST_GROUPS = 1;
// The distance in bytes at which W is prefetched; 4096 is slower (Zen 5, cold weights).
static const long AHEAD = 8192;

// The numbers q − 8 of a step of a dot product, from `count` bytes of its lines: first those of the lower
// halves of bytes, then those of the upper ones.
INLINE void decode(vec* q, const uint8_t* p, long, long count) {
    const byte_lanes in = load_first<byte_lanes>(p, count);
#if HAS_F16C  // GCC 12 converts bytes to words one by one
    bits a;
    __asm__("vpmovzxbd %1, %0" : "=v"(a) : "vm"(in));
#else
    const bits a = __builtin_convertvector(in, bits);
#endif
#if LANES == 16
    const vec table = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
    __asm__("vpermps %1, %2, %0" : "=v"(q[0]) : "v"(table), "v"(a));  // reads four bits of a lane
    __asm__("vpermps %1, %2, %0" : "=v"(q[1]) : "v"(table), "v"(a >> 4));
#else
    typedef int32_t ints __attribute__((vector_size(LANES * 4)));
    q[0] = __builtin_convertvector((ints)(a & 15), vec) - 8;
    q[1] = __builtin_convertvector((ints)(a >> 4), vec) - 8;
#endif
}
#if HAS_DPBF16
#define FOUR_BITS                                                                              \
    0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0, 0x3f80, 0x4000, 0x4040, \
        0x4080, 0x40a0, 0x40c0, 0x40e0
static const uint16_t NUMBERS[] = {FOUR_BITS, FOUR_BITS};  // in BF16

INLINE void decode(bits* q, const uint8_t* p, long line, long count) {  // two lines, side by side
    const byte_lanes first = load_first<byte_lanes>(p, count);
    const byte_lanes second = load_first<byte_lanes>(p + line, count);
    const bits table = load_raw<bits>(NUMBERS);
    uint8_t both __attribute__((vector_size(2 * LANES)));
    byte_lanes low, high;
    bits a;
    __asm__("vpunpcklbw %2, %1, %0" : "=v"(low) : "v"(first), "v"(second));
    __asm__("vpunpckhbw %2, %1, %0" : "=v"(high) : "v"(first), "v"(second));
    __asm__("vinserti32x4 $1, %2, %t1, %0" : "=v"(both) : "v"(low), "v"(high));
    __asm__("vpmovzxbw %1, %0" : "=v"(a) : "v"(both));
    __asm__("vpermw %1, %2, %0" : "=v"(q[0]) : "v"(table), "v"(a));  // reads five bits of a word
    __asm__("vpermw %1, %2, %0" : "=v"(q[1]) : "v"(table), "v"(a >> 4));
}
// The same of whole lines, the first or the second half of each, in fewer instructions.
#define FOUR_ROWS(i) \
    i, i, i + 4, i + 4, i + 1, i + 1, i + 5, i + 5, i + 2, i + 2, i + 6, i + 6, i + 3, i + 3, i + 7, i + 7
#define ALL_LANES(i) FOUR_ROWS(i), FOUR_ROWS(i), FOUR_ROWS(i), FOUR_ROWS(i)
static const uint8_t LINE_PAIRS[2][64] = {{ALL_LANES(0)}, {ALL_LANES(8)}};
INLINE void decode_whole(bits* q, const uint8_t* p, long half) {
    const bits lines = load_raw<bits>(p), table = load_raw<bits>(NUMBERS);
    // A lane has four rows of one line, the same of the other, then those of the second half likewise.
    const bits order = {0, 8, 4, 12, 1, 9, 5, 13, 2, 10, 6, 14, 3, 11, 7, 15};
    bits rows, a;
    __asm__("vpermd %1, %2, %0" : "=v"(rows) : "v"(lines), "v"(order));
    __asm__("vpshufb %2, %1, %0" : "=v"(a) : "v"(rows), "v"(load_raw<bits>(LINE_PAIRS[half])));
    __asm__("vpermw %1, %2, %0" : "=v"(q[0]) : "v"(table), "v"(a));
    __asm__("vpermw %1, %2, %0" : "=v"(q[1]) : "v"(table), "v"(a >> 4));
}
#endif
INLINE void decode_whole(vec*, const uint8_t*, long) {}  // never called
static const bool BY_LINES = HAS_DPBF16 && BLOCK == 64 && sizeof(E::T) == 2;
INLINE long at_once(long count) { return count < LANES ? count : LANES; }

// Scale and zero of a block's rows, those of the lower halves of bytes first, as sums are.
struct Factors {
    float scale[BLOCK], zero[BLOCK];
};
INLINE long row_of(long place, long size) {
    return size == BLOCK ? place : place < HALF ? 2 * place : 2 * (place - HALF) + 1;
}
template <class P> struct Split {  // LANES pairs
    INLINE Pair of(const typename P::T* s) {
        float both[2 * LANES];
        for (int i = 0; i < 2 * LANES; i++) both[i] = P::one(s[i]);
        Pair a;
        UNROLL for (int i = 0; i < LANES; i++) a.first[i] = both[2 * i], a.second[i] = both[2 * i + 1];
        return a;
    }
};
template <> struct Split<BF16> {
    INLINE Pair of(const BF16::T* s) {
        const bits pairs = load_raw<bits>(s);
        return {even(pairs), odd(pairs)};
    }
};
INLINE void load_factors(Factors* f, const Args* g, long begin, long size, long k) {
    const S::T* s = (const S::T*)g->scale + (k / g->group * g->out_features + begin) * 2;
    if (size == BLOCK) {
        UNROLL for (int i = 0; i < BLOCK; i += LANES) {
            const Pair a = Split<S>::of(s + 2 * i);
            memcpy(f->scale + i, &a.first, sizeof a.first);
            memcpy(f->zero + i, &a.second, sizeof a.second);
        }
        return;
    }
    float both[2 * BLOCK];
    memset(both, 0, sizeof both);
    for (long i = 0; i < 2 * size; i += LANES) {
        const vec part = S::widen(load_raw<S::raw>(s + i));
        memcpy(both + i, &part, sizeof part);
    }
    for (int i = 0; i < BLOCK; i++) {
        const float* of_row = both + 2 * row_of(i, size);
        f->scale[i] = of_row[0], f->zero[i] = of_row[1];
    }
}
// Those that come AHEAD bytes of W later, also in the next block, are not where W streams.
INLINE void prefetch_factors(const Args* g, long begin, long k) {
    const long K = g->in_features, N = g->out_features;
    k += (AHEAD / (g->group * HALF) + 1) * g->group;
    if (k >= K) k -= K, begin += BLOCK;
    if (k >= K || begin + BLOCK > N) return;
    const char* s = (const char*)((const S::T*)g->scale + (k / g->group * N + begin) * 2);
    for (int i = 0; i < 2 * BLOCK * (int)sizeof(S::T); i += 64) __builtin_prefetch(s + i, 0, 2);
}

// y[m] of a block
INLINE void store(const Args* g, long m, long begin, long size, const float* places) {
    float v[BLOCK];
    for (int i = 0; i < BLOCK; i++) v[row_of(i, size)] = places[i];
    for (long i = 0; i < size; i += LANES) {
        vec part = load_raw<vec>(v + i);
        if (g->bias) part += Y::widen(load_raw<Y::raw>((const Y::T*)g->bias + begin + i));
        const Y::raw out = Y::narrow(part);
        memcpy((Y::T*)g->y + m * g->out_features + begin + i, &out, sizeof out);
    }
}

// totals of a row += what the group at k gives LANES places, by its product `sums`
INLINE void add_scaled(const Call* c, const E::T* x, long k, const Factors& f, long place, vec sums,
                       float* totals) {
    const float sum = ((const float*)(x + c->args->in_features))[k / c->args->group];
    vec total = load_raw<vec>(totals + place) + sum * load_raw<vec>(f.zero + place);
    total += load_raw<vec>(f.scale + place) * sums;
    memcpy(totals + place, &total, sizeof total);
}

// totals += what PARTS vectors of bytes, from byte j of the lines of the group at k, add to ROWS rows
template <int ROWS, int PARTS, int SHARES, bool WHOLE>
INLINE void add_group(const Call* c, const E::T* x, long k, const uint8_t* q, long line, long j,
                      const Factors& f, float (*totals)[BLOCK]) {
    const long group = c->args->group;
    vec acc[ROWS][2 * PARTS] = {};
    for (long i = 0; i < group; i += D::STEP / LANES) {
        const uint8_t* p = q + i * line + j;
        if (SHARES) __builtin_prefetch(p + AHEAD, 0, 3);
        D::right a[2 * PARTS];
        UNROLL for (int part = 0; part < PARTS; part++)
            if (BY_LINES && WHOLE) decode_whole(a + 2 * part, p - j, j / LANES + part);
            else decode(a + 2 * part, p + part * LANES, line, WHOLE ? LANES : at_once(line - j));
        UNROLL for (int row = 0; row < ROWS; row++) {
            const uint32_t step = load_raw<uint32_t>(x + row * c->stride + k + i);
            const D::left xs = (D::left)((bits){} + step);
            UNROLL for (int n = 0; n < 2 * PARTS; n++) acc[row][n] = D::add(acc[row][n], xs, a[n]);
        }
    }
    UNROLL for (int row = 0; row < ROWS; row++)
        UNROLL for (int n = 0; n < 2 * PARTS; n++) {
            const long place = j + n / 2 * LANES + n % 2 * HALF;
            add_scaled(c, x + row * c->stride, k, f, place, acc[row][n], totals[row]);
        }
}

// totals += what a block gives ROWS rows
template <int ROWS, int SHARES>
INLINE void add_block(const Call* c, const E::T* x, long begin, long size, float (*totals)[BLOCK]) {
    const Args* g = c->args;
    const long K = g->in_features, line = size / 2;
    const int PARTS = ACCUMULATORS >= 4 * ROWS + 4 ? 2 : 1;
    for (long k = 0; k < K; k += g->group) {
        const uint8_t* q = (const uint8_t*)g->w + begin * K / 2 + k * line;
        Factors f;
        load_factors(&f, g, begin, size, k);
        if (SHARES) prefetch_factors(g, begin, k);
        if (size == BLOCK)
            for (long j = 0; j < HALF; j += PARTS * LANES)
                add_group<ROWS, PARTS, SHARES, true>(c, x, k, q, HALF, j, f, totals);
        else
            for (long j = 0; j < line; j += LANES)
                add_group<ROWS, 1, SHARES, false>(c, x, k, q, line, j, f, totals);
    }
}

#if MATRIX
// 0 to 3: sums; 4: of x; 5: of W
INLINE Shapes shapes_of(const Args* g) {
    const uint8_t M = tile_rows(g);
    return {1, 0, {}, {64, 64, 64, 64, 64, 64}, {M, M, M, M, M, 16}};
}

template <int N> INLINE void add_tile(const D::right (*tiles)[16]) {
    load_tile<5>(tiles[N], sizeof **tiles);
    multiply_tiles<N, 4, 5>();
}

// totals += what a block gives `rows` rows, in tiles of 16 rows of W and 16 pairs of lines
template <int SHARES, bool WHOLE>
INLINE void multiply_block(const Call* c, const E::T* x, int rows, long begin, long size,
                           float (*totals)[BLOCK]) {
    const Args* g = c->args;
    const long K = g->in_features, group = g->group, line = WHOLE ? HALF : size / 2;
    const uint8_t* q = (const uint8_t*)g->w + begin * K / 2;
    D::right numbers[2][BLOCK / 16][16];  // tiles are read while the next ones are written
    Factors f;
    auto add_sums = [&](long k) __attribute__((always_inline)) {
        float sums[TILE][BLOCK];
        store_tile<0>(sums[0], sizeof *sums), store_tile<1>(sums[0] + 16, sizeof *sums);
        store_tile<2>(sums[0] + 32, sizeof *sums), store_tile<3>(sums[0] + 48, sizeof *sums);
        for (int row = 0; row < rows; row++)
            UNROLL for (int n = 0; n < BLOCK; n += LANES)
                add_scaled(c, x + row * c->stride, k, f, n, load_raw<vec>(sums[row] + n), totals[row]);
    };
    for (long k = 0; k < K; k += D::STEP) {
        auto tiles = numbers[k / D::STEP % 2];
        for (int pair = 0; pair < 16; pair++) {
            const uint8_t* p = q + (k + 2 * pair) * line;
            if (SHARES) __builtin_prefetch(p + AHEAD, 0, 3);
            UNROLL for (int half = 0; half < 2; half++) {
                const long j = half * LANES;
                D::right a[2] = {};
                if (WHOLE) decode_whole(a, p, half);
                else if (j < line) decode(a, p + j, line, at_once(line - j));
                tiles[half][pair] = a[0], tiles[half + 2][pair] = a[1];
            }
        }
        if (k % group == 0) {  // the last group's products are ready by now
            if (k) add_sums(k - group);
            load_factors(&f, g, begin, size, k);
            if (SHARES) prefetch_factors(g, begin, k);
            zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
        }
        load_tile<4>(x + k, c->stride * sizeof *x);
        add_tile<0>(tiles), add_tile<1>(tiles), add_tile<2>(tiles), add_tile<3>(tiles);
    }
    add_sums(K - group);
}
#endif

// Σ_k x[k] of each group of a row
INLINE void sum_groups(const Args* g, const E::T* x, float* sums) {
    const bits one = (bits){} + (sizeof *x == 2 ? 0x3f803f80u : 0x3f800000u);  // a pair of BF16, or F32
    for (long k = 0; k < g->in_features; k += g->group) {
        vec acc = {};
        for (long i = k; i < k + g->group; i += D::STEP)
            acc = D::add(acc, load_raw<D::left>(x + i), (D::right)one);
        sums[k / g->group] = sum(acc);
    }
}

static void widen_blocks(int64_t first, int64_t last, void* context) {
    const Args* g = (const Args*)context;
    const long K = g->in_features, N = g->out_features;
    for (long begin = first * BLOCK; begin < last * BLOCK && begin < N; begin += BLOCK) {
        const long size = N - begin < BLOCK ? N - begin : BLOCK, line = size / 2;
        const uint8_t* q = (const uint8_t*)g->w + begin * K / 2;
        Factors f;
        for (long k = 0; k < K; k++) {
            if (k % g->group == 0) load_factors(&f, g, begin, size, k);
            float w[BLOCK];
            for (long j = 0; j < line; j += LANES) {
                vec a[2];
                decode(a, q + k * line + j, line, at_once(line - j));
                UNROLL for (int n = 0; n < 2; n++) {
                    const long place = j + n * HALF;
                    a[n] = a[n] * load_raw<vec>(f.scale + place) + load_raw<vec>(f.zero + place);
                    memcpy(w + place, a + n, sizeof *a);
                }
            }
            store(g, k, begin, size, w);
        }
    }
}

// y (K, N) = Wᵀ
extern "C" void lorafx_widen(const Args* g) {
    g->parallel(0, (g->out_features + BLOCK - 1) / BLOCK, 1, widen_blocks, (void*)g);
}
