// The gradients of linear_24 with AVX-512 and its bf16 dot products: Cooper Lake, Sapphire Rapids,
// Zen 4 and later. fp32 and fp16 as without; bf16 in pairs, two multiply-adds a lane.
#include "target.h"
#if defined(__x86_64__)

#include <immintrin.h>

#include <cstring>

#include "convert.h"
#include "kernels.h"
#include "scalar_24.h"

SPARSEKERN_TARGET_BEGIN(
    "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi2,avx512bf16,avx2,fma,f16c,bmi,bmi2,popcnt")

#include "linear_24_dvalues.h"
#include "linear_24_dx.h"
#include "linear_24_grad_avx512.h"

namespace sparsekern::cpu {
namespace {

struct Avx512Bf16 : Avx512 {
  static constexpr bool kPairs = true;

  static F dot(F w, F v, F acc) {
    return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(w), reinterpret_cast<__m512bh>(v));
  }

  // Sixteen words from sixteen bf16 of one row and as many of the next.
  static F zip(const uint8_t* low, const uint8_t* high) {
    const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(low));
    const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(high));
    return _mm512_castsi512_ps(
        _mm512_or_si512(_mm512_cvtepu16_epi32(a), _mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16)));
  }

  // 64 columns of two rows; the second row's values may be null: zeros.
  static uint64_t expand_pairs_64(const uint8_t* low, const uint8_t* low_meta, const uint8_t* high,
                                  const uint8_t* high_meta, float* out) {
    // Column c of both rows side by side, c in 0..15 and 16..31.
    const __m512i first =
        _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                         37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    const uint64_t a = kept_bits(low_meta), b = high ? kept_bits(high_meta) : 0;
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const __m512i v = expand_32(low + 32 * i, static_cast<__mmask32>(a >> 32 * i));
      const __m512i w = high ? expand_32(high + 32 * i, static_cast<__mmask32>(b >> 32 * i))
                             : _mm512_setzero_si512();
      _mm512_storeu_si512(out + 32 * i, _mm512_permutex2var_epi16(v, first, w));
      _mm512_storeu_si512(out + 32 * i + 16, _mm512_permutex2var_epi16(v, second, w));
    }
    return a | b;
  }

  static __m512i expand_32(const uint8_t* values, __mmask32 kept) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
    return _mm512_maskz_expand_epi16(kept, _mm512_castsi256_si512(half));
  }

  static void expand_pairs(const uint8_t* low, const uint8_t* low_meta, const uint8_t* high,
                           const uint8_t* high_meta, int64_t k, int64_t count, float* out,
                           uint64_t* kept) {
    low += k, low_meta += k / 8;
    if (high) high += k, high_meta += k / 8;
    for (int64_t c = 0; c + 64 <= count; c += 64) {
      *kept++ = expand_pairs_64(low + c, low_meta + c / 8, high ? high + c : nullptr,
                                high ? high_meta + c / 8 : nullptr, out + c);
    }
    const int64_t rest = count % 64, c = count - rest;
    if (rest == 0) return;
    uint8_t some[2][64] = {}, some_meta[2][8] = {};
    float words[64];
    std::memcpy(some[0], low + c, rest);
    std::memcpy(some_meta[0], low_meta + c / 8, ceil_div(rest, 8));
    if (high) {
      std::memcpy(some[1], high + c, rest);
      std::memcpy(some_meta[1], high_meta + c / 8, ceil_div(rest, 8));
    }
    *kept = expand_pairs_64(some[0], some_meta[0], high ? some[1] : nullptr, some_meta[1], words) &
            ((uint64_t{1} << rest) - 1);
    std::memcpy(out + c, words, sizeof(float) * rest);
  }
};

}  // namespace

const Gradient24Kernels linear_24_grad_avx512_bf16 = {
    GradientPack<Avx512Bf16>::pack,
    DxRows<Avx512Bf16>::run,
    DxPanels<Avx512Bf16>::run,
    DvaluesRows<Avx512Bf16>::run,
    DvaluesPanels<Avx512Bf16>::run,
    16,
    16,
    Avx512Bf16::kLanes,
    Avx512Bf16::kLanes * Avx512Bf16::kMaxWidth,
    Avx512Bf16::kPairs,
};

}  // namespace sparsekern::cpu

SPARSEKERN_TARGET_END
#endif
