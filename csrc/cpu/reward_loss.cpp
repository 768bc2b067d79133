// Bradley-Terry losses of a reward model: pairs with margin and centring, and all pairs of K ranked answers. The loops
// run on one thread, because B is small.
#include <vector>

#include "../pair_terms.h"
#include "ops.h"

namespace rlhf::ISA {
namespace {

template <typename T>
void pairs(Pointer chosen, Pointer rejected, Pointer margin, int64_t B, double center_coef, Pointer grad_chosen,
           Pointer grad_rejected, Pointer stats) {
    RewardSums sums;
    const double n = B > 0 ? double(B) : 1;
    for (int64_t b = 0; b < B; ++b) {
        double by_chosen, by_rejected;
        sums.add(double(chosen.as<T>()[b]), double(rejected.as<T>()[b]), margin ? double(margin.as<T>()[b]) : 0.0,
                 center_coef, by_chosen, by_rejected);
        if (grad_chosen) grad_chosen.as<T>()[b] = T(by_chosen / n);
        if (grad_rejected) grad_rejected.as<T>()[b] = T(by_rejected / n);
    }
    sums.write(stats.as<T>(), n, center_coef);
}

template <typename T>
void ranking(Pointer scores, Pointer ranks, int64_t B, int64_t K, Pointer grad, Pointer stats) {
    double loss = 0, right = 0, count = 0;
    for (int64_t b = 0; b < B; ++b)
        for (int64_t i = 0; i < K; ++i)
            for (int64_t j = 0; j < K; ++j) count += ranked_above(ranks.as<int64_t>() + b * K, i, j);
    const double n = count > 0 ? count : 1;
    std::vector<double> row_grad(K);
    for (int64_t b = 0; b < B; ++b) {
        const T* score = scores.as<T>() + b * K;
        for (int64_t i = 0; i < K; ++i) row_grad[i] = 0;
        for (int64_t i = 0; i < K; ++i)
            for (int64_t j = 0; j < K; ++j) {
                if (!ranked_above(ranks.as<int64_t>() + b * K, i, j)) continue;
                const double difference = double(score[i]) - double(score[j]);
                double by_difference = 0;
                loss += bradley_terry(difference, by_difference);
                right += order(difference);
                row_grad[i] += by_difference / n;
                row_grad[j] -= by_difference / n;
            }
        if (grad)
            for (int64_t i = 0; i < K; ++i) grad.as<T>()[b * K + i] = T(row_grad[i]);
    }
    stats.as<T>()[0] = T(loss / n);
    stats.as<T>()[1] = T(right / n);
}

}  // namespace

void reward_loss(int dtype, Pointer chosen, Pointer rejected, Pointer margin, int64_t B, double center_coef,
                 Pointer grad_chosen, Pointer grad_rejected, Pointer stats, int) {
    RLHF_BY_DTYPE(pairs, chosen, rejected, margin, B, center_coef, grad_chosen, grad_rejected, stats);
}

void ranking_loss(int dtype, Pointer scores, Pointer ranks, int64_t B, int64_t K, Pointer grad, Pointer stats, int) {
    RLHF_BY_DTYPE(ranking, scores, ranks, B, K, grad, stats);
}

}  // namespace rlhf::ISA
