// Bradley-Terry losses of a reward model: pairs with margin and centring, and all pairs of K ranked answers. One launch
// gives value, gradient and statistics. A launch before it counts the ranked pairs of a batch that has very many.
#include "launch.cuh"

namespace rlhf::cuda {
namespace {

constexpr int64_t kCountedByEveryBlock = 1 << 17;  // up to so many comparisons, every block counts the pairs

template <typename T>
struct RewardTensors {
    const T *chosen, *rejected, *margin;
    T *grad_chosen, *grad_rejected, *loss, *stats;
};

template <typename T>
__global__ void __launch_bounds__(kThreads)
    reward_pairs(RewardTensors<T> x, int64_t B, double center_coef, Scratch* scratch) {
    const double n = B > 0 ? double(B) : 1;
    RewardSums sums;
    for (int64_t b = blockIdx.x * int64_t(kThreads) + threadIdx.x; b < B; b += gridDim.x * int64_t(kThreads)) {
        double by_chosen, by_rejected;
        sums.add(double(x.chosen[b]), double(x.rejected[b]), x.margin ? double(x.margin[b]) : 0.0, center_coef,
                 by_chosen, by_rejected);
        if (x.grad_chosen) x.grad_chosen[b] = T(by_chosen / n);
        if (x.grad_rejected) x.grad_rejected[b] = T(by_rejected / n);
    }
    if (!grid_reduce(sums, Add(), scratch) || threadIdx.x != 0) return;
    sums.write(x.stats, n, center_coef);
    x.loss[0] = x.stats[0];
}

// The number of pairs whose better answer is one of this thread's answers: `first`, `first + step` and so on.
__device__ inline int64_t count_pairs(const int64_t* ranks, int64_t answers, int64_t K, int64_t first, int64_t step) {
    int64_t count = 0;
    for (int64_t answer = first; answer < answers; answer += step) {
        const int64_t row = answer / K;
        for (int64_t j = 0; j < K; ++j) count += ranked_above(ranks + row * K, answer - row * K, j);
    }
    return count;
}

__global__ void __launch_bounds__(kThreads)
    count_ranked(const int64_t* ranks, int64_t answers, int64_t K, Scratch* scratch) {
    int64_t count =
        count_pairs(ranks, answers, K, blockIdx.x * int64_t(kThreads) + threadIdx.x, gridDim.x * int64_t(kThreads));
    if (grid_reduce(count, Add(), scratch) && threadIdx.x == 0) scratch->carried[0] = double(count);
}

struct RankingSums {
    double loss = 0, right = 0;
    __device__ void operator+=(const RankingSums& other) {
        loss += other.loss;
        right += other.right;
    }
};

// A thread takes an answer with all the pairs that contain the answer.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    ranked_pairs(const T* scores, const int64_t* ranks, int64_t answers, int64_t K, bool counted, T* grad, T* loss,
                 T* stats, Scratch* scratch) {
    const double count = counted ? scratch->carried[0]
                                 : double(block_reduce(count_pairs(ranks, answers, K, threadIdx.x, kThreads), Add()));
    const double n = count > 0 ? count : 1;
    RankingSums sums;
    for (int64_t answer = blockIdx.x * int64_t(kThreads) + threadIdx.x; answer < answers;
         answer += gridDim.x * int64_t(kThreads)) {
        const int64_t begin = answer / K * K, i = answer - begin;
        double gradient = 0;
        for (int64_t j = 0; j < K; ++j) {
            const bool above = ranked_above(ranks + begin, i, j);
            if (!above && !ranked_above(ranks + begin, j, i)) continue;
            const double difference = double(scores[begin + i]) - double(scores[begin + j]);
            double by_difference;
            const double value = bradley_terry(above ? difference : -difference, by_difference);
            gradient += above ? by_difference : -by_difference;
            if (!above) continue;  // the other answer's thread adds it
            sums.loss += value;
            sums.right += order(difference);
        }
        if (grad) grad[answer] = T(gradient / n);
    }
    if (!grid_reduce(sums, Add(), scratch) || threadIdx.x != 0) return;
    loss[0] = stats[0] = T(sums.loss / n);
    stats[1] = T(sums.right / n);
}

template <typename T>
void launch_reward(Pointer chosen, Pointer rejected, Pointer margin, int64_t B, double center_coef, Pointer grad_chosen,
                   Pointer grad_rejected, Pointer loss, Pointer stats, Pointer scratch, Pointer stream) {
    const RewardTensors<T> tensors = {chosen.as<const T>(), rejected.as<const T>(), margin.as<const T>(),
                                      grad_chosen.as<T>(),  grad_rejected.as<T>(),  loss.as<T>(),
                                      stats.as<T>()};
    launch("reward_loss", stream, reward_pairs<T>, bounded_blocks(blocks_for(B, kThreads)), kThreads, tensors, B,
           center_coef, scratch.as<Scratch>());
}

template <typename T>
void launch_ranking(Pointer scores, Pointer ranks, int64_t B, int64_t K, Pointer grad, Pointer loss, Pointer stats,
                    Pointer scratch, Pointer stream) {
    const int64_t blocks = bounded_blocks(blocks_for(B * K, kThreads));
    const bool counted = B * K * K > kCountedByEveryBlock;
    if (counted)
        launch("ranking_loss", stream, count_ranked, blocks, kThreads, ranks.as<const int64_t>(), B * K, K,
               scratch.as<Scratch>());
    launch("ranking_loss", stream, ranked_pairs<T>, blocks, kThreads, scores.as<const T>(), ranks.as<const int64_t>(),
           B * K, K, counted, grad.as<T>(), loss.as<T>(), stats.as<T>(), scratch.as<Scratch>());
}

}  // namespace

void reward_loss(int dtype, Pointer chosen, Pointer rejected, Pointer margin, int64_t B, double center_coef,
                 Pointer grad_chosen, Pointer grad_rejected, Pointer loss, Pointer stats, Pointer scratch,
                 Pointer stream) {
    RLHF_BY_DTYPE(launch_reward, chosen, rejected, margin, B, center_coef, grad_chosen, grad_rejected, loss, stats,
                  scratch, stream);
}

void ranking_loss(int dtype, Pointer scores, Pointer ranks, int64_t B, int64_t K, Pointer grad, Pointer loss,
                  Pointer stats, Pointer scratch, Pointer stream) {
    RLHF_BY_DTYPE(launch_ranking, scores, ranks, B, K, grad, loss, stats, scratch, stream);
}

}  // namespace rlhf::cuda
