// What every tier of the 2:4 formats needs to know: element types and the masks of a tile.
// Baseline code: include before a target region.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../layout.h"

namespace sparsekern::cpu {

// An element's bits, the number its magnitude is added up as in prune_24_transposable, and the bits
// that make up its magnitude: all but the sign for floats; integers have no second zero to clear.
template <class Bits, class ScoreType, Bits magnitude>
struct Element {
  using Word = Bits;
  using Score = ScoreType;
  static constexpr Word kMagnitude = magnitude;
};
using F32 = Element<uint32_t, float, 0x7fffffffu>;
using F64 = Element<uint64_t, double, 0x7fffffffffffffffu>;
struct F16 : Element<uint16_t, float, 0x7fffu> {};
struct BF16 : Element<uint16_t, float, 0x7fffu> {};
struct I8 : Element<uint8_t, float, 0xffu> {};
struct U8 : Element<uint8_t, float, 0xffu> {};

template <class T>
constexpr bool kIsFloat = !std::is_same_v<T, I8> && !std::is_same_v<T, U8>;

// Calls f with the type that describes `dtype`.
template <class F>
void with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::f32: return f(F32{});
    case DType::f16: return f(F16{});
    case DType::bf16: return f(BF16{});
    case DType::f64: return f(F64{});
    case DType::i8: return f(I8{});
    case DType::u8: return f(U8{});
  }
}

// The same where only the order of the bits counts, which fp16 and bf16 share.
template <class F>
void with_order(DType dtype, F f) {
  with_type(dtype == DType::f16 ? DType::bf16 : dtype, [&](auto type) {
    if constexpr (!std::is_same_v<decltype(type), F16>) f(type);
  });
}

// The same where elements only move.
template <class F>
void with_word(int size, F f) {
  switch (size) {
    case 1: return f(uint8_t{});
    case 2: return f(uint16_t{});
    case 4: return f(uint32_t{});
    case 8: return f(uint64_t{});
  }
}

// |w| as an ordered integer.
template <class T>
inline typename T::Word magnitude(typename T::Word w) {
  if constexpr (std::is_same_v<T, I8>) return w & 0x80 ? static_cast<uint8_t>(-w) : w;
  return w & T::kMagnitude;
}

// ---- 4x4 tiles, two kept in every row and every column ----

// The 6 ways to keep two of four, in the order that breaks ties, and the 90 ways to stack four of
// them so that every column also keeps two. The order is lexicographic; reference.py builds the
// same list.
constexpr uint8_t kPairs[6] = {0b0011, 0b0101, 0b1001, 0b0110, 0b1010, 0b1100};
constexpr int kMasks = 90;

struct TileMasks {
  uint8_t upper[kMasks], lower[kMasks];  // rows 0 and 1, rows 2 and 3: 6 * pair + pair
  uint16_t keep[kMasks];                 // bit 4 * row + column
};

constexpr TileMasks make_tile_masks() {
  TileMasks t{};
  int count = 0;
  for (int i = 0; i < 6 * 6 * 6 * 6; ++i) {
    const int pairs[4] = {i / 216, i / 36 % 6, i / 6 % 6, i % 6};
    int keep = 0;
    for (int row = 0; row < 4; ++row) keep |= kPairs[pairs[row]] << 4 * row;
    bool balanced = true;
    for (int column = 0; column < 4; ++column) {
      int kept = 0;
      for (int row = 0; row < 4; ++row) kept += keep >> (4 * row + column) & 1;
      balanced = balanced && kept == 2;
    }
    if (!balanced) continue;
    t.upper[count] = static_cast<uint8_t>(i / 36);
    t.lower[count] = static_cast<uint8_t>(i % 36);
    t.keep[count++] = static_cast<uint16_t>(keep);
  }
  return t;
}
inline constexpr TileMasks kTileMasks = make_tile_masks();
static_assert(kTileMasks.keep[kMasks - 1] == 0x33cc, "90 masks, no more and no fewer");

}  // namespace sparsekern::cpu
