// The layout that linear_24 multiplies from: blocks of sixteen rows, so that one vector holds what
// sixteen outputs need of the same group of k.
//
//   canonical                            block of rows n .. n+15
//     values  row n    v v | v v | …       fp32, fp16   group 0: first kept  [ n n+1 … n+15 ]
//             row n+1  v v | v v | …                             second kept [ n n+1 … n+15 ]
//             …                                         group 1: …
//                                          bf16         group 0: [ n: first, second | n+1: … ]
//     meta    row n    8 nibbles, 8 …      words 0: 32 bits [ n n+1 … n+15 ], eight groups each
//
//   packed  = values of all blocks, then meta of all blocks
//           a permutation of the canonical bytes, and as many: where the last block has fewer rows
//           than sixteen, or the last word fewer groups than eight, nothing is padded
//           ([ceil(K % 32 / 8)] bytes of each row follow the last whole word)
//
// Two bf16 lie together because the dot product instruction takes them as a pair.
#pragma once

#include <cstring>

#include "kernels.h"
#include "scratch.h"

namespace sparsekern::cpu {
namespace {

constexpr int kBlock = 16;  // rows of a block

template <DType D>
constexpr int64_t kItem = D == DType::f32 ? 4 : 2;
template <DType D>
constexpr int64_t kGroupBytes = 2 * kBlock * kItem<D>;  // of a block's values

constexpr int64_t meta_words(int64_t groups) { return ceil_div(groups, 8); }

// One block as a kernel reads it: sixteen rows wide, meta in whole words.
struct Block {
  const uint8_t* values;  // [groups] of kGroupBytes
  const uint32_t* meta;   // [ceil(groups / 8)][16]
};

// A group of a block as fp32: the first and the second kept of T::kLanes rows.
template <class T, DType D>
void load_weights(const uint8_t* group, int half, typename T::F* first, typename T::F* second) {
  constexpr int64_t kHalf = T::kLanes * kItem<D>;
  if constexpr (D == DType::bf16) {
    const auto pairs = T::load_int(group + half * 2 * kHalf);
    *first = T::low_bf16(pairs);
    *second = T::high_bf16(pairs);
  } else {
    *first = T::template load_as_float<D>(group + half * kHalf);
    *second = T::template load_as_float<D>(group + kBlock * kItem<D> + half * kHalf);
  }
}

template <class T, DType D>
struct Blocks {
  static constexpr int64_t kBeside = D == DType::bf16 ? 4 : kItem<D>;  // bytes of a row that touch

  // Columns of dwords from rows of them; `rows` below sixteen and `dwords` of any number, what is
  // not there reads as zero. Brings what is `ahead` bytes on nearer.
  static void transpose(const uint8_t* in, int64_t stride, int rows, int64_t bytes, int64_t ahead,
                        uint32_t* out) {
    int64_t at = 0;
    if (rows == kBlock) {
      for (; at + 64 <= bytes; at += 64, out += 16 * kBlock) {
        for (int r = 0; r < kBlock; ++r) __builtin_prefetch(in + at + ahead + r * stride, 0, 2);
        T::transpose(in + at, stride, out, kBlock);
      }
    }
    for (; at < bytes; at += 64, out += 16 * kBlock) {
      const int64_t width = bytes - at < 64 ? bytes - at : 64;
      alignas(64) uint8_t square[kBlock][64] = {};
      alignas(64) uint32_t turned[16][kBlock];
      for (int r = 0; r < rows; ++r) std::memcpy(square[r], in + r * stride + at, width);
      T::transpose(square, 64, turned[0], kBlock);
      std::memcpy(out, turned, static_cast<size_t>(ceil_div(width, 4)) * sizeof turned[0]);
    }
  }

  // Rows [n, n + rows) and groups [g, g + groups) of the canonical form, g even, as a block. What
  // comes after it is the same groups of the rows `next_rows` on, or the next groups where that is 0.
  static void from_rows(const Linear24& a, int64_t n, int rows, int64_t g, int64_t groups,
                        int64_t next_rows, uint8_t* values, uint32_t* meta) {
    const int64_t row = a.K / 2 * kItem<D>, meta_row = meta_bytes(a.K);
    auto* out = reinterpret_cast<uint32_t*>(values);
    transpose(static_cast<const uint8_t*>(a.values) + n * row + g * 2 * kItem<D>, row, rows,
              groups * 2 * kItem<D>, next_rows ? next_rows * row : groups * 2 * kItem<D>, out);
    if constexpr (D == DType::f16) {
      for (int64_t i = 0; i < groups; ++i) {
        T::split_pairs(out + i * kBlock, reinterpret_cast<uint16_t*>(out + i * kBlock));
      }
    }
    transpose(a.meta + n * meta_row + g / 2, meta_row, rows, ceil_div(groups, 2),
              next_rows ? next_rows * meta_row : ceil_div(groups, 2), meta);
  }

  // Where `get` may put what is not in memory as a block yet.
  struct Room {
    uint8_t* values;  // groups * kGroupBytes
    uint32_t* meta;   // meta_words(groups + 7) * 16
  };
  static int64_t room_bytes(int64_t groups) {
    return ceil_div(groups * kGroupBytes<D> + meta_words(groups + 7) * kBlock * 4, 64) * 64;
  }
  static Room room(void* bytes, int64_t groups) {
    auto* values = static_cast<uint8_t*>(bytes);
    return {values, reinterpret_cast<uint32_t*>(values + groups * kGroupBytes<D>)};
  }

  static void prepack(const Linear24& a, int64_t n, uint8_t* packed, Scratch& scratch) {
    prepack(a, n, packed, room(scratch.get<uint8_t>(room_bytes(a.K / 4)), a.K / 4));
  }

  // The block of rows n .. n+15 to its place in `packed`, with room for all its groups.
  static void prepack(const Linear24& a, int64_t n, uint8_t* packed, const Room& to) {
    const int64_t groups = a.K / 4, left = a.N - n;
    const int rows = left < kBlock ? static_cast<int>(left) : kBlock;
    uint8_t* values = packed + n * (a.K / 2) * kItem<D>;
    uint8_t* bits = packed + a.N * (a.K / 2) * kItem<D> + n * meta_bytes(a.K);
    from_rows(a, n, rows, 0, groups, kBlock, rows == kBlock ? values : to.values, to.meta);
    if (rows < kBlock) {
      for (int64_t i = 0; i < groups * kGroupBytes<D> / kBlock / kBeside; ++i)
        std::memcpy(values + i * rows * kBeside, to.values + i * kBlock * kBeside, rows * kBeside);
    }
    const int64_t whole = a.K / 32;
    for (int64_t i = 0; i < meta_words(groups); ++i) {
      const int64_t width = i < whole ? 4 : meta_bytes(a.K) - 4 * whole;
      for (int r = 0; r < rows; ++r)
        std::memcpy(bits + i * 4 * rows + r * width, to.meta + i * kBlock + r, width);
    }
  }

  // Groups [g, g + groups) of rows n .. n+15 from either form, g a multiple of 4. `skip` is the
  // number of groups in the first word of meta that come before g.
  static Block get(const Linear24& a, int64_t n, int64_t g, int64_t groups, Room room, int* skip,
                   int64_t next_rows = 0) {
    const int64_t left = a.N - n;
    const int rows = left < kBlock ? static_cast<int>(left) : kBlock;
    if (!a.packed) {
      from_rows(a, n, rows, g, groups, next_rows, room.values, room.meta);
      *skip = 0;
      return {room.values, room.meta};
    }
    *skip = static_cast<int>(g % 8);
    const uint8_t* values = a.packed + n * (a.K / 2) * kItem<D> + g * 2 * rows * kItem<D>;
    const uint8_t* bits = a.packed + a.N * (a.K / 2) * kItem<D> + n * meta_bytes(a.K);
    const int64_t whole = a.K / 32, first = g / 8, last = meta_words(g + groups);
    if (rows == kBlock && last <= whole) {
      return {values, reinterpret_cast<const uint32_t*>(bits) + first * kBlock};
    }
    std::memset(room.meta, 0, sizeof *room.meta * (last - first) * kBlock);
    for (int64_t i = first; i < last; ++i) {
      const int64_t width = i < whole ? 4 : meta_bytes(a.K) - 4 * whole;
      for (int r = 0; r < rows; ++r)
        std::memcpy(room.meta + (i - first) * kBlock + r, bits + i * 4 * rows + r * width, width);
    }
    if (rows == kBlock) return {values, room.meta};
    std::memset(room.values, 0, groups * kGroupBytes<D>);
    for (int64_t i = 0; i < groups * kGroupBytes<D> / kBlock / kBeside; ++i)
      std::memcpy(room.values + i * kBlock * kBeside, values + i * rows * kBeside, rows * kBeside);
    return {room.values, room.meta};
  }
};

}  // namespace
}  // namespace sparsekern::cpu
