// AVX2, FMA and F16C as the linear_24 kernels want them. Included inside a target region.
#pragma once

#include "convert.h"
#include "kernels.h"

namespace sparsekern::cpu {
namespace {

struct Avx2 {
  using F = __m256;
  using I = __m256i;
  static constexpr int kLanes = 8;
  static constexpr int kTileRows = 9;  // of x: accumulators of a tile, the rest are operands
  static constexpr int kPanelAccumulators = 12;

  static F zero() { return _mm256_setzero_ps(); }
  static F set1(float v) { return _mm256_set1_ps(v); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F v) { _mm256_storeu_ps(p, v); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }

  static I load_int(const void* p) { return _mm256_loadu_si256(static_cast<const I*>(p)); }
  static void store_int(void* p, I v) { _mm256_storeu_si256(static_cast<I*>(p), v); }
  static I set1_int(int v) { return _mm256_set1_epi32(v); }
  static I add_int(I a, I b) { return _mm256_add_epi32(a, b); }
  static I and_int(I a, I b) { return _mm256_and_si256(a, b); }
  static void store_words(uint16_t* p, I v) {
    const I packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(v, v), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }
  static I shift_right(I a, int n) { return _mm256_srl_epi32(a, _mm_cvtsi32_si128(n)); }

  // kLanes elements as fp32.
  template <DType D>
  static F load_as_float(const void* p) {
    if constexpr (D == DType::f32) {
      return _mm256_loadu_ps(static_cast<const float*>(p));
    } else {
      const __m128i half = _mm_loadu_si128(static_cast<const __m128i*>(p));
      if constexpr (D == DType::f16) return _mm256_cvtph_ps(half);
      return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
    }
  }
  // kLanes fp32 rounded to D; the bits of float_to_f16 and float_to_bf16.
  template <DType D>
  static void store_rounded(void* p, F v) {
    if constexpr (D == DType::f32) {
      _mm256_storeu_ps(static_cast<float*>(p), v);
    } else if constexpr (D == DType::f16) {
      _mm_storeu_si128(static_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
    } else {
      const I bits = _mm256_castps_si256(v);
      const I odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
      const I rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
      const I nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
      const I quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
      const I word = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
      store_words(static_cast<uint16_t*>(p), word);
    }
  }

  // Two vectors of pairs of halves, (lo, hi) in each 32-bit lane, as fp32.
  static F low_bf16(I pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
  static F high_bf16(I pairs) {
    return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(0xffff0000)));
  }

  // TILES. A group's four x at the positions that the low two bits of each lane name.
  static constexpr int kTileGroups = 1;  // groups of x that one load brings
  struct Index {};
  static Index first_index() { return {}; }
  static Index next_index(Index) { return {}; }
  static I controls(I bits, Index) { return bits; }  // vpermilps reads no more than two bits
  static I second(I control) { return _mm256_srli_epi32(control, 2); }
  static F pick(const float* x, I positions) {
    return _mm256_permutevar_ps(_mm256_broadcast_ps(reinterpret_cast<const __m128*>(x)), positions);
  }

  // Sixteen rows of sixteen dwords, `stride` bytes apart, to sixteen columns, `pitch` dwords apart.
  static void transpose(const void* rows, int64_t stride, uint32_t* out, int64_t pitch) {
    const auto* in = static_cast<const uint8_t*>(rows);
    for (int down = 0; down < 16; down += 8) {
      for (int across = 0; across < 16; across += 8)
        transpose_8(in + down * stride + across * 4, stride, out + across * pitch + down, pitch);
    }
  }
  static void transpose_8(const uint8_t* in, int64_t stride, uint32_t* out, int64_t pitch) {
    I r[8], t[8];
    for (int i = 0; i < 8; ++i) r[i] = load_int(in + i * stride);
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
      t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
      r[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
      r[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
      r[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
      r[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {  // r[4q + i] holds columns i and i + 4 of rows 4q .. 4q+3
      store_int(out + pitch * i, _mm256_permute2x128_si256(r[i], r[i + 4], 0x20));
      store_int(out + pitch * (i + 4), _mm256_permute2x128_si256(r[i], r[i + 4], 0x31));
    }
  }

  // Sixteen pairs of halves to sixteen first halves, then sixteen second ones.
  static void split_pairs(const uint32_t* pairs, uint16_t* out) {
    const I index = _mm256_broadcastsi128_si256(
        _mm_set_epi8(15, 14, 11, 10, 7, 6, 3, 2, 13, 12, 9, 8, 5, 4, 1, 0));
    const I a = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(load_int(pairs), index), 0xd8);
    const I b = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(load_int(pairs + 8), index), 0xd8);
    store_int(out, _mm256_permute2x128_si256(a, b, 0x20));
    store_int(out + 16, _mm256_permute2x128_si256(a, b, 0x31));
  }

  // ROWS. Eight kept slots name sixteen dense x: lanes 0-3 permute the first eight, lanes 4-7 the
  // second eight.
  static constexpr int kRowsKept = 8;
  static constexpr int kWeightRows = 2;
  static I row_positions(const uint8_t* meta) {
    uint16_t bits;
    std::memcpy(&bits, meta, sizeof bits);
    const I shift = _mm256_set_epi32(14, 12, 10, 8, 6, 4, 2, 0);
    const I field =
        _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(bits), shift), _mm256_set1_epi32(3));
    return _mm256_or_si256(field, _mm256_set_epi32(4, 4, 0, 0, 4, 4, 0, 0));
  }
  struct Near {
    F low, high;
  };
  static Near row_load(const float* x) { return {load(x), load(x + 8)}; }
  static F row_pick(const Near& x, I positions) {
    const F low = _mm256_permutevar8x32_ps(x.low, positions);
    const F high = _mm256_permutevar8x32_ps(x.high, positions);
    return _mm256_blend_ps(low, high, 0xF0);
  }
  static float sum(F v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
};

}  // namespace
}  // namespace sparsekern::cpu
