// linear_24 on one thread: y[m, n] = activation(sum_k x[m, k] * weight[n, k] + bias[n]).
//
// Two shapes of one idea: bring the x that a kept weight names next to that weight, then one fused
// multiply-add.
//
// ROWS, few rows of x (decode). Lanes run along the kept elements of one weight row:
//
//     meta    32 bits = 16 positions        lane j: shift right by 2j, keep two bits, + 4 * (j / 2)
//     index   [ 1 3 | 4 6 | 8 11 | … ]      where lane j's x lies within the next 32 x
//     x       [ x0 x1 … x31 ] ─permute─▶ [ x1 x3 x4 x6 x8 x11 … ]
//     values  [ w0 w1 … w15 ]               one fma, then the next 16 kept
//
//   Limited by the bytes of values and meta: each is read once per call, in order.
//
// PANELS, many rows of x. Lanes run along the rows of x, so one position serves a whole vector:
//
//     panel[k][lane]   x transposed, fp32, kDepth k at a time (fits L1)
//     weight row n     w0 at k=1, w1 at k=3, w2 at k=4 …
//     acc[n][lane]     += w0 * panel[1][lane];  += w1 * panel[3][lane];  …   half the dense fmas
//
//   R rows of weight by W vectors of lanes stay in registers over kDepth; the partial sums then go
//   to `acc`. Starting each block of kDepth at zero also splits the sum, which is what keeps fp32
//   as accurate as a blocked dense product. Limited by L1 loads: one panel load for each fma.
//
// A tier T supplies: F (a vector of floats), kLanes, zero, set1, load, store, add, fma, and
//   decode(values, meta, first, kept, dtype, w, position)
//       slots [first, first + kept) of a row: fp32 weights, positions counted from group first / 2
//   dot_rows<R>(row of values, meta, xf, K, dtype, sums)    the ROWS inner loop for R rows of x
//   narrow(in, out, at, count, dtype)                       fp32 to out[at..], rounded
#pragma once

#include "kernels.h"

namespace sparsekern::cpu {

float activate(float value, Activation activation);  // dispatch.cpp

// Weight rows decoded together: their fp32 form and positions for one chunk stay in L1, and their
// accumulators for a whole pass over x (kBlockRows * kPassRows * 4 B = 98 KB) in L2.
constexpr int kBlockRows = 48;

template <class T>
struct LinearPanels {
  using F = typename T::F;
  static constexpr int kMaxWidth = T::kMaxWidth;  // vectors of lanes in the widest panel
  // Dense k per chunk: kDepth for the widest panel, so that its chunk fits L1; up to kDeepen times
  // that for narrower ones, so that each weight row is read in longer runs.
  static constexpr int kDepth = T::kDepth;
  static constexpr int kDeepen = 4;
  static constexpr int kStride = kDepth / 2 * kDeepen;  // of a decoded row, in kept elements
  static_assert(kDepth % 16 == 0, "a chunk starts on a whole byte of meta and on a whole vector");

  // acc[R][W vectors] += w[R][kept] * panel rows; `offset` is the float index of each panel row.
  template <int R, int W>
  static void multiply(const float* panel, const float* w, const int32_t* position, int kept,
                       float* acc) {
    constexpr int kWidth = W * T::kLanes;
    F sum[R][W];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) sum[r][i] = T::zero();
    }
    for (int j = 0; j < kept; ++j) {
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const F weight = T::set1(w[r * kStride + j]);
        const float* row = panel + static_cast<int64_t>(position[r * kStride + j]) * kWidth;
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i)
          sum[r][i] = T::fma(weight, T::load(row + i * T::kLanes), sum[r][i]);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) {
        float* a = acc + r * kWidth + i * T::kLanes;
        T::store(a, T::add(T::load(a), sum[r][i]));
      }
    }
  }

  template <int R, int W>
  static void multiply_block(const float* panel, const float* w, const int32_t* position, int kept,
                             float* acc) {
    static_assert(kBlockRows % R == 0, "the block is whole tiles; rows past N hold zero weights");
    for (int r = 0; r < kBlockRows; r += R) {
      multiply<R, W>(panel, w + r * kStride, position + r * kStride, kept, acc + r * W * T::kLanes);
    }
  }

  // The tile for each panel width: as many accumulators as the register file takes beside the
  // broadcast weights.
  static void multiply_width(int lanes, const float* panel, const float* w, const int32_t* position,
                             int kept, float* acc) {
    const int width = lanes / T::kLanes;
    if constexpr (kMaxWidth >= 8) {
      if (width == 8) return multiply_block<3, 8>(panel, w, position, kept, acc);
    }
    if (width == 4)
      return multiply_block<(kMaxWidth >= 8 ? 6 : 3), 4>(panel, w, position, kept, acc);
    if (width == 2)
      return multiply_block<(kMaxWidth >= 8 ? 8 : 4), 2>(panel, w, position, kept, acc);
    multiply_block<8, 1>(panel, w, position, kept, acc);
  }

  // acc[rows of the block][lanes] to y: transpose through a small buffer, add bias, activate,
  // round.
  static void write_block(const Linear24& a, const Panel& panel, const float* acc, int64_t n0,
                          int rows) {
    constexpr int kStrip = 16;
    float strip[kStrip][kBlockRows];
    for (int l0 = 0; l0 < panel.rows; l0 += kStrip) {
      const int lanes = panel.rows - l0 < kStrip ? panel.rows - l0 : kStrip;
      for (int r = 0; r < rows; ++r) {
        const float bias = a.bias ? load_float(a.bias, n0 + r, a.dtype) : 0.0f;
        for (int l = 0; l < lanes; ++l) strip[l][r] = acc[r * panel.lanes + l0 + l] + bias;
      }
      for (int l = 0; l < lanes; ++l) {
        const int64_t y = (panel.m0 + l0 + l) * a.N + n0;
        if (a.activation != Activation::none) {
          for (int r = 0; r < rows; ++r) strip[l][r] = activate(strip[l][r], a.activation);
        }
        T::narrow(strip[l], a.y, y, rows, a.dtype);
      }
    }
  }

  static void run(const Linear24& a, const Panel* panels, int count, int64_t n0, int64_t n1) {
    alignas(64) float w[kBlockRows * kStride];
    alignas(64) int32_t position[kBlockRows * kStride];
    alignas(64) float acc[kBlockRows * kPassRows];  // panel after panel, each [kBlockRows][lanes]
    const int64_t value_bytes = a.dtype == DType::f32 ? 4 : 2;
    const int widest = panels[0].lanes;  // panels come widest first
    const int deepen = kMaxWidth * T::kLanes / widest;
    const int64_t depth = kDepth * (deepen < kDeepen ? deepen : kDeepen);
    for (int64_t n = n0; n < n1; n += kBlockRows) {
      const int rows = static_cast<int>(n1 - n < kBlockRows ? n1 - n : kBlockRows);
      std::memset(acc, 0, sizeof acc);
      for (int64_t k = 0; k < a.K; k += depth) {
        const int kept = static_cast<int>((a.K - k < depth ? a.K - k : depth) / 2);
        for (int r = 0; r < rows; ++r) {
          const auto* values =
              static_cast<const uint8_t*>(a.values) + (n + r) * (a.K / 2) * value_bytes;
          // The rows are far apart: no hardware prefetcher follows that many streams.
          for (int64_t b = 0; b < kept * value_bytes; b += 64) {
            __builtin_prefetch(values + (k / 2 + kept) * value_bytes + b, 0, 2);
          }
          T::decode(values, a.meta + (n + r) * meta_bytes(a.K), k / 2, kept, a.dtype,
                    w + r * kStride, position + r * kStride);
        }
        for (int r = rows; r < kBlockRows; ++r) {
          std::memset(w + r * kStride, 0, sizeof(float) * kept);
          std::memset(position + r * kStride, 0, sizeof(int32_t) * kept);
        }
        float* panel_acc = acc;
        for (int p = 0; p < count; panel_acc += kBlockRows * panels[p].lanes, ++p) {
          multiply_width(panels[p].lanes, panels[p].data + k * panels[p].lanes, w, position, kept,
                         panel_acc);
        }
      }
      const float* panel_acc = acc;
      for (int p = 0; p < count; panel_acc += kBlockRows * panels[p].lanes, ++p) {
        write_block(a, panels[p], panel_acc, n, rows);
      }
    }
  }
};

template <class T>
struct LinearRows {
  template <int R>
  static void rows(const Linear24& a, const float* xf, int64_t m, int64_t n) {
    const int64_t value_bytes = a.dtype == DType::f32 ? 4 : 2;
    const auto* values = static_cast<const uint8_t*>(a.values) + n * (a.K / 2) * value_bytes;
    float sums[R];
    T::template dot_rows<R>(values, a.meta + n * meta_bytes(a.K), xf + m * a.K, a.K, a.dtype, sums);
    const float bias = a.bias ? load_float(a.bias, n, a.dtype) : 0.0f;
    for (int r = 0; r < R; ++r) {
      store_float(a.y, (m + r) * a.N + n, activate(sums[r] + bias, a.activation), a.dtype);
    }
  }

  static void run(const Linear24& a, const float* xf, int64_t n0, int64_t n1) {
    for (int64_t n = n0; n < n1; ++n) {
      int64_t m = 0;
      for (; m + 4 <= a.M; m += 4) rows<4>(a, xf, m, n);
      if (a.M - m >= 2) rows<2>(a, xf, m, n), m += 2;
      if (a.M - m == 1) rows<1>(a, xf, m, n);
    }
  }
};

}  // namespace sparsekern::cpu
