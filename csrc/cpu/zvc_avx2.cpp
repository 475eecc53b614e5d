// zvc with AVX2, which has no compress: a table gives, for each mask of eight (or four) lanes, the
// shuffle that moves the marked lanes together, and the inverse table spreads them.
#include "target.h"
#if defined(__x86_64__)

#include <immintrin.h>

#include <cstring>

#include "kernels.h"

namespace sparsekern::cpu {
namespace {

// For each 8-bit mask: gather[i] is the lane of the i-th marked element; spread[i] the rank of lane
// i, 0x80 if unmarked (pshufb writes a zero for it).
struct Shuffles {
  uint8_t gather[256][8];
  uint8_t spread[256][8];
};

constexpr Shuffles make_shuffles() {
  Shuffles s{};
  for (int mask = 0; mask < 256; ++mask) {
    int rank = 0;
    for (int lane = 0; lane < 8; ++lane) {
      if (mask >> lane & 1) {
        s.gather[mask][rank] = static_cast<uint8_t>(lane);
        s.spread[mask][lane] = static_cast<uint8_t>(rank++);
      } else {
        s.spread[mask][lane] = 0x80;
      }
    }
  }
  return s;
}
constexpr Shuffles kShuffles = make_shuffles();

}  // namespace
}  // namespace sparsekern::cpu

SPARSEKERN_TARGET_BEGIN("avx2,fma,f16c,bmi,bmi2,popcnt")

#include "zvc.h"

namespace sparsekern::cpu {
namespace {

// Eight elements a step for every size, so that one byte of mask is one table row.
template <class Word>
struct Avx2Zvc {
  static constexpr int kLanes = 8;

  static __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static void store(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
  static __m128i load_row(const uint8_t* row) {
    return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(row));
  }

  static uint64_t nonzero(const Word* x) {
    const __m256i zero = _mm256_setzero_si256();
    int zeros;
    if constexpr (sizeof(Word) == 1) {
      const __m128i v = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(x));
      zeros = _mm_movemask_epi8(_mm_cmpeq_epi8(v, _mm_setzero_si128()));
    } else if constexpr (sizeof(Word) == 2) {
      const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
      const __m128i equal = _mm_cmpeq_epi16(v, _mm_setzero_si128());
      zeros = _mm_movemask_epi8(_mm_packs_epi16(equal, equal));
    } else if constexpr (sizeof(Word) == 4) {
      zeros = _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(load(x), zero)));
    } else {
      zeros = _mm256_movemask_pd(_mm256_castsi256_pd(_mm256_cmpeq_epi64(load(x), zero))) |
              _mm256_movemask_pd(_mm256_castsi256_pd(_mm256_cmpeq_epi64(load(x + 4), zero))) << 4;
    }
    return ~static_cast<unsigned>(zeros) & 0xffu;
  }

  // Byte shuffle of eight 16-bit lanes from a row of lane numbers (0x80 stays a zeroing index).
  static __m128i pairs(__m128i row) {
    const __m128i twice = _mm_unpacklo_epi8(row, row);
    const __m128i low = _mm_add_epi8(twice, twice);  // 0x80 doubles to 0: restore it below
    const __m128i index = _mm_add_epi8(low, _mm_set1_epi16(0x0100));
    return _mm_or_si128(index, _mm_and_si128(twice, _mm_set1_epi8(static_cast<char>(0x80))));
  }

  static void compress(const Word* x, uint64_t bits, Word* out) {
    const __m128i row = load_row(kShuffles.gather[bits]);
    if constexpr (sizeof(Word) == 1) {
      const __m128i v = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(x));
      _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm_shuffle_epi8(v, row));
    } else if constexpr (sizeof(Word) == 2) {
      const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_shuffle_epi8(v, pairs(row)));
    } else if constexpr (sizeof(Word) == 4) {
      store(out, _mm256_permutevar8x32_epi32(load(x), _mm256_cvtepu8_epi32(row)));
    } else {
      compress_half(x, bits & 15, out);
      compress_half(x + 4, bits >> 4, out + __builtin_popcountll(bits & 15));
    }
  }

  static void expand(const Word* values, uint64_t bits, Word* x) {
    const __m128i row = load_row(kShuffles.spread[bits]);
    if constexpr (sizeof(Word) == 1) {
      const __m128i v = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(values));
      _mm_storel_epi64(reinterpret_cast<__m128i*>(x), _mm_shuffle_epi8(v, row));
    } else if constexpr (sizeof(Word) == 2) {
      const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(x), _mm_shuffle_epi8(v, pairs(row)));
    } else if constexpr (sizeof(Word) == 4) {
      const __m256i index = _mm256_cvtepi8_epi32(row);  // unmarked lanes become negative
      const __m256i spread = _mm256_permutevar8x32_epi32(load(values), index);
      store(x, _mm256_andnot_si256(_mm256_srai_epi32(index, 31), spread));
    } else {
      expand_half(values, bits & 15, x);
      expand_half(values + __builtin_popcountll(bits & 15), bits >> 4, x + 4);
    }
  }

  // Four 64-bit lanes as eight 32-bit ones: lane i is the pair 2i, 2i + 1.
  static __m256i pair_index(__m128i row) {
    const __m256i lane = _mm256_cvtepi8_epi64(row);
    const __m256i low = _mm256_slli_epi64(lane, 1);
    return _mm256_or_si256(low, _mm256_slli_epi64(_mm256_or_si256(low, _mm256_set1_epi64x(1)), 32));
  }
  static void compress_half(const Word* x, uint64_t bits, Word* out) {
    store(out, _mm256_permutevar8x32_epi32(load(x), pair_index(load_row(kShuffles.gather[bits]))));
  }
  static void expand_half(const Word* values, uint64_t bits, Word* x) {
    const __m128i row = load_row(kShuffles.spread[bits]);
    const __m256i spread = _mm256_permutevar8x32_epi32(load(values), pair_index(row));
    const __m256i unmarked = _mm256_cmpgt_epi64(_mm256_setzero_si256(), _mm256_cvtepi8_epi64(row));
    store(x, _mm256_andnot_si256(unmarked, spread));
  }
};

}  // namespace

const ZvcKernels zvc_avx2 = {
    Zvc<Avx2Zvc>::mask,
    Zvc<Avx2Zvc>::compress,
    Zvc<Avx2Zvc>::expand,
};

}  // namespace sparsekern::cpu

SPARSEKERN_TARGET_END
#endif
