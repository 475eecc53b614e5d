// AVX-512 as the linear_24 kernels want it. Included inside a target region.
#pragma once

#include "convert.h"
#include "kernels.h"

namespace sparsekern::cpu {
namespace {

struct Avx512 {
  using F = __m512;
  using I = __m512i;
  static constexpr int kLanes = 16;
  static constexpr int kTileRows = 24;  // of x: accumulators of a tile, the rest are operands
  static constexpr int kPanelAccumulators = 28;

  static F zero() { return _mm512_setzero_ps(); }
  static F set1(float v) { return _mm512_set1_ps(v); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }

  static I load_int(const void* p) { return _mm512_loadu_si512(p); }
  static void store_int(void* p, I v) { _mm512_storeu_si512(p, v); }
  static I set1_int(int v) { return _mm512_set1_epi32(v); }
  static I add_int(I a, I b) { return _mm512_add_epi32(a, b); }
  static I and_int(I a, I b) { return _mm512_and_si512(a, b); }
  static void store_words(uint16_t* p, I v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(v));
  }
  static I shift_right(I a, int n) { return _mm512_srl_epi32(a, _mm_cvtsi32_si128(n)); }

  // kLanes elements as fp32.
  template <DType D>
  static F load_as_float(const void* p) {
    if constexpr (D == DType::f32) {
      return _mm512_loadu_ps(p);
    } else {
      const __m256i half = _mm256_loadu_si256(static_cast<const __m256i*>(p));
      if constexpr (D == DType::f16) return _mm512_cvtph_ps(half);
      return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    }
  }
  // kLanes fp32 rounded to D; the bits of float_to_f16 and float_to_bf16.
  template <DType D>
  static void store_rounded(void* p, F v) {
    if constexpr (D == DType::f32) {
      _mm512_storeu_ps(p, v);
    } else if constexpr (D == DType::f16) {
      _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
    } else {
      // Integer rounding: vcvtneps2bf16 would flush denormals.
      const I bits = _mm512_castps_si512(v);
      const I odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
      const I rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
      const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
      const I quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
      const I word = _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16);
      _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtepi32_epi16(word));
    }
  }

  // Two vectors of pairs of halves, (lo, hi) in each 32-bit lane, as fp32.
  static F low_bf16(I pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
  static F high_bf16(I pairs) {
    return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(0xffff0000)));
  }

  // TILES. A group's four x, of the sixteen that `x` holds from the group's own quarter on, at the
  // positions that the low two bits of each lane name. Straight from memory: on Zen 5 a broadcast of
  // 128 bits costs a shuffle, which is what these kernels are short of.
  static constexpr int kTileGroups = 4;  // groups of x that one load brings
  using Index = I;
  static Index first_index() { return _mm512_setzero_si512(); }
  static Index next_index(Index quarter) {
    return _mm512_and_si512(_mm512_add_epi32(quarter, _mm512_set1_epi32(4)), _mm512_set1_epi32(15));
  }
  // Where the first kept of a group is in the low four bits, where the second in the next four.
  static I controls(I bits, Index quarter) {
    const I first = _mm512_ternarylogic_epi32(bits, _mm512_set1_epi32(3), quarter, 0xEA);
    const I second =
        _mm512_ternarylogic_epi32(_mm512_srli_epi32(bits, 2), _mm512_set1_epi32(3), quarter, 0xEA);
    return _mm512_or_si512(first, _mm512_slli_epi32(second, 4));
  }
  static I second(I control) { return _mm512_srli_epi32(control, 4); }
  static F pick(const float* x, I positions) {
    return _mm512_permutexvar_ps(positions, _mm512_loadu_ps(x));
  }

  // Sixteen rows of sixteen dwords, `stride` bytes apart, to sixteen columns, `pitch` dwords apart.
  static void transpose(const void* rows, int64_t stride, uint32_t* out, int64_t pitch) {
    const auto* in = static_cast<const uint8_t*>(rows);
    I r[16], t[16];
    for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(in + i * stride);
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
      t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
      r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
      r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
      r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
      r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {  // r[4q + i] holds columns i, i+4, i+8, i+12 of rows 4q .. 4q+3
      const I a = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
      const I b = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
      const I c = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
      const I d = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
      store_int(out + pitch * i, _mm512_shuffle_i32x4(a, b, 0x88));
      store_int(out + pitch * (i + 8), _mm512_shuffle_i32x4(a, b, 0xdd));
      store_int(out + pitch * (i + 4), _mm512_shuffle_i32x4(c, d, 0x88));
      store_int(out + pitch * (i + 12), _mm512_shuffle_i32x4(c, d, 0xdd));
    }
  }

  // Sixteen pairs of halves to sixteen first halves, then sixteen second ones.
  static void split_pairs(const uint32_t* pairs, uint16_t* out) {
    const I index = _mm512_set_epi16(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1, 30,
                                     28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    store_int(out, _mm512_permutexvar_epi16(index, load_int(pairs)));
  }

  // ROWS. Sixteen kept slots name 32 dense x: ((meta >> 2 * lane) & 3) | (lane / 2 * 4).
  static constexpr int kRowsKept = 16;
  static constexpr int kWeightRows = 4;
  static I row_positions(const uint8_t* meta) {
    const I shift = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const I group = _mm512_set_epi32(28, 28, 24, 24, 20, 20, 16, 16, 12, 12, 8, 8, 4, 4, 0, 0);
    uint32_t bits;
    std::memcpy(&bits, meta, sizeof bits);
    const I field = _mm512_srlv_epi32(_mm512_set1_epi32(static_cast<int>(bits)), shift);
    return _mm512_ternarylogic_epi32(field, _mm512_set1_epi32(3), group, 0xEA);
  }
  struct Near {
    F low, high;
  };
  static Near row_load(const float* x) { return {load(x), load(x + 16)}; }
  static F row_pick(const Near& x, I positions) {
    return _mm512_permutex2var_ps(x.low, positions, x.high);
  }
  static float sum(F v) { return _mm512_reduce_add_ps(v); }
};

}  // namespace
}  // namespace sparsekern::cpu
