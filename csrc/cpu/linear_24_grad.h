// What both gradients of linear_24 stand on: words, and how they are packed.
//
// A word is 32 bits, held in a float: one fp32 (Single), or, where the CPU multiplies and adds pairs
// of bf16 (Pair), two bf16 that are neighbours along the summed dimension. One loop serves both:
//
//     Single   word(r, j) = s[r, j]                        acc += w * v
//     Pair     dx, summed over n      (s[r, 2j], s[r, 2j+1])
//              dvalues, over m        (s[2r, j], s[2r+1, j])      acc += w.lo * v.lo + w.hi * v.hi
//
// The kernels read them row by row, or as a panel, where a vector's lanes run along the rows:
//
//     panel[j][lane] = word(r0 + lane, j)      zero past the last row, so that no kernel has a tail
//
// A tier T supplies: F (a vector of kLanes floats), kMaxWidth (vectors in the widest panel), kSums
//   (accumulators that fit beside the operands), kPairs,
//   zero, set1, load, store, add, mul, fma
//   load_values<D>(bytes, i)        kLanes elements from the i-th, as fp32
//   dot(w, v, acc), zip(low, high)  with kPairs: the pair product; words from two rows of kLanes bf16
//   transpose(F[kLanes])
//   fold<Level>(a, b)               one level of the tree of dvalues_panels
//   narrow(v, out, at, dtype)       kLanes results, rounded
//   expand<D>, expand_pairs         of dx: a run of kept weights as dense words
//   expand_64<D>                    with kExpandsInRegisters: 64 columns as vectors
//   index, pick                     of dvalues: the x that kLanes kept slots name
#pragma once

#include "kernels.h"
#include "scalar_24.h"

namespace sparsekern::cpu {

// Widths of a panel in vectors of lanes.
constexpr int kPanelWidths[] = {1, 2, 3, 4, 6, 8, 12, 16};

template <class T, bool kPair>
inline typename T::F multiply_add(typename T::F w, typename T::F v, typename T::F acc) {
  if constexpr (kPair) {
    return T::dot(w, v, acc);
  } else {
    return T::fma(w, v, acc);
  }
}

template <class T>
inline void narrow_some(typename T::F v, void* out, int64_t at, int64_t count, DType dtype) {
  if (count >= T::kLanes) return T::narrow(v, out, at, dtype);
  float some[T::kLanes];
  T::store(some, v);
  for (int64_t i = 0; i < count; ++i) store_float(out, at + i, some[i], dtype);
}

// Writes the words of s[M, I]; see kernels.h.
template <class T>
struct GradientPack {
  using F = typename T::F;
  enum class Words { single, pair_along_i, pair_along_m };

  template <DType D, Words W>
  static float word(const Strided& s, int64_t M, int64_t I, int64_t r, int64_t j) {
    if constexpr (W == Words::single) {
      return r < M && j < I ? load_float(s.data, r * s.stride_m + j * s.stride_i, D) : 0.0f;
    } else {
      constexpr bool kAlongM = W == Words::pair_along_m;
      const int64_t m = kAlongM ? 2 * r : r, i = kAlongM ? j : 2 * j;
      if (m >= M || i >= I) return 0.0f;
      const auto* at = static_cast<const uint16_t*>(s.data) + m * s.stride_m + i * s.stride_i;
      uint32_t bits = *at;
      if (kAlongM ? m + 1 < M : i + 1 < I) {
        bits |= uint32_t{at[kAlongM ? s.stride_m : s.stride_i]} << 16;
      }
      return bits_to_float(bits);
    }
  }

  // kLanes words of one row from column j; needs stride_i == 1 and that many columns.
  template <DType D, Words W>
  static F words(const Strided& s, int64_t M, int64_t I, int64_t r, int64_t j) {
    const auto* data = static_cast<const uint8_t*>(s.data);
    if constexpr (W == Words::single) {
      return r < M ? T::template load_values<D>(data, r * s.stride_m + j) : T::zero();
    } else if constexpr (W == Words::pair_along_i) {
      float some[T::kLanes];
      if (r >= M) return T::zero();
      std::memcpy(some, data + (r * s.stride_m + 2 * j) * 2, sizeof some);
      return T::load(some);
    } else {
      if (2 * r + 1 < M) {
        const uint8_t* low = data + (2 * r * s.stride_m + j) * 2;
        return T::zip(low, low + s.stride_m * 2);
      }
      float some[T::kLanes];
      for (int i = 0; i < T::kLanes; ++i) some[i] = word<D, W>(s, M, I, r, j + i);
      return T::load(some);
    }
  }

  template <DType D, Words W>
  static void run(const Strided& s, int64_t M, int64_t I, int64_t r0, int rows, int64_t j0,
                  int64_t j1, float* out, int64_t row_stride, int64_t column_stride) {
    const int64_t whole = W == Words::pair_along_i ? I / 2 : I;  // columns of full words
    int64_t j = j0;
    if (s.stride_i == 1 && (column_stride == 1 || rows % T::kLanes == 0)) {
      for (; j + T::kLanes <= (j1 < whole ? j1 : whole); j += T::kLanes) {
        if (column_stride == 1) {
          for (int r = 0; r < rows; ++r) {
            T::store(out + r * row_stride + (j - j0), words<D, W>(s, M, I, r0 + r, j));
          }
          continue;
        }
        float* at = out + (j - j0) * column_stride;
        for (int r = 0; r < rows; r += T::kLanes) {
          F tile[T::kLanes];
#pragma GCC unroll 16
          for (int i = 0; i < T::kLanes; ++i) tile[i] = words<D, W>(s, M, I, r0 + r + i, j);
          T::transpose(tile);
#pragma GCC unroll 16
          for (int i = 0; i < T::kLanes; ++i) T::store(at + i * column_stride + r, tile[i]);
        }
      }
    }
    for (; j < j1; ++j) {
      for (int r = 0; r < rows; ++r) {
        out[r * row_stride + (j - j0) * column_stride] = word<D, W>(s, M, I, r0 + r, j);
      }
    }
  }

  static void pack(const Strided& s, DType dtype, bool along_m, int64_t M, int64_t I, int64_t r0,
                   int rows, int64_t j0, int64_t j1, float* out, int64_t row_stride,
                   int64_t column_stride) {
    constexpr auto kSingle = Words::single;
    const auto call = [&](auto kernel) {
      kernel(s, M, I, r0, rows, j0, j1, out, row_stride, column_stride);
    };
    if (dtype == DType::f32) return call(run<DType::f32, kSingle>);
    if (dtype == DType::f16) return call(run<DType::f16, kSingle>);
    if constexpr (T::kPairs) {
      if (along_m) return call(run<DType::bf16, Words::pair_along_m>);
      return call(run<DType::bf16, Words::pair_along_i>);
    }
    call(run<DType::bf16, kSingle>);
  }
};

}  // namespace sparsekern::cpu
