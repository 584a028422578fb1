// Tensors through torch's stable C interface, for libraries that register CPU kernels of ops: handles
// of tensors, and the functions that Python hands over as pointers (cpu_source.py).
#include <stdint.h>
#include <stdlib.h>

#include <exception>

typedef void* Handle;
typedef void (*Body)(int64_t, int64_t, void*);

struct Shims {  // the order of _SHIMS in cpu_source.py
    int32_t (*library_init)(const char*, const char*, const char*, uint32_t, Handle*);
    int32_t (*library_impl)(Handle, const char*, void (*)(uint64_t*, uint64_t, uint64_t), uint64_t);
    uint64_t (*version)();
    int32_t (*data_ptr)(Handle, void**);
    int32_t (*dim)(Handle, int64_t*);
    int32_t (*sizes)(Handle, int64_t**);
    int32_t (*strides)(Handle, int64_t**);
    int32_t (*dtype)(Handle, int32_t*);
    int32_t (*delete_tensor)(Handle);
    int32_t (*threads)(uint32_t*);
    int32_t (*parallel)(int64_t, int64_t, int64_t, Body, void*);
    int32_t (*empty)(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, Handle*);
    int32_t (*list_size)(Handle, size_t*);
    int32_t (*list_item)(Handle, size_t, uint64_t*);
    int32_t (*delete_list)(Handle);
};
static Shims torch;

// A std::runtime_error, whose header took a third of the time to compile a library. Its text is a
// literal.
struct Failure : std::exception {
    const char* text;
    explicit Failure(const char* text) : text(text) {}
    const char* what() const noexcept override { return text; }
};

struct View {
    char* data;
    int64_t dim, *sizes, *strides;
    int32_t dtype;

    View() {}
    explicit View(uint64_t handle) {
        Handle t = (Handle)handle;
        void* p;
        if (torch.data_ptr(t, &p) | torch.dim(t, &dim) | torch.sizes(t, &sizes) |
            torch.strides(t, &strides) | torch.dtype(t, &dtype))
            throw Failure("lorafx: a tensor without plain memory");
        data = (char*)p;
    }
    bool contiguous() const {
        int64_t expected = 1;
        for (int64_t d = dim - 1; d >= 0; d--) {
            if (sizes[d] != 1 && strides[d] != expected) return false;
            expected *= sizes[d];
        }
        return true;
    }
};

static void require(bool condition, const char* message) {
    if (!condition) throw Failure(message);
}

struct OwnedTensor {
    Handle tensor = 0;
    OwnedTensor() {}
    explicit OwnedTensor(uint64_t handle) : tensor((Handle)handle) {}
    OwnedTensor(const OwnedTensor&) = delete;
    ~OwnedTensor() {
        if (tensor) torch.delete_tensor(tensor);
    }
    Handle release() {
        Handle result = tensor;
        tensor = 0;
        return result;
    }
};

struct List {
    Handle handle;
    ~List() {
        if (handle) torch.delete_list(handle);
    }
};

static uint32_t thread_count() {
    uint32_t threads = 1;
    torch.threads(&threads);
    return threads;
}
