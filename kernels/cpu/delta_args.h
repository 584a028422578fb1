// The arguments of a generated kernel of deltas. Before this text stands rows.h.

typedef void (*Body)(int64_t, int64_t, void*);
struct Args {
    void* y;
    const void* x;
    const void* a;
    const void* b;
    const int32_t* ranks;
    const float* scales;
    const int32_t* slots;
    int64_t n, rows, capacity, vocabulary, threads;
    int32_t (*parallel)(int64_t, int64_t, int64_t, Body, void*);
    int64_t wide_ids;
    const Rows *y_rows, *x_rows;
    int64_t slot_a, slot_b, token_a;  // from one slot of A and B to the next, one token of A
    const int32_t* alike;             // this and the next fields: for routed rows
    const void* experts;              // of each row, or with `ends` the end of each expert's rows
    int64_t wide_experts, ends;
};
enum Status { DONE = 0, BAD_SLOT = 1, MIXED = 2, NO_MEMORY = 3, BAD_ID = 4 };
