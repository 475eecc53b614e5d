// The gradients of linear_24 with AVX2, FMA, F16C and BMI.
#include "target.h"
#if defined(__x86_64__)

#include <immintrin.h>

#include <cstring>

#include "convert.h"
#include "kernels.h"
#include "scalar_24.h"

SPARSEKERN_TARGET_BEGIN("avx2,fma,f16c,bmi,bmi2,popcnt")

#include "linear_24_dvalues.h"
#include "linear_24_dx.h"

namespace sparsekern::cpu {
namespace {

struct Avx2 {
  using F = __m256;
  static constexpr int kLanes = 8, kLevels = 3, kMaxWidth = 8, kSums = 10;
  static constexpr bool kPairs = false, kExpandsInRegisters = false;

  static F zero() { return _mm256_setzero_ps(); }
  static F set1(float v) { return _mm256_set1_ps(v); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F v) { _mm256_storeu_ps(p, v); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }

  template <DType D>
  static F load_values(const uint8_t* values, int64_t i) {
    if constexpr (D == DType::f32) {
      return _mm256_loadu_ps(reinterpret_cast<const float*>(values) + i);
    } else {
      const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values + i * 2));
      if constexpr (D == DType::f16) return _mm256_cvtph_ps(half);
      return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
    }
  }

  static void transpose(F* v) {
    F t[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
      t[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
    }
    // u[4q + c]: in 128-bit lane l, column 4l + c of rows 4q .. 4q+3.
    F u[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i += 4) {
#pragma GCC unroll 8
      for (int h = 0; h < 2; ++h) {
        const __m256d a = _mm256_castps_pd(t[i + h]), b = _mm256_castps_pd(t[i + h + 2]);
        u[i + 2 * h] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
        u[i + 2 * h + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
      }
    }
#pragma GCC unroll 8
    for (int c = 0; c < 4; ++c) {
      v[c] = _mm256_permute2f128_ps(u[c], u[4 + c], 0x20);
      v[4 + c] = _mm256_permute2f128_ps(u[c], u[4 + c], 0x31);
    }
  }

  // Three levels put the sum of eight slots' lanes in slot order.
  template <int Level>
  static F fold(F a, F b) {
    if constexpr (Level == 1) return add(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    if constexpr (Level == 2) {
      const __m256d p = _mm256_castps_pd(a), q = _mm256_castps_pd(b);
      return add(_mm256_castpd_ps(_mm256_unpacklo_pd(p, q)),
                 _mm256_castpd_ps(_mm256_unpackhi_pd(p, q)));
    }
    return add(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
  }

  static void narrow(F v, void* out, int64_t at, DType dtype) {
    if (dtype == DType::f32) return store(static_cast<float*>(out) + at, v);
    auto* half = reinterpret_cast<__m128i*>(static_cast<uint16_t*>(out) + at);
    if (dtype == DType::f16) {
      return _mm_storeu_si128(half, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
    }
    const __m256i bits = _mm256_castps_si256(v), high = _mm256_srli_epi32(bits, 16);
    const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i nan = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i rounded = _mm256_blendv_epi8(_mm256_srli_epi32(up, 16), nan, is_nan);
    _mm_storeu_si128(half, _mm_packus_epi32(_mm256_castsi256_si128(rounded),
                                            _mm256_extracti128_si256(rounded, 1)));
  }

  // ---- dx: kept weights to dense words ----

  // Per nibble: the bits of the columns it keeps, and for each column the slot it takes, or 0x80.
  static constexpr uint8_t kKept[16] = {1, 3, 5, 9, 3, 2, 6, 10, 5, 6, 4, 12, 9, 10, 12, 8};
  static constexpr uint32_t kSlot[16] = {0x80808000, 0x80800001, 0x80008001, 0x00808001,
                                         0x80800100, 0x80800080, 0x80000180, 0x00800180,
                                         0x80018000, 0x80010080, 0x80008080, 0x00018080,
                                         0x01808000, 0x01800080, 0x01008080, 0x00808080};

  // Bit b of 64 bytes is bits 0..63 of out[b].
  static void turn_bits(const uint8_t* bytes, uint64_t* out) {
    __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes));
    __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes) + 1);
    for (int b = 7; b >= 0; --b) {
      out[b] = static_cast<uint32_t>(_mm256_movemask_epi8(low)) |
               uint64_t{static_cast<uint32_t>(_mm256_movemask_epi8(high))} << 32;
      low = _mm256_add_epi8(low, low), high = _mm256_add_epi8(high, high);
    }
  }

  // Eight columns: one byte of meta, four values.
  template <DType D>
  static void expand_8(const uint8_t* values, uint8_t meta, float* out) {
    __m128 four;
    if constexpr (D == DType::f32) {
      four = _mm_loadu_ps(reinterpret_cast<const float*>(values));
    } else {
      const __m128i half = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(values));
      if constexpr (D == DType::f16) {
        four = _mm_cvtph_ps(half);
      } else {
        four = _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(half), 16));
      }
    }
    const uint64_t slots = kSlot[meta & 15] | uint64_t{kSlot[meta >> 4] | 0x02020202u} << 32;
    const __m256i slot = _mm256_cvtepi8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(slots)));
    const __m256i all =
        _mm256_castps_si256(_mm256_permutevar8x32_ps(_mm256_castps128_ps256(four), slot));
    const __m256i dropped = _mm256_srai_epi32(slot, 31);
    store(out, _mm256_castsi256_ps(_mm256_andnot_si256(dropped, all)));
  }

  template <DType D>
  static void expand(const uint8_t* values, const uint8_t* meta, int64_t k, int64_t count,
                     float* out, uint64_t* kept) {
    constexpr int kSize = D == DType::f32 ? 4 : 2;
    values += k / 2 * kSize, meta += k / 8;
    for (int64_t c = 0; c < count; c += 8, values += 4 * kSize, ++meta) {
      uint64_t bits = kKept[*meta & 15];
      if (count - c >= 8) {
        expand_8<D>(values, *meta, out + c);
        bits |= uint64_t{kKept[*meta >> 4]} << 4;
      } else {
        uint8_t some_values[4 * kSize] = {};
        float some[8];
        std::memcpy(some_values, values, 2 * kSize);
        expand_8<D>(some_values, *meta, some);
        std::memcpy(out + c, some, sizeof(float) * 4);
      }
      kept[c / 64] = (c % 64 ? kept[c / 64] : 0) | bits << c % 64;
    }
  }

  // ---- dvalues: the x that eight kept slots from j name, of `slots` in the row ----

  static __m256i fields(const uint8_t* meta, int64_t j, int64_t slots) {
    const int bits = meta[j / 4] | (j + 4 < slots ? meta[j / 4 + 1] << 8 : 0);
    const __m256i shift = _mm256_set_epi32(14, 12, 10, 8, 6, 4, 2, 0);
    return _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(bits), shift),
                            _mm256_set1_epi32(3));
  }

  // Lanes 0-3 point into the first eight x, lanes 4-7 into the second eight.
  static __m256i index(const uint8_t* meta, int64_t j, int64_t slots) {
    return _mm256_or_si256(fields(meta, j, slots), _mm256_set_epi32(4, 4, 0, 0, 4, 4, 0, 0));
  }

  static F pick(const float* x, __m256i index) {
    const F low = _mm256_permutevar8x32_ps(load(x), index);
    const F high = _mm256_permutevar8x32_ps(load(x + 8), index);
    return _mm256_blend_ps(low, high, 0xF0);
  }

  static void store_positions(int32_t* position, const uint8_t* meta, int64_t j, int64_t slots) {
    const __m256i group = _mm256_set_epi32(12, 12, 8, 8, 4, 4, 0, 0);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(position),
                        _mm256_or_si256(fields(meta, j, slots), group));
  }
};

}  // namespace

const Gradient24Kernels linear_24_grad_avx2 = {
    GradientPack<Avx2>::pack,
    DxRows<Avx2>::run,
    DxPanels<Avx2>::run,
    DvaluesRows<Avx2>::run,
    DvaluesPanels<Avx2>::run,
    8,
    16,
    Avx2::kLanes,
    Avx2::kLanes * Avx2::kMaxWidth,
    Avx2::kPairs,
};

}  // namespace sparsekern::cpu

SPARSEKERN_TARGET_END
#endif
