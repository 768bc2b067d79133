// Counts the bytes that emulated CUDA kernels load from and store to global memory. GCC's thread sanitizer calls the
// functions below at every access of the kernels, which are compiled for it; the sanitizer itself is not linked. An
// access to a stack (a thread's own memory) or to static memory (a block's shared memory) is not global.
//
// Between two barriers of a block an address counts once, because threads that read it together are served together. A
// second pass over a row, which has a barrier before it, counts again.
#include <link.h>
#include <pthread.h>

#include <unordered_set>

#include "cuda_on_host.h"

namespace {

struct Range {
    uintptr_t begin, end;
};
Range excluded[32];
int ranges = 0;
bool counting = false;

struct Total {
    int64_t bytes = 0;
    long block = -1;                      // that the addresses are of
    std::unordered_set<uintptr_t> since;  // addresses, and in their upper bits the barriers that the thread has passed
} loaded, stored;

void exclude(const void* begin, size_t size) {
    if (ranges == 32) abort();
    excluded[ranges++] = {uintptr_t(begin), uintptr_t(begin) + size};
}

int exclude_own_segments(dl_phdr_info* module, size_t, void*) {
    const uintptr_t here = uintptr_t(&counting);
    bool own = false;
    for (int i = 0; i < module->dlpi_phnum; ++i) {
        const auto& segment = module->dlpi_phdr[i];
        const uintptr_t begin = module->dlpi_addr + segment.p_vaddr;
        own |= segment.p_type == PT_LOAD && here >= begin && here < begin + segment.p_memsz;
    }
    for (int i = 0; own && i < module->dlpi_phnum; ++i) {
        const auto& segment = module->dlpi_phdr[i];
        if (segment.p_type == PT_LOAD)
            exclude(reinterpret_cast<void*>(module->dlpi_addr + segment.p_vaddr), segment.p_memsz);
    }
    return own;
}

void note(const void* pointer, size_t size, Total& total) {
    const uintptr_t address = uintptr_t(pointer);
    if (!counting) return;
    for (int i = 0; i < ranges; ++i)
        if (address >= excluded[i].begin && address < excluded[i].end) return;
    const auto& machine = cuda_on_host::machine;
    if (total.block != machine.blocks) total.since.clear();
    total.block = machine.blocks;
    const uintptr_t barriers = uintptr_t(machine.fibers[machine.current].block_barriers);
    if (total.since.insert(address | barriers << 48).second) total.bytes += int64_t(size);
}

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED void counts_begin() {
    const auto& machine = cuda_on_host::machine;
    ranges = 0;
    dl_iterate_phdr(exclude_own_segments, nullptr);
    exclude(machine.stacks.data(), machine.stacks.size());
    exclude(machine.fibers.data(), machine.fibers.size() * sizeof machine.fibers[0]);
    exclude(machine.warps.data(), machine.warps.size() * sizeof machine.warps[0]);
    pthread_attr_t attributes;
    void* stack;
    size_t size;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &stack, &size);
    pthread_attr_destroy(&attributes);
    exclude(stack, size);
    loaded = stored = Total();
    counting = true;
}
EXPORTED int64_t counts_loaded() { return loaded.bytes; }
EXPORTED int64_t counts_stored() { return stored.bytes; }
EXPORTED void counts_end() { counting = false; }

#define ACCESSES(size)                                                              \
    extern "C" void __tsan_read##size(void* p) { note(p, size, loaded); }           \
    extern "C" void __tsan_write##size(void* p) { note(p, size, stored); }          \
    extern "C" void __tsan_unaligned_read##size(void* p) { note(p, size, loaded); } \
    extern "C" void __tsan_unaligned_write##size(void* p) { note(p, size, stored); }
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
extern "C" void __tsan_read_range(void* p, size_t size) { note(p, size, loaded); }
extern "C" void __tsan_write_range(void* p, size_t size) { note(p, size, stored); }
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
