// Products of bfloat16 matrices with float sums: logits from hidden states, and the gradients of both factors. Blocks
// of the right factor are packed for all threads; each thread packs rows of the left factor, and its sums stay in its
// L2 cache. Threads share rows and columns, never k, so that the bits do not depend on the threads.
#include "ops.h"

#if defined(__AVX512BW__) && defined(__x86_64__)
#include <memory>
#include <new>

#include "bf16_tiles.h"

namespace rlhf::ISA {
namespace {

constexpr int64_t kRows = 512;      // rows of a thread's block
constexpr int64_t kBandRows = 128;  // rows and columns of sums that are made in a buffer
constexpr int64_t kBandColumns = 256;
constexpr int64_t kPacked = 2 << 20;  // numbers of a packed block of the right factor
constexpr int64_t kDirect = 2048;     // sums whose rows lie further apart are made in the buffer
constexpr int64_t kCached = 1 << 21;  // sums that do not fit into a cache are stored past it

struct Free {
    void operator()(void* memory) const { ::operator delete[](memory, std::align_val_t(64)); }
};
template <typename T>
std::unique_ptr<T[], Free> memory_of(int64_t count) {
    return std::unique_ptr<T[], Free>(
        static_cast<T*>(::operator new[](size_t(count) * sizeof(T), std::align_val_t(64))));
}

struct Product {
    int64_t M, N, K;
    Factor left, right;
    float* sums;
    int64_t stride;
    bool add;
    int unit;

    // k of one call of a unit. It sets the order of a sum, so that it depends on the shape alone. Where the sums are
    // many, a long run over k saves passes over them; where k is long, blocks leave room in the L2 cache for the sums.
    int64_t depth() const { return minimum<int64_t>(round_up(K, kStep), N > kDirect ? 512 : 256); }

    void multiply(const uint16_t* a, const uint16_t* b, int64_t steps, float* to, int64_t beside, bool onto) const {
        unit == kAmx ? multiply_amx(a, b, steps, to, beside, onto) : multiply_dot(a, b, steps, to, beside, onto);
    }

    // The sums of m rows from i on and n columns from j on. `left` holds the panels of the rows, `right` of the
    // columns.
    void band(const uint16_t* a, const uint16_t* b, int64_t depth, int64_t i, int64_t j, int64_t m, int64_t n,
              bool onto, float* buffer) const {
        float* const out = sums + i * stride + j;
        const bool direct = stride <= kDirect && m % kPanel == 0 && n % kPanel == 0;
        float* const to = direct ? out : buffer;
        const int64_t beside = direct ? stride : kBandColumns;
        if (!direct && onto)
            for (int64_t row = 0; row < m; ++row)
                memcpy(to + row * beside, out + row * stride, size_t(n) * sizeof(float));
        for (int64_t column = 0; column < n; column += kPanel)
            for (int64_t row = 0; row < m; row += kPanel)
                multiply(a + row * depth, b + column * depth, depth / kStep, to + row * beside + column, beside, onto);
        if (direct) return;
        const bool past_cache = M * N > kCached;
        for (int64_t row = 0; row < m; ++row) {
            float* const line = out + row * stride;
            int64_t column = 0;
            if (past_cache && uintptr_t(line) % 64 == 0)
                for (; column + 16 <= n; column += 16)
                    _mm512_stream_ps(line + column, _mm512_load_ps(to + row * beside + column));
            memcpy(line + column, to + row * beside + column, size_t(n - column) * sizeof(float));
        }
    }

    void run(int threads) const {
        const int64_t panels = (N + kPanel - 1) / kPanel, depth = this->depth(), all_k = round_up(K, kStep);
        const int64_t block_k =
            minimum(all_k, maximum(depth, kPacked / (minimum<int64_t>(panels, 64) * kPanel) / depth * depth));
        const int64_t beside = kBandColumns / kPanel;  // panels of a band
        const int64_t block_panels = minimum(panels, maximum(beside, kPacked / kPanel / block_k / beside * beside));
        const int64_t rows = minimum(kRows, maximum(kBandRows, round_up((M + threads - 1) / threads, kPanel)));
        const int64_t row_blocks = (M + rows - 1) / rows;
        const auto packed = memory_of<uint16_t>(block_k * block_panels * kPanel);
#pragma omp parallel num_threads(threads)
        {
            const auto left = memory_of<uint16_t>(rows * depth);
            const auto buffer = memory_of<float>(kBandRows * kBandColumns);
            if (unit == kAmx) begin_tiles();
            for (int64_t first = 0; first < panels; first += block_panels)
                for (int64_t k = 0; k < K; k += block_k)
                    block(first, minimum(block_panels, panels - first), k, minimum(block_k, K - k), depth, rows,
                          row_blocks, threads, packed.get(), left.get(), buffer.get());
            if (unit == kAmx) end_tiles();
            _mm_sfence();
        }
    }

    // One packed block of the right factor, `count` panels from the panel `first` on and so many k, with all rows.
    void block(int64_t first, int64_t count, int64_t begin_k, int64_t block_k, int64_t depth, int64_t rows,
               int64_t row_blocks, int threads, uint16_t* packed, uint16_t* left_panels, float* buffer) const {
        const auto run_of = [&](int64_t k) { return minimum(depth, round_up(block_k - k, kStep)); };
#pragma omp for schedule(static)
        for (int64_t step = 0; step < block_k; step += kStep) {  // along the rows of memory where k is not contiguous
            const int64_t k = step / depth * depth;
            for (int64_t panel = 0; panel < count; ++panel)
                pack_step<false>(right, (first + panel) * kPanel, begin_k + step, N - (first + panel) * kPanel,
                                 block_k - step, packed + (k * count + panel * run_of(k) + step - k) * kPanel);
        }
        const int64_t beside = kBandColumns / kPanel, bands = (count + beside - 1) / beside;
        const int64_t groups = minimum(bands, (threads + row_blocks - 1) / row_blocks);
        const int64_t group = (bands + groups - 1) / groups * beside;
#pragma omp for schedule(dynamic, 1) collapse(2)
        for (int64_t g = 0; g < groups; ++g)
            for (int64_t r = 0; r < row_blocks; ++r) {
                const int64_t begin = r * rows, m = minimum(rows, M - begin), end = minimum(count, (g + 1) * group);
                for (int64_t k = 0; k < block_k; k += depth) {
                    const int64_t run = run_of(k);
                    for (int64_t step = 0; step < run; step += kStep)
                        for (int64_t i = 0; i < m; i += kPanel)
                            pack_step<true>(left, begin + i, begin_k + k + step, m - i, block_k - k - step,
                                            left_panels + i * run + step * kPanel);
                    for (int64_t panel = g * group; panel < end; panel += beside)
                        for (int64_t i = 0; i < m; i += kBandRows) {
                            const int64_t j = (first + panel) * kPanel,
                                          n = minimum(N - j, minimum(beside, end - panel) * kPanel);
                            band(left_panels + i * run, packed + (k * count + panel * run) * kPanel, run, begin + i, j,
                                 minimum(kBandRows, m - i), n, add || begin_k + k > 0, buffer);
                        }
                }
            }
    }
};

}  // namespace

bool matmul_bf16(int unit, int64_t M, int64_t N, int64_t K, Pointer left, int64_t left_row_stride,
                 int64_t left_k_stride, Pointer right, int64_t right_k_stride, int64_t right_column_stride,
                 Pointer sums, int64_t sums_row_stride, bool add, int threads) {
    const auto factor = [](Pointer x, int64_t stride, int64_t k_stride) {
        return k_stride == 1 ? Factor{x.as<const uint16_t>(), stride, true}
                             : Factor{x.as<const uint16_t>(), k_stride, false};
    };
    if (K == 0 && !add)
        for (int64_t i = 0; i < M; ++i) memset(sums.as<float>() + i * sums_row_stride, 0, size_t(N) * sizeof(float));
    if (M > 0 && N > 0 && K > 0)
        Product{M,
                N,
                K,
                factor(left, left_row_stride, left_k_stride),
                factor(right, right_column_stride, right_k_stride),
                sums.as<float>(),
                sums_row_stride,
                add,
                unit}
            .run(M * N * K < (int64_t(1) << 24) ? 1 : threads);
    return true;
}

}  // namespace rlhf::ISA
#else
namespace rlhf::ISA {

bool matmul_bf16(int, int64_t, int64_t, int64_t, Pointer, int64_t, int64_t, Pointer, int64_t, int64_t, Pointer, int64_t,
                 bool, int) {
    return false;
}

}  // namespace rlhf::ISA
#endif
