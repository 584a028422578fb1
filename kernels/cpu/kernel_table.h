// Generated kernels by key, for the ops of a library. Before this text stands handles.h.
//
// A library's `struct Kernel` has words of 64 bits alone: the key, then what `add_kernel` of cpu_source.py
// gives. Open addressing; an entry is published by its address, and stays, since a thread may call it.

struct Key {
    int64_t parts[6];  // 0 where there are fewer
};

template <class Kernel> struct Table {
    static const uint64_t CAPACITY = 1 << 14;
    Kernel* entries[CAPACITY];
    uint64_t filled;
    void (*load)(const Key*);  // by lorafx_add, where a graph from a cache is the first to need a kernel

    // The kernel of `key`, or null; `place` becomes where it is, or would be.
    Kernel* look(const Key& key, Kernel*** place) {
        uint64_t hash = 0;
        for (int64_t part : key.parts) hash = (hash ^ (uint64_t)part) * 0x9E3779B97F4A7C15u;
        for (uint64_t i = hash >> 32;; i++) {
            *place = entries + i % CAPACITY;
            Kernel* k = __atomic_load_n(*place, __ATOMIC_ACQUIRE);
            if (!k || !__builtin_memcmp(&k->key, &key, sizeof key)) return k;
        }
    }
    const Kernel* find(const Key& key) {
        Kernel** place;
        const Kernel* k = look(key, &place);
        if (k || !load) return k;
        load(&key);
        return look(key, &place);
    }
    // Adds a kernel, or replaces that of its key; the caller holds a lock. Returns 1 if the table is full.
    int32_t add(const Kernel* kernel) {
        Kernel **place, *copy = (Kernel*)malloc(sizeof *copy);
        const bool is_new = !look(kernel->key, &place);
        if (!copy || (is_new && ++filled * 2 > CAPACITY)) return 1;
        *copy = *kernel;
        __atomic_store_n(place, copy, __ATOMIC_RELEASE);
        return 0;
    }
};
