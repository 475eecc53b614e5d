// linear_24, PANELS: lanes along the rows of x (many rows of x, fp32 sums).
//
//     panel[k][lane]    x transposed, W vectors of lanes wide, some k deep so that it fits L1
//     weight row n      w0 at k=1, w1 at k=3, w2 at k=4 …            a scalar and the panel row it names
//     acc[n][W]         += w0 * panel[1];  += w1 * panel[3];  …      half the dense fmas
//
//   R rows of weight by W vectors of x stay in registers for the depth of the panel; the partial
//   sums then join `acc`. That also splits the sum, which keeps fp32 as accurate as a blocked dense
//   product.
//
//   for 192 rows of weight            their positions and weights decoded for one chunk: L2
//     for chunks of k                 as deep as three quarters of L1 allow
//       for panels of x               up to 512 rows of x in all
//         for tiles of R rows         registers
//
// Limited by L1 loads: each fma takes its panel row from memory, and R of them share one broadcast
// and half a load of positions. The loop of eight vectors and two rows of weight, AVX-512: 16 fmas
// from memory, 2 broadcasts, 1 load of positions, 4 integer, 4 more; bound 0.59 cycles an fma at two
// loads a cycle, 0.69 measured in L1, 0.87 in a product of 1024 rows (Zen 5).
#pragma once

#include <utility>

#include "convert.h"
#include "kernels.h"
#include "linear_24_tiles.h"
#include "scratch.h"

namespace sparsekern::cpu {
namespace {

template <class T, DType D>
struct LinearPanels {
  using F = typename T::F;
  static constexpr int kRows = 192;  // of weight that share a chunk of the panels while it is in L1
  static constexpr int kLine = 16;   // floats of a cache line

  // Rows of weight in a tile: as many accumulators as the registers hold; sixteen are whole tiles.
  static constexpr int tile_rows(int width) {
    int rows = kBlock;
    while (rows > 1 && rows * width > T::kPanelAccumulators) rows /= 2;
    return rows;
  }

  // acc[16][W vectors] += w[kept][16] * the panel rows that at[kept][16] names.
  template <int W>
  static void multiply(const float* panel, const float* w, const uint16_t* at, int kept,
                       float* acc) {
    constexpr int R = tile_rows(W), kWidth = W * T::kLanes;
    for (int n = 0; n < kBlock; n += R) {
      F sum[R][W];
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) sum[r][i] = T::zero();
      }
      for (int j = 0; j < kept; ++j) {
        const float* weights = w + j * kBlock + n;
        // One load brings the positions of up to four rows.
        constexpr int kQuad = R < 4 ? R : 4;
#pragma GCC unroll 16
        for (int r = 0; r < R; r += kQuad) {
          uint64_t quad = 0;
          std::memcpy(&quad, at + j * kBlock + n + r, sizeof(uint16_t) * kQuad);
#pragma GCC unroll 16
          for (int q = 0; q < kQuad; ++q) {
            const float* row = panel + static_cast<int64_t>(quad >> (16 * q) & 0xffff) * kWidth;
            const F weight = T::set1(weights[r + q]);
#pragma GCC unroll 16
            for (int i = 0; i < W; ++i)
              sum[r + q][i] = T::fma(weight, T::load(row + i * T::kLanes), sum[r + q][i]);
          }
        }
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) {
          float* a = acc + (n + r) * kWidth + i * T::kLanes;
          T::store(a, T::add(T::load(a), sum[r][i]));
        }
      }
    }
  }

  using Function = void (*)(const float*, const float*, const uint16_t*, int, float*);
  template <int... W>
  static Function choose(int width, std::integer_sequence<int, W...>) {
    static constexpr Function kFunctions[] = {multiply<W + 1>...};
    return kFunctions[width - 1];
  }

  // Weights as fp32 and positions within the chunk, both [kept][16], of groups [g, g + groups) of a
  // block; `skip` groups of the first word are not of the chunk.
  static const float* decode(const Block& block, int skip, int64_t groups, float* w, uint16_t* at) {
    using I = typename T::I;
    const I three = T::set1_int(3);
    for (int half = 0; half < kBlock / T::kLanes; ++half) {
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t place = skip + g;
        const I bits = T::shift_right(
            T::load_int(block.meta + place / 8 * kBlock + half * T::kLanes), place % 8 * 4);
        const I base = T::set1_int(static_cast<int>(4 * g));
        uint16_t* to = at + 2 * g * kBlock + half * T::kLanes;
        T::store_words(to, T::add_int(T::and_int(bits, three), base));
        T::store_words(to + kBlock, T::add_int(T::and_int(T::shift_right(bits, 2), three), base));
        if constexpr (D != DType::f32) {
          F first, second;
          load_weights<T, D>(block.values + g * kGroupBytes<D>, half, &first, &second);
          T::store(w + 2 * g * kBlock + half * T::kLanes, first);
          T::store(w + (2 * g + 1) * kBlock + half * T::kLanes, second);
        }
      }
    }
    if constexpr (D == DType::f32) return reinterpret_cast<const float*>(block.values);
    return w;
  }

  static const float* chunk_of(const XPanel& panel, int64_t group) {
    return panel.data + 4 * group * panel.width * T::kLanes;
  }

  static void run(const Linear24& a, const XPanel* panels, int count, int64_t n0, int64_t n1,
                  Scratch& scratch) {
    const int64_t groups = a.K / 4, chunk = panels[0].depth / 4;
    int lanes = 0;
    for (int p = 0; p < count; ++p) lanes += panels[p].width * T::kLanes;
    // Sums of 192 rows, their weights and positions for a chunk, and room for one block of it.
    constexpr int kBlocks = kRows / kBlock;
    const int64_t kept = 2 * chunk * kBlock, room_bytes = Blocks<T, D>::room_bytes(chunk);
    float* acc = scratch.get<float>(kRows * lanes + kBlocks * (kept + kept / 2) + room_bytes / 4);
    float* w = acc + kRows * lanes;
    auto* at = reinterpret_cast<uint16_t*>(w + kBlocks * kept);
    auto room = Blocks<T, D>::room(at + kBlocks * kept, chunk);
    alignas(64) float bias[kRows];
    for (int64_t n = n0; n < n1; n += kRows) {
      const int64_t end = n1 - n < kRows ? n1 : n + kRows;
      const int blocks = static_cast<int>(ceil_div(end - n, kBlock));
      std::memset(acc, 0, sizeof(float) * blocks * kBlock * lanes);
      for (int64_t g = 0; g < groups; g += chunk) {
        const int64_t here = groups - g < chunk ? groups - g : chunk;
        const float* weights[kBlocks];
        for (int b = 0; b < blocks; ++b) {
          // fp32 weights are multiplied where they are, or where `get` puts them.
          if (D == DType::f32) room.values = reinterpret_cast<uint8_t*>(w + b * kept);
          int skip;
          const Block block =
              Blocks<T, D>::get(a, n + b * kBlock, g, here, room, &skip, blocks > 1 ? kBlock : 0);
          weights[b] = decode(block, skip, here, w + b * kept, at + b * kept);
        }
        float* to = acc;
        for (int p = 0; p < count; ++p) {
          const Function multiply_block =
              choose(panels[p].width, std::make_integer_sequence<int, kMaxPanelWidth>());
          const int width = panels[p].width * T::kLanes;
          const float* panel = chunk_of(panels[p], g);
          // The chunk that comes next is brought nearer, a part with each block.
          const float* next =
              p + 1 < count ? chunk_of(panels[p + 1], g) : chunk_of(panels[0], g + here);
          const int64_t part = ceil_div(4 * here * width, blocks * kLine) * kLine;
          for (int b = 0; b < blocks; ++b, to += kBlock * width) {
            for (int64_t i = b * part; i < (b + 1) * part; i += kLine)
              __builtin_prefetch(next + i, 0, 2);
            multiply_block(panel, weights[b], at + b * kept, static_cast<int>(2 * here), to);
          }
        }
      }
      load_bias<D>(a, n, end, bias);
      write(a, panels, count, acc, bias, n, end);
    }
  }

  // acc, panel after panel, each [blocks * 16][lanes], to y: transposed, finished.
  static void write(const Linear24& a, const XPanel* panels, int count, const float* acc,
                    const float* bias, int64_t n, int64_t end) {
    const int blocks = static_cast<int>(ceil_div(end - n, kBlock));
    alignas(64) float turned[16 * kBlock];
    for (int p = 0; p < count; ++p) {
      const int width = panels[p].width * T::kLanes;
      for (int l = 0; l < panels[p].rows; l += 16) {
        const int rows = panels[p].rows - l < 16 ? panels[p].rows - l : 16;
        for (int b = 0; b < blocks; ++b) {
          turn(acc + b * kBlock * width + l, width, width - l < 16 ? width - l : 16, turned);
          const int64_t at = n + b * kBlock;
          const int columns = static_cast<int>(end - at < kBlock ? end - at : kBlock);
          for (int r = 0; r < rows; ++r) {
            finish<T, D>(turned + r * kBlock, bias + b * kBlock, columns, a.activation, a.y,
                         (panels[p].m0 + l + r) * a.N + at);
          }
        }
      }
      acc += blocks * kBlock * width;
    }
  }

  // Sixteen rows of `width` floats, `stride` apart, to columns of sixteen.
  static void turn(const float* in, int64_t stride, int width, float* out) {
    if (width == 16) return T::transpose(in, stride * 4, reinterpret_cast<uint32_t*>(out), kBlock);
    for (int r = 0; r < kBlock; ++r) {
      for (int c = 0; c < width; ++c) out[c * kBlock + r] = in[r * stride + c];
    }
  }

  // k in [k0, k1) of the panel; lanes past its rows are zero.
  static void pack(const Linear24& a, const XPanel& panel, int64_t k0, int64_t k1) {
    const int width = panel.width * T::kLanes;
    alignas(64) float square[16][16];
    for (int64_t k = k0; k < k1; k += 16) {
      const int depth = static_cast<int>(k1 - k < 16 ? k1 - k : 16);
      for (int l = 0; l < width; l += 16) {
        const int rows = panel.rows - l < 16 ? (panel.rows > l ? panel.rows - l : 0) : 16;
        const int lanes = width - l < 16 ? width - l : 16;
        float* out = panel.data + k * width + l;
        if (depth < 16 || rows < 16) std::memset(square, 0, sizeof square);
        for (int r = 0; r < rows; ++r) {
          const int64_t row = (panel.m0 + l + r) * a.x_stride_m;
          if (a.x_stride_k == 1 && depth == 16) {
            const auto* in = static_cast<const uint8_t*>(a.x) + (row + k) * kItem<D>;
            for (int i = 0; i < 16; i += T::kLanes)
              T::store(square[r] + i, T::template load_as_float<D>(in + i * kItem<D>));
          } else {
            for (int i = 0; i < depth; ++i)
              square[r][i] = load_float(a.x, row + (k + i) * a.x_stride_k, D);
          }
        }
        if (lanes == 16 && depth == 16) {
          T::transpose(square, sizeof square[0], reinterpret_cast<uint32_t*>(out), width);
          continue;
        }
        for (int i = 0; i < depth; ++i) {
          for (int c = 0; c < lanes; ++c) out[i * width + c] = square[c][i];
        }
      }
    }
  }
};

}  // namespace
}  // namespace sparsekern::cpu
