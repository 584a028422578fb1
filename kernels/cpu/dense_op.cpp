// CPU kernels of lorafx::dense_mm and dense_addmm: few rows by generated code, many by a library.
//
//     dense_mm(x, weight, sizes) -> y            dense_addmm(bias, x, weight, sizes) -> y
//
//     dense_mm_delta(x, weight, sizes, A, B, ranks, scales, slots, rows, kernel) -> y
//     dense_addmm_delta(bias, x, weight, sizes, A, B, ranks, scales, slots, rows, kernel) -> y
//
// The choice is made at each call, so a graph serves any number of rows. The latter two add the delta
// that run_delta_ adds: of few rows in the product's parallel region, of many after it. Before this
// text stand handles.h, epilogue.h and dense_args.h.

struct DenseShims {  // the order of _SHIMS in cpu_source.py, then of _MORE_SHIMS in dense.py
    Shims common;
    int32_t (*empty)(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, Handle*);
    int32_t (*view)(Handle, int64_t, const int64_t*, const int64_t*, int64_t, Handle*);
    int32_t (*mm)(Handle, Handle, Handle);
    int32_t (*addmm)(Handle, Handle, Handle, Handle, double, double);
    int32_t (*list_size)(Handle, size_t*);
    int32_t (*list_item)(Handle, size_t, uint64_t*);
    int32_t (*delete_list)(Handle);
};
static DenseShims more;

// Indexed by torch's number of a dtype; an entry is written once, its `run` last.
struct Kernel {
    int64_t most_rows;
    int32_t (*run)(const Args*);
};
static const int DTYPES = 64;
static Kernel kernels[DTYPES];

// lorafx_run_delta of dispatcher.cpp, and what the ops hand to it: y, x, A, B, ranks, scales, slots.
typedef void (*RunDelta)(const uint64_t* operands, int64_t rows, uint64_t kernel,
                         int32_t (*product)(void*, const Epilogue*), void* context);
static RunDelta run_delta;
struct Delta {
    uint64_t operands[7];
    int64_t rows;
    uint64_t kernel;
};

// oneDNN's product of many rows, mkldnn::_linear_pointwise, where it is faster than aten.mm.
typedef int32_t (*Linear)(Handle x, Handle weight, Handle* bias, const char* attr, const double** scalars,
                          int64_t count, const char** algorithm, Handle* y);
static Linear linears[DTYPES];

static void succeeds(int32_t status) { require(!status, "lorafx: a product failed"); }

struct OwnedTensor {
    Handle tensor = 0;
    OwnedTensor() {}
    OwnedTensor(const OwnedTensor&) = delete;
    ~OwnedTensor() {
        if (tensor) torch.delete_tensor(tensor);
    }
};

// Columns [first, first + size) of a tensor of these strides, as (size,) or (rows, size).
static void part(OwnedTensor* out, Handle tensor, int64_t dim, int64_t rows, int64_t size, int64_t row_stride,
                 int64_t stride, int64_t first) {
    const int64_t sizes[] = {rows, size}, strides[] = {row_stride, stride};
    succeeds(more.view(tensor, dim, sizes + 2 - dim, strides + 2 - dim, first * stride, &out->tensor));
}

struct FewRows {
    int32_t (*run)(const Args*);
    Args args;
};
static int32_t with_epilogue(void* context, const Epilogue* epilogue) {
    FewRows* few = (FewRows*)context;
    few->args.epilogue = epilogue;
    return few->run(&few->args);
}

// Returns whether y was computed; a delta is then part of it.
static bool by_kernel(const View& x, const View& w, const View* bias, Handle y, const Delta* delta) {
    if (x.dtype < 0 || x.dtype >= DTYPES || x.dtype != w.dtype || (bias && bias->dtype != x.dtype))
        return false;
    const Kernel* k = kernels + x.dtype;
    int32_t (*run)(const Args*) = __atomic_load_n(&k->run, __ATOMIC_ACQUIRE);
    const int64_t M = x.sizes[0], K = x.sizes[1], N = w.sizes[0];
    if (!run || M > k->most_rows || !M || !K || !N) return false;
    if (K > 1 && (x.strides[1] != 1 || w.strides[1] != 1)) return false;
    if (bias && N > 1 && bias->strides[0] != 1) return false;
    void* data;
    succeeds(torch.data_ptr(y, &data));
    FewRows few = {run, {data, x.data, w.data, bias ? bias->data : 0, M, K, N, x.strides[0],
                         w.strides[0], (int64_t)thread_count(), torch.parallel, 0}};
    if (!delta) return !run(&few.args);
    run_delta(delta->operands, delta->rows, delta->kernel, with_epilogue, &few);
    return true;
}

// The columns of part i; N where the list is empty.
static int64_t part_size(Handle list, size_t count, size_t i, int64_t N) {
    uint64_t size = N;
    if (count) succeeds(more.list_item(list, i, &size));
    return size;
}

static size_t check_parts(Handle list, int64_t N) {
    size_t count = 0;
    succeeds(more.list_size(list, &count));
    int64_t sum = 0;
    for (size_t i = 0; i < count; i++) {
        const int64_t size = part_size(list, count, i, N);
        require(size >= 0 && size <= N - sum, "lorafx: sizes are over N");
        sum += size;
    }
    require(!count || sum == N, "lorafx: sizes do not add up to N");
    return count;
}

static bool by_onednn(Handle x, const View& xs, Handle w, const View& ws, Handle bias,
                      const View* bs, Handle* y) {
    if (xs.dtype < 0 || xs.dtype >= DTYPES || xs.dtype != ws.dtype || (bs && bs->dtype != xs.dtype))
        return false;
    Linear linear = __atomic_load_n(linears + xs.dtype, __ATOMIC_ACQUIRE);
    const int64_t M = xs.sizes[0], K = xs.sizes[1], N = ws.sizes[0];
    if (!linear || M <= kernels[xs.dtype].most_rows || !K || !N) return false;
    // It copies a strided x, and reads any bias as contiguous.
    if (!xs.contiguous() || !ws.contiguous() || (bs && !bs->contiguous())) return false;
    succeeds(linear(x, w, bias ? &bias : 0, "none", 0, 0, 0, y));
    return true;
}

static void by_library(Handle x, const View& xs, Handle w, const View& ws, Handle bias,
                       const View* bs, Handle list, size_t count, Handle y) {
    const int64_t M = xs.sizes[0], K = xs.sizes[1], N = ws.sizes[0];
    int64_t first = 0;
    for (size_t i = 0; i < (count ? count : 1); i++) {
        const int64_t size = part_size(list, count, i, N);
        OwnedTensor out, right, addend;
        part(&out, y, 2, M, size, N, 1, first);
        part(&right, w, 2, K, size, ws.strides[1], ws.strides[0], first);
        if (bias) {
            part(&addend, bias, 1, 0, size, 0, bs->strides[0], first);
            succeeds(more.addmm(out.tensor, addend.tensor, x, right.tensor, 1, 1));
        } else
            succeeds(more.mm(out.tensor, x, right.tensor));
        first += size;
    }
}

struct List {
    Handle handle;
    ~List() { more.delete_list(handle); }
};

static Handle product(Handle bias, Handle x, Handle w, Handle list, Delta* delta) {
    View xs((uint64_t)x), ws((uint64_t)w);
    require(xs.dim == 2 && ws.dim == 2 && xs.sizes[1] == ws.sizes[1],
            "lorafx: x (M, K) and weight (N, K) do not fit together");
    const int64_t M = xs.sizes[0], N = ws.sizes[0], sizes[] = {M, N}, strides[] = {N ? N : 1, 1};
    const View bs(bias ? View((uint64_t)bias) : View());
    require(!bias || (bs.dim == 1 && bs.sizes[0] == N), "lorafx: bias is not (N,)");
    const View* b = bias ? &bs : 0;
    const size_t parts = check_parts(list, N);
    OwnedTensor y;
    bool added = false;
    if (!by_onednn(x, xs, w, ws, bias, b, &y.tensor)) {
        succeeds(more.empty(2, sizes, strides, xs.dtype, 0, 0, &y.tensor));
        if (delta) delta->operands[0] = (uint64_t)y.tensor;
        if (by_kernel(xs, ws, b, y.tensor, delta)) added = true;
        else by_library(x, xs, w, ws, bias, b, list, parts, y.tensor);
    }
    if (delta && !added) {
        delta->operands[0] = (uint64_t)y.tensor;
        run_delta(delta->operands, delta->rows, delta->kernel, 0, 0);
    }
    Handle result = y.tensor;
    y.tensor = 0;
    return result;
}

// A boxed kernel owns what is on its stack, and leaves its result there: (bias), x, weight, sizes and,
// with a delta, the bank, rows, kernel.
template <bool BIAS, bool DELTA> static void dense(uint64_t* stack, uint64_t, uint64_t) {
    OwnedTensor bias, x, w, bank[5];
    const uint64_t* next = stack;
    if (BIAS) bias.tensor = (Handle)*next++;
    x.tensor = (Handle)*next++, w.tensor = (Handle)*next++;
    List list = {(Handle)*next++};
    Delta delta;
    if (DELTA) {
        for (int i = 0; i < 5; i++) bank[i].tensor = (Handle)next[i];
        delta = {{0, (uint64_t)x.tensor, next[0], next[1], next[2], next[3], next[4]},
                 (int64_t)next[5], next[6]};
    }
    stack[0] = (uint64_t)product(bias.tensor, x.tensor, w.tensor, list.handle, DELTA ? &delta : 0);
}

extern "C" int32_t lorafx_install(const DenseShims* shims) {
    more = *shims;
    torch = more.common;
    Handle library;
    uint64_t version = torch.version();
    return torch.library_init("lorafx", "CPU", "lorafx/kernels/cpu/dense_op.cpp", 1, &library) ||
           torch.library_impl(library, "dense_mm", dense<false, false>, version) ||
           torch.library_impl(library, "dense_addmm", dense<true, false>, version);
}

// The ops with deltas, which `run` adds; called once.
extern "C" int32_t lorafx_install_deltas(RunDelta run) {
    run_delta = run;
    Handle library;
    uint64_t version = torch.version();
    return torch.library_init("lorafx", "CPU", "lorafx/kernels/cpu/dense_op.cpp", 1, &library) ||
           torch.library_impl(library, "dense_mm_delta", dense<false, true>, version) ||
           torch.library_impl(library, "dense_addmm_delta", dense<true, true>, version);
}

extern "C" void lorafx_add(int32_t dtype, int64_t most_rows, int32_t (*run)(const Args*)) {
    if (dtype < 0 || dtype >= DTYPES) return;
    kernels[dtype].most_rows = most_rows;
    __atomic_store_n(&kernels[dtype].run, run, __ATOMIC_RELEASE);
}

// Whether aten.mm has the best instructions of this CPU: MKL takes AVX-512 on Intel's alone.
extern "C" int32_t lorafx_mm_is_slow() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && !__builtin_cpu_is("intel");
#else
    return 0;
#endif
}

extern "C" void lorafx_add_many(int32_t dtype, Linear linear) {
    if (dtype >= 0 && dtype < DTYPES) __atomic_store_n(linears + dtype, linear, __ATOMIC_RELEASE);
}

extern "C" int32_t lorafx_has_many(int32_t dtype) {
    return dtype >= 0 && dtype < DTYPES && __atomic_load_n(linears + dtype, __ATOMIC_ACQUIRE);
}
