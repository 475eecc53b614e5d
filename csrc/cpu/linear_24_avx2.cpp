// linear_24 with AVX2, FMA, F16C and BMI: every x86-64 server since Haswell and Zen.
#include "target.h"
#if defined(__x86_64__)

#include <immintrin.h>

#include <cstring>

#include "convert.h"
#include "kernels.h"
#include "scalar_24.h"

SPARSEKERN_TARGET_BEGIN("avx2,fma,f16c,bmi,bmi2,popcnt")

#include "linear_24.h"

namespace sparsekern::cpu {
namespace {

struct Avx2 {
  using F = __m256;
  static constexpr int kLanes = 8, kMaxWidth = 4, kDepth = 96;

  static F zero() { return _mm256_setzero_ps(); }
  static F set1(float v) { return _mm256_set1_ps(v); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F v) { _mm256_storeu_ps(p, v); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }

  template <DType D>
  static F load_values(const uint8_t* values, int64_t j) {
    if constexpr (D == DType::f32) {
      return _mm256_loadu_ps(reinterpret_cast<const float*>(values) + j);
    } else {
      const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values + j * 2));
      if constexpr (D == DType::f16) return _mm256_cvtph_ps(half);
      return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
    }
  }

  // The two-bit fields of eight kept slots.
  static __m256i fields(const uint8_t* meta, int64_t j) {
    uint16_t bits;
    std::memcpy(&bits, meta + j / 4, sizeof bits);
    const __m256i shift = _mm256_set_epi32(14, 12, 10, 8, 6, 4, 2, 0);
    return _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(bits), shift),
                            _mm256_set1_epi32(3));
  }

  template <DType D>
  static void decode_typed(const uint8_t* values, const uint8_t* meta, int64_t first, int kept,
                           float* w, int32_t* position) {
    const __m256i group = _mm256_set_epi32(12, 12, 8, 8, 4, 4, 0, 0);
    int j = 0;
    for (; j + 8 <= kept; j += 8) {
      store(w + j, load_values<D>(values, first + j));
      const __m256i at = _mm256_add_epi32(group, _mm256_set1_epi32(2 * j));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(position + j),
                          _mm256_add_epi32(fields(meta, first + j), at));
    }
    decode_scalar(values, meta, first, j, kept, D, w, position);
  }

  static void decode(const uint8_t* values, const uint8_t* meta, int64_t first, int kept,
                     DType dtype, float* w, int32_t* position) {
    if (dtype == DType::f32)
      return decode_typed<DType::f32>(values, meta, first, kept, w, position);
    if (dtype == DType::f16)
      return decode_typed<DType::f16>(values, meta, first, kept, w, position);
    decode_typed<DType::bf16>(values, meta, first, kept, w, position);
  }

  static void narrow(const float* in, void* out, int64_t at, int count, DType dtype) {
    int i = 0;
    if (dtype == DType::f32) {
      std::memcpy(static_cast<float*>(out) + at, in, sizeof(float) * count);
      return;
    }
    if (dtype == DType::f16) {
      for (; i + 8 <= count; i += 8) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(static_cast<uint16_t*>(out) + at + i),
                         _mm256_cvtps_ph(load(in + i), _MM_FROUND_TO_NEAREST_INT));
      }
    }
    for (; i < count; ++i) store_float(out, at + i, in[i], dtype);
  }

  // Eight kept slots name sixteen dense x: lanes 0-3 permute the first eight, lanes 4-7 the second
  // eight.
  template <int R, DType D>
  static void dot_rows_typed(const uint8_t* values, const uint8_t* meta, const float* x, int64_t K,
                             float* sums) {
    const __m256i group = _mm256_set_epi32(4, 4, 0, 0, 4, 4, 0, 0);
    F even[R], odd[R];
    for (int r = 0; r < R; ++r) even[r] = odd[r] = zero();
    const auto step = [&](int64_t k, F* acc) __attribute__((always_inline)) {
      const F w = load_values<D>(values, k / 2);
      const __m256i index = _mm256_or_si256(fields(meta, k / 2), group);
      for (int r = 0; r < R; ++r) {
        const float* at = x + r * K + k;
        const F low = _mm256_permutevar8x32_ps(load(at), index);
        const F high = _mm256_permutevar8x32_ps(load(at + 8), index);
        acc[r] = fma(w, _mm256_blend_ps(low, high, 0xF0), acc[r]);
      }
    };
    int64_t k = 0;
    for (; k + 32 <= K; k += 32) {
      step(k, even);
      step(k + 16, odd);
    }
    if (k + 16 <= K) step(k, even), k += 16;
    dot_rows_scalar<R>(values, meta, x, k, K, K, D, sums);
    for (int r = 0; r < R; ++r) {
      const F all = add(even[r], odd[r]);
      __m128 s = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
      s = _mm_add_ps(s, _mm_movehl_ps(s, s));
      s = _mm_add_ss(s, _mm_movehdup_ps(s));
      sums[r] += _mm_cvtss_f32(s);
    }
  }

  template <int R>
  static void dot_rows(const uint8_t* values, const uint8_t* meta, const float* x, int64_t K,
                       DType dtype, float* sums) {
    if (dtype == DType::f32) return dot_rows_typed<R, DType::f32>(values, meta, x, K, sums);
    if (dtype == DType::f16) return dot_rows_typed<R, DType::f16>(values, meta, x, K, sums);
    dot_rows_typed<R, DType::bf16>(values, meta, x, K, sums);
  }
};

}  // namespace

const Linear24Kernels linear_24_avx2 = {
    LinearRows<Avx2>::run, LinearPanels<Avx2>::run, 5, Avx2::kMaxWidth * Avx2::kLanes, Avx2::kLanes,
};

}  // namespace sparsekern::cpu

SPARSEKERN_TARGET_END
#endif
