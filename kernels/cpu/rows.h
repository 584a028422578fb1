// Where the rows of x and y lie, for the dispatcher and the generated kernels alike.
//
//     element e of row m at  data + Σ_d (digit d of m) · strides[d] + e · step
//
// The digits of m are its indices in the leading dimensions. Kernels read strided tensors in place and
// copy at most the rows of a tile.
#include <stdint.h>
#include <stdlib.h>

static const int MOST_STRIDES = 8;

struct Rows {
    int64_t count, step, dims;  // dims is at least 1
    int64_t sizes[MOST_STRIDES], strides[MOST_STRIDES];  // innermost first, merged where that can be
};

static inline int64_t row_offset(const Rows* rows, int64_t m) {
    int64_t at = 0, d = 0;
    for (; d + 1 < rows->dims; d++) {
        at += m % rows->sizes[d] * rows->strides[d];
        m /= rows->sizes[d];
    }
    return at + m * rows->strides[d];
}

// `size` adjacent elements from `first` on of the rows in `order`: in place, or copied to `space`
// where elements are `step` apart. at[0] is null if there was no memory.
template <class T, int ROWS> struct Tile {
    T* at[ROWS];
    T* from[ROWS];
    T* space;
    int64_t step, size;

    template <class ORDER>
    inline __attribute__((always_inline)) Tile(T* data, const Rows* rows, const ORDER& order,
                                               int64_t first, int64_t size)
        : space(0), step(rows->step), size(size) {
        for (int row = 0; row < ROWS; row++)
            at[row] = from[row] = data + row_offset(rows, order[row]) + first * step;
        if (__builtin_expect(step != 1, 0)) gather();
    }
    __attribute__((noinline)) void gather() {
        space = (T*)malloc(ROWS * size * sizeof(T));
        for (int row = 0; row < ROWS; row++) {
            at[row] = space ? space + row * size : 0;
            for (int64_t e = 0; space && e < size; e++) at[row][e] = from[row][e * step];
        }
    }
    inline __attribute__((always_inline)) void put_back() {
        if (__builtin_expect(step != 1, 0)) scatter();
    }
    __attribute__((noinline)) void scatter() {
        for (int row = 0; row < ROWS; row++)
            for (int64_t e = 0; e < size; e++) from[row][e * step] = at[row][e];
    }
    inline __attribute__((always_inline)) ~Tile() {
        if (__builtin_expect(space != 0, 0)) free(space);
    }
    Tile(const Tile&) = delete;
};
