// The CPU kernel of lorafx::attention(query, key, value, mask[], causal, scale, fixed): finds the generated
// kernel for the dtype, the head and the strides, and hands it the tensors. Before this text stand
// handles.h, kernel_table.h and attention_args.h.

struct Kernel {
    Key key;  // AttentionForm.key of dense_attention.py
    int32_t (*run)(const Tensors*);  // null where no kernel is generated
};
static Table<Kernel> kernels;

static void attention(uint64_t* stack, uint64_t, uint64_t) {
    OwnedTensor query(stack[0]), key(stack[1]), value(stack[2]), mask, out;
    const List masks = {(Handle)stack[3]};
    size_t given = 0;
    require(!torch.list_size(masks.handle, &given) && given < 2, "lorafx::attention: one mask or none");
    if (given) require(!torch.list_item(masks.handle, 0, (uint64_t*)&mask.tensor), "lorafx: no mask");
    const View q((uint64_t)query.tensor), k((uint64_t)key.tensor), v((uint64_t)value.tensor);
    require(q.dim == 4 && k.dim == 4 && v.dim == 4, "lorafx::attention: tensors of 4 dimensions");
    require(q.sizes[0] == k.sizes[0] && k.sizes[1] > 0 && q.sizes[1] % k.sizes[1] == 0 &&
                q.sizes[3] == k.sizes[3] && q.dtype == k.dtype && q.dtype == v.dtype,
            "lorafx::attention: query and key do not fit together");
    for (int d = 0; d < 4; d++)
        require(k.sizes[d] == v.sizes[d], "lorafx::attention: key and value differ in size");
    require(q.strides[3] == 1 && k.strides[3] == 1 && v.strides[3] == 1,
            "lorafx::attention: the numbers of a head are not adjacent");
    const int64_t B = q.sizes[0], H = k.sizes[1], T = q.sizes[2], N = k.sizes[2], D = q.sizes[3];
    Tensors a = {0, q.data, 0, k.data, v.data, B, H, T, N, q.strides[0], q.strides[1], q.strides[2], 0, 0,
                 0, k.strides[0], k.strides[1], v.strides[0], v.strides[1], (uint8_t)stack[4] != 0,
                 (int64_t)thread_count(), 0, torch.parallel};
    __builtin_memcpy(&a.scale, stack + 5, sizeof a.scale);
    const int64_t group = q.sizes[1] / H;
    if (given) {
        const View m((uint64_t)mask.tensor);
        const bool fits = m.dim == 4 && m.dtype == q.dtype && (m.sizes[0] == 1 || m.sizes[0] == B) &&
                          (m.sizes[1] == 1 || (m.sizes[1] == H && group == 1)) &&
                          (m.sizes[2] == 1 || m.sizes[2] == T) && m.sizes[3] == N &&
                          (N == 1 || m.strides[3] == 1);
        require(fits, "lorafx::attention: the mask is not (B or 1, 1, T or 1, N) of the query's dtype");
        a.mask = m.data;
        a.mask_request = m.sizes[0] == 1 ? 0 : m.strides[0];
        a.mask_head = m.sizes[1] == 1 ? 0 : m.strides[1];
        a.mask_row = m.sizes[2] == 1 ? 0 : m.strides[2];
    }
    const int64_t sizes[] = {B, q.sizes[1], T, D}, strides[] = {T * H * group * D, D, H * group * D, 1};
    require(!torch.empty(4, sizes, strides, q.dtype, 0, 0, &out.tensor), "lorafx: no memory");
    void* data;
    require(!torch.data_ptr(out.tensor, &data), "lorafx: a tensor without plain memory");
    a.out = data;
    if (B && T && D) {
        const Kernel* kernel = kernels.find({{q.dtype, D, group, k.strides[2], v.strides[2], (uint8_t)stack[6]}});
        require(kernel && kernel->run, "lorafx::attention: there is no kernel for these tensors");
        require(!kernel->run(&a), "lorafx::attention: out of memory");
    }
    stack[0] = (uint64_t)out.release();
}

extern "C" int32_t lorafx_install(const Shims* shims) {
    torch = *shims;
    Handle library;
    return torch.library_init("lorafx", "CPU", "lorafx/kernels/cpu/attention_op.cpp", 1, &library) |
           torch.library_impl(library, "attention", attention, torch.version());
}

extern "C" void lorafx_load_by(void (*load)(const Key*)) { kernels.load = load; }
extern "C" int32_t lorafx_add(const Kernel* kernel) { return kernels.add(kernel); }
