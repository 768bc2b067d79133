// A loss over the True tokens of a mask, in one launch. A block computes terms, gradients and sums of a tile; the last
// block to finish adds up the blocks' sums. The weight of a token needs a count of the mask first. Every block counts a
// short mask, in a few microseconds; a launch before counts a longer mask.
#pragma once
#include "launch.cuh"

namespace rlhf::cuda {
namespace {

constexpr int kPerThread = 4;  // tokens that a thread loads before it uses them
constexpr int64_t kTile = kThreads * kPerThread;
constexpr int64_t kCountedByEveryBlock = 1 << 17;

// The number of nonzero bytes among 16.
__device__ inline int nonzero_bytes(ulonglong2 bytes) {
    const unsigned long long low = 0x7f7f7f7f7f7f7f7fULL;
    // A byte's low 7 bits carry into its top bit unless they are all 0.
    return __popcll((((bytes.x & low) + low) | bytes.x) & ~low) + __popcll((((bytes.y & low) + low) | bytes.y) & ~low);
}

// This thread's share of the number of True bytes. Between the first and the last aligned address it reads 16 at a
// time.
__device__ inline int64_t count_share(const uint8_t* mask, int64_t n) {
    const int64_t head = minimum(int64_t(-uintptr_t(mask) % 16), n), lines = (n - head) / 16, tail = head + 16 * lines;
    int64_t count = 0;
    if (threadIdx.x < head) count += mask[threadIdx.x] != 0;
    if (tail + threadIdx.x < n) count += mask[tail + threadIdx.x] != 0;
    const ulonglong2* line = reinterpret_cast<const ulonglong2*>(mask + head);
#pragma unroll 4
    for (int64_t k = threadIdx.x; k < lines; k += blockDim.x) count += nonzero_bytes(line[k]);
    return count;
}

__global__ void __launch_bounds__(kThreads) count_mask(const uint8_t* mask, int64_t n, Scratch* scratch) {
    const int64_t share = (n + gridDim.x - 1) / gridDim.x, begin = minimum(blockIdx.x * share, n);
    int64_t count = count_share(mask + begin, minimum(share, n - begin));
    if (grid_reduce(count, Add(), scratch) && threadIdx.x == 0) scratch->carried[0] = double(count);
}

// A batch as `rows` stretches of `length` tokens. All tokens of a stretch have the same weight.
struct Masked {
    const uint8_t* mask;
    int64_t rows, length;
    double batch_rows, denominator;
    const double* normalizer;
    int reduction;
    bool counted;  // a launch before has counted the mask
    Scratch* scratch;
};

__device__ inline double weight_in(const Masked& batch, int64_t row) {
    const double denominator = batch.normalizer ? *batch.normalizer : batch.denominator;
    double count = 1;
    if (batch.counted)
        count = batch.scratch->carried[0];
    else if (batch.reduction == kSequenceMean || (batch.reduction == kTokenMean && denominator == 0))
        count = double(block_reduce(count_share(batch.mask + row * batch.length, batch.length), Add()));
    return token_weight(count, count, batch.batch_rows, batch.reduction, denominator);
}

struct Nothing {};

// Loss has
//   Row row(mask, begin, length)                 what the tokens of a stretch share; all threads of a block call it
//   Token load(i)                                reads the numbers of token i
//   add(i, token, on, weight, row, Sums& sums)   adds the token's terms and writes its gradients
//   write(sums)                                  writes the loss and the statistics
template <typename Loss>
__global__ void __launch_bounds__(kThreads) masked_loss(Loss loss, Masked batch) {
    const int64_t tiles = (batch.length + kTile - 1) / kTile, tasks = batch.rows * tiles;
    auto sums = typename Loss::Sums();
    double weight = 0;
    auto shared = typename Loss::Row();
    int64_t weighed = -1;
    for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
        const int64_t row = task / tiles, begin = row * batch.length, end = begin + batch.length,
                      first = begin + (task - row * tiles) * kTile + threadIdx.x;
        typename Loss::Token tokens[kPerThread];
        bool on[kPerThread];
#pragma unroll
        for (int k = 0; k < kPerThread; ++k) {
            const int64_t i = first + k * kThreads;
            on[k] = i < end && batch.mask[i];
            if (i < end) tokens[k] = loss.load(i);
        }
        if (row != weighed) {
            weight = weight_in(batch, row);
            shared = loss.row(batch.mask, begin, batch.length);
        }
        weighed = row;
#pragma unroll
        for (int k = 0; k < kPerThread; ++k)
            if (first + k * kThreads < end) loss.add(first + k * kThreads, tokens[k], on[k], weight, shared, sums);
    }
    if (grid_reduce(sums, Add(), batch.scratch) && threadIdx.x == 0) loss.write(sums);
}

// by_sequence: the loss has a `row` for each of the B rows.
template <typename Loss>
void launch_masked(const char* what, const Loss& loss, Pointer mask, int64_t B, int64_t T, int reduction,
                   double denominator, Pointer normalizer, Pointer scratch, Pointer stream, bool by_sequence = false) {
    // kSequenceMean alone gives the rows different weights.
    const bool by_row = reduction == kSequenceMean || by_sequence;
    Masked batch = {mask.as<const uint8_t>(),
                    by_row ? B : 1,
                    by_row ? T : B * T,
                    double(B),
                    denominator,
                    normalizer.as<const double>(),
                    reduction,
                    false,
                    scratch.as<Scratch>()};
    const bool counts_all = reduction == kTokenMean && denominator == 0 && !normalizer;
    if (counts_all && (B * T > kCountedByEveryBlock || by_sequence)) {
        launch(what, stream, count_mask, minimum(blocks_for(B * T, kTile * 16), int64_t(kMaxBlocks)), kThreads,
               batch.mask, B * T, batch.scratch);
        batch.counted = true;
    }
    launch(what, stream, masked_loss<Loss>, bounded_blocks(batch.rows * blocks_for(batch.length, kTile)), kThreads,
           loss, batch);
}

}  // namespace
}  // namespace rlhf::cuda
