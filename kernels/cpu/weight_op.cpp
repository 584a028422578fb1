// CPU kernels of lorafx::weight_mm and others: few rows by generated code, many by a library.
//
//     weight_mm(x, weight, bias?, sizes?, scale?, zero?, fixed) -> y
//     weight_mm_delta(x, weight, A, B, ranks, scales, slots, rows, kernel, bias?, sizes?, scale?, zero?, fixed) -> y
//
// and for several weights of one x and bank
//
//     weight_mms_delta(x, weights, biases, A, B, ranks, scales, slots, rows, kernels, fixed) -> y[]
//
// The choice is made at each call, so a graph serves any number of rows; `fixed` rows are always multiplied
// by generated code, which makes each row's bits independent of their number. A weight with a scale is integers;
// the scale of packed ones has the zero in it. For many rows integers become a dense weight. Ops with a
// delta add what run_delta_ adds: of few rows in the product's parallel region, of many after it. Before
// this text stand handles.h, kernel_table.h, epilogue.h and dense_args.h.

// lorafx_run_delta of dispatcher.cpp, and what the ops hand to it: y, x, A, B, ranks, scales, slots.
typedef void (*RunDelta)(const uint64_t* operands, int64_t rows, uint64_t kernel,
                         int32_t (*product)(void*, const Epilogue*), void* context);
struct Delta {
    uint64_t operands[7];
    int64_t rows;
    uint64_t kernel;
};

struct WeightShims {  // the order of _SHIMS in cpu_source.py, then of `op_library` in weight_mm.py
    Shims common;
    int32_t (*view)(Handle, int64_t, const int64_t*, const int64_t*, int64_t, Handle*);
    int32_t (*mm)(Handle, Handle, Handle);
    int32_t (*addmm)(Handle, Handle, Handle, Handle, double, double);
    int32_t (*new_list)(size_t, Handle*);
    int32_t (*push)(Handle, uint64_t);
    int32_t (*copy)(Handle to, Handle from, int32_t);
    RunDelta run_delta;
};
static WeightShims more;

struct Kernel {
    Key key;  // WeightSpec.key of weight_source.py
    int32_t (*run)(const Args*);  // null where no kernel is generated
    void (*widen)(const Args*);   // null for a dense weight
    int64_t most_rows;
};
static Table<Kernel> kernels;

// oneDNN's product of many rows, mkldnn::_linear_pointwise, where it is faster than aten.mm.
typedef int32_t (*Linear)(Handle x, Handle weight, Handle* bias, const char* attr, const double** scalars,
                          int64_t count, const char** algorithm, Handle* y);
static const int DTYPES = 64;
static Linear linears[DTYPES];  // by torch's number of a dtype

// The dtype in which many rows of another are multiplied, or 0; and the columns of W converted at a time.
static int32_t wider[DTYPES];
static const int64_t CONVERTED_COLUMNS = 256;
static int32_t wider_than(int32_t dtype) {
    return dtype >= 0 && dtype < DTYPES ? __atomic_load_n(wider + dtype, __ATOMIC_ACQUIRE) : 0;
}

// Elements of the longest step of a generated kernel, which no group may cut.
static const int64_t LONGEST_STEP = 32;

static void succeeds(int32_t status) { require(!status, "lorafx: a product failed"); }

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

// Returns whether y was computed; a delta is then part of it. `args` has what is not of x, w and bias.
static bool by_kernel(const Kernel* k, const View& x, const View& w, const View* bias, Handle y,
                      const Delta* delta, bool fixed, Args args = {}) {
    const int64_t M = x.sizes[0], K = x.sizes[1], N = w.sizes[0];
    if (!k || !k->run || (M > k->most_rows && !fixed) || !M || !K || !N) return false;
    if (K > 1 && (x.strides[1] != 1 || w.strides[1] != 1)) return false;
    if (bias && N > 1 && bias->strides[0] != 1) return false;
    void* data;
    succeeds(torch.data_ptr(y, &data));
    FewRows few = {k->run, {data, x.data, w.data, bias ? bias->data : 0, M, K, N, x.strides[0],
                         w.strides[0], (int64_t)thread_count(), torch.parallel, 0, args.scale,
                         args.zero, args.group, fixed}};
    if (!delta) return !k->run(&few.args);
    more.run_delta(delta->operands, delta->rows, delta->kernel, with_epilogue, &few);
    return true;
}

// The columns of part i; N where there is no list.
static int64_t part_size(Handle list, size_t count, size_t i, int64_t N) {
    uint64_t size = N;
    if (count) succeeds(torch.list_item(list, i, &size));
    return size;
}

static size_t check_parts(Handle list, int64_t N) {
    size_t count = 0;
    if (list) succeeds(torch.list_size(list, &count));
    int64_t sum = 0;
    for (size_t i = 0; i < count; i++) {
        const int64_t size = part_size(list, count, i, N);
        require(size >= 0 && size <= N - sum, "lorafx: sizes are over N");
        sum += size;
    }
    require(!count || sum == N, "lorafx: sizes do not add up to N");
    return count;
}

static bool by_onednn(const Kernel* k, Handle x, const View& xs, Handle w, const View& ws, Handle bias,
                      const View* bs, Handle* y) {
    if (xs.dtype < 0 || xs.dtype >= DTYPES) return false;
    Linear linear = __atomic_load_n(linears + xs.dtype, __ATOMIC_ACQUIRE);
    const int64_t M = xs.sizes[0], K = xs.sizes[1], N = ws.sizes[0];
    if (!linear || M <= (k ? k->most_rows : 0) || !K || !N) return false;
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

static Handle dense_product(Handle bias, Handle x, Handle w, Handle list, Delta* delta, bool fixed);

// Where aten.mm has no instructions for a dtype. W is converted block by block, which a cache holds.
static bool converted(const Kernel* k, Handle x, const View& xs, Handle w, const View& ws, Handle bias,
                       const View* bs, Handle y) {
    const int64_t M = xs.sizes[0], K = xs.sizes[1], N = ws.sizes[0];
    const int32_t type = wider_than(xs.dtype);
    if (!type || M <= (k ? k->most_rows : 0) || !K || !N) return false;
    const int64_t rows[] = {M, K}, block[] = {CONVERTED_COLUMNS < N ? CONVERTED_COLUMNS : N, K}, strides[] = {K, 1};
    OwnedTensor left, space;
    succeeds(torch.empty(2, rows, strides, type, 0, 0, &left.tensor));
    succeeds(torch.empty(2, block, strides, type, 0, 0, &space.tensor));
    succeeds(more.copy(left.tensor, x, 0));
    for (int64_t first = 0; first < N; first += block[0]) {
        const int64_t size = N - first < block[0] ? N - first : block[0], sizes[] = {size, K}, one = 1;
        OwnedTensor stored, right, addend, out;
        succeeds(more.view(w, 2, sizes, ws.strides, first * ws.strides[0], &stored.tensor));
        succeeds(more.view(space.tensor, 2, sizes, strides, 0, &right.tensor));
        succeeds(more.copy(right.tensor, stored.tensor, 0));
        if (bias) {
            OwnedTensor narrow;
            part(&narrow, bias, 1, 0, size, 0, bs->strides[0], first);
            succeeds(torch.empty(1, &size, &one, type, 0, 0, &addend.tensor));
            succeeds(more.copy(addend.tensor, narrow.tensor, 0));
        }
        const OwnedTensor wide((uint64_t)dense_product(addend.tensor, left.tensor, right.tensor, 0, 0, false));
        part(&out, y, 2, M, size, N, 1, first);
        succeeds(more.copy(out.tensor, wide.tensor, 0));
    }
    return true;
}

static Handle dense_product(Handle bias, Handle x, Handle w, Handle list, Delta* delta, bool fixed) {
    View xs((uint64_t)x), ws((uint64_t)w);
    require(xs.dim == 2 && ws.dim == 2 && xs.sizes[1] == ws.sizes[1],
            "lorafx: x (M, K) and weight (N, K) do not fit together");
    require(xs.dtype == ws.dtype, "lorafx: x and weight differ in dtype");
    const int64_t M = xs.sizes[0], N = ws.sizes[0], sizes[] = {M, N}, strides[] = {N ? N : 1, 1};
    const View bs(bias ? View((uint64_t)bias) : View());
    require(!bias || (bs.dim == 1 && bs.sizes[0] == N && bs.dtype == xs.dtype),
            "lorafx: bias is not (N,) of the dtype of x");
    const View* b = bias ? &bs : 0;
    const size_t parts = check_parts(list, N);
    const Kernel* k = kernels.find({{xs.dtype, ws.dtype}});
    OwnedTensor y;
    bool added = false;
    if (fixed || !by_onednn(k, x, xs, w, ws, bias, b, &y.tensor)) {
        succeeds(torch.empty(2, sizes, strides, xs.dtype, 0, 0, &y.tensor));
        if (delta) delta->operands[0] = (uint64_t)y.tensor;
        if (by_kernel(k, xs, ws, b, y.tensor, delta, fixed)) added = true;
        else if (fixed || !converted(k, x, xs, w, ws, bias, b, y.tensor)) {
            require(!fixed || !M || !xs.sizes[1] || !N, "lorafx: no generated product fits x and weight");
            by_library(x, xs, w, ws, bias, b, list, parts, y.tensor);
        }
    }
    if (delta && !added) {
        delta->operands[0] = (uint64_t)y.tensor;
        more.run_delta(delta->operands, delta->rows, delta->kernel, 0, 0);
    }
    return y.release();
}

static size_t size_of(const List& list) {
    size_t count;
    succeeds(torch.list_size(list.handle, &count));
    return count;
}

struct Weight {
    OwnedTensor parts[3];  // W, or integers, scale and maybe zero
    size_t count = 0;

    void take(const List& list, size_t first, size_t size) {
        require(size && size < 4, "lorafx: a weight is one tensor, or integers, scale and maybe zero");
        for (; count < size; count++)
            succeeds(torch.list_item(list.handle, first + count, (uint64_t*)&parts[count].tensor));
    }
};

static Handle stored_product(Handle bias, Handle x, const Weight& weight, Handle list, Delta* delta,
                             bool fixed) {
    View xs((uint64_t)x), ws((uint64_t)weight.parts[0].tensor), scale((uint64_t)weight.parts[1].tensor);
    const View bs(bias ? View((uint64_t)bias) : View());
    const View zero(weight.count > 2 ? View((uint64_t)weight.parts[2].tensor) : View());
    const bool packed = scale.dim == 3;  // W of four bits, scale and zero (groups, N, 2)
    require(xs.dim == 2 && ws.dim == 2 && xs.sizes[1] == ws.sizes[1] * (packed ? 2 : 1),
            "lorafx: x (M, K) and weight (N, K) do not fit together");
    const int64_t M = xs.sizes[0], K = xs.sizes[1], N = ws.sizes[0];
    const int64_t groups = packed ? scale.sizes[0] : scale.dim == 2 ? scale.sizes[1] : 0;
    require(groups > 0 && K % groups == 0 && scale.sizes[packed] == N && scale.contiguous(),
            "lorafx: the scale of a stored weight is not (N, groups), contiguous");
    require(!packed || (weight.count == 2 && scale.sizes[2] == 2 && N % 16 == 0 &&
                        K / groups % LONGEST_STEP == 0 && ws.contiguous()),
            "lorafx: packed integers are not (N, K / 2) with scale and zero (groups, N, 2)");
    require(weight.count < 3 || (zero.dim == 2 && zero.sizes[0] == N && zero.sizes[1] == groups &&
                                 zero.contiguous()),
            "lorafx: the zero of a stored weight is not (N, groups), contiguous");
    require(!bias || (bs.dim == 1 && bs.sizes[0] == N && bs.dtype == xs.dtype),
            "lorafx: bias is not (N,) of the dtype of x");
    require(K < 2 || ws.strides[1] == 1, "lorafx: the integers of a stored weight are not in rows");
    check_parts(list, N);
    const int64_t zeros = weight.count > 2 ? zero.dtype + 1 : 0;
    const Kernel* k = kernels.find({{xs.dtype, ws.dtype, scale.dtype + 1, zeros, packed || groups > 1 || zeros}});
    require(k && k->run, "lorafx: there is no kernel for a stored weight");
    const Args args = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, scale.data, zeros ? zero.data : 0, K / groups};
    OwnedTensor y;
    const int64_t sizes[] = {M, N}, strides[] = {N ? N : 1, 1};
    if (groups == 1 || args.group % LONGEST_STEP == 0) {
        succeeds(torch.empty(2, sizes, strides, xs.dtype, 0, 0, &y.tensor));
        if (delta) delta->operands[0] = (uint64_t)y.tensor;
        if (by_kernel(k, xs, ws, bias ? &bs : 0, y.tensor, delta, fixed, args)) return y.release();
    }
    OwnedTensor dense;
    const int64_t shape[] = {N, K}, steps[] = {packed || !K ? 1 : K, packed ? N : 1};
    succeeds(torch.empty(2, shape, steps, xs.dtype, 0, 0, &dense.tensor));
    Args widened = args;
    succeeds(torch.data_ptr(dense.tensor, &widened.y));
    widened.w = ws.data, widened.w_stride = ws.strides[0];
    widened.in_features = K, widened.out_features = N;
    widened.parallel = torch.parallel;
    if (K && N) k->widen(&widened);
    return dense_product(bias, x, dense.tensor, list, delta, fixed);
}

static Handle product(Handle bias, Handle x, const Weight& weight, Handle sizes, Delta* delta, bool fixed) {
    return weight.count > 1 ? stored_product(bias, x, weight, sizes, delta, fixed)
                            : dense_product(bias, x, weight.parts[0].tensor, sizes, delta, fixed);
}

// An optional value has a place of its own in memory, which the kernel frees, or is null.
static Handle taken(uint64_t value) {
    uint64_t* place = (uint64_t*)value;
    const Handle item = place ? (Handle)*place : 0;
    delete place;
    return item;
}

// A boxed kernel owns what is on its stack, and leaves its result there: x, weight; with a delta the bank,
// rows, kernel; bias, sizes, scale, zero, fixed.
template <bool DELTA> static void weight_op(uint64_t* stack, uint64_t, uint64_t) {
    OwnedTensor x, bias, bank[5];
    Weight weight;
    x.tensor = (Handle)stack[0];
    weight.parts[0].tensor = (Handle)stack[1];
    const uint64_t* next = stack + 2;
    Delta delta;
    if (DELTA) {
        for (int i = 0; i < 5; i++) bank[i].tensor = (Handle)next[i];
        delta = {{0, stack[0], next[0], next[1], next[2], next[3], next[4]}, (int64_t)next[5], next[6]};
        next += 7;
    }
    bias.tensor = taken(next[0]);
    const List sizes = {taken(next[1])};
    weight.parts[1].tensor = taken(next[2]);
    weight.parts[2].tensor = taken(next[3]);
    const bool scaled = weight.parts[1].tensor, shifted = weight.parts[2].tensor;
    require(scaled || !shifted, "lorafx: a zero without a scale");
    weight.count = 1 + scaled + shifted;
    const bool fixed = (uint8_t)next[4];
    stack[0] = (uint64_t)product(bias.tensor, x.tensor, weight, sizes.handle, DELTA ? &delta : 0, fixed);
}

static const size_t MOST_WEIGHTS = 8;

// Products of one x, each with its delta: x, weights, biases, the bank, rows, kernels, fixed. Each weight has
// as many tensors in the list as the others; there are no biases, or one each.
static void several(uint64_t* stack, uint64_t, uint64_t) {
    OwnedTensor operands[6], biases[MOST_WEIGHTS], results[MOST_WEIGHTS];  // operands: x, the bank
    const List weight_list = {(Handle)stack[1]}, bias_list = {(Handle)stack[2]}, ids = {(Handle)stack[9]};
    Weight weights[MOST_WEIGHTS];
    operands[0].tensor = (Handle)stack[0];
    for (int i = 1; i < 6; i++) operands[i].tensor = (Handle)stack[i + 2];
    const size_t count = size_of(ids), tensors = size_of(weight_list), added = size_of(bias_list);
    require(count && count <= MOST_WEIGHTS && tensors % count == 0 && (!added || added == count),
            "lorafx: weights, biases and kernels differ in number, or are over 8");
    for (size_t i = 0; i < count; i++) {
        weights[i].take(weight_list, i * (tensors / count), tensors / count);
        if (added) succeeds(torch.list_item(bias_list.handle, i, (uint64_t*)&biases[i].tensor));
    }
    List made = {0};
    succeeds(more.new_list(count, &made.handle));
    for (size_t i = 0; i < count; i++) {
        Delta delta = {{0, stack[0], stack[3], stack[4], stack[5], stack[6], stack[7]}, (int64_t)stack[8], 0};
        succeeds(torch.list_item(ids.handle, i, &delta.kernel));
        results[i].tensor = product(biases[i].tensor, operands[0].tensor, weights[i], 0, &delta,
                                    (uint8_t)stack[10]);
    }
    for (size_t i = 0; i < count; i++) succeeds(more.push(made.handle, (uint64_t)results[i].release()));
    stack[0] = (uint64_t)made.handle;
    made.handle = 0;
}

extern "C" int32_t lorafx_install(const WeightShims* shims) {
    more = *shims;
    torch = more.common;
    Handle library;
    const uint64_t version = torch.version();
    return torch.library_init("lorafx", "CPU", "lorafx/kernels/cpu/weight_op.cpp", 1, &library) ||
           torch.library_impl(library, "weight_mm", weight_op<false>, version) ||
           torch.library_impl(library, "weight_mm_delta", weight_op<true>, version) ||
           torch.library_impl(library, "weight_mms_delta", several, version);
}

extern "C" void lorafx_load_by(void (*load)(const Key*)) { kernels.load = load; }
extern "C" int32_t lorafx_add(const Kernel* kernel) { return kernels.add(kernel); }

// Whether aten.mm has general code only: MKL has code of its own for Intel's CPUs alone.
extern "C" int32_t lorafx_mm_is_slow() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    return !__builtin_cpu_is("intel");
#else
    return 0;
#endif
}

extern "C" void lorafx_add_many(int32_t dtype, Linear linear) {
    if (dtype >= 0 && dtype < DTYPES) __atomic_store_n(linears + dtype, linear, __ATOMIC_RELEASE);
}

extern "C" void lorafx_widen_many(int32_t dtype, int32_t type) {
    if (dtype >= 0 && dtype < DTYPES) __atomic_store_n(wider + dtype, type, __ATOMIC_RELEASE);
}

extern "C" int32_t lorafx_has_many(int32_t dtype) {
    if (wider_than(dtype)) return 1;
    return dtype >= 0 && dtype < DTYPES && __atomic_load_n(linears + dtype, __ATOMIC_ACQUIRE);
}
