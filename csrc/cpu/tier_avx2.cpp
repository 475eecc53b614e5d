// The AVX2 tier: AVX2, FMA, F16C, BMI; every x86-64 server since Haswell and Zen.
//
// AVX2 has no compress: a table gives, for each mask of eight (or four) lanes, the shuffle that
// moves the marked lanes together, and the inverse table spreads them.
#include "target.h"
#if defined(__x86_64__)

#include <immintrin.h>

#include <cstring>

#include "convert.h"
#include "kernels.h"
#include "scalar_24.h"

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

#include "linear_24.h"
#include "zvc.h"

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

const Kernels kernels_avx2 = {
    "avx2",
    LinearRows<Avx2>::run,
    LinearPanels<Avx2>::run,
    5,
    Avx2::kMaxWidth * Avx2::kLanes,
    Avx2::kLanes,
    Zvc<Avx2Zvc>::mask,
    Zvc<Avx2Zvc>::compress,
    Zvc<Avx2Zvc>::expand,
};

}  // namespace sparsekern::cpu

SPARSEKERN_TARGET_END
#endif
