// The arguments of the generated kernels of lorafx::weight_mm. Before this text stands
// epilogue.h.

typedef void (*Body)(int64_t, int64_t, void*);
struct Args {
    void* y;           // (M, N), contiguous
    const void* x;     // (M, K), contiguous rows `x_stride` apart
    const void* w;     // (N, K), contiguous rows `w_stride` apart
    const void* bias;  // (N,), or null
    int64_t rows, in_features, out_features, x_stride, w_stride, threads;
    int32_t (*parallel)(int64_t, int64_t, int64_t, Body, void*);
    const Epilogue* epilogue;  // or null
    // Of integers W: (N, in_features / group), contiguous, zero may be null. Of packed ones scale has both.
    const void *scale, *zero;
    int64_t group;
    // Whether a row's bits must not depend on how many there are: one row alone of integers may have others.
    int64_t fixed;
};
