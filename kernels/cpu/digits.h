// One row of x in 16 bits times integers W, without rounding: in chunks of K, x is integers of three digits
// of 8 bits, with a scale,
//
//     x[k] = scale · Σ_p digit[p, k] · 256^p        W x = Σ_chunks scale · Σ_p 256^p · Σ_k W[k] digit[p, k]
//
// so that the CPU multiplies bytes, four at a time in each lane, faster than memory brings them. What is too
// small for the digits of its chunk is another chunk of the same k. A row with an infinity or NaN, or with
// numbers so far apart that two chunks of each k do not hold them, has no digits, and is multiplied like others.
//
// Before this text stand the preamble that dense.cpp describes, vectors.h, epilogue.h, dense_args.h,
// dense_call.h, the tiles, and how x is packed for them.

typedef int32_t ints __attribute__((vector_size(LANES * 4)));
static const int PLACES = 3, BYTES = 4 * LANES;

struct alignas(32) Chunk {
    float scale, sum;  // `sum`: of x, and 0 in a later chunk of the same k
    int32_t sums[PLACES], k;
};
// In memory behind this: most_chunks, the digits of each, place by place, and a chunk of floats.
struct alignas(BYTES) Digits {
    long count;
};

// Of a chunk: with more numbers sums might not be exact in float32.
INLINE long chunk(const Args* g) { return PACKED ? g->group : 512; }
INLINE long most_chunks(const Args* g) { return (g->in_features + chunk(g) - 1) / chunk(g) * 2; }
INLINE Chunk* chunks(Digits* d) { return (Chunk*)(d + 1); }
INLINE uint8_t* digits(const Args* g, Digits* d) { return (uint8_t*)(chunks(d) + most_chunks(g)); }
INLINE long digit_bytes(const Args* g) {
    return sizeof(Digits) + most_chunks(g) * (sizeof(Chunk) + PLACES * chunk(g)) + chunk(g) * sizeof(float);
}
INLINE bool by_digits(const Args* g) { return g->rows == 1 && !g->fixed; }
INLINE long digits_at(const Call* c) { return (c->stride + 31) / 32 * 32; }  // elements behind a row
// Of the row at x, if it is multiplied so.
INLINE Digits* digits_of(const Call* c, const E::T* x) {
    Digits* d = (Digits*)(x + digits_at(c));
    return by_digits(c->args) && d->count ? d : 0;
}
INLINE float power(int exponent) {
    const uint32_t b = (exponent + 127) << 23;
    return load_raw<float>(&b);
}

// `rest`, of `size` numbers, without what its digits hold; whether there are any digits
INLINE bool split_chunk(float* rest, long size, uint8_t* out, Chunk* chunk, bool* finite) {
    bits most = {};
    for (long i = 0; i < size; i += LANES) {
        const bits a = load_raw<bits>(rest + i) & 0x7fffffff;
        most = a > most ? a : most;
    }
    uint32_t largest = 0;
    UNROLL for (int i = 0; i < LANES; i++) largest = most[i] > largest ? most[i] : largest;
    *finite = largest < 0x7f800000;
    if (!largest || !*finite) return false;
    const int top = largest >> 23, shift = 148 - (top < 40 ? 40 : top);  // numbers become less than 2^22
    const float factor = power(shift), unit = power(-shift);
    ints sums[PLACES] = {};
    for (long i = 0; i < size; i += LANES) {
        const vec a = load_raw<vec>(rest + i);
        const ints whole = __builtin_convertvector(a * factor, ints);
        const vec left = a - __builtin_convertvector(whole, vec) * unit;
        memcpy(rest + i, &left, sizeof left);
        const bits offset = (bits)whole + 0x808080;  // digits from −128 to 127, each plus 128
        UNROLL for (int p = 0; p < PLACES; p++) {
            const bits digit = offset >> 8 * p & 255;
            sums[p] += (ints)digit - 128;
            const bits kept = PACKED ? digit ^ 128 : digit;
            __asm__("vpmovdb %1, %0" : "=m"(*(char(*)[LANES])(out + p * size + i)) : "v"(kept));
        }
    }
    chunk->scale = unit;
    UNROLL for (int p = 0; p < PLACES; p++)
        chunk->sums[p] = (int32_t)sum(__builtin_convertvector(sums[p], vec));
    return true;
}

// The digits of the only row, behind the copy of it at `row`
static void write_digits(const Call* c, E::T* row) {
    const Args* g = c->args;
    const long K = g->in_features, size = chunk(g);
    const X::T* x = (const X::T*)g->x;
    const float* sums = (const float*)(row + K);
    Digits* d = (Digits*)(row + digits_at(c));
    Chunk* next = chunks(d);
    uint8_t* out = digits(g, d);
    float* rest = (float*)(out + most_chunks(g) * PLACES * size);
    bool finite = true;
    for (long k = 0; k < K && finite; k += size) {
        const long end = K - k < size ? K - k : size;
        long i = 0;
        for (; i + LANES <= end; i += LANES) {
            const vec a = X::widen(load_raw<X::raw>(x + k + i));
            memcpy(rest + i, &a, sizeof a);
        }
        for (; i < size; i++) rest[i] = i < end ? X::one(x[k + i]) : 0;
        float total = PACKED ? sums[k / size] : 0;
        while (next - chunks(d) < most_chunks(g) && split_chunk(rest, size, out, next, &finite)) {
            next->sum = total, next->k = k;
            next++, out += PLACES * size, total = 0;
        }
        for (i = 0; i < size; i++) finite &= !(rest[i] != 0);
    }
    d->count = finite ? next - chunks(d) : 0;
}

// acc + what four bytes of u and four signed ones of s give a lane
INLINE ints dot_bytes(ints acc, bits u, bits s) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(u), "v"(s));
    return acc;
}
INLINE vec whole_sum(const ints* acc) {
    vec total = __builtin_convertvector(acc[PLACES - 1], vec);
    UNROLL for (int p = PLACES - 2; p >= 0; p--)
        total = total * 256 + __builtin_convertvector(acc[p], vec);
    return total;
}

#if PACKED
// Four lines of a block, of 16 rows a vector: a lane has a row's four numbers. Of the first half of rows they
// stand beside those of the second, which are multiplied by 16.
#define BYTE_PAIRS 0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15
static const uint8_t PAIRS_OF_LINES[] = {BYTE_PAIRS, BYTE_PAIRS, BYTE_PAIRS, BYTE_PAIRS};
INLINE void four_lines(bits* q, const uint8_t* p) {
    const bits order = {0, 8, 4, 12, 1, 9, 5, 13, 2, 10, 6, 14, 3, 11, 7, 15};
    const bits bytes = load_raw<bits>(PAIRS_OF_LINES);
    bits pairs[2];
    UNROLL for (int i = 0; i < 2; i++) {
        __asm__("vpermd %1, %2, %0" : "=v"(pairs[i]) : "v"(load_raw<bits>(p + i * BYTES)), "v"(order));
        __asm__("vpshufb %2, %1, %0" : "=v"(pairs[i]) : "v"(pairs[i]), "v"(bytes));
    }
    __asm__("vpunpcklwd %2, %1, %0" : "=v"(q[0]) : "v"(pairs[0]), "v"(pairs[1]));
    __asm__("vpunpckhwd %2, %1, %0" : "=v"(q[1]) : "v"(pairs[0]), "v"(pairs[1]));
    q[2] = q[0] & 0xf0f0f0f0, q[3] = q[1] & 0xf0f0f0f0;
}

// totals += W x for the rows of a whole block
INLINE void multiply_digits(const Args* g, Digits* d, long begin, float* totals) {
    const long size = g->group;
    const uint8_t* x = digits(g, d);
    const int VECTORS = BLOCK / LANES;
    vec sums[VECTORS] = {};
    for (long at = 0; at < d->count; at++, x += PLACES * size) {
        const Chunk* c = chunks(d) + at;
        const uint8_t* q = (const uint8_t*)g->w + begin * g->in_features / 2 + c->k * HALF;
        Factors f;
        load_factors(&f, g, begin, BLOCK, c->k);
        prefetch_factors(g, begin, c->k);
        ints acc[VECTORS][PLACES];  // of q − 8: in the second half times 16, in the first plus these
        UNROLL for (int n = 0; n < VECTORS; n++)
            UNROLL for (int p = 0; p < PLACES; p++)
                acc[n][p] = (ints){} - (n < VECTORS / 2 ? 136 : 128) * c->sums[p];
        for (long i = 0; i < size; i += 4, q += 2 * BYTES) {
            UNROLL for (int line = 0; line < 2; line++) __builtin_prefetch(q + AHEAD + line * BYTES, 0, 3);
            bits a[VECTORS];
            four_lines(a, q);
            UNROLL for (int p = 0; p < PLACES; p++) {
                const bits four = (bits){} + load_raw<uint32_t>(x + p * size + i);
                UNROLL for (int n = 0; n < VECTORS; n++) acc[n][p] = dot_bytes(acc[n][p], a[n], four);
            }
        }
        UNROLL for (int n = 0; n < VECTORS; n++) {
            const bool first = n < VECTORS / 2;
            if (first)
                UNROLL for (int p = 0; p < PLACES; p++) acc[n][p] -= acc[n + VECTORS / 2][p];
            sums[n] += c->sum * load_raw<vec>(f.zero + n * LANES);
            const float scale = first ? c->scale : c->scale / 16;
            sums[n] += load_raw<vec>(f.scale + n * LANES) * (scale * whole_sum(acc[n]));
        }
    }
    memcpy(totals, sums, sizeof sums);
}
#else
// v[n] = W[column + n] · x for N columns
template <int N> INLINE void digit_columns(const Args* g, Digits* d, long column, float* v) {
    const long K = g->in_features, size = chunk(g);
    const W::T* w = (const W::T*)g->w + column * g->w_stride;
    const char* ahead = (const char*)(column + 3 * N <= g->out_features ? w + 2 * N * g->w_stride : w);
    const uint8_t* x = digits(g, d);
    vec totals[N] = {};
    for (long at = 0; at < d->count; at++, x += PLACES * size) {
        const Chunk* c = chunks(d) + at;
        const long end = K - c->k < size ? K - c->k : size;
        ints acc[N][PLACES + 1] = {};  // the last is of W alone: digits here are 128 more
        for (long i = 0; i < end; i += BYTES) {
            UNROLL for (int n = 0; n < N; n++)
                __builtin_prefetch(ahead + (c->k + i) * N + n * BYTES, 0, 3);
            bits a[PLACES + 1];
            UNROLL for (int p = 0; p < PLACES; p++) a[p] = load_raw<bits>(x + p * size + i);
            a[PLACES] = (bits){} + 0x01010101;
            UNROLL for (int n = 0; n < N; n++) {
                const W::T* from = w + n * g->w_stride + c->k + i;
                const bits q = i + BYTES <= end ? load_raw<bits>(from) : load_first<bits>(from, end - i);
                UNROLL for (int p = 0; p <= PLACES; p++) acc[n][p] = dot_bytes(acc[n][p], a[p], q);
            }
        }
        UNROLL for (int n = 0; n < N; n++) {
            UNROLL for (int p = 0; p < PLACES; p++) acc[n][p] -= acc[n][PLACES] << 7;
            totals[n] += c->scale * whole_sum(acc[n]);
        }
    }
    UNROLL for (int n = 0; n < N; n++) v[n] = sum(totals[n]);
}

// The same for `size` columns
INLINE void multiply_digits(const Args* g, Digits* d, long column, int size, float* v) {
    int n = 0;
    for (; n + 4 <= size; n += 4) digit_columns<4>(g, d, column + n, v + n);
    for (; n < size; n++) digit_columns<1>(g, d, column + n, v + n);
}
#endif
