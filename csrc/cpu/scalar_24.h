// The scalar pieces of linear_24 that every tier uses for its tails. Baseline code: include before
// a target region.
#pragma once

#include "convert.h"
#include "kernels.h"

namespace sparsekern::cpu {

// Position of kept slot j of a row within its group of four.
inline int slot_position(const uint8_t* meta, int64_t j) { return meta[j / 4] >> (j % 4 * 2) & 3; }

// sums[r] of x[r][begin..end) against one weight row; x has rows of K, fp32 or bf16.
template <int R, class X>
inline void dot_rows_scalar(const uint8_t* values, const uint8_t* meta, const X* x, int64_t begin,
                            int64_t end, int64_t K, DType dtype, float* sums) {
  // Eight chains: the sum is split, so that its error stays near that of a blocked dense product.
  float chain[R][8] = {};
  for (int64_t j = begin / 2; j < end / 2; ++j) {
    const float w = load_float(values, j, dtype);
    const X* at = x + j / 2 * 4 + slot_position(meta, j);
    for (int r = 0; r < R; ++r) {
      if constexpr (sizeof(X) == 2) {
        chain[r][j % 8] += w * bf16_to_float(at[r * K]);
      } else {
        chain[r][j % 8] += w * at[r * K];
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    const float* c = chain[r];
    sums[r] = ((c[0] + c[1]) + (c[2] + c[3])) + ((c[4] + c[5]) + (c[6] + c[7]));
  }
}

}  // namespace sparsekern::cpu
