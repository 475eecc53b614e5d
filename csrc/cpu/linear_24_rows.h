// linear_24, ROWS: lanes along one row of the weight (few rows of x, weight as it is stored).
//
//     meta    32 bits = 16 positions        lane j: shift right by 2j, keep two bits, + 4 * (j / 2)
//     index   [ 1 3 | 4 6 | 8 11 | … ]      where lane j's x lies within the next 32 x
//     x       [ x0 x1 … x31 ] ─permute─▶ [ x1 x3 x4 x6 x8 x11 … ]
//     values  [ w0 w1 … w15 ]               one fma, then the next 16 kept
//
// Limited by the bytes of values and meta, each read once per call in order; from four rows of x on
// by the permutes, one and an fma for each vector of kept weights and row of x: a cycle (Zen 5). The
// loop of one row of x, fp32 AVX-512, sixteen kept: 5 loads, 1 broadcast, 1 shift, 1 logic, 1
// permute, 1 fma, 1 prefetch. One row of x reads at 77 % of the bandwidth of a plain read on one
// thread, 88 % on two.
#pragma once

#include <algorithm>

#include "activation.h"
#include "convert.h"
#include "kernels.h"
#include "prepack_24.h"
#include "scalar_24.h"

namespace sparsekern::cpu {
namespace {

template <class T, DType D>
struct FloatRow {
  using X = float;
  static constexpr int kKept = T::kRowsKept;  // slots a step takes
  typename T::F weights;
  typename T::I at;

  static typename T::Near near(const X* x) { return T::row_load(x); }
  void load(const uint8_t* values, const uint8_t* meta, int64_t j) {
    weights = T::template load_as_float<D>(values + j * kItem<D>);
    at = T::row_positions(meta + j / 4);
  }
  typename T::F multiply(const typename T::Near& x, typename T::F acc) const {
    return T::fma(weights, T::row_pick(x, at), acc);
  }
};

template <class T, DType D, template <class, DType> class Multiply>
struct LinearRows {
  using F = typename T::F;
  using Mul = Multiply<T, D>;
  using X = typename Mul::X;

  static constexpr int64_t kAhead = 8192;             // bytes of each row of weight
  static constexpr int kWeightRows = T::kWeightRows;  // that share what is loaded of x, from L2

  // sums[R][C] of C rows of weight from row n on with R rows of x, contiguous.
  template <int R, int C>
  static void multiply(const Linear24& a, const X* x, int64_t n, float (*sums)[kFinish]) {
    constexpr int kStep = Mul::kKept;
    const int64_t kept = a.K / 2, row = kept * kItem<D>, meta_row = meta_bytes(a.K);
    const auto* values = static_cast<const uint8_t*>(a.values) + n * row;
    const uint8_t* meta = a.meta + n * meta_row;
    constexpr int kChains = C == 1 ? 4 : 1;  // one row alone would wait for its own sums
    F acc[kChains][C][R];
    for (auto& chain : acc) {
      for (auto& sum : chain) std::fill(sum, sum + R, T::zero());
    }
    int64_t j = 0;
    const auto step = [&](F(&sum)[C][R]) __attribute__((always_inline)) {
      Mul mul[C];
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        mul[c].load(values + c * row, meta + c * meta_row, j);
        __builtin_prefetch(values + c * row + j * kItem<D> + kAhead, 0, 2);
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const auto near = Mul::near(x + r * a.K + 2 * j);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) sum[c][r] = mul[c].multiply(near, sum[c][r]);
      }
      j += kStep;
    };
    while (j + kChains * kStep <= kept) {
#pragma GCC unroll 4
      for (int i = 0; i < kChains; ++i) step(acc[i]);
    }
    while (j + kStep <= kept) step(acc[0]);
    for (int i = 1; i < kChains; ++i) {
      for (int r = 0; r < R; ++r) acc[0][0][r] = T::add(acc[0][0][r], acc[i][0][r]);
    }
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      float rest[R];
      dot_rows_scalar<R>(values + c * row, meta + c * meta_row, x, 2 * j, a.K, a.K, D, rest);
      for (int r = 0; r < R; ++r) sums[r][c] = rest[r] + T::sum(acc[0][c][r]);
    }
  }

  // Columns [n0, n1), at most kFinish, of y for R rows of x from row m on.
  template <int R>
  static void rows(const Linear24& a, const X* x, int64_t m, int64_t n0, int64_t n1) {
    alignas(64) float sums[R][kFinish] = {};
    alignas(64) float bias[kFinish] = {};
    load_bias<D>(a, n0, n1, bias);
    int64_t n = n0;
    constexpr int kShare =
        R == 1 ? 1 : kWeightRows;  // one row of x is read as one stream of weight
    for (; n + kShare <= n1; n += kShare) {
      multiply<R, kShare>(a, x + m * a.K, n,
                          reinterpret_cast<float (*)[kFinish]>(&sums[0][n - n0]));
    }
    for (; n < n1; ++n)
      multiply<R, 1>(a, x + m * a.K, n, reinterpret_cast<float (*)[kFinish]>(&sums[0][n - n0]));
    for (int r = 0; r < R; ++r) {
      finish<T, D>(sums[r], bias, static_cast<int>(n1 - n0), a.activation, a.y, (m + r) * a.N + n0);
    }
  }

  static void run(const Linear24& a, const void* x, int64_t n0, int64_t n1) {
    // A few rows of weight at a time, so that they are still in L2 for the next rows of x.
    for (int64_t n = n0; n < n1; n += kFinish) {
      const int64_t end = n1 - n < kFinish ? n1 : n + kFinish;
      const auto* at = static_cast<const X*>(x);
      int64_t m = 0;
      for (; m + 4 <= a.M; m += 4) rows<4>(a, at, m, n, end);
      if (a.M - m >= 2) rows<2>(a, at, m, n, end), m += 2;
      if (a.M - m == 1) rows<1>(a, at, m, n, end);
    }
  }

  // Row m of x, contiguous, as the kernel reads it.
  static void pack(const Linear24& a, int64_t m, void* to) {
    if (a.K == 0) return;  // there may be no memory at all, not even to copy nothing to
    auto* out = static_cast<X*>(to) + m * a.K;
    const int64_t row = m * a.x_stride_m;
    int64_t k = 0;
    if (a.x_stride_k == 1) {
      const auto* in = static_cast<const uint8_t*>(a.x) + row * kItem<D>;
      if constexpr (sizeof(X) == kItem<D>) {
        std::memcpy(out, in, a.K * kItem<D>);
        return;
      } else {
        for (; k + T::kLanes <= a.K; k += T::kLanes)
          T::store(out + k, T::template load_as_float<D>(in + k * kItem<D>));
      }
    }
    for (; k < a.K; ++k) {
      const int64_t from = row + k * a.x_stride_k;
      if constexpr (sizeof(X) == 2) {
        out[k] = static_cast<const uint16_t*>(a.x)[from];
      } else {
        out[k] = load_float(a.x, from, D);
      }
    }
  }
};

}  // namespace
}  // namespace sparsekern::cpu
