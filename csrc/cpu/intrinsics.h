// The compiler's intrinsics, without the warnings that GCC 12 gives of its own undefined registers in them.
#pragma once
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
