// The 2:4 formats with AVX-512 F, BW, DQ, VL and VBMI2.
//
//   one zmm of magnitudes m    a b c d | e f g h | …     a group in 4 lanes of 2, 4 or 8 bytes
//   d1 = rot1(m) - m - (1 1 1 0)   negative where lane i beats lane i + 1 (the last: lane 0)
//   d2 = rot2(m) - m - (1 1 0 0)   negative where lane i beats lane i + 2
//   rot3(d1)                       not negative where lane i beats lane i - 1
//   keep = two of the three, one vpternlog on the sign bits, one vpmov?2m to a mask
// The ones subtracted turn > into >=, so that a tie goes to the lower lane; magnitudes have a spare
// top bit, so nothing wraps. Bytes have none: there, two unsigned comparisons give the six
// comparisons of each group, and majorities are taken on general registers, 16 groups at a time.
//
//   pack      vpcompress by keep; 64 keep bits become 16 nibbles through one pshufb table
//   unpack    meta to keep bits and "second slot" bits (pshufb again); lane = permute(values,
//             2 * group + second), zeroed where not kept
//   gather    meta to lane numbers: shift by 2 * slot, take two bits, add the group
// Permutes, not vpexpand, so that an illegal nibble spoils its own group only. vpcompress in
// register form: to memory it is microcoded on Zen 4.
//
// Limited by bytes: each is read once and written once. Instructions per group in the inner loop
// (GCC 12), fp32 / bf16 / int8, which leave the vector units idle most of the time:
//   prune 4.5 / 2.3 / 1.8   pack 5.2 / 2.9 / 2.4   unpack 2.9 / 1.9 / 1.4   gather 2.4 / 0.8 / 0.9
// Zen 5, 2 cores, 4096 x 4096 fp32 and bf16, share of Tensor.copy_'s bandwidth, 1 and 2 threads:
//   prune 1.00-1.12   pack 0.94-1.19   unpack 0.89-0.93   gather 1.08-1.32
// Stores that bypass the cache gained 14 to 20 % at 64 MB there and are not used: who packs a weight
// mostly reads it next.
#include "target.h"
#if defined(__x86_64__)

#include <immintrin.h>

#include <cstring>

#include "format_24.h"
#include "kernels.h"

SPARSEKERN_TARGET_BEGIN(
    "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi2,avx2,fma,f16c,bmi,bmi2,popcnt")

namespace sparsekern::cpu {
namespace {

__m512i load(const void* p) { return _mm512_loadu_si512(p); }
void store(void* p, __m512i v) { _mm512_storeu_si512(p, v); }
__m512i load_half(const void* p) {
  return _mm512_castsi256_si512(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
}
void store_half(void* p, __m512i v) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_castsi512_si256(v));
}
__m512i every_lane(__m128i v) { return _mm512_broadcast_i32x4(v); }

// ---- lanes of one width ----

template <class Word>
struct Lanes;

template <>
struct Lanes<uint64_t> {
  static __m512i rot1(__m512i v) { return _mm512_permutex_epi64(v, 0x39); }
  static __m512i rot2(__m512i v) { return _mm512_permutex_epi64(v, 0x4e); }
  static __m512i rot3(__m512i v) { return _mm512_permutex_epi64(v, 0x93); }
  static __m512i add(__m512i a, __m512i b) { return _mm512_add_epi64(a, b); }
  static __m512i sub(__m512i a, __m512i b) { return _mm512_sub_epi64(a, b); }
  static __m512i set1(uint64_t w) { return _mm512_set1_epi64(static_cast<int64_t>(w)); }
  static __m512i each_group(int64_t a, int64_t b, int64_t c, int64_t d) {
    return _mm512_setr_epi64(a, b, c, d, a, b, c, d);
  }
  static uint64_t signs(__m512i v) { return _mm512_movepi64_mask(v); }
  static uint64_t test(__m512i a, __m512i b) { return _mm512_test_epi64_mask(a, b); }
  static __m512i zero_unless(uint64_t k, __m512i v) {
    return _mm512_maskz_mov_epi64(static_cast<__mmask8>(k), v);
  }
  static __m512i compress(uint64_t k, __m512i v) {
    return _mm512_maskz_compress_epi64(static_cast<__mmask8>(k), v);
  }
  static __m512i spread(uint64_t keep, uint64_t second, __m512i values) {
    const __m512i slot = _mm512_mask_mov_epi64(_mm512_setr_epi64(0, 0, 0, 0, 2, 2, 2, 2),
                                               static_cast<__mmask8>(second),
                                               _mm512_setr_epi64(1, 1, 1, 1, 3, 3, 3, 3));
    return _mm512_maskz_permutexvar_epi64(static_cast<__mmask8>(keep), slot, values);
  }
  // 8 slots of the 16 elements of two vectors; the low 16 bits of meta.
  static __m512i gather(__m512i a, __m512i b, uint64_t meta) {
    const __m512i field =
        _mm512_srlv_epi64(set1(meta), _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14));
    const __m512i index = _mm512_ternarylogic_epi64(
        field, set1(3), _mm512_setr_epi64(0, 0, 4, 4, 8, 8, 12, 12), 0xea);  // (x & y) | z
    return _mm512_permutex2var_epi64(a, index, b);
  }
};

template <>
struct Lanes<uint32_t> {
  static __m512i rot1(__m512i v) { return _mm512_shuffle_epi32(v, _MM_PERM_ENUM(0x39)); }
  static __m512i rot2(__m512i v) { return _mm512_shuffle_epi32(v, _MM_PERM_ENUM(0x4e)); }
  static __m512i rot3(__m512i v) { return _mm512_shuffle_epi32(v, _MM_PERM_ENUM(0x93)); }
  static __m512i add(__m512i a, __m512i b) { return _mm512_add_epi32(a, b); }
  static __m512i sub(__m512i a, __m512i b) { return _mm512_sub_epi32(a, b); }
  static __m512i set1(uint32_t w) { return _mm512_set1_epi32(static_cast<int>(w)); }
  static __m512i each_group(int a, int b, int c, int d) { return _mm512_setr4_epi32(a, b, c, d); }
  static uint64_t signs(__m512i v) { return _mm512_movepi32_mask(v); }
  static uint64_t test(__m512i a, __m512i b) { return _mm512_test_epi32_mask(a, b); }
  static __m512i zero_unless(uint64_t k, __m512i v) {
    return _mm512_maskz_mov_epi32(static_cast<__mmask16>(k), v);
  }
  static __m512i compress(uint64_t k, __m512i v) {
    return _mm512_maskz_compress_epi32(static_cast<__mmask16>(k), v);
  }
  static __m512i spread(uint64_t keep, uint64_t second, __m512i values) {
    const __m512i first = _mm512_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2, 4, 4, 4, 4, 6, 6, 6, 6);
    const __m512i slot = _mm512_mask_mov_epi32(first, static_cast<__mmask16>(second),
                                               _mm512_or_si512(first, set1(1)));
    return _mm512_maskz_permutexvar_epi32(static_cast<__mmask16>(keep), slot, values);
  }
  // 16 slots of 32 elements; the low 32 bits of meta.
  static __m512i gather(__m512i a, __m512i b, uint64_t meta) {
    const __m512i field = _mm512_srlv_epi32(
        set1(static_cast<uint32_t>(meta)),
        _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30));
    const __m512i group =
        _mm512_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28);
    const __m512i index = _mm512_ternarylogic_epi32(field, set1(3), group, 0xea);
    return _mm512_permutex2var_epi32(a, index, b);
  }
};

template <>
struct Lanes<uint16_t> {
  static __m512i rotated(__m512i v, int64_t order) {
    return _mm512_shuffle_epi8(v, every_lane(_mm_set_epi64x(order + 0x0808080808080808, order)));
  }
  static __m512i rot1(__m512i v) { return rotated(v, 0x0100070605040302); }
  static __m512i rot2(__m512i v) { return rotated(v, 0x0302010007060504); }
  static __m512i rot3(__m512i v) { return rotated(v, 0x0504030201000706); }
  static __m512i add(__m512i a, __m512i b) { return _mm512_add_epi16(a, b); }
  static __m512i sub(__m512i a, __m512i b) { return _mm512_sub_epi16(a, b); }
  static __m512i set1(uint16_t w) { return _mm512_set1_epi16(static_cast<short>(w)); }
  static __m512i each_group(int64_t a, int64_t b, int64_t c, int64_t d) {
    return _mm512_set1_epi64(a | b << 16 | c << 32 | d << 48);
  }
  static uint64_t signs(__m512i v) { return _mm512_movepi16_mask(v); }
  static uint64_t test(__m512i a, __m512i b) { return _mm512_test_epi16_mask(a, b); }
  static __m512i zero_unless(uint64_t k, __m512i v) {
    return _mm512_maskz_mov_epi16(static_cast<__mmask32>(k), v);
  }
  static __m512i compress(uint64_t k, __m512i v) {
    return _mm512_maskz_compress_epi16(static_cast<__mmask32>(k), v);
  }
  static __m512i spread(uint64_t keep, uint64_t second, __m512i values) {
    const __m512i first = _mm512_cvtepi8_epi16(_mm256_set_epi64x(
        0x0e0e0e0e0c0c0c0c, 0x0a0a0a0a08080808, 0x0606060604040404, 0x0202020200000000));
    const __m512i slot = _mm512_mask_mov_epi16(first, static_cast<__mmask32>(second),
                                               _mm512_or_si512(first, set1(1)));
    return _mm512_maskz_permutexvar_epi16(static_cast<__mmask32>(keep), slot, values);
  }
  // 32 slots of 64 elements. 128 bits of slots read 16 bits of meta.
  static __m512i gather(__m512i a, __m512i b, uint64_t meta) {
    const __m512i bits = _mm512_permutexvar_epi16(
        _mm512_cvtepi8_epi16(
            _mm256_set_epi64x(0x0303030303030303, 0x0202020202020202, 0x0101010101010101, 0)),
        Lanes<uint64_t>::set1(meta));
    const __m512i field =
        _mm512_srlv_epi16(bits, every_lane(_mm_setr_epi16(0, 2, 4, 6, 8, 10, 12, 14)));
    const __m512i group = _mm512_cvtepi8_epi16(_mm256_set_epi64x(
        0x3c3c383834343030, 0x2c2c282824242020, 0x1c1c181814141010, 0x0c0c080804040000));
    const __m512i index = _mm512_ternarylogic_epi32(field, set1(3), group, 0xea);
    return _mm512_permutex2var_epi16(a, index, b);
  }
};

template <>
struct Lanes<uint8_t> {
  static __m512i set1(uint8_t w) { return _mm512_set1_epi8(static_cast<char>(w)); }
  static __m512i zero_unless(uint64_t k, __m512i v) { return _mm512_maskz_mov_epi8(k, v); }
  static __m512i compress(uint64_t k, __m512i v) { return _mm512_maskz_compress_epi8(k, v); }
  // 16 elements, in 128 bits, have their 8 values in the low half.
  static __m512i spread(uint64_t keep, uint64_t second, __m512i values) {
    const __m512i first = every_lane(_mm_set_epi64x(0x0606060604040404, 0x0202020200000000));
    const __m512i slot = _mm512_mask_mov_epi8(first, second, _mm512_or_si512(first, set1(1)));
    const __m512i near =
        _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 0, 1, 1, 2, 2, 3, 3), values);
    return _mm512_maskz_shuffle_epi8(keep, near, slot);
  }
  // 32 slots of 64 elements: a nibble per 16-bit lane, its two fields split to the two bytes.
  static __m512i gather(__m512i a, uint64_t meta) {
    const __m512i bits = _mm512_permutexvar_epi16(
        _mm512_cvtepi8_epi16(
            _mm256_set_epi64x(0x0303030303030303, 0x0202020202020202, 0x0101010101010101, 0)),
        Lanes<uint64_t>::set1(meta));
    const __m512i nibble =
        _mm512_srlv_epi16(bits, every_lane(_mm_setr_epi16(0, 4, 8, 12, 0, 4, 8, 12)));
    const __m512i fields = _mm512_ternarylogic_epi32(
        Lanes<uint16_t>::set1(0xff), nibble, _mm512_slli_epi16(nibble, 6), 0xca);  // x ? y : z
    const __m512i index =
        _mm512_ternarylogic_epi32(fields, set1(3), _mm512_set1_epi64(0x0c0c080804040000), 0xea);
    return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 0, 2, 4, 6),
                                    _mm512_shuffle_epi8(a, index));
  }
};

// ---- which elements of a vector are kept ----

template <class T>
uint64_t kept(__m512i v) {
  using Word = typename T::Word;
  using L = Lanes<Word>;
  if constexpr (sizeof(Word) > 1) {
    const __m512i m = _mm512_and_si512(v, L::set1(T::kMagnitude));
    const __m512i d1 = L::sub(L::rot1(m), L::add(m, L::each_group(1, 1, 1, 0)));
    const __m512i d2 = L::sub(L::rot2(m), L::add(m, L::each_group(1, 1, 0, 0)));
    return L::signs(_mm512_ternarylogic_epi32(d1, d2, L::rot3(d1), 0xd4));  // majority(x, y, !z)
  } else {
    const __m512i m = std::is_same_v<T, I8> ? _mm512_abs_epi8(v) : v;
    const auto shuffled = [&](int order) {
      return _mm512_shuffle_epi8(
          m,
          every_lane(_mm_add_epi8(_mm_set1_epi32(order), _mm_setr_epi8(0, 0, 0, 0, 4, 4, 4, 4, 8, 8,
                                                                       8, 8, 12, 12, 12, 12))));
    };
    // Lane by lane: 0>=1, 1>=2, 2>=3, 0>=3 and 0>=2, 1>=3, 0>=2, 1>=3.
    const uint64_t next = _mm512_cmpge_epu8_mask(shuffled(0x00020100), shuffled(0x03030201));
    const uint64_t across = _mm512_cmpge_epu8_mask(shuffled(0x01000100), shuffled(0x03020302));
    const uint64_t before = (next << 1 & 0xeeeeeeeeeeeeeeee) | (next >> 3 & 0x1111111111111111);
    const uint64_t x = next ^ 0x8888888888888888, y = across ^ 0xcccccccccccccccc,
                   z = before ^ 0xeeeeeeeeeeeeeeee;
    return (x & y) | (z & (x | y));
  }
}

// A kept zero is stored as +0.0, so that the bytes do not depend on which zero was named.
template <class T>
__m512i canonical(__m512i v) {
  using L = Lanes<typename T::Word>;
  if constexpr (kIsFloat<T>) return L::zero_unless(L::test(v, L::set1(T::kMagnitude)), v);
  return v;
}

// ---- 64 keep bits or 8 bytes of meta, in general registers ----

// Each nibble of `word` through a table.
uint64_t map_nibbles(uint64_t word, __m128i low, __m128i high) {
  const __m128i x = _mm_cvtsi64_si128(static_cast<int64_t>(word)), nibble = _mm_set1_epi8(15);
  const __m128i y =
      _mm_or_si128(_mm_shuffle_epi8(low, _mm_and_si128(x, nibble)),
                   _mm_shuffle_epi8(high, _mm_and_si128(_mm_srli_epi16(x, 4), nibble)));
  return static_cast<uint64_t>(_mm_cvtsi128_si64(y));
}
uint64_t map_nibbles(uint64_t word, int64_t entries0, int64_t entries8) {
  const __m128i table = _mm_set_epi64x(entries8, entries0);
  return map_nibbles(word, table, _mm_slli_epi16(table, 4));
}

uint64_t meta_of_keep(uint64_t keep) {
  return map_nibbles(keep, 0x0009080004000000, 0x0000000e000d0c00);
}
// Nibble i0 | i1 << 2 to bits i0 and i1; to bit i1 alone.
uint64_t keep_of_meta(uint64_t meta) {
  return map_nibbles(meta, 0x0a06020309050301, 0x080c0a090c040605);
}
uint64_t second_of_meta(uint64_t meta) {
  return map_nibbles(meta, 0x0202020201010101, 0x0808080804040404);
}

// ---- blocks ----

template <class Word>
constexpr int kLanes = 64 / sizeof(Word);

template <class T>
void prune_blocks(const typename T::Word* in, typename T::Word* out, int64_t blocks) {
  using L = Lanes<typename T::Word>;
  constexpr int n = kLanes<typename T::Word>;
  for (int64_t i = 0; i < blocks * kFormatBlock; i += n) {
    const __m512i v = load(in + i);
    store(out + i, L::zero_unless(kept<T>(v), canonical<T>(v)));
  }
}

template <class T>
void pack_blocks(const typename T::Word* in, typename T::Word* values, uint8_t* meta,
                 int64_t blocks) {
  using L = Lanes<typename T::Word>;
  constexpr int n = kLanes<typename T::Word>;
  for (int64_t b = 0; b < blocks; ++b, meta += 8) {
    uint64_t keep = 0;
    for (int i = 0; i < kFormatBlock; i += n, in += n, values += n / 2) {
      const __m512i v = load(in);
      const uint64_t k = kept<T>(v);
      store_half(values, L::compress(k, canonical<T>(v)));
      keep |= k << i;
    }
    const uint64_t packed = meta_of_keep(keep);
    std::memcpy(meta, &packed, sizeof packed);
  }
}

template <class Word>
void unpack_blocks(const Word* values, const uint8_t* meta, Word* out, int64_t blocks) {
  constexpr int n = kLanes<Word>;
  for (int64_t b = 0; b < blocks; ++b, meta += 8) {
    uint64_t packed;
    std::memcpy(&packed, meta, sizeof packed);
    const uint64_t keep = keep_of_meta(packed), second = second_of_meta(packed);
    for (int i = 0; i < kFormatBlock; i += n, out += n, values += n / 2) {
      store(out, Lanes<Word>::spread(keep >> i, second >> i, load_half(values)));
    }
  }
}

template <class Word>
void gather_blocks(const Word* in, const uint8_t* meta, Word* values, int64_t blocks) {
  constexpr int n = kLanes<Word>;
  for (int64_t b = 0; b < blocks; ++b, meta += 8) {
    uint64_t packed;
    std::memcpy(&packed, meta, sizeof packed);
    if constexpr (sizeof(Word) == 1) {
      store_half(values, Lanes<Word>::gather(load(in), packed));
      in += n, values += n / 2;
    } else {
      for (int i = 0; i < kFormatBlock / 2; i += n, in += 2 * n, values += n) {
        store(values, Lanes<Word>::gather(load(in), load(in + n), packed >> 2 * i));
      }
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
    gather_blocks(static_cast<const Word*>(dense), meta, static_cast<Word*>(values), blocks);
  });
}

}  // namespace

const Format24Kernels format_24_avx512 = {prune, pack, unpack, gather};

}  // namespace sparsekern::cpu

SPARSEKERN_TARGET_END
#endif
