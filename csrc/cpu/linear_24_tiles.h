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
// order. The loop for a group and R rows of x, AVX-512:
//     fp32   2R shuffles from memory, 2R fmas, 4 loads and shifts, 4 more; bound 0.667 cycles for a
//            shuffle and its fma, 0.74 measured in L1, 0.8 to 0.95 in a product (Zen 5)
//     bf16   R broadcasts, R shuffles, R dot products, 2 loads, 4 more; bound 0.667 cycles, 0.674
//            measured in L1, 0.70 in a product of 1024 rows (Zen 5)
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
  static constexpr int kControls = 1;             // words of control for a group and row of weight

  F first, second;
  typename T::I at_first, at_second;

  // controls[groups][kControls][16] of a block's meta.
  static void decode(const uint32_t* meta, int64_t groups, uint32_t* controls) {
    for (int half = 0; half < kBlock / T::kLanes; ++half) {
      auto quarter = T::first_index();
      uint32_t* to = controls + half * T::kLanes;
      for (int64_t g = 0; g < groups;) {
        auto bits = T::load_int(meta + g / 8 * kBlock + half * T::kLanes);
        for (const int64_t end = g + 8 < groups ? g + 8 : groups; g < end; ++g) {
          T::store_int(to, T::controls(bits, quarter));
          bits = T::shift_right(bits, 4);
          quarter = T::next_index(quarter);
          to += kControls * kBlock;
        }
      }
    }
  }
  void load(const uint8_t* values, const uint32_t* controls, int half) {
    load_weights<T, D>(values, half, &first, &second);
    at_first = T::load_int(controls + half * T::kLanes);
    at_second = T::second(at_first);
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
  static constexpr int kBlocks = 8;        // blocks that share a chunk of x while it is in L1
  static constexpr int64_t kDepth = 256;   // groups whose weights and controls stay in L2
  static constexpr int64_t kAhead = 4096;  // bytes
  static constexpr int kStreamRows = 8;

  // The controls are made once for a chunk, not in the loop: a permute for each group that the
  // shuffles of that group wait for costs 0.14 cycles for each of them (Zen 5), a load nothing.
  //
  // acc[R][16] += a block's groups [0, groups) with a tile of x: [groups / kGroups][R][kSpan].
  template <int R>
  static void multiply(const uint8_t* values, const uint32_t* controls, const X* x, int64_t groups,
                       const uint8_t* next, float* acc) {
    // Few rows: several accumulators each, or the latency of the fma shows.
    constexpr int kChains = R <= 2 ? 4 : R <= 6 ? 2 : 1;
    for (int half = 0; half < kHalves; ++half) {
      F sum[kChains][R];
#pragma GCC unroll 4
      for (int c = 0; c < kChains; ++c) {
#pragma GCC unroll 32
        for (int r = 0; r < R; ++r) sum[c][r] = T::zero();
      }
      const auto step = [&](int64_t g, int chain) __attribute__((always_inline)) {
        Mul mul;
        mul.load(values + g * kGroupBytes<D>, controls + g * Mul::kControls * kBlock, half);
        if (half == 0) {
          for (int64_t i = 0; i < kGroupBytes<D>; i += 64)
            __builtin_prefetch(next + g * kGroupBytes<D> + i, 0, 2);
        }
        const X* at = x + g / Mul::kGroups * (R * kSpan);
#pragma GCC unroll 32
        for (int r = 0; r < R; ++r) sum[chain][r] = mul.multiply(at + r * kSpan, sum[chain][r]);
      };
      int64_t g = 0;
      for (; g + kChains <= groups; g += kChains) {
#pragma GCC unroll 4
        for (int c = 0; c < kChains; ++c) step(g + c, c);
      }
      for (; g < groups; ++g) step(g, 0);
#pragma GCC unroll 32
      for (int r = 0; r < R; ++r) {
        F all = sum[0][r];
        for (int c = 1; c < kChains; ++c) all = T::add(all, sum[c][r]);
        float* a = acc + r * kBlock + half * T::kLanes;
        T::store(a, T::add(T::load(a), all));
      }
    }
  }

  using Function = void (*)(const uint8_t*, const uint32_t*, const X*, int64_t, const uint8_t*,
                            float*);
  template <int... R>
  static Function choose(int rows, std::integer_sequence<int, R...>) {
    static constexpr Function kFunctions[] = {multiply<R + 1>...};
    return kFunctions[rows - 1];
  }

  // Columns [n0, n1) of y, n0 a multiple of 16, for the rows of x in `tiles`.
  static bool run(const Linear24& a, const XTile* tiles, int count, int64_t n0, int64_t n1,
                  Scratch& scratch) {
    const int64_t groups = a.K / 4, height = tiles[0].height;
    const Function multiply_rows =
        choose(static_cast<int>(height), std::make_integer_sequence<int, T::kTileRows>());
    // Sums of every tile with every block, and the blocks' weights and controls for some depth.
    const int64_t depth = groups < kDepth ? groups : kDepth;
    const int64_t sums = kBlocks * count * height * kBlock;
    const int64_t room_bytes = Blocks<T, D>::room_bytes(depth);
    const int64_t controls_size = depth * Mul::kControls * kBlock;
    float* acc = scratch.get<float>(sums + kBlocks * (controls_size + room_bytes / 4));
    auto* controls = reinterpret_cast<uint32_t*>(acc + sums);
    auto* room = reinterpret_cast<uint8_t*>(controls + kBlocks * controls_size);
    alignas(64) float bias[kBlocks * kBlock];
    // Where the bytes of the weight are the limit, they are read as one stream.
    const int64_t step = (count == 1 && height <= kStreamRows ? 1 : kBlocks) * kBlock;
    for (int64_t n = n0; n < n1; n += step) {
      const int64_t end = n1 - n < step ? n1 : n + step;
      const int blocks = static_cast<int>(ceil_div(end - n, kBlock));
      std::memset(acc, 0, sizeof(float) * blocks * count * height * kBlock);
      for (int64_t g = 0; g < groups; g += depth) {
        const int64_t here = groups - g < depth ? groups - g : depth;
        const uint8_t* values[kBlocks];
        for (int b = 0; b < blocks; ++b) {
          int skip;  // none: the depth is whole words of meta
          const auto to = Blocks<T, D>::room(room + b * room_bytes, depth);
          const Block block =
              Blocks<T, D>::get(a, n + b * kBlock, g, here, to, &skip, blocks > 1 ? kBlock : 0);
          values[b] = block.values;
          Mul::decode(block.meta, here, controls + b * controls_size);
        }
        for (int t = 0; t < count; ++t) {
          const int64_t ahead = a.packed && t == 0 ? kAhead : 0;
          for (int64_t i = 0; i < here; i += Mul::kChunk) {
            const X* x =
                static_cast<const X*>(tiles[t].data) + (g + i) / Mul::kGroups * height * kSpan;
            const int64_t chunk = here - i < Mul::kChunk ? here - i : Mul::kChunk;
            float* to = acc + t * blocks * height * kBlock;
            for (int b = 0; b < blocks; ++b, to += height * kBlock) {
              const uint8_t* from = values[b] + i * kGroupBytes<D>;
              multiply_rows(from, controls + b * controls_size + i * Mul::kControls * kBlock, x,
                            chunk, from + ahead, to);
            }
          }
        }
      }
      load_bias<D>(a, n, end, bias);
      const float* from = acc;
      for (int t = 0; t < count; ++t) {
        for (int b = 0; b < blocks; ++b, from += height * kBlock) {
          const int64_t at = n + b * kBlock;
          const int columns = static_cast<int>(end - at < kBlock ? end - at : kBlock);
          for (int r = 0; r < tiles[t].rows; ++r) {
            finish<T, D>(from + r * kBlock, bias + b * kBlock, columns, a.activation, a.y,
                         (tiles[t].m0 + r) * a.N + at);
          }
        }
      }
    }
    return true;
  }

  // Rows [m0, m0 + rows) of x as a tile of `height` rows; rows past them and k past K are zero.
  static bool pack(const Linear24& a, const XTile& tile) {
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
    return true;
  }
};

}  // namespace
}  // namespace sparsekern::cpu
