// zvc with AVX-512 VBMI2: a vector of x a step, its mask from one test, its values from one
// shuffle.
//
//   compress   x --load--> v --vptestm--> k --kmov--> mask, popcnt --> next place
//                          v --vpcompress{k}--> 64 bytes at the place, the tail overwritten next
//   expand     values --load--> v --vpexpand{k}--> 64 bytes of x
//
// Assumes: 64 bytes past the values may be written (compress) or read (expand).
// Limited by: memory. In the loops, instructions per 64 bytes of x, for elements of 1, 2, 4, 8
// bytes: compress 16, 13.5, 12.3, 11.6; expand 13, 11, 10.8, 10.4. From L1 that is 2.5 cycles
// (0.57 ns) to compress 4-byte elements, where memory allows 5.5 (64 bytes read at 48 GB/s; Zen 5,
// 2 cores).
//
// Three things that cost more than the instructions themselves:
//   * vpcompress to memory is microcoded (Zen 4: 72 cycles against 1.5): register form, full store.
//   * The zeroing forms wait for the old destination (5 cycles a vector on Zen 5): compress merges
//     into its own source, expand into a zero the compiler may not fold.
//   * vpexpand from memory hides the stream from the prefetcher: decompress of 64 MB at 50 % zeros
//     took 4.2 ms against 2.6 with a load of its own.
#include "target.h"
#if defined(__x86_64__)

#include <immintrin.h>

#include <cstring>

#include "kernels.h"

SPARSEKERN_TARGET_BEGIN(
    "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi2,avx2,fma,f16c,bmi,bmi2,popcnt")

#include "zvc.h"

namespace sparsekern::cpu {
namespace {

constexpr int64_t kAhead = 8192;  // bytes of x; 2 and 4 KB were 10 to 30 % slower

template <int kSize>
struct Avx512Zvc {
  static constexpr int kLanes = 64 / kSize;

  static uint64_t nonzero(__m512i v) {
    if constexpr (kSize == 1) return _mm512_test_epi8_mask(v, v);
    if constexpr (kSize == 2) return _mm512_test_epi16_mask(v, v);
    if constexpr (kSize == 4) return _mm512_test_epi32_mask(v, v);
    return _mm512_test_epi64_mask(v, v);
  }
  static __m512i together(__m512i v, uint64_t bits) {
    if constexpr (kSize == 1) return _mm512_mask_compress_epi8(v, bits, v);
    if constexpr (kSize == 2) return _mm512_mask_compress_epi16(v, static_cast<__mmask32>(bits), v);
    if constexpr (kSize == 4) return _mm512_mask_compress_epi32(v, static_cast<__mmask16>(bits), v);
    return _mm512_mask_compress_epi64(v, static_cast<__mmask8>(bits), v);
  }
  static __m512i apart(__m512i v, uint64_t bits) {
    __m512i zero = _mm512_setzero_si512();
    asm("" : "+v"(zero));
    if constexpr (kSize == 1) return _mm512_mask_expand_epi8(zero, bits, v);
    if constexpr (kSize == 2)
      return _mm512_mask_expand_epi16(zero, static_cast<__mmask32>(bits), v);
    if constexpr (kSize == 4)
      return _mm512_mask_expand_epi32(zero, static_cast<__mmask16>(bits), v);
    return _mm512_mask_expand_epi64(zero, static_cast<__mmask8>(bits), v);
  }

  static uint8_t* compress(const uint8_t* x, uint8_t* values, uint64_t& marked) {
    marked = 0;
#pragma GCC unroll 8
    for (int i = 0; i < kSize; ++i) {
      const __m512i v = _mm512_loadu_si512(x + 64 * i);
      const uint64_t bits = nonzero(v);
      __builtin_prefetch(x + 64 * i + kAhead);
      _mm512_storeu_si512(values, together(v, bits));
      values += __builtin_popcountll(bits) * kSize;
      marked |= bits << (i * kLanes % 64);
    }
    return values;
  }

  static const uint8_t* expand(const uint8_t* values, uint64_t marked, uint8_t* x) {
#pragma GCC unroll 8
    for (int i = 0; i < kSize; ++i) {
      const uint64_t bits = marked >> (i * kLanes % 64) & (~uint64_t{0} >> (64 - kLanes));
      __m512i v = _mm512_loadu_si512(values);
      asm("" : "+v"(v));  // not as the memory operand of vpexpand
      _mm512_storeu_si512(x + 64 * i, apart(v, bits));
      values += __builtin_popcountll(bits) * kSize;
    }
    return values;
  }
};

void store_lines(uint8_t* to, const uint8_t* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) {
    _mm512_store_si512(reinterpret_cast<__m512i*>(to + i), _mm512_loadu_si512(from + i));
  }
}

void stream_lines(uint8_t* to, const uint8_t* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_loadu_si512(from + i));
  }
}

}  // namespace

const ZvcKernels zvc_avx512 = {
    Zvc<Avx512Zvc>::compress,
    Zvc<Avx512Zvc>::expand,
    Zvc<Avx512Zvc>::count,
    Zvc<Avx512Zvc>::put<store_lines>,
    Zvc<Avx512Zvc>::put<stream_lines>,
};

}  // namespace sparsekern::cpu

SPARSEKERN_TARGET_END
#endif
