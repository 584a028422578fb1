// Vectors of a generated CPU kernel, in GCC's vector extensions: the same text for every LANES.
//
// F32, BF16, F16, I8: how an element type becomes float lanes and back. Dot: one step of a dot product.
// Columns: two vectors of neighbouring columns of the bank and of y, in one lane order. Some
// instructions without an extension are inline assembly, so no intrinsics header is read (a third of
// a second).
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef uint32_t bits __attribute__((vector_size(LANES * 4)));
typedef uint16_t half __attribute__((vector_size(LANES * 2)));

// ---- elements: how each storage type becomes float lanes and back ---------------------------

template <class T> INLINE T load_raw(const void* p) { T t; memcpy(&t, p, sizeof t); return t; }
template <class T> INLINE T load_first(const void* p, long bytes) {
    T t = {};
    memcpy(&t, p, bytes);
    return t;
}

struct F32 {
    typedef float T;
    typedef vec raw;
    INLINE vec widen(raw a) { return a; }
    INLINE raw narrow(vec a) { return a; }
    INLINE float one(T a) { return a; }
};

struct BF16 {
    typedef uint16_t T;
    typedef half raw;
    INLINE vec widen(raw a) { return (vec)(__builtin_convertvector(a, bits) << 16); }
    INLINE bits rounded(vec a) {  // to nearest even, in the upper half; NaN stays a quiet NaN
        bits b = (bits)a, nan = (bits)(a != a);
        return (nan & 0x7fc00000) | (~nan & (b + 0x7fff + ((b >> 16) & 1)));
    }
    INLINE raw narrow(vec a) { return __builtin_convertvector(rounded(a) >> 16, half); }
    INLINE float one(T a) {
        uint32_t b = (uint32_t)a << 16;
        return load_raw<float>(&b);
    }
};

struct F16 {
    typedef uint16_t T;
    typedef half raw;
    INLINE float one(T a) {  // exact, subnormals included: scaling by 2^112 moves the exponent
        uint32_t sign = (uint32_t)(a & 0x8000) << 16, rest = (uint32_t)(a & 0x7fff) << 13;
        float value = load_raw<float>(&rest) * 0x1p112f;
        uint32_t b = load_raw<uint32_t>(&value);
        if ((a & 0x7c00) == 0x7c00) b = 0x7f800000 | rest;
        b |= sign;
        return load_raw<float>(&b);
    }
#if HAS_F16C
    INLINE vec widen(raw a) {
        vec out;
        __asm__("vcvtph2ps %1, %0" : "=v"(out) : "v"(a));
        return out;
    }
    INLINE raw narrow(vec a) {
        raw out;
        __asm__("vcvtps2ph $0, %1, %0" : "=v"(out) : "v"(a));
        return out;
    }
#else
    INLINE vec widen(raw a) {
        vec out;
        for (int i = 0; i < LANES; i++) out[i] = one(a[i]);
        return out;
    }
    INLINE T one_back(float f) {  // round to nearest even
        uint32_t b = load_raw<uint32_t>(&f), sign = (b >> 16) & 0x8000;
        b &= 0x7fffffff;
        if (b > 0x7f800000) return (T)(sign | 0x7e00);
        if (b >= 0x477ff000) return (T)(sign | 0x7c00);
        if (b < 0x38800000) {  // subnormal half: let the float adder round at 2^-24
            float shifted = load_raw<float>(&b) + 0.5f;
            return (T)(sign | (load_raw<uint32_t>(&shifted) - 0x3f000000));
        }
        return (T)(sign | ((b - 0x38000000 + 0xfff + ((b >> 13) & 1)) >> 13));
    }
    INLINE raw narrow(vec a) {
        raw out;
        for (int i = 0; i < LANES; i++) out[i] = one_back(a[i]);
        return out;
    }
#endif
};

struct I8 {
    typedef int8_t T;
    typedef int8_t raw __attribute__((vector_size(LANES)));
    INLINE vec widen(raw a) {
        typedef int32_t ints __attribute__((vector_size(LANES * 4)));
#if HAS_F16C  // GCC 12 converts bytes to words one by one
        struct { int64_t at[LANES / 8]; } given = load_raw<decltype(given)>(&a);
        int64_t in __attribute__((vector_size(16))) = {given.at[0], given.at[LANES / 8 - 1]};
        ints words;
        __asm__("vpmovsxbd %1, %0" : "=v"(words) : "v"(in));
        return __builtin_convertvector(words, vec);
#else
        return __builtin_convertvector(__builtin_convertvector(a, ints), vec);
#endif
    }
    INLINE vec at(const T* p) {  // widened as it is loaded
#if HAS_F16C
        struct bytes { T of[LANES]; };
        typedef int32_t ints __attribute__((vector_size(LANES * 4)));
        ints words;
        __asm__("vpmovsxbd %1, %0" : "=v"(words) : "m"(*(const bytes*)p));
        return __builtin_convertvector(words, vec);
#else
        return widen(load_raw<raw>(p));
#endif
    }
    INLINE float one(T a) { return a; }
};

// Two bf16 to a 32-bit lane: the even elements and the odd ones.
INLINE vec even(bits a) { return (vec)(a << 16); }
#if LANES == 8 && HAS_F16C
static const bits UPPER = (bits){} + 0xffff0000;
INLINE vec odd(bits a) {  // the mask in memory: GCC 12 holds it in a register that sums need
    vec out;
    __asm__("vpand %1, %2, %0" : "=x"(out) : "m"(UPPER), "x"(a));
    return out;
}
#else
INLINE vec odd(bits a) { return (vec)(a & 0xffff0000); }
#endif
#if HAS_DPBF16
static const uint16_t INTERLEAVE[] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
#endif

// The order of additions is one tree, (low half + high half) down to one lane, in all forms.
#if LANES >= 8 && defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SUM_FOUR 1
// sum_four: four sums for the price of one and a half, the halves of all four are added side by side.
#if LANES == 8
INLINE float sum(vec a) {
    a += __builtin_shufflevector(a, a, 4, 5, 6, 7, 0, 1, 2, 3);
    a += __builtin_shufflevector(a, a, 2, 3, 0, 1, 6, 7, 4, 5);
    return a[0] + a[1];
}
INLINE vec sum_four(vec a, vec b, vec c, vec d) {
    vec ab = __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11) +
             __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
    vec cd = __builtin_shufflevector(c, d, 0, 1, 2, 3, 8, 9, 10, 11) +
             __builtin_shufflevector(c, d, 4, 5, 6, 7, 12, 13, 14, 15);
    vec q = __builtin_shufflevector(ab, cd, 0, 1, 8, 9, 4, 5, 12, 13) +
            __builtin_shufflevector(ab, cd, 2, 3, 10, 11, 6, 7, 14, 15);
    q += __builtin_shufflevector(q, q, 1, 0, 3, 2, 5, 4, 7, 6);
    return __builtin_shufflevector(q, q, 0, 4, 2, 6, 0, 4, 2, 6);
}
#else
INLINE float sum(vec a) {
    a += __builtin_shufflevector(a, a, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    a += __builtin_shufflevector(a, a, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    a += __builtin_shufflevector(a, a, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    a += __builtin_shufflevector(a, a, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
    return a[0];
}

INLINE vec sum_four(vec a, vec b, vec c, vec d) {
#define LOW_HALVES 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23
#define HIGH_HALVES 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31
#define LOW_QUARTERS 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27
#define HIGH_QUARTERS 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31
    vec ab = __builtin_shufflevector(a, b, LOW_HALVES) + __builtin_shufflevector(a, b, HIGH_HALVES);
    vec cd = __builtin_shufflevector(c, d, LOW_HALVES) + __builtin_shufflevector(c, d, HIGH_HALVES);
    vec q = __builtin_shufflevector(ab, cd, LOW_QUARTERS) +
            __builtin_shufflevector(ab, cd, HIGH_QUARTERS);
    q += __builtin_shufflevector(q, q, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    q += __builtin_shufflevector(q, q, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
    return __builtin_shufflevector(q, q, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12);
}
#endif
#endif
#endif
#ifndef SUM_FOUR
INLINE float sum(vec a) {
    float total[LANES];
    memcpy(total, &a, sizeof a);
    UNROLL for (int width = LANES / 2; width > 0; width /= 2)
        UNROLL for (int i = 0; i < width; i++) total[i] += total[i + width];
    return total[0];
}
#endif

// ---- one step of a dot product ---------------------------------------------------------------

// acc + x · a
INLINE vec fused(vec acc, vec x, vec a) {
#if LANES == 8 && HAS_F16C  // GCC 12 moves sums from register to register, and to the stack
    __asm__("vfmadd231ps %2, %1, %0" : "+x"(acc) : "x"(x), "x"(a));
    return acc;
#else
    return acc + x * a;
#endif
}

// How many planes ahead a tile of one plane prefetches.
static const int STREAM_AHEAD = 8;
// STREAM: the most rows of a tile with one plane at a time, or with STREAMS that lie far apart. With few rows
// memory is what takes the time, which is read more slowly in streams that are 4 KB apart; with more it is the
// loads of x, which planes side by side share, as they do conversions.
template <class P, class Q> struct Dot {
    static const int STEP = LANES, STREAM = sizeof(typename P::T) == 4 ? 3 : 1;
    typedef typename P::raw left;
    typedef typename Q::raw right;
    INLINE vec add(vec acc, left x, right a) { return fused(acc, P::widen(x), Q::widen(a)); }
};

template <> struct Dot<BF16, BF16> {
    static const int STEP = 2 * LANES, STREAM = HAS_DPBF16 ? 6 : 1;
    typedef bits left;
    typedef bits right;
    INLINE vec add(vec acc, left x, right a) {
#if HAS_DPBF16
        __asm__("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(x), "v"(a));
        return acc;
#else
        return fused(fused(acc, even(x), even(a)), odd(x), odd(a));
#endif
    }
};

// The elements of a step of a dot product, from their floats in order.
INLINE void narrow_step(vec* step, const vec* a) { *step = a[0]; }
#if HAS_DPBF16
INLINE void narrow_step(bits* step, const vec* a) {
    __asm__("vcvtne2ps2bf16 %1, %2, %0" : "=v"(*step) : "v"(a[0]), "v"(a[1]));
}
#endif

// ---- two vectors of columns -------------------------------------------------------------------

struct Pair {
    vec first, second;
};

template <class Q, class P> struct Columns {
    struct part {
        typename P::raw first, second;
    };
    struct bank {
        typename Q::raw first, second;
    };
    INLINE Pair widen_bank(bank a) { return {Q::widen(a.first), Q::widen(a.second)}; }
    INLINE Pair widen(part a) { return {P::widen(a.first), P::widen(a.second)}; }
    INLINE part narrow(Pair a) { return {P::narrow(a.first), P::narrow(a.second)}; }
};

template <> struct Columns<BF16, BF16> {  // even and odd columns: a shift and a mask widen two vectors
    typedef bits part;
    typedef bits bank;
    INLINE Pair widen_bank(bank a) { return {even(a), odd(a)}; }
    INLINE Pair widen(part a) { return {even(a), odd(a)}; }
    INLINE part narrow(Pair a) {
#if HAS_DPBF16
        bits halves, merged;
        __asm__("vcvtne2ps2bf16 %1, %2, %0" : "=v"(halves) : "v"(a.first), "v"(a.second));
        __asm__("vpermw %1, %2, %0" : "=v"(merged) : "v"(halves), "v"(load_raw<bits>(INTERLEAVE)));
        return merged;
#else
        return (BF16::rounded(a.first) >> 16) | (BF16::rounded(a.second) & 0xffff0000);
#endif
    }
};
