// Zero-value compression of one tile (at most 4096 elements) on one thread.
//
//   x       a 0 0 b 0 0 c 0    1, 2, 4 or 8 bytes each, compared on all bits: -0.0 is not a zero
//   mask    1 0 0 1 0 0 1 0    one bit each, lowest bit first
//   values  a b c              compress: marked lanes move together; expand: they spread out again
//
// A tier Z<Word> supplies, for kLanes elements at a time:
//   kLanes                      a multiple of 8, so that a step is whole bytes of mask
//   nonzero(x)                  kLanes bits
//   compress(x, bits, out)      writes the marked lanes together, may write up to 64 bytes in all
//   expand(values, bits, x)     reads up to 64 bytes of values, writes kLanes elements
// Tails shorter than kLanes, at most one per tensor, run on the scalar code below.
// Limited by: bytes. What a lane shuffle costs decides whether a tier gets there.
#pragma once

#include <cstring>

#include "kernels.h"

namespace sparsekern::cpu {

template <template <class> class Z>
struct Zvc {
  template <class F>
  static auto with_word(int size, F f) {
    switch (size) {
      case 1: return f(uint8_t{});
      case 2: return f(uint16_t{});
      case 4: return f(uint32_t{});
      default: return f(uint64_t{});
    }
  }

  template <class Word>
  static int64_t mask_words(const Word* x, int64_t n, uint8_t* mask) {
    constexpr int L = Z<Word>::kLanes;
    int64_t count = 0, i = 0;
    for (; i + L <= n; i += L) {
      const uint64_t bits = Z<Word>::nonzero(x + i);
      std::memcpy(mask + i / 8, &bits, L / 8);
      count += __builtin_popcountll(bits);
    }
    for (; i < n; i += 8) {
      unsigned bits = 0;
      for (int64_t j = i; j < n && j < i + 8; ++j) bits |= unsigned{x[j] != 0} << (j - i);
      mask[i / 8] = static_cast<uint8_t>(bits);
      count += __builtin_popcount(bits);
    }
    return count;
  }

  template <class Word>
  static void compress_words(const Word* x, const uint8_t* mask, int64_t n, Word* values) {
    constexpr int L = Z<Word>::kLanes;
    int64_t i = 0;
    for (; i + L <= n; i += L) {
      uint64_t bits = 0;
      std::memcpy(&bits, mask + i / 8, L / 8);
      Z<Word>::compress(x + i, bits, values);
      values += __builtin_popcountll(bits);
    }
    for (; i < n; ++i) {
      *values = x[i];  // always written, kept when the bit says so: no branch to mispredict
      values += mask[i / 8] >> (i % 8) & 1;
    }
  }

  template <class Word>
  static void expand_words(const Word* values, const uint8_t* mask, int64_t n, Word* x) {
    constexpr int L = Z<Word>::kLanes;
    int64_t i = 0;
    for (; i + L <= n; i += L) {
      uint64_t bits = 0;
      std::memcpy(&bits, mask + i / 8, L / 8);
      Z<Word>::expand(values, bits, x + i);
      values += __builtin_popcountll(bits);
    }
    for (; i < n; ++i) {
      const unsigned bit = mask[i / 8] >> (i % 8) & 1;
      x[i] = bit ? *values : Word{0};
      values += bit;
    }
  }

  static int64_t mask(const void* x, int64_t n, int size, uint8_t* mask) {
    return with_word(
        size, [&](auto w) { return mask_words(static_cast<const decltype(w)*>(x), n, mask); });
  }
  static void compress(const void* x, const uint8_t* mask, int64_t n, int size, void* values) {
    with_word(size, [&](auto w) {
      using Word = decltype(w);
      compress_words(static_cast<const Word*>(x), mask, n, static_cast<Word*>(values));
    });
  }
  static void expand(const void* values, const uint8_t* mask, int64_t n, int size, void* x) {
    with_word(size, [&](auto w) {
      using Word = decltype(w);
      expand_words(static_cast<const Word*>(values), mask, n, static_cast<Word*>(x));
    });
  }
};

}  // namespace sparsekern::cpu
