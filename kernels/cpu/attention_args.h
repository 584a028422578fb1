// The arguments of the generated kernels of lorafx::attention: tensors, and distances in numbers.

typedef void (*Body)(int64_t, int64_t, void*);
struct Tensors {
    void* out;  // (B, T, heads · GROUP, D), contiguous
    const void *query, *mask, *keys, *values;
    int64_t requests, heads, tokens, count;
    int64_t query_request, query_head, query_token, mask_request, mask_head, mask_row;
    int64_t key_request, key_head, value_request, value_head;
    int64_t causal, threads;
    double scale;
    int32_t (*parallel)(int64_t, int64_t, int64_t, Body, void*);
};
