// The vectors of the gradients with AVX-512. Included inside a target region, after the standard
// headers; the unnamed namespace keeps each tier's copy its own.
#pragma once

#include "linear_24_grad.h"

namespace sparsekern::cpu {
namespace {

struct Avx512 {
  using F = __m512;
  static constexpr int kLanes = 16, kLevels = 4, kMaxWidth = 16, kSums = 16;
  static constexpr bool kPairs = false, kExpandsInRegisters = true;

  static F zero() { return _mm512_setzero_ps(); }
  static F set1(float v) { return _mm512_set1_ps(v); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }

  template <DType D>
  static F load_values(const uint8_t* values, int64_t i) {
    if constexpr (D == DType::f32) {
      return _mm512_loadu_ps(values + i * 4);
    } else {
      const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + i * 2));
      if constexpr (D == DType::f16) return _mm512_cvtph_ps(half);
      return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    }
  }

  static void transpose(F* v) {
    F t[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
      t[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 4) {
#pragma GCC unroll 16
      for (int h = 0; h < 2; ++h) {
        const __m512d a = _mm512_castps_pd(t[i + h]), b = _mm512_castps_pd(t[i + h + 2]);
        v[i + 2 * h] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
        v[i + 2 * h + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
      }
    }
    // v[4q + c]: in 128-bit lane l, column 4l + c of rows 4q .. 4q+3.
#pragma GCC unroll 16
    for (int c = 0; c < 4; ++c) {
      const F even01 = _mm512_shuffle_f32x4(v[c], v[4 + c], 0x88);
      const F odd01 = _mm512_shuffle_f32x4(v[c], v[4 + c], 0xdd);
      const F even23 = _mm512_shuffle_f32x4(v[8 + c], v[12 + c], 0x88);
      const F odd23 = _mm512_shuffle_f32x4(v[8 + c], v[12 + c], 0xdd);
      t[c] = _mm512_shuffle_f32x4(even01, even23, 0x88);
      t[4 + c] = _mm512_shuffle_f32x4(odd01, odd23, 0x88);
      t[8 + c] = _mm512_shuffle_f32x4(even01, even23, 0xdd);
      t[12 + c] = _mm512_shuffle_f32x4(odd01, odd23, 0xdd);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) v[i] = t[i];
  }

  // Four levels put the sum of sixteen slots' lanes in slot order.
  template <int Level>
  static F fold(F a, F b) {
    if constexpr (Level == 1) return add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    if constexpr (Level == 2) {
      const __m512d p = _mm512_castps_pd(a), q = _mm512_castps_pd(b);
      return add(_mm512_castpd_ps(_mm512_unpacklo_pd(p, q)),
                 _mm512_castpd_ps(_mm512_unpackhi_pd(p, q)));
    }
    return add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  }

  static void narrow(F v, void* out, int64_t at, DType dtype) {
    if (dtype == DType::f32) return store(static_cast<float*>(out) + at, v);
    auto* half = reinterpret_cast<__m256i*>(static_cast<uint16_t*>(out) + at);
    if (dtype == DType::f16) {
      return _mm256_storeu_si256(half, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
    }
    const __m512i bits = _mm512_castps_si512(v), high = _mm512_srli_epi32(bits, 16);
    const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __m512i nan = _mm512_or_si512(high, _mm512_set1_epi32(0x40));
    const __m512i rounded = _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q),
                                                    _mm512_srli_epi32(up, 16), nan);
    _mm256_storeu_si256(half, _mm512_cvtepi32_epi16(rounded));
  }

  // ---- dx: kept weights to dense words ----

  // Eight bytes of meta to 64 bits: which columns are kept. A nibble's two positions are two bits.
  static uint64_t kept_bits(const uint8_t* meta) {
    const __m128i table = _mm_setr_epi8(1, 3, 5, 9, 3, 2, 6, 10, 5, 6, 4, 12, 9, 10, 12, 8);
    const __m128i table_high =
        _mm_setr_epi8(0x10, 0x30, 0x50, char(0x90), 0x30, 0x20, 0x60, char(0xa0), 0x50, 0x60, 0x40,
                      char(0xc0), char(0x90), char(0xa0), char(0xc0), char(0x80));
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(meta));
    const __m128i nibble = _mm_set1_epi8(15);
    const __m128i low = _mm_shuffle_epi8(table, _mm_and_si128(bytes, nibble));
    const __m128i high =
        _mm_shuffle_epi8(table_high, _mm_and_si128(_mm_srli_epi16(bytes, 4), nibble));
    return static_cast<uint64_t>(_mm_cvtsi128_si64(_mm_or_si128(low, high)));
  }

  // Bit b of 64 bytes is bits 0..63 of out[b].
  static void turn_bits(const uint8_t* bytes, uint64_t* out) {
    const __m512i all = _mm512_loadu_si512(bytes);
#pragma GCC unroll 8
    for (int b = 0; b < 8; ++b) {
      out[b] = _mm512_test_epi8_mask(all, _mm512_set1_epi8(static_cast<char>(1 << b)));
    }
  }

  // 64 columns, as four vectors.
  template <DType D>
  static uint64_t expand_64(const uint8_t* values, const uint8_t* meta, F* out) {
    const uint64_t kept = kept_bits(meta);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      __m256 eight;
      if constexpr (D == DType::f32) {
        eight = _mm256_loadu_ps(reinterpret_cast<const float*>(values) + 8 * i);
      } else {
        const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values) + i);
        if constexpr (D == DType::f16) {
          eight = _mm256_cvtph_ps(half);
        } else {
          eight = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
        }
      }
      const auto mask = static_cast<__mmask16>(kept >> 16 * i);
      out[i] = _mm512_maskz_expand_ps(mask, _mm512_castps256_ps512(eight));
    }
    return kept;
  }

  template <DType D>
  static void expand(const uint8_t* values, const uint8_t* meta, int64_t k, int64_t count,
                     float* out, uint64_t* kept) {
    constexpr int kSize = D == DType::f32 ? 4 : 2;
    values += k / 2 * kSize, meta += k / 8;
    for (; count >= 64; count -= 64, values += 32 * kSize, meta += 8, out += 64) {
      F words[4];
      *kept++ = expand_64<D>(values, meta, words);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) store(out + 16 * i, words[i]);
    }
    if (count == 0) return;
    uint8_t some_values[32 * kSize] = {}, some_meta[8] = {};
    F some[4];
    std::memcpy(some_values, values, count / 2 * kSize);
    std::memcpy(some_meta, meta, ceil_div(count, 8));
    *kept = expand_64<D>(some_values, some_meta, some) & ((uint64_t{1} << count) - 1);
    std::memcpy(out, some, sizeof(float) * count);
  }

  // ---- dvalues: the x that sixteen kept slots from j name, of `slots` in the row ----

  static __m512i index(const uint8_t* meta, int64_t j, int64_t slots) {
    const __m512i shift =
        _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i group =
        _mm512_set_epi32(28, 28, 24, 24, 20, 20, 16, 16, 12, 12, 8, 8, 4, 4, 0, 0);
    uint32_t bits = 0;
    if (j + 16 <= slots) {
      std::memcpy(&bits, meta + j / 4, sizeof bits);
    } else {
      std::memcpy(&bits, meta + j / 4, ceil_div(slots - j, 4));
    }
    const __m512i field = _mm512_srlv_epi32(_mm512_set1_epi32(static_cast<int>(bits)), shift);
    return _mm512_or_si512(_mm512_and_si512(field, _mm512_set1_epi32(3)), group);
  }

  static F pick(const float* x, __m512i index) {
    return _mm512_permutex2var_ps(load(x), index, load(x + 16));
  }

  static void store_positions(int32_t* position, const uint8_t* meta, int64_t j, int64_t slots) {
    _mm512_storeu_si512(position, index(meta, j, slots));
  }
};

}  // namespace
}  // namespace sparsekern::cpu
