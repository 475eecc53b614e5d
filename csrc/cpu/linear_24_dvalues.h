// dvalues[n, j] = sum_m dy[m, n] * x[m, k(n, j)] on one thread, for a range of rows n and columns k.
// Words as in linear_24_grad.h: one row m each, or two.
//
// ROWS, few rows of x. Lanes run along the kept elements of one row:
//
//     meta    ─index─▶ where the x of the next kept elements lie
//     x[m]    ─pick──▶ [ x1 x3 x4 x6 x8 x11 … ] * dy[m, n]     one permute for each fma
//
//   Writes dvalues once, in order. Limited by those bytes for few m, then by the permutes.
//
// PANELS, many rows. Lanes run along m:
//
//     x[k][lanes]     as many k as kLanes kept elements span, L1
//     dy[n][lanes]    W vectors, in registers for all of them
//     sum of slot j   += dy[n][i] * x[k(n, j)][i]   i in 0..W     then folded: a tree of shuffles and
//                                                                 adds makes kLanes sums one vector
//
//   Half the multiplications of the dense product. Sixteen kept elements against 16 vectors are 256
//   products and 256 loads, 48 adds to join chains and 45 instructions to fold: 0.5 cycles a product
//   by the loads. Measured on a Zen 5, 2 cores, M = 1024, 4096 x 4096, one thread: 1.05 to 1.2 in
//   fp32, 1.04 in pairs. Four chains instead of two, prefetching the next dy and panels of 8 vectors
//   were no faster; what holds it back is not known.
#pragma once

#include "linear_24_grad.h"

namespace sparsekern::cpu {

constexpr int64_t kDvaluesRows = 256;            // rows n per block, fewer where M is large:
constexpr int64_t kDvaluesBlockWords = 1 << 17;  // words of their dy: half of L2
constexpr int64_t kDvaluesMinRows = 16;
constexpr int64_t kDvaluesScratch = kDvaluesRows * 16;

template <class T>
struct DvaluesRows {
  using F = typename T::F;

  template <bool kPair>
  static void run_kind(const Linear24Dvalues& a, const float* x, int64_t stride, const float* dy,
                       int64_t words, int64_t k0, int64_t k1, int64_t n0, int64_t n1) {
    constexpr int64_t kSpan = 2 * T::kLanes;       // dense columns of a vector of kept ones
    int64_t block = 8192 / words / kSpan * kSpan;  // columns whose x fits L1
    block = block < 4 * kSpan ? 4 * kSpan : block;
    for (int64_t k = k0; k < k1; k += block) {
      const int64_t end = k1 < k + block ? k1 : k + block;
      for (int64_t n = n0; n < n1; ++n) {
        const uint8_t* meta = a.meta + n * meta_bytes(a.K);
        const float* d = dy + n * words;
        for (int64_t i = k; i < end; i += kSpan) {
          const auto index = T::index(meta, i / 2, a.K / 2);
          const float* at = x + (i - k0);
          F even = T::zero(), odd = T::zero();
          int64_t m = 0;
          for (; m + 2 <= words; m += 2) {
            even = multiply_add<T, kPair>(T::pick(at + m * stride, index), T::set1(d[m]), even);
            odd = multiply_add<T, kPair>(T::pick(at + (m + 1) * stride, index), T::set1(d[m + 1]),
                                         odd);
          }
          if (m < words) {
            even = multiply_add<T, kPair>(T::pick(at + m * stride, index), T::set1(d[m]), even);
          }
          narrow_some<T>(T::add(even, odd), a.dvalues, n * (a.K / 2) + i / 2, (end - i) / 2,
                         a.dtype);
        }
      }
    }
  }

  static void run(const Linear24Dvalues& a, const float* x, int64_t stride, const float* dy,
                  int64_t words, int64_t k0, int64_t k1, int64_t n0, int64_t n1) {
    if constexpr (T::kPairs) {
      if (a.dtype == DType::bf16) return run_kind<true>(a, x, stride, dy, words, k0, k1, n0, n1);
    }
    run_kind<false>(a, x, stride, dy, words, k0, k1, n0, n1);
  }
};

template <class T>
struct DvaluesPanels {
  using F = typename T::F;
  static constexpr int64_t kSpan = 2 * T::kLanes;

  template <bool kPair, int W>
  static F dot(const F* d, const float* x, const int32_t* position) {
    const float* row = x + *position * int64_t{W * T::kLanes};
    constexpr int kChains = W >= 8 && T::kSums >= 16 ? 4 : W >= 4 ? 2 : 1;
    F sum[kChains];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
      const F v = T::load(row + i * T::kLanes);
      if (i >= kChains) {
        sum[i % kChains] = multiply_add<T, kPair>(d[i], v, sum[i % kChains]);
      } else if constexpr (kPair) {
        sum[i] = T::dot(d[i], v, T::zero());
      } else {
        sum[i] = T::mul(d[i], v);
      }
    }
    if constexpr (kChains == 4) return T::add(T::add(sum[0], sum[1]), T::add(sum[2], sum[3]));
    if constexpr (kChains == 2) return T::add(sum[0], sum[1]);
    return sum[0];
  }

  // The sums of `Count` slots, folded Log2(Count) levels: each slot's sum is spread over kLanes /
  // Count lanes.
  template <bool kPair, int W, int Level>
  static F fold(const F* d, const float* x, const int32_t* position) {
    if constexpr (Level == 0) {
      return dot<kPair, W>(d, x, position);
    } else {
      const F low = fold<kPair, W, Level - 1>(d, x, position);
      const F high = fold<kPair, W, Level - 1>(d, x, position + (1 << (Level - 1)));
      return T::template fold<Level>(low, high);
    }
  }

  // sums[n][kLanes slots] (+)= dy[n] · x[k] over the rows of one panel.
  template <bool kPair, int W>
  [[gnu::noinline]] static void multiply(const Linear24Dvalues& a, const float* x, const float* dy,
                                         int64_t k, int64_t n0, int64_t n1, bool first,
                                         float* sums) {
    for (int64_t n = n0; n < n1; ++n, dy += W * T::kLanes, sums += T::kLanes) {
      alignas(64) int32_t position[T::kLanes];
      T::store_positions(position, a.meta + n * meta_bytes(a.K), k / 2, a.K / 2);
      asm("" : "+m"(position));  // from memory: GCC would take them out of the vector one by one
      F d[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) d[i] = T::load(dy + i * T::kLanes);
      F sum = fold<kPair, W, T::kLevels>(d, x, position);
      if (!first) sum = T::add(T::load(sums), sum);
      T::store(sums, sum);
    }
  }

  template <bool kPair>
  static void multiply_width(const Linear24Dvalues& a, int lanes, const float* x, const float* dy,
                             int64_t k, int64_t n0, int64_t n1, bool first, float* sums) {
    switch (lanes / T::kLanes) {
      case 1: return multiply<kPair, 1>(a, x, dy, k, n0, n1, first, sums);
      case 2: return multiply<kPair, 2>(a, x, dy, k, n0, n1, first, sums);
      case 3: return multiply<kPair, 3>(a, x, dy, k, n0, n1, first, sums);
      case 4: return multiply<kPair, 4>(a, x, dy, k, n0, n1, first, sums);
      case 6: return multiply<kPair, 6>(a, x, dy, k, n0, n1, first, sums);
      case 8: return multiply<kPair, 8>(a, x, dy, k, n0, n1, first, sums);
    }
    if constexpr (T::kMaxWidth >= 16) {
      if (lanes == 12 * T::kLanes) return multiply<kPair, 12>(a, x, dy, k, n0, n1, first, sums);
      multiply<kPair, 16>(a, x, dy, k, n0, n1, first, sums);
    }
  }

  template <bool kPair>
  static void run_kind(const Linear24Dvalues& a, const Panel* x, const Panel* dy, int count,
                       int64_t k0, int64_t k1, int64_t n0, int64_t n1, float* sums) {
    for (int64_t k = k0; k < k1; k += kSpan) {
      for (int p = 0; p < count; ++p) {
        multiply_width<kPair>(a, x[p].lanes, x[p].data + (k - k0) * x[p].lanes, dy[p].data, k, n0,
                              n1, p == 0, sums);
      }
      for (int64_t n = n0; n < n1; ++n) {
        narrow_some<T>(T::load(sums + (n - n0) * T::kLanes), a.dvalues, n * (a.K / 2) + k / 2,
                       (k1 - k) / 2, a.dtype);
      }
    }
  }

  static void run(const Linear24Dvalues& a, const Panel* x, const Panel* dy, int count, int64_t k0,
                  int64_t k1, int64_t n0, int64_t n1, float* sums) {
    if constexpr (T::kPairs) {
      if (a.dtype == DType::bf16) return run_kind<true>(a, x, dy, count, k0, k1, n0, n1, sums);
    }
    run_kind<false>(a, x, dy, count, k0, k1, n0, n1, sums);
  }
};

}  // namespace sparsekern::cpu
