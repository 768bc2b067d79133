// A kernel's arguments: a tensor's address as Python passes it, the choice of type, the number of threads worth
// starting.
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

// Waking threads, or waiting for one that is not running, costs more than some 100 microseconds of work.
__attribute__((always_inline)) inline int team_size(int64_t elements, int threads) {
    return elements < (1 << 17) ? 1 : threads;
}

}  // namespace rlhf

// Runs FUNCTION<float>(...) or FUNCTION<double>(...) by the dtype code.
#define RLHF_BY_DTYPE(FUNCTION, ...) (dtype == 3 ? FUNCTION<double>(__VA_ARGS__) : FUNCTION<float>(__VA_ARGS__))
