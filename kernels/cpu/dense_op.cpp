// CPU kernels of lorafx::dense_mm and dense_addmm: few rows by generated code, many by the library.
//
//     dense_mm(x, weight, sizes) -> y            dense_addmm(bias, x, weight, sizes) -> y
//
// Which it is, is decided at each call, so a graph serves any number of rows. Before this text stand
// handles.h and dense_args.h.

struct DenseShims {  // the order of _SHIMS in native_ops.py, then of _MORE_SHIMS in dense.py
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

// By torch's number of a dtype; entries are written once, `run` last.
struct Kernel {
    int64_t most_rows;
    int32_t (*run)(const Args*);
};
static const int DTYPES = 64;
static Kernel kernels[DTYPES];

static void succeeds(int32_t status) { require(!status, "lorafx: a product failed"); }

struct Held {
    Handle tensor = 0;
    Held() {}
    Held(const Held&) = delete;
    ~Held() {
        if (tensor) torch.delete_tensor(tensor);
    }
};

// Columns [first, first + size) of what the tensor is, as (columns,) or (…, columns) at these strides.
static void part(Held* out, Handle tensor, int64_t dim, int64_t rows, int64_t size, int64_t row_stride,
                 int64_t stride, int64_t first) {
    const int64_t sizes[] = {rows, size}, strides[] = {row_stride, stride};
    succeeds(more.view(tensor, dim, sizes + 2 - dim, strides + 2 - dim, first * stride, &out->tensor));
}

static bool by_kernel(const View& x, const View& w, const View* bias, Handle y) {
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
    const Args args = {data, x.data, w.data, bias ? bias->data : 0, M, K, N, x.strides[0],
                       w.strides[0], (int64_t)thread_count(), torch.parallel};
    return !run(&args);
}

static void by_library(Handle x, const View& xs, Handle w, const View& ws, Handle bias,
                       const View* bs, Handle list, Handle y) {
    const int64_t M = xs.sizes[0], K = xs.sizes[1], N = ws.sizes[0];
    size_t count = 0;
    succeeds(more.list_size(list, &count));
    int64_t first = 0;
    for (size_t i = 0; i < (count ? count : 1); i++) {
        uint64_t size = N;
        if (count) succeeds(more.list_item(list, i, &size));
        require((int64_t)size >= 0 && first + (int64_t)size <= N, "lorafx: sizes are over N");
        Held out, right, own;
        part(&out, y, 2, M, size, N, 1, first);
        part(&right, w, 2, K, size, ws.strides[1], ws.strides[0], first);
        if (bias) {
            part(&own, bias, 1, 0, size, 0, bs->strides[0], first);
            succeeds(more.addmm(out.tensor, own.tensor, x, right.tensor, 1, 1));
        } else
            succeeds(more.mm(out.tensor, x, right.tensor));
        first += size;
    }
    require(first == N, "lorafx: sizes do not add up to N");
}

struct List {
    Handle handle;
    ~List() { more.delete_list(handle); }
};

static Handle product(Handle bias, Handle x, Handle w, Handle list) {
    View xs((uint64_t)x), ws((uint64_t)w);
    require(xs.dim == 2 && ws.dim == 2 && xs.sizes[1] == ws.sizes[1],
            "lorafx: x (M, K) and weight (N, K) do not fit together");
    const int64_t M = xs.sizes[0], N = ws.sizes[0], sizes[] = {M, N}, strides[] = {N ? N : 1, 1};
    Held y;
    succeeds(more.empty(2, sizes, strides, xs.dtype, 0, 0, &y.tensor));
    if (bias) {
        View bs((uint64_t)bias);
        require(bs.dim == 1 && bs.sizes[0] == N, "lorafx: bias is not (N,)");
        if (!by_kernel(xs, ws, &bs, y.tensor)) by_library(x, xs, w, ws, bias, &bs, list, y.tensor);
    } else if (!by_kernel(xs, ws, 0, y.tensor))
        by_library(x, xs, w, ws, 0, 0, list, y.tensor);
    Handle result = y.tensor;
    y.tensor = 0;
    return result;
}

// A boxed kernel owns what is on its stack, and leaves its result there.
static void dense_mm(uint64_t* stack, uint64_t, uint64_t) {
    Held x, w;
    x.tensor = (Handle)stack[0], w.tensor = (Handle)stack[1];
    List list = {(Handle)stack[2]};
    stack[0] = (uint64_t)product(0, x.tensor, w.tensor, list.handle);
}
static void dense_addmm(uint64_t* stack, uint64_t, uint64_t) {
    Held bias, x, w;
    bias.tensor = (Handle)stack[0], x.tensor = (Handle)stack[1], w.tensor = (Handle)stack[2];
    List list = {(Handle)stack[3]};
    stack[0] = (uint64_t)product(bias.tensor, x.tensor, w.tensor, list.handle);
}

extern "C" int32_t lorafx_install(const DenseShims* shims) {
    more = *shims;
    torch = more.common;
    Handle library;
    uint64_t version = torch.version();
    return torch.library_init("lorafx", "CPU", "lorafx/kernels/cpu/dense_op.cpp", 1, &library) ||
           torch.library_impl(library, "dense_mm", dense_mm, version) ||
           torch.library_impl(library, "dense_addmm", dense_addmm, version);
}

extern "C" void lorafx_add(int32_t dtype, int64_t most_rows, int32_t (*run)(const Args*)) {
    if (dtype < 0 || dtype >= DTYPES) return;
    kernels[dtype].most_rows = most_rows;
    __atomic_store_n(&kernels[dtype].run, run, __ATOMIC_RELEASE);
}
