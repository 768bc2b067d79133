// How Python calls a kernel: a tensor's address is an int, a dtype is a code. Shared by the CPU and CUDA kernels.
#pragma once
#include <cstdint>

namespace rlhf {

struct Pointer {
    uintptr_t address = 0;
    template <typename T>
    __attribute__((always_inline)) T* as() const {
        return reinterpret_cast<T*>(address);
    }
    __attribute__((always_inline)) explicit operator bool() const { return address != 0; }
};

// The number of threads for so many elements: one below 2^17, because waking threads, or waiting for a thread that is
// not running, costs as much as some 100 microseconds of work.
__attribute__((always_inline)) inline int team_size(int64_t elements, int threads) {
    return elements < (1 << 17) ? 1 : threads;
}

}  // namespace rlhf

// Runs FUNCTION<double>(...) for dtype code 3, else FUNCTION<float>(...).
#define RLHF_BY_DTYPE(FUNCTION, ...) (dtype == 3 ? FUNCTION<double>(__VA_ARGS__) : FUNCTION<float>(__VA_ARGS__))
