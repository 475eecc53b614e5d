// The 2:4 formats with AVX2.
//
//   keep      as format_24_avx512.cpp: two differences with rotated magnitudes, their signs, and the
//             majority; bytes by max and equality. A full lane of ones is what movemask and `and` take
//   gather    32 bytes a, 32 bytes b of elements; in 128 bits, the kept halves go low and high:
//               a   g0 g1 | g2 g3     pshufb    g0 g1 .  .  | g2 g3 .  .
//               b   g4 g5 | g6 g7     pshufb    .  .  g4 g5 | .  .  g6 g7
//               blended, vpermq         g0 g1 g2 g3 | g4 g5 g6 g7      (vpermilps for 4 bytes)
//   pack      keep bits, their nibbles, and gather with these
//   unpack    every byte sees its group's nibble and compares both fields with its own position:
//             first or second value, or zero; one pshufb then spreads the values of 128 bits
// 8-byte elements, whose group fills a vector, gather by a table of vpermd indices.
//
// Limited by bytes, pack on one thread by operations. Instructions per group in the inner loop
// (GCC 12), fp32 / bf16 / int8:
//   prune 10 / 5 / 2.8   pack 11.9 / 7.2 / 4.2   unpack 8.2 / 4.2 / 2.2   gather 3.8 / 3 / 1.8
// Zen 5, 2 cores, 4096 x 4096 fp32 and bf16, share of Tensor.copy_'s bandwidth, 1 and 2 threads:
//   prune 0.99-1.16   pack 0.44-1.12   unpack 0.89-0.95   gather 0.97-1.23
#include "target.h"
#if defined(__x86_64__)

#include <immintrin.h>

#include <cstring>

#include "format_24.h"
#include "kernels.h"

namespace sparsekern::cpu {
namespace {

// For a nibble i0 | i1 << 2, the 32-bit lanes of elements i0 and i1 of 8 bytes.
struct PairIndex {
  alignas(16) int lanes[16][4];
};
constexpr PairIndex make_pair_index() {
  PairIndex p{};
  for (int n = 0; n < 16; ++n) {
    for (int i = 0; i < 4; ++i) p.lanes[n][i] = 2 * (i < 2 ? n & 3 : n >> 2) + i % 2;
  }
  return p;
}
constexpr PairIndex kPairIndex = make_pair_index();

}  // namespace
}  // namespace sparsekern::cpu

SPARSEKERN_TARGET_BEGIN("avx2,fma,f16c,bmi,bmi2,popcnt")

namespace sparsekern::cpu {
namespace {

__m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
void store(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
__m128i load_half(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
__m256i both(__m128i v) { return _mm256_broadcastsi128_si256(v); }
__m256i both(int64_t high, int64_t low) { return _mm256_set_epi64x(high, low, high, low); }
__m256i set1_8(int v) { return _mm256_set1_epi8(static_cast<char>(v)); }

// ---- lanes of one width ----

template <class Word>
struct Lanes;

template <>
struct Lanes<uint64_t> {
  static __m256i rot1(__m256i v) { return _mm256_permute4x64_epi64(v, 0x39); }
  static __m256i rot2(__m256i v) { return _mm256_permute4x64_epi64(v, 0x4e); }
  static __m256i rot3(__m256i v) { return _mm256_permute4x64_epi64(v, 0x93); }
  static __m256i add(__m256i a, __m256i b) { return _mm256_add_epi64(a, b); }
  static __m256i sub(__m256i a, __m256i b) { return _mm256_sub_epi64(a, b); }
  static __m256i set1(uint64_t w) { return _mm256_set1_epi64x(static_cast<int64_t>(w)); }
  static __m256i each_group(int64_t a, int64_t b, int64_t c, int64_t d) {
    return _mm256_setr_epi64x(a, b, c, d);
  }
  static __m256i negative(__m256i v) { return _mm256_cmpgt_epi64(_mm256_setzero_si256(), v); }
  static __m256i zeros(__m256i v) { return _mm256_cmpeq_epi64(v, _mm256_setzero_si256()); }
};

template <>
struct Lanes<uint32_t> {
  static __m256i rot1(__m256i v) { return _mm256_shuffle_epi32(v, 0x39); }
  static __m256i rot2(__m256i v) { return _mm256_shuffle_epi32(v, 0x4e); }
  static __m256i rot3(__m256i v) { return _mm256_shuffle_epi32(v, 0x93); }
  static __m256i add(__m256i a, __m256i b) { return _mm256_add_epi32(a, b); }
  static __m256i sub(__m256i a, __m256i b) { return _mm256_sub_epi32(a, b); }
  static __m256i set1(uint32_t w) { return _mm256_set1_epi32(static_cast<int>(w)); }
  static __m256i each_group(int a, int b, int c, int d) {
    return _mm256_setr_epi32(a, b, c, d, a, b, c, d);
  }
  static __m256i negative(__m256i v) { return _mm256_srai_epi32(v, 31); }
  static __m256i zeros(__m256i v) { return _mm256_cmpeq_epi32(v, _mm256_setzero_si256()); }
};

template <>
struct Lanes<uint16_t> {
  static __m256i rotated(__m256i v, int64_t order) {
    return _mm256_shuffle_epi8(v, both(order + 0x0808080808080808, order));
  }
  static __m256i rot1(__m256i v) { return rotated(v, 0x0100070605040302); }
  static __m256i rot2(__m256i v) { return rotated(v, 0x0302010007060504); }
  static __m256i rot3(__m256i v) { return rotated(v, 0x0504030201000706); }
  static __m256i add(__m256i a, __m256i b) { return _mm256_add_epi16(a, b); }
  static __m256i sub(__m256i a, __m256i b) { return _mm256_sub_epi16(a, b); }
  static __m256i set1(uint16_t w) { return _mm256_set1_epi16(static_cast<short>(w)); }
  static __m256i each_group(int64_t a, int64_t b, int64_t c, int64_t d) {
    return _mm256_set1_epi64x(a | b << 16 | c << 32 | d << 48);
  }
  static __m256i negative(__m256i v) { return _mm256_srai_epi16(v, 15); }
  static __m256i zeros(__m256i v) { return _mm256_cmpeq_epi16(v, _mm256_setzero_si256()); }
};

// ---- which elements of a vector are kept ----

__m256i majority(__m256i x, __m256i y, __m256i z) {
  return _mm256_or_si256(_mm256_and_si256(x, y), _mm256_and_si256(z, _mm256_or_si256(x, y)));
}

// Ones in the lanes that are kept; in the top bit alone where lanes have more than one byte.
template <class T>
__m256i kept(__m256i v) {
  using Word = typename T::Word;
  if constexpr (sizeof(Word) > 1) {
    using L = Lanes<Word>;
    const __m256i m = _mm256_and_si256(v, L::set1(T::kMagnitude));
    const __m256i d1 = L::sub(L::rot1(m), L::add(m, L::each_group(1, 1, 1, 0)));
    const __m256i d2 = L::sub(L::rot2(m), L::add(m, L::each_group(1, 1, 0, 0)));
    const __m256i either = _mm256_or_si256(d1, d2), all = _mm256_and_si256(d1, d2);
    return _mm256_or_si256(all, _mm256_andnot_si256(L::rot3(d1), either));
  } else {
    const __m256i m = std::is_same_v<T, I8> ? _mm256_abs_epi8(v) : v;
    const auto shuffled = [](__m256i x, int64_t order) {
      const int64_t low = order | (order + 0x04040404) << 32;
      return _mm256_shuffle_epi8(x, both(low + 0x0808080808080808, low));
    };
    const auto at_least = [](__m256i x, __m256i y) {
      return _mm256_cmpeq_epi8(_mm256_max_epu8(x, y), x);
    };
    // Lane by lane: 0>=1, 1>=2, 2>=3, 0>=3 and 0>=2, 1>=3, 0>=2, 1>=3.
    const __m256i next = at_least(shuffled(m, 0x00020100), shuffled(m, 0x03030201));
    const __m256i across = at_least(shuffled(m, 0x01000100), shuffled(m, 0x03020302));
    const __m256i before = shuffled(next, 0x02010003);
    const auto flip = [](__m256i x, uint32_t lanes) {
      return _mm256_xor_si256(x, _mm256_set1_epi32(static_cast<int>(lanes)));
    };
    return majority(flip(next, 0xff000000), flip(across, 0xffff0000), flip(before, 0xffffff00));
  }
}

// A kept zero is stored as +0.0, so that the bytes do not depend on which zero was named.
template <class T>
__m256i canonical(__m256i v) {
  using L = Lanes<typename T::Word>;
  if constexpr (kIsFloat<T>) {
    return _mm256_andnot_si256(L::zeros(_mm256_and_si256(v, L::set1(T::kMagnitude))), v);
  }
  return v;
}

// The keep bits of 32 elements.
template <class T>
uint32_t keep_bits(const typename T::Word* p) {
  constexpr int size = sizeof(typename T::Word);
  if constexpr (size == 1) {
    return static_cast<uint32_t>(_mm256_movemask_epi8(kept<T>(load(p))));
  } else if constexpr (size == 2) {
    const __m256i both_halves = _mm256_packs_epi16(kept<T>(load(p)), kept<T>(load(p + 16)));
    return static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_permute4x64_epi64(both_halves, 0xd8)));
  } else if constexpr (size == 4) {
    uint32_t bits = 0;
    for (int i = 0; i < 32; i += 8) {
      const __m256 lanes = _mm256_castsi256_ps(kept<T>(load(p + i)));
      bits |= static_cast<uint32_t>(_mm256_movemask_ps(lanes)) << i;
    }
    return bits;
  } else {
    uint32_t bits = 0;
    for (int i = 0; i < 32; i += 4) {
      const __m256d lanes = _mm256_castsi256_pd(kept<T>(load(p + i)));
      bits |= static_cast<uint32_t>(_mm256_movemask_pd(lanes)) << i;
    }
    return bits;
  }
}

// 64 keep bits to 16 nibbles i0 | i1 << 2.
uint64_t meta_of_keep(uint64_t keep) {
  const __m128i table = _mm_set_epi64x(0x0000000e000d0c00, 0x0009080004000000),
                low = _mm_set1_epi8(15);
  const __m128i x = _mm_cvtsi64_si128(static_cast<int64_t>(keep));
  const __m128i even = _mm_shuffle_epi8(table, _mm_and_si128(x, low));
  const __m128i odd = _mm_shuffle_epi8(table, _mm_and_si128(_mm_srli_epi16(x, 4), low));
  return static_cast<uint64_t>(_mm_cvtsi128_si64(_mm_or_si128(even, _mm_slli_epi16(odd, 4))));
}

// ---- gather: 64 bytes of elements to 32 bytes of values, by the low bits of meta ----

__m256i gather_vectors(__m256i a, __m256i b, uint64_t meta, uint32_t) {
  const __m256i shifts = _mm256_setr_epi32(0, 2, 8, 10, 4, 6, 12, 14);
  const __m256i index = _mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(meta)), shifts);
  const __m256 kept_a = _mm256_permutevar_ps(_mm256_castsi256_ps(a), index),
               kept_b = _mm256_permutevar_ps(_mm256_castsi256_ps(b), index);
  return _mm256_permute4x64_epi64(_mm256_castps_si256(_mm256_blend_ps(kept_a, kept_b, 0xcc)), 0xd8);
}

__m256i gather_bytes(__m256i a, __m256i b, __m256i index) {
  const __m256i kept_a = _mm256_shuffle_epi8(a, index), kept_b = _mm256_shuffle_epi8(b, index);
  return _mm256_permute4x64_epi64(_mm256_blend_epi32(kept_a, kept_b, 0xcc), 0xd8);
}

__m256i gather_vectors(__m256i a, __m256i b, uint64_t meta, uint16_t) {
  // 128 bits of slots: four of a, by meta byte 0 (or 1), four of b, by byte 2 (or 3), each byte in
  // the upper half of a 16-bit lane; the high half of the product by 2^(8 - 2 i) is a shift by 2 i.
  const __m256i spread = _mm256_set_epi64x(
      static_cast<int64_t>(0x0380038003800380), static_cast<int64_t>(0x0180018001800180),
      static_cast<int64_t>(0x0280028002800280), static_cast<int64_t>(0x0080008000800080));
  const __m256i bits = _mm256_shuffle_epi8(_mm256_set1_epi32(static_cast<int>(meta)), spread);
  const __m256i field = _mm256_and_si256(
      _mm256_mulhi_epu16(bits, _mm256_set1_epi64x(0x0004001000400100)), _mm256_set1_epi16(3));
  // Element f of its group of 8 bytes is bytes 2 f and 2 f + 1.
  const __m256i index = _mm256_add_epi8(_mm256_mullo_epi16(field, _mm256_set1_epi16(0x0202)),
                                        _mm256_set1_epi64x(0x0908090801000100));
  return gather_bytes(a, b, index);
}

__m256i gather_vectors(__m256i a, __m256i b, uint64_t meta, uint8_t) {
  // 16-bit lanes hold a nibble each: 128 bits take four nibbles of a, by meta bytes 0, 1 (or 2, 3),
  // and four of b, by bytes 4, 5 (or 6, 7).
  const __m256i spread = _mm256_set_epi64x(
      static_cast<int64_t>(0x0780078006800680), static_cast<int64_t>(0x0380038002800280),
      static_cast<int64_t>(0x0580058004800480), static_cast<int64_t>(0x0180018000800080));
  const __m256i bits = _mm256_shuffle_epi8(_mm256_set1_epi64x(static_cast<int64_t>(meta)), spread);
  const __m256i nibble = _mm256_and_si256(_mm256_mulhi_epu16(bits, _mm256_set1_epi32(0x00100100)),
                                          _mm256_set1_epi16(15));
  const __m256i fields = _mm256_and_si256(_mm256_or_si256(nibble, _mm256_slli_epi16(nibble, 6)),
                                          _mm256_set1_epi16(0x0303));
  return gather_bytes(a, b, _mm256_or_si256(fields, _mm256_set1_epi64x(0x0c0c080804040000)));
}

__m256i gather_vectors(__m256i a, __m256i b, uint64_t meta, uint64_t) {
  const auto pick = [](__m256i v, uint64_t nibble) {
    const __m256i index = _mm256_castsi128_si256(load_half(kPairIndex.lanes[nibble]));
    return _mm256_castsi256_si128(_mm256_permutevar8x32_epi32(v, index));
  };
  return _mm256_set_m128i(pick(b, meta >> 4 & 15), pick(a, meta & 15));
}

// ---- unpack: 16 bytes of values to 32 bytes of elements, by the nibbles of their groups ----

// What every byte of 32 does: which byte of meta holds its nibble, which bits of it are the two
// fields and which values of them name the byte's own position, and where the first value's byte
// lies among the 16.
template <class Word>
struct Spread {
  alignas(32) uint8_t byte[32], first_mask[32], first_is[32],
      second_mask[32], second_is[32], source[32];
};
template <class Word>
constexpr Spread<Word> make_spread(int odd) {
  Spread<Word> s{};
  const int size = sizeof(Word);
  for (int i = 0; i < 32; ++i) {
    const int group = i / (4 * size), position = i / size % 4, high = (group + odd) % 2 * 4;
    s.byte[i] = static_cast<uint8_t>(group / 2);
    s.first_mask[i] = static_cast<uint8_t>(3 << high);
    s.first_is[i] = static_cast<uint8_t>(position << high);
    s.second_mask[i] = static_cast<uint8_t>(12 << high);
    s.second_is[i] = static_cast<uint8_t>(position << 2 << high);
    s.source[i] = static_cast<uint8_t>(group * 2 * size + i % size);
  }
  return s;
}
template <class Word, int odd>
constexpr Spread<Word> kSpread = make_spread<Word>(odd);

template <class Word, int odd = 0>
__m256i unpack_vector(__m128i values, uint64_t meta) {
  constexpr const Spread<Word>& s = kSpread<Word, odd>;
  const __m256i nibble =
      _mm256_shuffle_epi8(_mm256_set1_epi32(static_cast<int>(meta)), load(s.byte));
  const __m256i first =
      _mm256_cmpeq_epi8(_mm256_and_si256(nibble, load(s.first_mask)), load(s.first_is));
  const __m256i second =
      _mm256_cmpeq_epi8(_mm256_and_si256(nibble, load(s.second_mask)), load(s.second_is));
  const __m256i from =
      _mm256_add_epi8(load(s.source), _mm256_and_si256(second, set1_8(sizeof(Word))));
  return _mm256_and_si256(_mm256_shuffle_epi8(both(values), from), _mm256_or_si256(first, second));
}

// ---- blocks ----

template <class T>
void prune_blocks(const typename T::Word* in, typename T::Word* out, int64_t blocks) {
  constexpr int n = 32 / sizeof(typename T::Word);
  for (int64_t i = 0; i < blocks * kFormatBlock; i += n) {
    const __m256i v = load(in + i);
    __m256i keep = kept<T>(v);
    if constexpr (n < 32) keep = Lanes<typename T::Word>::negative(keep);
    store(out + i, _mm256_and_si256(keep, canonical<T>(v)));
  }
}

template <class Word>
void gather_block(const Word* in, uint64_t meta, Word* values) {
  constexpr int n = 32 / sizeof(Word);
  for (int i = 0; i < kFormatBlock; i += 2 * n) {
    store(values + i / 2, gather_vectors(load(in + i), load(in + i + n), meta >> i, Word{}));
  }
}

template <class T>
void pack_blocks(const typename T::Word* in, typename T::Word* values, uint8_t* meta,
                 int64_t blocks) {
  constexpr int n = 32 / sizeof(typename T::Word);
  for (int64_t b = 0; b < blocks; ++b, meta += 8, in += 64, values += 32) {
    const uint64_t keep = keep_bits<T>(in) | uint64_t{keep_bits<T>(in + 32)} << 32;
    const uint64_t packed = meta_of_keep(keep);
    std::memcpy(meta, &packed, sizeof packed);
    for (int i = 0; i < kFormatBlock; i += 2 * n) {
      const __m256i v =
          gather_vectors(load(in + i), load(in + i + n), packed >> i, typename T::Word{});
      store(values + i / 2, canonical<T>(v));
    }
  }
}

template <class Word>
void unpack_blocks(const Word* values, const uint8_t* meta, Word* out, int64_t blocks) {
  constexpr int n = 32 / sizeof(Word);
  for (int64_t b = 0; b < blocks; ++b, meta += 8) {
    uint64_t packed;
    std::memcpy(&packed, meta, sizeof packed);
    for (int i = 0; i < kFormatBlock; i += 2 * n, values += n, out += 2 * n) {
      // Vectors of one group each take the two halves of a byte in turn.
      constexpr int odd = n == 4;
      store(out, unpack_vector<Word>(load_half(values), packed >> i));
      store(out + n,
            unpack_vector<Word, odd>(load_half(values + n / 2), packed >> (odd ? i : i + n)));
    }
  }
}

void prune(const void* weight, void* out, int64_t blocks, DType dtype) {
  with_order(dtype, [&](auto type) {
    using T = decltype(type);
    using Word = typename T::Word;
    prune_blocks<T>(static_cast<const Word*>(weight), static_cast<Word*>(out), blocks);
  });
}
void pack(const void* weight, void* values, uint8_t* meta, int64_t blocks, DType dtype) {
  with_order(dtype, [&](auto type) {
    using T = decltype(type);
    using Word = typename T::Word;
    pack_blocks<T>(static_cast<const Word*>(weight), static_cast<Word*>(values), meta, blocks);
  });
}
void unpack(const void* values, const uint8_t* meta, void* dense, int64_t blocks, int size) {
  with_word(size, [&](auto word) {
    using Word = decltype(word);
    unpack_blocks(static_cast<const Word*>(values), meta, static_cast<Word*>(dense), blocks);
  });
}
void gather(const void* dense, const uint8_t* meta, void* values, int64_t blocks, int size) {
  with_word(size, [&](auto word) {
    using Word = decltype(word);
    for (int64_t b = 0; b < blocks; ++b) {
      uint64_t packed;
      std::memcpy(&packed, meta + 8 * b, sizeof packed);
      gather_block(static_cast<const Word*>(dense) + 64 * b, packed,
                   static_cast<Word*>(values) + 32 * b);
    }
  });
}

}  // namespace

const Format24Kernels format_24_avx2 = {prune, pack, unpack, gather};

}  // namespace sparsekern::cpu

SPARSEKERN_TARGET_END
#endif
