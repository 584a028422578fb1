// CPU kernels of lorafx::run_delta_, run_embedding_delta_ and run_expert_delta_: from an id to its code.
//
//     run_delta_(y!, x, A, B, ranks, scales, slots, rows, kernel) -> ()
//     run_expert_delta_(y!, x, A, B, ranks, scales, slots, alike, experts, rows, count, ends, kernel)
//
// Before this text stand handles.h, kernel_table.h, rows.h, delta_args.h and epilogue.h.

enum Op { LINEAR = 0, EMBEDDING = 1, ROUTED = 2 };
struct Kernel {  // as `_enter` of delta_kernels.py gives them: the constants of the generated code
    Key key;  // the id
    int32_t (*run)(const Args*);
    int32_t (*begin)(const Args*, Epilogue*);  // beside the product y; null where there is none
    int32_t (*end)(Epilogue*);
    int64_t op, in_features, out_features, rank, group, columns, siblings, last_column, experts;
    int64_t x_dtype, bank_dtype, y_dtype, int32, int64, float32;
};

static Table<Kernel> kernels;

// Sizes (a, b, c), rows at this stride and slots at any: a bank, or some siblings' part.
static bool is_bank(const View& v, int64_t type, int64_t a, int64_t b, int64_t c, int64_t row) {
    return v.dtype == type && v.dim == 3 && v.sizes[0] == a && v.sizes[1] == b && v.sizes[2] == c &&
           (b == 1 || v.strides[1] == row) && (c == 1 || v.strides[2] == 1);
}

static bool is_table(const View& v, int64_t type, int64_t a, int64_t b, int64_t outer) {
    return v.dtype == type && v.dim == 2 && v.sizes[0] == a && v.sizes[1] == b &&
           (a == 1 || v.strides[0] == outer) && (b == 1 || v.strides[1] == 1);
}

// The rows of a tensor over its first `leading` dimensions.
static Rows rows_of(const View& v, int64_t leading) {
    Rows rows = {1, leading < v.dim ? v.strides[leading] : 1, 0, {}, {}};
    for (int64_t d = leading - 1; d >= 0; d--) {
        rows.count *= v.sizes[d];
        if (v.sizes[d] == 1) continue;
        int64_t last = rows.dims - 1;
        if (last >= 0 && v.strides[d] == rows.strides[last] * rows.sizes[last]) {
            rows.sizes[last] *= v.sizes[d];
            continue;
        }
        require(rows.dims < MOST_STRIDES,
                "lorafx: the rows of x or y lie at more than 8 strides; make it contiguous first");
        rows.sizes[rows.dims] = v.sizes[d];
        rows.strides[rows.dims++] = v.strides[d];
    }
    if (!rows.dims) rows.dims = 1;  // one row, at its beginning
    if (leading < v.dim && v.sizes[leading] == 1) rows.step = 1;
    return rows;
}

static const Kernel* kernel_of(uint64_t id, Op op) {
    const Kernel* k = kernels.find({{(int64_t)id}});
    require(k && k->op == op,
            "lorafx: this process has not loaded that kernel id; build it with lorafx.kernels.cpu.delta_kernels");
    return k;
}

// Arguments of `run` beside the tensors that all ops have.
struct Call {
    Op op;
    uint64_t kernel;
    int64_t rows;
    const View *alike, *experts;  // of routed rows
    int64_t count, ends;
};

static void check_routed(const Kernel* k, const Call& call, int64_t capacity, int64_t rows) {
    const View &alike = *call.alike, &experts = *call.experts;
    require(call.count == k->experts && capacity % k->experts == 0,
            "lorafx: the bank is not for the number of experts that the kernel was generated for");
    require(is_table(alike, k->int32, capacity, alike.dim == 2 ? alike.sizes[1] : -1, k->group) &&
                alike.sizes[1] >= k->siblings,
            "lorafx: alike (int32) is not (slots, siblings) of the kernel's bank");
    require((experts.dtype == k->int32 || experts.dtype == k->int64) && experts.dim == 1 &&
                experts.contiguous() && experts.sizes[0] == (call.ends ? k->experts : rows),
            "lorafx: experts is not a contiguous vector of integers, one a row, or one an expert "
            "that says where its rows end");
}

static void check_status(int32_t status) {
    switch (status) {
        case DONE: break;
        case BAD_SLOT: throw Failure("lorafx: a slot is outside the bank, or slots is empty");
        case MIXED:
            throw Failure("lorafx: a mixed batch reached a site whose row ownership is not proved");
        case BAD_ID: throw Failure("lorafx: a token id is outside the embedding");
        default: throw Failure("lorafx: out of memory");
    }
}

// Computes y by the kernel of its dtype, with the epilogue, where that is not null.
typedef int32_t (*Product)(void* context, const Epilogue*);

// Adds the delta to y; a `product` computes y first, in the same parallel region.
static void run(const uint64_t* stack, const Call& call, Product product = 0, void* context = 0) {
    const Kernel* k = kernel_of(call.kernel, call.op);
    const bool embedding = call.op == EMBEDDING;
    View y(stack[0]), x(stack[1]), a(stack[2]), b(stack[3]), ranks(stack[4]), scales(stack[5]),
        slots(stack[6]);
    int64_t capacity = ranks.dim == 2 ? ranks.sizes[0] : -1;
    int64_t vocabulary = embedding && a.dim == 3 ? a.sizes[1] : 0;
    int64_t siblings = ranks.dim == 2 ? ranks.sizes[1] : -1, K = k->in_features, R = k->rank;
    require(siblings >= k->siblings && is_table(ranks, k->int32, capacity, siblings, k->group) &&
                is_table(scales, k->float32, capacity, siblings, k->group),
            "lorafx: ranks (int32) and scales (float32) are not (slots, siblings) of the kernel's bank");
    int64_t shown = b.dim == 3 ? b.sizes[2] : -1;
    require(shown >= k->last_column &&
                is_bank(b, k->bank_dtype, capacity, R, shown, k->columns) &&
                (embedding ? is_bank(a, k->bank_dtype, capacity, vocabulary, R, a.strides[1])
                           : is_bank(a, k->bank_dtype, capacity, R, siblings * K, k->group * K)),
            "lorafx: A and B are not a bank of the kernel's dtype, sizes and strides, or part of one");
    require(slots.dtype == k->int32 && slots.dim == 1 && slots.contiguous(),
            "lorafx: slots is not a contiguous int32 vector");
    require(y.dtype == k->y_dtype && y.dim >= 1 && y.sizes[y.dim - 1] == k->out_features,
            "lorafx: y does not have the dtype and columns that the kernel was generated for");
    require(embedding ? x.dtype == k->int32 || x.dtype == k->int64
                      : x.dtype == k->x_dtype && x.dim >= 1 && x.sizes[x.dim - 1] == k->in_features,
            "lorafx: x does not have the dtype and features that the kernel was generated for");
    Rows out = rows_of(y, y.dim - 1), in = rows_of(x, embedding ? x.dim : x.dim - 1);
    require(out.count == in.count, "lorafx: x and y differ in rows");
    if (call.op == ROUTED) check_routed(k, call, capacity, out.count);
    Args args = {y.data, x.data, a.data, b.data, (const int32_t*)ranks.data,
                 (const float*)scales.data, (const int32_t*)slots.data, slots.sizes[0], call.rows,
                 capacity, vocabulary, (int64_t)thread_count(), torch.parallel,
                 embedding && x.dtype == k->int64, &out, &in,
                 a.strides[0], b.strides[0], a.strides[1],
                 call.alike ? (const int32_t*)call.alike->data : 0,
                 call.experts ? call.experts->data : 0,
                 call.experts && call.experts->dtype == k->int64, call.ends};
    if (!product) return check_status(k->run(&args));
    Epilogue epilogue;
    check_status(k->begin(&args, &epilogue));
    const int32_t failed = product(context, &epilogue);
    check_status(k->end(&epilogue));
    require(!failed, "lorafx: out of memory");
}

struct Owned {  // a boxed kernel owns the tensors on its stack
    uint64_t* stack;
    int tensors;
    ~Owned() {
        for (int i = 0; i < tensors; i++) torch.delete_tensor((Handle)stack[i]);
    }
};

static void run_delta(uint64_t* stack, uint64_t, uint64_t) {
    Owned owned = {stack, 7};
    run(stack, {LINEAR, stack[8], (int64_t)stack[7]});
}
static void run_embedding_delta(uint64_t* stack, uint64_t, uint64_t) {
    Owned owned = {stack, 7};
    run(stack, {EMBEDDING, stack[8], (int64_t)stack[7]});
}
static void run_expert_delta(uint64_t* stack, uint64_t, uint64_t) {
    Owned owned = {stack, 9};
    View alike(stack[7]), experts(stack[8]);
    run(stack, {ROUTED, stack[12], (int64_t)stack[9], &alike, &experts, (int64_t)stack[10],
                (stack[11] & 0xff) != 0});
}

// Computes y by `product`, if any, and adds its delta. The operands y, x, A, B, ranks, scales, slots
// remain the caller's.
extern "C" void lorafx_run_delta(const uint64_t* operands, int64_t rows, uint64_t kernel,
                                 Product product, void* context) {
    run(operands, {LINEAR, kernel, rows}, product, context);
}

extern "C" int32_t lorafx_install(const Shims* shims) {
    torch = *shims;
    Handle library;
    uint64_t version = torch.version();
    return torch.library_init("lorafx", "CPU", "lorafx/kernels/cpu/dispatcher.cpp", 1, &library) ||
           torch.library_impl(library, "run_delta_", run_delta, version) ||
           torch.library_impl(library, "run_embedding_delta_", run_embedding_delta, version) ||
           torch.library_impl(library, "run_expert_delta_", run_expert_delta, version);
}

extern "C" int32_t lorafx_add(const Kernel* kernel) { return kernels.add(kernel); }
