// A tensor's address as Python passes it.
#pragma once
#include <cstdint>

namespace rlhf {

struct Pointer {
    uintptr_t address = 0;
    template <typename T>
    __attribute__((always_inline)) T* as() const { return reinterpret_cast<T*>(address); }
    __attribute__((always_inline)) explicit operator bool() const { return address != 0; }
};

}  // namespace rlhf

// Runs FUNCTION<float>(...) or FUNCTION<double>(...) by the dtype code.
#define RLHF_BY_DTYPE(FUNCTION, ...) (dtype == 3 ? FUNCTION<double>(__VA_ARGS__) : FUNCTION<float>(__VA_ARGS__))
