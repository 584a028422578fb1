// What is done in the parallel region of a product y: units of work that need nothing of y, and after
// them something to each of its columns. A kernel of deltas fills it in, that of the product calls it.
#include <stdint.h>

struct Epilogue {
    void* context;
    int64_t units;
    void (*before)(void* context, int64_t unit);  // each unit once, on any thread
    // Columns [begin, end) of y, each once, when all units are done and the columns are written.
    void (*after)(void* context, int64_t begin, int64_t end);
};
