// Normalised advantages: masked whitening, and the group baselines of RLOO and GRPO. One thread sums, in double.
#include "../returns.h"
#include "ops.h"

namespace rlhf::ISA {
namespace {

template <typename T>
void whiten_all(Pointer x, Pointer mask, int64_t n, bool shift_mean, Pointer out, int threads) {
    const T* from = x.as<T>();
    const uint8_t* on = mask.as<uint8_t>();
    double count = 0, sum = 0, squares = 0;
#pragma omp simd reduction(+ : count, sum)
    for (int64_t i = 0; i < n; ++i) {
        count += on[i] ? 1 : 0;
        sum += on[i] ? double(from[i]) : 0.0;
    }
    const double mean = count > 0 ? sum / count : 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < n; ++i) squares += on[i] ? (double(from[i]) - mean) * (double(from[i]) - mean) : 0.0;
    const double scale = Moments{count, mean, squares}.whitening_scale(), shift = shift_mean ? 0 : mean;
    const int team = team_size(n, threads);
#pragma omp parallel for num_threads(team) schedule(static)
    for (int64_t i = 0; i < n; ++i) out.as<T>()[i] = on[i] ? T((double(from[i]) - mean) * scale + shift) : T(0);
}

template <typename T>
void rloo(Pointer scores, int64_t B, int64_t group, Pointer out) {
    for (int64_t b = 0; b < B; b += group) {
        double sum = 0;
        for (int64_t i = b; i < b + group; ++i) sum += double(scores.as<T>()[i]);
        for (int64_t i = b; i < b + group; ++i) {
            const double score = scores.as<T>()[i];
            out.as<T>()[i] = T(score - (sum - score) / double(group - 1));
        }
    }
}

template <typename T>
void grpo(Pointer scores, int64_t B, int64_t group, Pointer out) {
    for (int64_t b = 0; b < B; b += group) {
        double sum = 0, squares = 0;
        for (int64_t i = b; i < b + group; ++i) sum += double(scores.as<T>()[i]);
        const double mean = sum / double(group);
        for (int64_t i = b; i < b + group; ++i) squares += (scores.as<T>()[i] - mean) * (scores.as<T>()[i] - mean);
        const double scale = group_scale(squares, group);
        for (int64_t i = b; i < b + group; ++i) out.as<T>()[i] = T((scores.as<T>()[i] - mean) * scale);
    }
}

}  // namespace

void whiten(int dtype, Pointer x, Pointer mask, int64_t n, bool shift_mean, Pointer out, int threads) {
    RLHF_BY_DTYPE(whiten_all, x, mask, n, shift_mean, out, threads);
}

void rloo_advantages(int dtype, Pointer scores, int64_t B, int64_t group, Pointer out, int) {
    RLHF_BY_DTYPE(rloo, scores, B, group, out);
}

void grpo_advantages(int dtype, Pointer scores, int64_t B, int64_t group, Pointer out, int) {
    RLHF_BY_DTYPE(grpo, scores, B, group, out);
}

}  // namespace rlhf::ISA
