// The two storage formats and the codes that cross the language border, stated once for every back
// end. Plain C++17: no torch, no Python, no CUDA, so that host code, nvcc and NVRTC all read the
// same file.
//
// 2:4  A weight[N, K] of which every group of four consecutive k keeps two:
//
//        dense group      a  b  c  d          k = 4g .. 4g+3
//        kept             .  b  .  d          positions i0 = 1, i1 = 3   (i0 < i1)
//        values           b  d                slots 2g, 2g+1 of values[N, K/2]
//        nibble           i1 i0 = 11 01       i0 | i1 << 2 = 13
//        meta[N, K/8]     group g sits in byte g/2, even g in the low half
//
//      Read a row of meta as one little-endian bit string: bits 2j, 2j+1 are the position of kept
//      slot j. That is why no kernel ever needs a table to decode it: lane j shifts by 2j and takes
//      two bits.
//
// ZVC  A tensor of n elements, in tiles of 4096:
//        mask[ceil(n/8)]   bit i%8 of byte i/8 says that element i is not all-zero bits
//        values            the non-zero elements, tile after tile
//        offsets[tiles]    where each tile's values start in `values`, in elements
#pragma once

#include <cstdint>

namespace sparsekern {

// Codes of the element types. Python's side of this table is sparsekern/backends/cpu.py.
enum class DType : int { f32 = 0, f16 = 1, bf16 = 2, f64 = 3, i8 = 4, u8 = 5 };

// Fused activations of linear_24, in the order of sparsekern.ops.ACTIVATIONS.
enum class Activation : int { none = 0, relu = 1, relu2 = 2, gelu = 3, silu = 4 };

constexpr int64_t kZvcTile = 4096;   // elements per ZVC tile; mask of a tile is 512 bytes
constexpr uint8_t kEmptyNibble = 4;  // positions (0, 1): the high half after an odd last group

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t meta_bytes(int64_t K) { return ceil_div(K, 8); }

}  // namespace sparsekern
