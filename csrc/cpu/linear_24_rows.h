// linear_24, ROWS: lanes along one row of the weight (few rows of x, weight as it is stored).
//
//     meta    32 bits = 16 positions        lane j: shift right by 2j, keep two bits, + 4 * (j / 2)
//     index   [ 1 3 | 4 6 | 8 11 | … ]      where lane j's x lies within the next 32 x
//     x       [ x0 x1 … x31 ] ─permute─▶ [ x1 x3 x4 x6 x8 x11 … ]
//     values  [ w0 w1 … w15 ]               one fma, then the next 16 kept
//
// Limited by the bytes of values and meta, each read once per call in order; from four rows of x on
// by the permutes.
#pragma once

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

  void load(const uint8_t* values, const uint8_t* meta, int64_t j) {
    weights = T::template load_as_float<D>(values + j * kItem<D>);
    at = T::row_positions(meta + j / 4);
  }
  typename T::F multiply(const X* x, typename T::F acc) const {
    return T::fma(weights, T::row_pick(x, at), acc);
  }
};

template <class T, DType D, template <class, DType> class Multiply>
struct LinearRows {
  using F = typename T::F;
  using Mul = Multiply<T, D>;
  using X = typename Mul::X;

  // Columns [n0, n1) of y for R rows of x, contiguous.
  template <int R>
  static void rows(const Linear24& a, const X* x, int64_t m, int64_t n0, int64_t n1) {
    constexpr int kStep = Mul::kKept;
    const int64_t kept = a.K / 2;
    float sums[R][kFinish], bias[kFinish];
    for (int64_t n = n0; n < n1; n += kFinish) {
      const int columns = static_cast<int>(n1 - n < kFinish ? n1 - n : kFinish);
      for (int c = 0; c < columns; ++c) {
        const auto* values = static_cast<const uint8_t*>(a.values) + (n + c) * kept * kItem<D>;
        const uint8_t* meta = a.meta + (n + c) * meta_bytes(a.K);
        F even[R], odd[R];
        for (int r = 0; r < R; ++r) even[r] = odd[r] = T::zero();
        int64_t j = 0;
        const auto step = [&](F* acc) __attribute__((always_inline)) {
          Mul mul;
          mul.load(values, meta, j);
          for (int r = 0; r < R; ++r) acc[r] = mul.multiply(x + r * a.K + 2 * j, acc[r]);
          j += kStep;
        };
        while (j + 2 * kStep <= kept) step(even), step(odd);
        if (j + kStep <= kept) step(even);
        float rest[R];
        dot_rows_scalar<R>(values, meta, x, 2 * j, a.K, a.K, D, rest);
        for (int r = 0; r < R; ++r) sums[r][c] = rest[r] + T::sum(T::add(even[r], odd[r]));
      }
      for (int r = 0; r < R; ++r) {
        for (int c = columns; c < kFinish; ++c) sums[r][c] = 0;
      }
      load_bias<D>(a, n, n + columns, bias);
      for (int c = columns; c < kFinish; ++c) bias[c] = 0;
      for (int r = 0; r < R; ++r)
        finish<T, D>(sums[r], bias, columns, a.activation, a.y, (m + r) * a.N + n);
    }
  }

  static void run(const Linear24& a, const void* x, int64_t n0, int64_t n1) {
    // A few rows of weight at a time, so that they are still in L1 for the next rows of x.
    for (int64_t n = n0; n < n1; n += kFinish) {
      const int64_t end = n1 - n < kFinish ? n1 : n + kFinish;
      const auto* at = static_cast<const X*>(x);
      int64_t m = 0;
      for (; m + 4 <= a.M; m += 4) rows<4>(a, at + m * a.K, m, n, end);
      if (a.M - m >= 2) rows<2>(a, at + m * a.K, m, n, end), m += 2;
      if (a.M - m == 1) rows<1>(a, at + m * a.K, m, n, end);
    }
  }

  // Row m of x, contiguous, as the kernel reads it.
  static void pack(const Linear24& a, int64_t m, void* to) {
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
