// The tiles of AMX as linear_24 and its gradients use them. Included inside a target region, after
// the standard headers; the unnamed namespace keeps each file's copy its own.
//
//     sums [ 16 ][ 16 ] fp32   +=   a [ 16 ][ 32 ] · b [ 16 pairs ][ 16 ][ 2 ]     1 KiB each
//
// A tile product takes 16 cycles; loads from L1 hide behind it, those from L2 take 24 themselves.
#pragma once

#include "kernels.h"

namespace sparsekern::cpu {
namespace {

constexpr int kTileRows = 16;
constexpr int kTileSpan = 32;       // of the summed dimension
constexpr int64_t kTile = 16 * 16;  // dwords of a tile

// The eight tiles of this thread: 0 to 3 sums, 4 and 5 a, 6 and 7 b. Sums and a have `rows` rows.
class Tiles {
 public:
  explicit Tiles(int rows) {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) {
      config.bytes[i] = 64;
      config.rows[i] = static_cast<uint8_t>(i < 6 ? rows : 16);
    }
    std::atomic_signal_fence(std::memory_order_seq_cst);
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// Rows [0, rows) of x, of `columns`, strided in elements, to out[ceil(columns / 32)][height][32];
// rows and columns past them are zero.
void pack_a(const uint16_t* x, int64_t stride_row, int64_t stride_column, int64_t columns, int rows,
            int height, uint16_t* out) {
  for (int64_t k = 0; k < columns; k += kTileSpan) {
    const int width = static_cast<int>(columns - k < kTileSpan ? columns - k : kTileSpan);
    for (int r = 0; r < height; ++r, out += kTileSpan) {
      __m512i row = _mm512_setzero_si512();
      if (r < rows) {
        const uint16_t* from = x + r * stride_row + k * stride_column;
        if (stride_column == 1) {
          row = _mm512_maskz_loadu_epi16(~0u >> (kTileSpan - width), from);
        } else {
          alignas(64) uint16_t gathered[kTileSpan] = {};
          for (int i = 0; i < width; ++i) gathered[i] = from[i * stride_column];
          row = _mm512_load_si512(gathered);
        }
      }
      _mm512_storeu_si512(out, row);
    }
  }
}

// sums[A][B] of [rows][16] fp32 = (first ? 0 : sums) + a · b over `tiles` tiles. Tiles of a lie
// a_step elements apart along the summed dimension and a_apart in the next sixteen rows, those of b
// kTile and b_apart, sums sums_a and sums_b. With P = 2 each tile is a sum of two: a's second lies
// a_step / 2 on, b's kTile, and all four products are added. `beside(t)` is called once a tile.
template <int A, int B, int P, class Beside>
void multiply_tiles(const uint16_t* a, int64_t a_step, int64_t a_apart, const uint32_t* b,
                    int64_t b_apart, int64_t tiles, bool first, float* sums, int64_t sums_a,
                    int64_t sums_b, const Beside& beside) {
  // The header's intrinsics do not tell every compiler which memory they read.
  std::atomic_signal_fence(std::memory_order_seq_cst);
  if (first) {
    _tile_zero(0);
    if (B == 2) _tile_zero(1);
    if (A == 2) _tile_zero(2);
    if (A == 2 && B == 2) _tile_zero(3);
  } else {
    _tile_loadd(0, sums, 64);
    if (B == 2) _tile_loadd(1, sums + sums_b, 64);
    if (A == 2) _tile_loadd(2, sums + sums_a, 64);
    if (A == 2 && B == 2) _tile_loadd(3, sums + sums_a + sums_b, 64);
  }
  for (int64_t t = 0; t < tiles; ++t, a += a_step) {
    beside(t);
    for (int of_b = 0; of_b < P; ++of_b, b += kTile) {
      _tile_loadd(6, b, 64);
      for (int of_a = 0; of_a < P; ++of_a) {
        const uint16_t* part = a + of_a * a_step / P;
        _tile_loadd(4, part, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (A == 2) {
          _tile_loadd(5, part + a_apart, 64);
          _tile_dpbf16ps(2, 5, 6);
        }
        if (B == 2) {
          if (of_a == 0) _tile_loadd(7, b + b_apart, 64);
          _tile_dpbf16ps(1, 4, 7);
          if (A == 2) _tile_dpbf16ps(3, 5, 7);
        }
      }
    }
  }
  _tile_stored(0, sums, 64);
  if (B == 2) _tile_stored(1, sums + sums_b, 64);
  if (A == 2) _tile_stored(2, sums + sums_a, 64);
  if (A == 2 && B == 2) _tile_stored(3, sums + sums_a + sums_b, 64);
  std::atomic_signal_fence(std::memory_order_seq_cst);
}

// The same for one tile or a pair of a, and of b.
template <int P, class Beside>
void multiply_some(bool pair_a, bool pair_b, const uint16_t* a, int64_t a_step, int64_t a_apart,
                   const uint32_t* b, int64_t b_apart, int64_t tiles, bool first, float* sums,
                   int64_t sums_a, int64_t sums_b, const Beside& beside) {
  const auto one = pair_b ? multiply_tiles<1, 2, P, Beside> : multiply_tiles<1, 1, P, Beside>;
  const auto two = pair_b ? multiply_tiles<2, 2, P, Beside> : multiply_tiles<2, 1, P, Beside>;
  (pair_a ? two : one)(a, a_step, a_apart, b, b_apart, tiles, first, sums, sums_a, sums_b, beside);
}

// For `beside`: two lines of each tile of sums of the next pair of a: in L1 for the next call, after
// eight tiles.
auto sums_ahead(const float* sums, int64_t sums_a, int64_t sums_b) {
  return [=](int64_t t) {
    for (int i = 0; i < 4; ++i) {
      const float* next = sums + 2 * sums_a + i / 2 * sums_a + i % 2 * sums_b + t * 32;
      __builtin_prefetch(next, 1, 3);
      __builtin_prefetch(next + 16, 1, 3);
    }
  };
}

}  // namespace
}  // namespace sparsekern::cpu
