// linear_24, TILES: lanes along the rows of the weight (few to some tens of rows of x; with bf16 dot
// products, any number).
//
//     y[m, n .. n+15] += first[n .. n+15] * x[m, 4g + i0]  +  second[n .. n+15] * x[m, 4g + i1]
//
//   meta word       8 groups of 16 rows; shifted four bits a group: i0 | i1 << 2 in the low bits
//   first, second   [ n | n+1 | … | n+15 ]           one load each from the block (prepack_24.h)
//   x of row m      x0 x1 x2 x3 (group g) ─shuffle by i0─▶ [ x1 x0 x0 … x2 ]    then one fma
//                                         ─shuffle by i1─▶ [ x3 x2 x1 … x3 ]    then one fma
//   acc[R]          R rows of x share what was decoded; R accumulators stay in registers
//
//   bf16 dot products: one shuffle picks both of a group's x, one vdpbf16ps multiplies both pairs.
//
// Limited by a shuffle and an fma for each kept weight and row of x, which share two of the three
// vector ports of Zen 4 and Zen 5; at one to four rows of x by the bytes of the block, read once in
// order.
#pragma once

#include <utility>

#include "activation.h"
#include "convert.h"
#include "kernels.h"
#include "prepack_24.h"
#include "scratch.h"

namespace sparsekern::cpu {
namespace {

// How a tile multiplies: fp32 fmas, weights converted as they are loaded.
template <class T, DType D>
struct FloatTile {
  using X = float;
  using F = typename T::F;
  static constexpr int kGroups = T::kTileGroups;  // groups of x side by side in a tile of x
  static constexpr int64_t kChunk = 64;           // groups summed before they join the total

  typename T::Index index = T::first_index();
  typename T::I bits;
  F first, second;
  typename T::I at_first, at_second;

  void load_meta(const uint32_t* word, int half) { bits = T::load_int(word + half * T::kLanes); }
  void load_group(const uint8_t* values, int half) {
    constexpr int64_t kHalf = T::kLanes * kItem<D>;
    if constexpr (D == DType::bf16) {
      const auto pairs = T::load_int(values + half * 2 * kHalf);
      first = T::low_bf16(pairs);
      second = T::high_bf16(pairs);
    } else {
      first = T::template load_as_float<D>(values + half * kHalf);
      second = T::template load_as_float<D>(values + kBlock * kItem<D> + half * kHalf);
    }
    at_first = T::positions(bits, index);
    at_second = T::positions(T::shift_right(bits, 2), index);
    bits = T::shift_right(bits, 4);
    index = T::next_index(index);
  }
  F multiply(const X* x, F acc) const {
    acc = T::fma(first, T::pick(x, at_first), acc);
    return T::fma(second, T::pick(x, at_second), acc);
  }
};

template <class T, DType D, template <class, DType> class Multiply>
struct LinearTiles {
  using F = typename T::F;
  using Mul = Multiply<T, D>;
  using X = typename Mul::X;
  static constexpr int kSpan = 4 * Mul::kGroups;  // x side by side
  static constexpr int kHalves = kBlock / T::kLanes;
  static constexpr int kBlocks = 4;  // blocks that share a chunk of x while it is in L1

  // acc[R][16] += a block's groups [0, groups) with a tile of x: [groups / kGroups][R][kSpan].
  template <int R>
  static void multiply(const uint8_t* values, const uint32_t* meta, const X* x, int64_t groups,
                       float* acc) {
    // Few rows: several accumulators each, or the latency of the fma shows.
    constexpr int kChains = R <= 2 ? 4 : R <= 6 ? 2 : 1;
    for (int half = 0; half < kHalves; ++half) {
      F sum[kChains][R];
#pragma GCC unroll 4
      for (int c = 0; c < kChains; ++c) {
#pragma GCC unroll 32
        for (int r = 0; r < R; ++r) sum[c][r] = T::zero();
      }
      Mul mul;
      int64_t g = 0;
      const auto step = [&](int chain) __attribute__((always_inline)) {
        mul.load_group(values + g * kGroupBytes<D>, half);
        const X* at = x + g / Mul::kGroups * (R * kSpan);
#pragma GCC unroll 32
        for (int r = 0; r < R; ++r) sum[chain][r] = mul.multiply(at + r * kSpan, sum[chain][r]);
        ++g;
      };
      while (g + 8 <= groups) {
        mul.load_meta(meta + g / 8 * kBlock, half);
        for (int i = 0; i < 8; i += kChains) {
#pragma GCC unroll 4
          for (int c = 0; c < kChains; ++c) step(c);
        }
      }
      if (g < groups) mul.load_meta(meta + g / 8 * kBlock, half);
      while (g < groups) step(0);
#pragma GCC unroll 32
      for (int r = 0; r < R; ++r) {
        F all = sum[0][r];
        for (int c = 1; c < kChains; ++c) all = T::add(all, sum[c][r]);
        float* a = acc + r * kBlock + half * T::kLanes;
        T::store(a, T::add(T::load(a), all));
      }
    }
  }

  using Function = void (*)(const uint8_t*, const uint32_t*, const X*, int64_t, float*);
  template <int... R>
  static Function choose(int rows, std::integer_sequence<int, R...>) {
    static constexpr Function kFunctions[] = {multiply<R + 1>...};
    return kFunctions[rows - 1];
  }

  // Columns [n0, n1) of y, n0 a multiple of 16, for the rows of x in `tiles`.
  static void run(const Linear24& a, const XTile* tiles, int count, int64_t n0, int64_t n1,
                  Scratch& scratch) {
    const int64_t groups = a.K / 4;
    const int64_t room_bytes = Blocks<T, D>::room_bytes(groups);
    const int R = tiles[0].height;
    const Function multiply_rows = choose(R, std::make_integer_sequence<int, T::kTileRows>());
    auto* bytes = scratch.get<uint8_t>(kBlocks * room_bytes);
    alignas(64) float acc[kBlocks][T::kTileRows * kBlock];
    alignas(64) float bias[kBlocks * kBlock];
    for (int64_t n = n0; n < n1; n += kBlocks * kBlock) {
      const int64_t end = n1 - n < kBlocks * kBlock ? n1 : n + kBlocks * kBlock;
      const int blocks = static_cast<int>(ceil_div(end - n, kBlock));
      Block block[kBlocks];
      for (int b = 0; b < blocks; ++b) {
        int skip;
        block[b] = Blocks<T, D>::get(a, n + b * kBlock, 0, groups,
                                     Blocks<T, D>::room(bytes + b * room_bytes, groups), &skip);
      }
      load_bias<D>(a, n, end, bias);
      for (int t = 0; t < count; ++t) {
        const auto* x = static_cast<const X*>(tiles[t].data);
        for (int b = 0; b < blocks; ++b) std::memset(acc[b], 0, sizeof(float) * R * kBlock);
        for (int64_t g = 0; g < groups; g += Mul::kChunk) {
          const int64_t chunk = groups - g < Mul::kChunk ? groups - g : Mul::kChunk;
          for (int b = 0; b < blocks; ++b) {
            multiply_rows(block[b].values + g * kGroupBytes<D>, block[b].meta + g / 8 * kBlock,
                          x + g / Mul::kGroups * R * kSpan, chunk, acc[b]);
          }
        }
        for (int b = 0; b < blocks; ++b) {
          const int64_t at = n + b * kBlock;
          const int columns = static_cast<int>(end - at < kBlock ? end - at : kBlock);
          for (int r = 0; r < tiles[t].rows; ++r) {
            finish<T, D>(acc[b] + r * kBlock, bias + b * kBlock, columns, a.activation, a.y,
                         (tiles[t].m0 + r) * a.N + at);
          }
        }
      }
    }
  }

  // Rows [m0, m0 + rows) of x as a tile of `height` rows; rows past them and k past K are zero.
  static void pack(const Linear24& a, const XTile& tile) {
    auto* out = static_cast<X*>(tile.data);
    const int64_t spans = ceil_div(a.K, kSpan);
    for (int r = 0; r < tile.height; ++r) {
      if (r >= tile.rows) {
        for (int64_t s = 0; s < spans; ++s)
          std::memset(out + (s * tile.height + r) * kSpan, 0, sizeof(X) * kSpan);
        continue;
      }
      const int64_t row = (tile.m0 + r) * a.x_stride_m;
      int64_t k = 0;
      if (a.x_stride_k == 1) {
        const auto* in = static_cast<const uint8_t*>(a.x) + row * kItem<D>;
        if constexpr (sizeof(X) == kItem<D>) {  // as it is
          for (; k + kSpan <= a.K; k += kSpan)
            std::memcpy(out + (k / kSpan * tile.height + r) * kSpan, in + k * kItem<D>,
                        sizeof(X) * kSpan);
        } else {
          alignas(64) float wide[T::kLanes];
          for (; k + T::kLanes <= a.K; k += T::kLanes) {
            T::store(wide, T::template load_as_float<D>(in + k * kItem<D>));
            for (int i = 0; i < T::kLanes; i += kSpan)
              std::memcpy(out + ((k + i) / kSpan * tile.height + r) * kSpan, wide + i,
                          sizeof(X) * kSpan);
          }
        }
      }
      for (; k < spans * kSpan; ++k) {
        X& to = out[(k / kSpan * tile.height + r) * kSpan + k % kSpan];
        const int64_t from = row + k * a.x_stride_k;
        if (k >= a.K) {
          to = 0;
        } else if constexpr (sizeof(X) == 2) {
          to = static_cast<const uint16_t*>(a.x)[from];
        } else {
          to = load_float(a.x, from, D);
        }
      }
    }
  }
};

}  // namespace
}  // namespace sparsekern::cpu
