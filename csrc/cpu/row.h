// The online-softmax state of a row of logits in one pass over memory, in blocks that stay in the L1 cache.
#pragma once
#include "lane_sums.h"
#include "storage.h"
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace rlhf::ISA {
namespace {

constexpr int64_t kBlock = 4096;       // logits of a block, which fits in the L1 cache as floats
constexpr int64_t kSegment = 1 << 15;  // columns of a thread; fixed, so that the bits do not depend on the threads
constexpr int64_t kGuess = 256;        // the largest of so many first logits is the first shift
constexpr int64_t kMasked = -100;      // the token id of a row that does not count

template <typename T>
inline void cap(T* z, int64_t n, T softcap) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) z[i] = softcap * tanh_of(z[i] / softcap);
}

template <typename In>
inline Compute<In> logit(const In* row, int64_t i, double softcap) {
    Compute<In> z = widen(row[i]);
    if (softcap != 0) cap(&z, 1, Compute<In>(softcap));
    return z;
}

// n logits ready to be summed: the row itself where the logits need no conversion and no softcap, else the buffer.
template <typename In>
inline const Compute<In>* block(const In* from, int64_t n, double softcap, Compute<In>* buffer) {
    if constexpr (sizeof(In) == sizeof(Compute<In>))
        if (softcap == 0) return from;
    load(from, buffer, n);
    if (softcap != 0) cap(buffer, n, Compute<In>(softcap));
    return buffer;
}

template <typename T>
inline T max_of(const T* z, int64_t n) {
    T top = T(-kInf);
#pragma omp simd reduction(max : top)
    for (int64_t k = 0; k < n; ++k) top = z[k] > top ? z[k] : top;
    return top;
}

// The shift for the largest logit: the next integer, so that z - shift is exact for large logits. At a low temperature
// the shift is the logit itself, because a shift up to 1 above the logit would leave little of the logit's weight.
template <typename T>
inline T shift_of(T top, double inv_temperature) {
    return inv_temperature < 16 ? std::ceil(top) : top;
}

// State of the columns [begin, end) without the target; memory is read once. The first few logits give the shift, so
// that a sum needs no search for the largest logit first. A chunk whose sums show that the shift is too low moves the
// shift.
template <typename In>
Softmax accumulate(const In* row, int64_t begin, int64_t end, int64_t target, double inv_temperature, double softcap) {
    using T = Compute<In>;
    alignas(64) T buffer[kChunk], rest[kLine];
    const T factor = T(inv_temperature * kLog2E);
    Softmax state;
    LaneSums sums;
    bool wide = sizeof(T) != sizeof(float);
    // The target does not set the shift, because beside a far larger target the others would vanish.
    const int64_t first = target >= begin && target < begin + kGuess ? target + 1 : begin;
    const int64_t guessed = minimum(kGuess, end - first);
    T shift = shift_of(max_of(block(row + first, guessed, softcap, buffer), guessed), inv_temperature);
    const auto add = [&](const T* z, const In* source, int64_t n) {
        if (!wide && add_lines<false>(z, source, n, -shift, factor, sums)) return;
        const T top = max_of(z, n);
        if (top > shift) {
            const Softmax before = sums.total(shift, factor);
            if (before.sum != 0) state.merge(before, inv_temperature);
            sums = LaneSums();
            shift = shift_of(top, inv_temperature);
            if (!wide && add_lines<false>(z, source, n, -shift, factor, sums)) return;
        }
        wide = true;  // for the rest of the row, because a row with one logit of -inf has more of them
        add_lines<true>(z, source, n, shift > T(-kInf) ? -shift : T(0), factor, sums);
    };
    const auto add_range = [&](int64_t from, int64_t to) {
        for (int64_t i = from; i < to; i += kChunk) {
            const int64_t n = minimum(kChunk, to - i), lines = n / kLine * kLine;
            if constexpr (kReadsStored<In>)
                if (!wide && softcap == 0 && lines == n && add_stored(row + i, n, -shift, factor, sums)) continue;
            const T* z = block(row + i, n, softcap, buffer);
            if (lines > 0) add(z, row + i, lines);
            if (lines == n) continue;
            const T low = shift + kLowest<T> / factor, none = low < shift ? low : T(-kInf);  // low may round to shift
            for (int k = 0; k < kLine; ++k) rest[k] = lines + k < n ? z[lines + k] : none;
            add(rest, row + i + lines, kLine);
        }
    };
    const bool split = target >= begin && target < end;
    add_range(begin, split ? target : end);
    if (split) add_range(target + 1, end);
    const Softmax last = sums.total(shift, factor);
    if (last.sum != 0) state.merge(last, inv_temperature);
    return state;
}

// The state of one segment of a row, without the target.
template <typename In>
Softmax segment_state(const In* row, int64_t segment, int64_t V, int64_t target, double inv_temperature,
                      double softcap) {
    const int64_t begin = segment * kSegment;
    return accumulate(row, begin, minimum(begin + kSegment, V), target, inv_temperature, softcap);
}

inline int64_t segments_of(int64_t V) { return (V + kSegment - 1) / kSegment; }

template <typename In>
RowOutputs row_outputs_of(const In* row, int64_t V, int64_t target, double inv_temperature, double softcap) {
    Softmax others;
    for (int64_t s = 0; s < segments_of(V); ++s)
        others.merge(segment_state(row, s, V, target, inv_temperature, softcap), inv_temperature);
    return row_outputs(others, logit(row, target, softcap), inv_temperature);
}

// Hints to the operating system to use pages of 2 MiB. Nobody has touched the memory of a new [N, V] tensor yet, and
// its page faults, of 4 KiB each, take several times as long as filling the tensor.
template <typename In>
void prefer_huge_pages(In* first, int64_t count) {
#ifdef MADV_HUGEPAGE
    constexpr uintptr_t huge = 1 << 21;
    const uintptr_t begin = (uintptr_t(first) + huge - 1) & ~(huge - 1), end = uintptr_t(first + count) & ~(huge - 1);
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)first, (void)count;
#endif
}

// The first row whose token id is neither in [0, V) nor kMasked, or -1.
inline int64_t first_bad_id(const int64_t* ids, int64_t N, int64_t V) {
    for (int64_t i = 0; i < N; ++i)
        if (ids[i] != kMasked && (ids[i] < 0 || ids[i] >= V)) return i;
    return -1;
}

}  // namespace
}  // namespace rlhf::ISA
