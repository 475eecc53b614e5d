// linear_24 with the dot products of pairs of bf16, of AVX-512 BF16. Included inside a target region.
//
// TILES, one group of k, sixteen rows of weight:
//     block    [ n: first second | n+1: first second | … ]              one load
//     control  nibble of n, n+1, … ─vpermd in a table of 16─▶ four byte numbers each
//     x        x0 x1 x2 x3 in every 64 bits ─vpshufb─▶ [ n: x1 x3 | n+1: x0 x2 | … ]
//     acc      vdpbf16ps: += first * x[i0] + second * x[i1]
//   A shuffle and a dot product for each group and row of x; three ports take them, two of them
//   each: 0.67 cycles, against one cycle for the two dot products of a dense one.
//
// ROWS, 32 kept of one row: vpmultishiftqb brings each lane its two bits, vpermt2w picks 32 of 64 x.
#pragma once

#include "kernels.h"
#include "prepack_24.h"

namespace sparsekern::cpu {
namespace {

// For slot w of 32: the bit its two begin at, and the first x of its group.
struct Words {
  alignas(64) uint16_t twice[32], group[32];
};
constexpr Words make_words() {
  Words words{};
  for (int w = 0; w < 32; ++w) {
    words.twice[w] = static_cast<uint16_t>(2 * w);
    words.group[w] = static_cast<uint16_t>(w / 2 * 4);
  }
  return words;
}
constexpr Words kWords = make_words();

template <class T, DType>
struct DotTile {
  using X = uint16_t;
  static constexpr int kGroups = 1;
  static constexpr int64_t kChunk = 128;
  static constexpr int kControls = 1;
  __m512i control, pairs;

  static void decode(const uint32_t* meta, int64_t groups, uint32_t* controls) {
    // Nibble i0 | i1 << 2 to the bytes 2*i0, 2*i0 + 1, 2*i1, 2*i1 + 1.
    const auto entry = [](int i0, int i1) {
      return static_cast<int>(0x01000100u + 0x0202u * i0 + (0x0202u * i1 << 16));
    };
    const __m512i table = _mm512_set_epi32(entry(3, 3), entry(2, 3), entry(1, 3), entry(0, 3),
                                           entry(3, 2), entry(2, 2), entry(1, 2), entry(0, 2),
                                           entry(3, 1), entry(2, 1), entry(1, 1), entry(0, 1),
                                           entry(3, 0), entry(2, 0), entry(1, 0), entry(0, 0));
    for (int64_t g = 0; g < groups;) {
      __m512i bits = _mm512_loadu_si512(meta + g / 8 * kBlock);
      for (const int64_t end = g + 8 < groups ? g + 8 : groups; g < end; ++g) {
        _mm512_storeu_si512(controls + g * kBlock, _mm512_permutexvar_epi32(bits, table));
        bits = _mm512_srli_epi32(bits, 4);
      }
    }
  }
  void load(const uint8_t* values, const uint32_t* controls, int) {
    pairs = _mm512_loadu_si512(values);
    control = _mm512_loadu_si512(controls);
  }
  __m512 multiply(const X* x, __m512 acc) const {
    long long four;
    std::memcpy(&four, x, sizeof four);
    const __m512i picked = _mm512_shuffle_epi8(_mm512_set1_epi64(four), control);
    return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(pairs),
                            reinterpret_cast<__m512bh>(picked));
  }
};

template <class T, DType>
struct DotRow {
  using X = uint16_t;
  static constexpr int kKept = 32;
  __m512i weights, at;

  void load(const uint8_t* values, const uint8_t* meta, int64_t j) {
    weights = _mm512_loadu_si512(values + 2 * j);
    long long bits;
    std::memcpy(&bits, meta + j / 4, sizeof bits);
    const __m512i fields =
        _mm512_multishift_epi64_epi8(_mm512_load_si512(kWords.twice), _mm512_set1_epi64(bits));
    at = _mm512_ternarylogic_epi32(fields, _mm512_set1_epi16(3), _mm512_load_si512(kWords.group),
                                   0xEA);  // (a & b) | c
  }
  struct Near {
    __m512i low, high;
  };
  static Near near(const X* x) { return {_mm512_loadu_si512(x), _mm512_loadu_si512(x + 32)}; }
  __m512 multiply(const Near& x, __m512 acc) const {
    const __m512i picked = _mm512_permutex2var_epi16(x.low, at, x.high);
    return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(weights),
                            reinterpret_cast<__m512bh>(picked));
  }
};

}  // namespace
}  // namespace sparsekern::cpu
