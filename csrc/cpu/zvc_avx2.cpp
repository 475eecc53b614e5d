// zvc with AVX2, which has no compress: tables give, for each mask of eight lanes (four of 8
// bytes), the shuffle that moves the marked lanes together, and the inverse one that spreads them.
//
//   x      a 0 0 b 0 0 c 0  --compare--> mask 01001001 --table--> gather 0 3 6 . . . . .
//   values a b c . . . . .  <--shuffle-- x, gather      the tail is overwritten by the next step
//
// Assumes: 64 bytes past the values may be written (compress) or read (expand).
// Limited by: instructions. In the loops, per 64 bytes of x for elements of 1, 2, 4, 8 bytes:
// compress 87, 57, 33, 37; expand 83, 48, 26, 28. Four bytes keep up with memory (64 MB at
// 50 % zeros, one thread: 1.32 times torch's copy_, decompress 1.35), two do not on one thread
// (0.84, 1.06; on two threads 1.20, 1.41; Zen 5, 2 cores).
#include "target.h"
#if defined(__x86_64__)

#include <immintrin.h>

#include <cstring>

#include "kernels.h"

namespace sparsekern::cpu {
namespace {

// Row `mask`: gather[i] is the lane of the i-th marked element; spread[i] the rank of lane i, with
// the top bit set if it is unmarked: pshufb then writes a zero, permutevar8x32 looks at three bits.
struct Shuffles {
  uint8_t gather[256][8], spread[256][8];                // lanes of 1 and 4 bytes
  uint8_t gather_pairs[256][16], spread_pairs[256][16];  // bytes of lanes of 2
  int32_t gather_halves[16][8], spread_halves[16][8];    // 4-byte halves of lanes of 8
};

constexpr Shuffles make_shuffles() {
  Shuffles s{};
  for (int mask = 0; mask < 256; ++mask) {
    int rank = 0;
    for (int lane = 0; lane < 8; ++lane) {
      const bool marked = mask >> lane & 1;
      if (marked) s.gather[mask][rank] = static_cast<uint8_t>(lane);
      s.spread[mask][lane] = static_cast<uint8_t>(marked ? rank : 0x80);
      rank += marked;
    }
    for (int byte = 0; byte < 16; ++byte) {
      const int odd = byte % 2, rank_of = s.spread[mask][byte / 2];
      s.gather_pairs[mask][byte] = static_cast<uint8_t>(2 * s.gather[mask][byte / 2] + odd);
      s.spread_pairs[mask][byte] = static_cast<uint8_t>(rank_of == 0x80 ? 0x80 : 2 * rank_of + odd);
      if (mask < 16 && byte < 8) {
        s.gather_halves[mask][byte] = 2 * s.gather[mask][byte / 2] + odd;
        s.spread_halves[mask][byte] = rank_of == 0x80 ? -1 : 2 * rank_of + odd;
      }
    }
  }
  return s;
}
alignas(64) constexpr Shuffles kShuffles = make_shuffles();

}  // namespace
}  // namespace sparsekern::cpu

SPARSEKERN_TARGET_BEGIN("avx2,fma,f16c,bmi,bmi2,popcnt")

#include "zvc.h"

namespace sparsekern::cpu {
namespace {

__m128i load8(const void* p) { return _mm_loadl_epi64(static_cast<const __m128i*>(p)); }
__m128i load16(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
__m256i load32(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
void store8(void* p, __m128i v) { _mm_storel_epi64(static_cast<__m128i*>(p), v); }
void store16(void* p, __m128i v) { _mm_storeu_si128(static_cast<__m128i*>(p), v); }
void store32(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }

constexpr int64_t kAhead = 8192;  // bytes of x

template <int kSize>
struct Avx2Zvc {
  static constexpr int kLanes = kSize == 8 ? 4 : 8;  // a table row

  // One bit per element of 64 bytes of x.
  static uint64_t nonzero(const uint8_t* x) {
    const __m256i zero = _mm256_setzero_si256(), a = load32(x), b = load32(x + 32);
    if constexpr (kSize == 1) {
      const uint64_t low = static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(a, zero)));
      const uint64_t high = static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(b, zero)));
      return ~(low | high << 32);
    } else if constexpr (kSize == 2) {
      const __m256i both =
          _mm256_packs_epi16(_mm256_cmpeq_epi16(a, zero), _mm256_cmpeq_epi16(b, zero));
      // packs works within halves: a's low, b's low, a's high, b's high.
      return static_cast<uint32_t>(~_mm256_movemask_epi8(_mm256_permute4x64_epi64(both, 0xd8)));
    } else if constexpr (kSize == 4) {
      const int low = _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(a, zero)));
      const int high = _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(b, zero)));
      return ~(low | high << 8) & 0xffff;
    } else {
      const int low = _mm256_movemask_pd(_mm256_castsi256_pd(_mm256_cmpeq_epi64(a, zero)));
      const int high = _mm256_movemask_pd(_mm256_castsi256_pd(_mm256_cmpeq_epi64(b, zero)));
      return ~(low | high << 4) & 0xff;
    }
  }

  static void gather(const uint8_t* x, unsigned row, uint8_t* values) {
    if constexpr (kSize == 1) {
      store8(values, _mm_shuffle_epi8(load8(x), load8(kShuffles.gather[row])));
    } else if constexpr (kSize == 2) {
      store16(values, _mm_shuffle_epi8(load16(x), load16(kShuffles.gather_pairs[row])));
    } else if constexpr (kSize == 4) {
      const __m256i index = _mm256_cvtepu8_epi32(load8(kShuffles.gather[row]));
      store32(values, _mm256_permutevar8x32_epi32(load32(x), index));
    } else {
      const __m256i index = load32(kShuffles.gather_halves[row]);
      store32(values, _mm256_permutevar8x32_epi32(load32(x), index));
    }
  }

  static void spread(const uint8_t* values, unsigned row, uint8_t* x) {
    if constexpr (kSize == 1) {
      store8(x, _mm_shuffle_epi8(load8(values), load8(kShuffles.spread[row])));
    } else if constexpr (kSize == 2) {
      store16(x, _mm_shuffle_epi8(load16(values), load16(kShuffles.spread_pairs[row])));
    } else {
      const __m256i index = kSize == 4 ? _mm256_cvtepi8_epi32(load8(kShuffles.spread[row]))
                                       : load32(kShuffles.spread_halves[row & 15]);
      const __m256i lanes = _mm256_permutevar8x32_epi32(load32(values), index);
      store32(x, _mm256_andnot_si256(_mm256_srai_epi32(index, 31), lanes));
    }
  }

  static uint8_t* compress(const uint8_t* x, uint8_t* values, uint64_t& marked) {
    marked = 0;
#pragma GCC unroll 8
    for (int i = 0; i < kSize; ++i) {
      __builtin_prefetch(x + 64 * i + kAhead);
      marked |= nonzero(x + 64 * i) << (64 / kSize * i % 64);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 64; i += kLanes) {
      const unsigned row = marked >> i & ((1u << kLanes) - 1);
      gather(x + i * kSize, row, values);
      values += __builtin_popcount(row) * kSize;
    }
    return values;
  }

  static const uint8_t* expand(const uint8_t* values, uint64_t marked, uint8_t* x) {
#pragma GCC unroll 16
    for (int i = 0; i < 64; i += kLanes) {
      const unsigned row = marked >> i & ((1u << kLanes) - 1);
      spread(values, row, x + i * kSize);
      values += __builtin_popcount(row) * kSize;
    }
    return values;
  }
};

void store_lines(uint8_t* to, const uint8_t* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 32) store32(to + i, load32(from + i));
}

void stream_lines(uint8_t* to, const uint8_t* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 32) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i), load32(from + i));
  }
}

}  // namespace

const ZvcKernels zvc_avx2 = {
    Zvc<Avx2Zvc>::compress,
    Zvc<Avx2Zvc>::expand,
    Zvc<Avx2Zvc>::count,
    Zvc<Avx2Zvc>::put<store_lines>,
    Zvc<Avx2Zvc>::put<stream_lines>,
};

}  // namespace sparsekern::cpu

SPARSEKERN_TARGET_END
#endif
