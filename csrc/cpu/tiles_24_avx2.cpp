// prune_24_transposable with AVX2: 8 tiles at a time (4 in fp64). The search is in tiles_24.h.
#include "target.h"
#if defined(__x86_64__)

#include <immintrin.h>

#include <utility>

#include "format_24.h"
#include "kernels.h"

SPARSEKERN_TARGET_BEGIN("avx2,fma,f16c,bmi,bmi2,popcnt")

#include "tiles_24.h"

namespace sparsekern::cpu {
namespace {

__m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
__m128i load_half(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }

// `kept` lanes of v, a kept zero as +0.0.
template <class T>
__m256i prune(__m256i v, __m256i kept) {
  constexpr auto m = T::kMagnitude;
  const __m256i zero = _mm256_setzero_si256();
  if constexpr (!kIsFloat<T>) return _mm256_and_si256(v, kept);
  __m256i zeros;
  if constexpr (sizeof m == 2) {
    zeros = _mm256_cmpeq_epi16(_mm256_and_si256(v, _mm256_set1_epi16(m)), zero);
  } else if constexpr (sizeof m == 4) {
    zeros = _mm256_cmpeq_epi32(_mm256_and_si256(v, _mm256_set1_epi32(m)), zero);
  } else {
    zeros = _mm256_cmpeq_epi64(_mm256_and_si256(v, _mm256_set1_epi64x(m)), zero);
  }
  return _mm256_andnot_si256(zeros, _mm256_and_si256(v, kept));
}

template <class Score>
struct Avx2Scores;

template <>
struct Avx2Scores<float> {
  using F = __m256;
  using Keep = __m256i;
  static constexpr int kLanes = 8;

  // Magnitudes of 8 elements.
  template <class T>
  static __m256 magnitudes(const typename T::Word* p) {
    __m256i bits;
    if constexpr (std::is_same_v<T, F32>) {
      bits = load(p);
    } else if constexpr (sizeof(typename T::Word) == 2) {
      const __m128i half = load_half(p);
      bits = std::is_same_v<T, BF16> ? _mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16)
                                     : _mm256_castps_si256(_mm256_cvtph_ps(half));
    } else {
      const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
      const __m256i wide = std::is_same_v<T, I8> ? _mm256_abs_epi32(_mm256_cvtepi8_epi32(bytes))
                                                 : _mm256_cvtepu8_epi32(bytes);
      return _mm256_cvtepi32_ps(wide);
    }
    bits = _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff));
    return _mm256_castsi256_ps(_mm256_min_epu32(bits, _mm256_set1_epi32(0x7f800000)));
  }

  // Four by four within 128 bits: tile 2 * q + l goes to lane q of half l.
  template <class T>
  static void columns(const typename T::Word* row, F (&m)[4]) {
    const __m256 a = magnitudes<T>(row), b = magnitudes<T>(row + 8), c = magnitudes<T>(row + 16),
                 d = magnitudes<T>(row + 24);
    const __m256d ab0 = _mm256_castps_pd(_mm256_unpacklo_ps(a, b)),
                  ab2 = _mm256_castps_pd(_mm256_unpackhi_ps(a, b)),
                  cd0 = _mm256_castps_pd(_mm256_unpacklo_ps(c, d)),
                  cd2 = _mm256_castps_pd(_mm256_unpackhi_ps(c, d));
    m[0] = _mm256_castpd_ps(_mm256_unpacklo_pd(ab0, cd0));
    m[1] = _mm256_castpd_ps(_mm256_unpackhi_pd(ab0, cd0));
    m[2] = _mm256_castpd_ps(_mm256_unpacklo_pd(ab2, cd2));
    m[3] = _mm256_castpd_ps(_mm256_unpackhi_pd(ab2, cd2));
  }

  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static Keep keep(int bits) { return _mm256_set1_epi32(bits); }
  // As integers, which order alike where nothing is negative and have more ports.
  static void take(F score, Keep keep, F& best, Keep& best_keep) {
    const __m256i a = _mm256_castps_si256(score), b = _mm256_castps_si256(best);
    best_keep = _mm256_blendv_epi8(best_keep, keep, _mm256_cmpgt_epi32(a, b));
    best = _mm256_castsi256_ps(_mm256_max_epi32(a, b));
  }

  // Ones in the lanes of 8 elements that `keep` keeps.
  template <int row, int q>
  static __m256i lanes(Keep keep) {
    const __m256i bits = _mm256_broadcastsi128_si256(
        _mm_setr_epi32(1 << 4 * row, 2 << 4 * row, 4 << 4 * row, 8 << 4 * row));
    const __m256i own = _mm256_and_si256(_mm256_shuffle_epi32(keep, q * 0x55), bits);
    return _mm256_cmpeq_epi32(own, bits);
  }

  template <class T, int row>
  static void store(const typename T::Word* in, Keep keep, typename T::Word* out) {
    const __m256i a = lanes<row, 0>(keep), b = lanes<row, 1>(keep), c = lanes<row, 2>(keep),
                  d = lanes<row, 3>(keep);
    const auto put = [&](int i, __m256i kept) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), prune<T>(load(in + i), kept));
    };
    if constexpr (sizeof(typename T::Word) == 4) {
      put(0, a), put(8, b), put(16, c), put(24, d);
    } else {
      const __m256i ab = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8),
                    cd = _mm256_permute4x64_epi64(_mm256_packs_epi32(c, d), 0xd8);
      if constexpr (sizeof(typename T::Word) == 2) {
        put(0, ab), put(16, cd);
      } else {
        put(0, _mm256_permute4x64_epi64(_mm256_packs_epi16(ab, cd), 0xd8));
      }
    }
  }
};

template <>
struct Avx2Scores<double> {
  using F = __m256d;
  using Keep = __m256i;
  static constexpr int kLanes = 4;

  static __m256d magnitudes(const uint64_t* p) {
    const __m256i bits = _mm256_and_si256(load(p), _mm256_set1_epi64x(0x7fffffffffffffff));
    const __m256i infinity = _mm256_set1_epi64x(0x7ff0000000000000);
    return _mm256_castsi256_pd(
        _mm256_blendv_epi8(bits, infinity, _mm256_cmpgt_epi64(bits, infinity)));
  }

  // Tile q goes to lane q.
  template <class T>
  static void columns(const uint64_t* row, F (&m)[4]) {
    const __m256d a = magnitudes(row), b = magnitudes(row + 4), c = magnitudes(row + 8),
                  d = magnitudes(row + 12);
    const __m256d ab0 = _mm256_unpacklo_pd(a, b), ab1 = _mm256_unpackhi_pd(a, b),
                  cd0 = _mm256_unpacklo_pd(c, d), cd1 = _mm256_unpackhi_pd(c, d);
    m[0] = _mm256_permute2f128_pd(ab0, cd0, 0x20);
    m[1] = _mm256_permute2f128_pd(ab1, cd1, 0x20);
    m[2] = _mm256_permute2f128_pd(ab0, cd0, 0x31);
    m[3] = _mm256_permute2f128_pd(ab1, cd1, 0x31);
  }

  static F add(F a, F b) { return _mm256_add_pd(a, b); }
  static Keep keep(int bits) { return _mm256_set1_epi64x(bits); }
  static void take(F score, Keep keep, F& best, Keep& best_keep) {
    const __m256d larger = _mm256_cmp_pd(score, best, _CMP_GT_OQ);
    best_keep = _mm256_blendv_epi8(best_keep, keep, _mm256_castpd_si256(larger));
    best = _mm256_max_pd(best, score);
  }

  template <class T, int row>
  static void store(const uint64_t* in, Keep keep, uint64_t* out) {
    const __m256i bits = _mm256_setr_epi64x(1 << 4 * row, 2 << 4 * row, 4 << 4 * row, 8 << 4 * row);
    const auto put = [&](int i, __m256i tile) {
      const __m256i kept = _mm256_cmpeq_epi64(_mm256_and_si256(tile, bits), bits);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), prune<F64>(load(in + i), kept));
    };
    put(0, _mm256_permute4x64_epi64(keep, 0x00)), put(4, _mm256_permute4x64_epi64(keep, 0x55));
    put(8, _mm256_permute4x64_epi64(keep, 0xaa)), put(12, _mm256_permute4x64_epi64(keep, 0xff));
  }
};

}  // namespace

const Tiles24Kernel tiles_24_avx2 = Tiles24<Avx2Scores>::tiles;

}  // namespace sparsekern::cpu

SPARSEKERN_TARGET_END
#endif
