// Products of bfloat16 tiles with float sums, by AMX or by vdpbf16ps, and the packed layout that both read. A tile has
// 16 rows (or columns) of 32 k; a panel has 32 rows (or columns), two tiles for each step of 32 k:
//     left panel    [step][tile][row][pair of k]
//     right panel   [step][tile][pair of k][column]
// Both units add the products of a sum in one order, which depends on k alone. Denormals count as zeros.
#pragma once
#include "../math.h"
#include "intrinsics.h"

namespace rlhf::ISA {
namespace {

constexpr int64_t kTile = 16, kStep = 32, kPanel = 32;
constexpr int64_t kTileSize = kTile * kStep;    // numbers of a tile
constexpr int64_t kBesideStep = 2 * kTileSize;  // from a step of a panel to the next
inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// A factor of the product. Element (i, k) is x[i * stride + k] where k is contiguous, else x[k * stride + i].
struct Factor {
    const uint16_t* x;
    int64_t stride;
    bool k_contiguous;
};

// Transposes 16 rows of 16 words.
inline void transpose(__m512i* row) {
    __m512i half[16];
    for (int i = 0; i < 16; i += 2) {
        half[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
        half[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        row[i] = _mm512_unpacklo_epi64(half[i], half[i + 2]);
        row[i + 1] = _mm512_unpackhi_epi64(half[i], half[i + 2]);
        row[i + 2] = _mm512_unpacklo_epi64(half[i + 1], half[i + 3]);
        row[i + 3] = _mm512_unpackhi_epi64(half[i + 1], half[i + 3]);
    }
    for (int j = 0; j < 4; ++j)
        for (int i = 0; i < 16; i += 8) {
            half[i + j] = _mm512_shuffle_i32x4(row[i + j], row[i + j + 4], 0x88);
            half[i + j + 4] = _mm512_shuffle_i32x4(row[i + j], row[i + j + 4], 0xdd);
        }
    for (int j = 0; j < 8; ++j) {
        row[j] = _mm512_shuffle_i32x4(half[j], half[j + 8], 0x88);
        row[j + 8] = _mm512_shuffle_i32x4(half[j], half[j + 8], 0xdd);
    }
}

// One tile from row (or column) i and k on, of which n rows and `depth` k exist; the others are zeros.
template <bool kLeft>
inline void pack_tile(const Factor& factor, int64_t i, int64_t k, int64_t n, int64_t depth, uint16_t* out) {
    if (n <= 0) {
        memset(out, 0, kTileSize * sizeof *out);
        return;
    }
    __m512i word[16];  // pairs of k: of one row each, or of all rows
    if (factor.k_contiguous) {
        const uint16_t* from = factor.x + i * factor.stride + k;
        const __mmask32 there = depth >= kStep ? ~0u : (1u << depth) - 1;
        for (int j = 0; j < 16; ++j)
            word[j] = j < n ? _mm512_maskz_loadu_epi16(there, from + j * factor.stride) : _mm512_setzero_si512();
    } else {
        const uint16_t* from = factor.x + k * factor.stride + i;
        const __mmask16 there = n >= kTile ? 0xffff : (1u << n) - 1;
        for (int j = 0; j < 16; ++j) {
            __m512i low = _mm512_setzero_si512(), high = low;
            if (2 * j < depth)
                low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, from + 2 * j * factor.stride));
            if (2 * j + 1 < depth)
                high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, from + (2 * j + 1) * factor.stride));
            word[j] = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
        }
    }
    if (factor.k_contiguous != kLeft) transpose(word);
    for (int j = 0; j < 16; ++j) _mm512_store_si512(out + j * kStep, word[j]);
}

// One step of a panel.
template <bool kLeft>
inline void pack_step(const Factor& factor, int64_t i, int64_t k, int64_t n, int64_t depth, uint16_t* out) {
    pack_tile<kLeft>(factor, i, k, n, depth, out);
    pack_tile<kLeft>(factor, i + kTile, k, n - kTile, depth, out + kTileSize);
}

enum Unit { kDot = 1, kAmx = 2 };  // the order of bf16_units in bind_cpu.cpp

// What a thread does before and after its products.
__attribute__((target("amx-tile"))) inline void begin_tiles() {
    struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {};
        uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) {
        config.row_bytes[i] = 64;
        config.rows[i] = 16;
    }
    asm volatile("" : : "r"(&config) : "memory");  // because GCC takes the first 8 bytes alone for read
    _tile_loadconfig(&config);
}
__attribute__((target("amx-tile"))) inline void end_tiles() { _tile_release(); }

// sums [32, 32] = left panel x right panel over so many steps, or sums += ... with `add`.
__attribute__((target("amx-tile,amx-bf16"))) inline void multiply_amx(const uint16_t* left, const uint16_t* right,
                                                                      int64_t steps, float* sums, int64_t stride,
                                                                      bool add) {
    const int64_t bytes = stride * sizeof(float);
    float* const below = sums + kTile * stride;
    if (add) {
        _tile_loadd(0, sums, bytes);
        _tile_loadd(1, sums + kTile, bytes);
        _tile_loadd(2, below, bytes);
        _tile_loadd(3, below + kTile, bytes);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (; steps > 0; --steps, left += kBesideStep, right += kBesideStep) {
        _tile_loadd(4, left, 64);
        _tile_loadd(6, right, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, right + kTileSize, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, left + kTileSize, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, bytes);
    _tile_stored(1, sums + kTile, bytes);
    _tile_stored(2, below, bytes);
    _tile_stored(3, below + kTile, bytes);
}

// The same by dot products of pairs: 8 rows at a time, whose 16 sums of 16 columns stay in registers.
__attribute__((target("avx512bf16"))) inline void multiply_dot(const uint16_t* left, const uint16_t* right,
                                                               int64_t steps, float* sums, int64_t stride, bool add) {
    constexpr int kRows = 8;
    for (int64_t row = 0; row < kPanel; row += kRows, sums += kRows * stride) {
        const uint16_t* a = left + row / kTile * kTileSize + row % kTile * kStep;
        const uint16_t* b = right;
        __m512 sum[kRows][2];
        for (int i = 0; i < kRows; ++i)
            for (int j = 0; j < 2; ++j)
                sum[i][j] = add ? _mm512_loadu_ps(sums + i * stride + j * kTile) : _mm512_setzero_ps();
        for (int64_t step = 0; step < steps; ++step, a += kBesideStep, b += kBesideStep)
            for (int pair = 0; pair < kTile; ++pair) {
                const __m512bh b0 = (__m512bh)_mm512_load_si512(b + pair * kStep),
                               b1 = (__m512bh)_mm512_load_si512(b + kTileSize + pair * kStep);
                for (int i = 0; i < kRows; ++i) {
                    int both;
                    memcpy(&both, a + i * kStep + 2 * pair, sizeof both);
                    const __m512bh x = (__m512bh)_mm512_set1_epi32(both);
                    sum[i][0] = _mm512_dpbf16_ps(sum[i][0], x, b0);
                    sum[i][1] = _mm512_dpbf16_ps(sum[i][1], x, b1);
                }
            }
        for (int i = 0; i < kRows; ++i)
            for (int j = 0; j < 2; ++j) _mm512_storeu_ps(sums + i * stride + j * kTile, sum[i][j]);
    }
}

}  // namespace
}  // namespace rlhf::ISA
