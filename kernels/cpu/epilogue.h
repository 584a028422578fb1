// Work in the parallel region of a product y: units that do not read y, then a step for each of its
// columns. A kernel of deltas fills it in, and the kernel of the product calls it.
#include <stdint.h>

struct Epilogue {
    void* context;
    int64_t units;
    void (*before)(void* context, int64_t unit);  // each unit once, on any thread
    // Columns [begin, end) of y, each once, when all units are done and the columns are written.
    void (*after)(void* context, int64_t begin, int64_t end);
};
