// linear_24 with AVX-512 F, BW, DQ, VL and VBMI2: Ice Lake, Sapphire Rapids, Zen 4 and later.
#include "target.h"
#if defined(__x86_64__)

#include <immintrin.h>

#include <cstring>

#include "convert.h"
#include "kernels.h"
#include "scalar_24.h"

SPARSEKERN_TARGET_BEGIN(
    "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi2,avx2,fma,f16c,bmi,bmi2,popcnt")

#include "linear_24.h"

namespace sparsekern::cpu {
namespace {

struct Avx512 {
  using F = __m512;
  static constexpr int kLanes = 16, kMaxWidth = 8, kDepth = 48;

  static F zero() { return _mm512_setzero_ps(); }
  static F set1(float v) { return _mm512_set1_ps(v); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }

  // Sixteen kept weights of a row from slot j, as fp32.
  template <DType D>
  static F load_values(const uint8_t* values, int64_t j) {
    if constexpr (D == DType::f32) {
      return _mm512_loadu_ps(values + j * 4);
    } else {
      const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + j * 2));
      if constexpr (D == DType::f16) return _mm512_cvtph_ps(half);
      return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    }
  }

  // Where sixteen kept slots point within their 32 dense elements: ((meta >> 2 * lane) & 3) | (lane
  // / 2 * 4).
  static __m512i positions(const uint8_t* meta, int64_t j) {
    const __m512i shift =
        _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i group =
        _mm512_set_epi32(28, 28, 24, 24, 20, 20, 16, 16, 12, 12, 8, 8, 4, 4, 0, 0);
    uint32_t bits;
    std::memcpy(&bits, meta + j / 4, sizeof bits);
    const __m512i field = _mm512_srlv_epi32(_mm512_set1_epi32(static_cast<int>(bits)), shift);
    return _mm512_ternarylogic_epi32(field, _mm512_set1_epi32(3), group, 0xEA);  // (a & b) | c
  }

  template <DType D>
  static void decode_typed(const uint8_t* values, const uint8_t* meta, int64_t first, int kept,
                           float* w, int32_t* position) {
    int j = 0;
    for (; j + 16 <= kept; j += 16) {
      _mm512_storeu_ps(w + j, load_values<D>(values, first + j));
      _mm512_storeu_si512(position + j,
                          _mm512_add_epi32(positions(meta, first + j), _mm512_set1_epi32(2 * j)));
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
      for (; i + 16 <= count; i += 16) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(static_cast<uint16_t*>(out) + at + i),
                            _mm512_cvtps_ph(load(in + i), _MM_FROUND_TO_NEAREST_INT));
      }
    }
    for (; i < count; ++i) store_float(out, at + i, in[i], dtype);
  }

  template <int R, DType D>
  static void dot_rows_typed(const uint8_t* values, const uint8_t* meta, const float* x, int64_t K,
                             float* sums) {
    F even[R], odd[R];
    for (int r = 0; r < R; ++r) even[r] = odd[r] = zero();
    const auto step = [&](int64_t k, F* acc) __attribute__((always_inline)) {
      const F w = load_values<D>(values, k / 2);
      const __m512i index = positions(meta, k / 2);
      for (int r = 0; r < R; ++r) {
        const float* at = x + r * K + k;
        acc[r] = fma(w, _mm512_permutex2var_ps(load(at), index, load(at + 16)), acc[r]);
      }
    };
    int64_t k = 0;
    for (; k + 64 <= K; k += 64) {
      step(k, even);
      step(k + 32, odd);
    }
    if (k + 32 <= K) step(k, even), k += 32;
    dot_rows_scalar<R>(values, meta, x, k, K, K, D, sums);
    for (int r = 0; r < R; ++r) sums[r] += _mm512_reduce_add_ps(add(even[r], odd[r]));
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

const Linear24Kernels linear_24_avx512 = {
    LinearRows<Avx512>::run, LinearPanels<Avx512>::run, 11, Avx512::kMaxWidth * Avx512::kLanes,
    Avx512::kLanes,
};

}  // namespace sparsekern::cpu

SPARSEKERN_TARGET_END
#endif
