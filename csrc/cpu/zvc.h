// Zero-value compression of one tile (at most 4096 elements) on one thread.
//
//   x       a 0 0 b 0 0 c 0    1, 2, 4 or 8 bytes each, compared on all bits: -0.0 is not a zero
//   mask    1 0 0 1 0 0 1 0    one bit each, lowest bit first
//   values  a b c              compress: marked lanes move together; expand: they spread out again
//
// A tier Z<size> supplies, for 64 elements of `size` bytes, which is one word of mask:
//   compress(x, values, mask)   sets mask, writes the marked elements together, returns where they
//                               end; may write up to 64 bytes past that end
//   expand(values, mask, x)     writes 64 elements, returns where their values end; may read up to
//                               64 bytes past that end
// and store_lines, stream_lines(to, from, bytes): copies of whole lines of 64 bytes, `to` on the
// border of one, through the cache or past it.
// Fewer than 64 elements, at most once per tensor, run on the scalar code below. Addresses are of
// bytes: nothing is assumed to be aligned.
// Limited by: bytes. What a lane shuffle costs decides whether a tier gets there.
#pragma once

#include <cstring>

#include "kernels.h"

namespace sparsekern::cpu {

template <template <int> class Z>
struct Zvc {
  template <int kSize>
  static int64_t compress_sized(const uint8_t* x, int64_t n, uint8_t* mask, uint8_t* values) {
    const uint8_t* const start = values;
    int64_t i = 0;
    for (; i + 64 <= n; i += 64) {
      uint64_t marked;
      values = Z<kSize>::compress(x + i * kSize, values, marked);
      std::memcpy(mask + i / 8, &marked, sizeof marked);
    }
    for (; i < n; i += 8) {
      unsigned marked = 0;
      for (int64_t j = i; j < n && j < i + 8; ++j) {
        uint64_t word = 0;
        std::memcpy(&word, x + j * kSize, kSize);
        std::memcpy(values, &word, kSize);  // always written, kept when it is not zero: no branch
        values += word != 0 ? kSize : 0;
        marked |= unsigned{word != 0} << (j - i);
      }
      mask[i / 8] = static_cast<uint8_t>(marked);
    }
    return (values - start) / kSize;
  }

  template <int kSize>
  static int64_t expand_sized(const uint8_t* values, const uint8_t* mask, int64_t n, uint8_t* x) {
    const uint8_t* const start = values;
    int64_t i = 0;
    for (; i + 64 <= n; i += 64) {
      uint64_t marked;
      std::memcpy(&marked, mask + i / 8, sizeof marked);
      values = Z<kSize>::expand(values, marked, x + i * kSize);
    }
    for (; i < n; ++i) {
      const bool bit = mask[i / 8] >> (i % 8) & 1;
      uint64_t word = 0;
      std::memcpy(&word, values, kSize);
      word = bit ? word : 0;
      std::memcpy(x + i * kSize, &word, kSize);
      values += bit ? kSize : 0;
    }
    return (values - start) / kSize;
  }

  static int64_t compress(const void* from, int64_t n, int size, uint8_t* mask, void* to) {
    const auto* x = static_cast<const uint8_t*>(from);
    auto* values = static_cast<uint8_t*>(to);
    switch (size) {
      case 1: return compress_sized<1>(x, n, mask, values);
      case 2: return compress_sized<2>(x, n, mask, values);
      case 4: return compress_sized<4>(x, n, mask, values);
      default: return compress_sized<8>(x, n, mask, values);
    }
  }

  static int64_t expand(const void* from, const uint8_t* mask, int64_t n, int size, void* to) {
    const auto* values = static_cast<const uint8_t*>(from);
    auto* x = static_cast<uint8_t*>(to);
    switch (size) {
      case 1: return expand_sized<1>(values, mask, n, x);
      case 2: return expand_sized<2>(values, mask, n, x);
      case 4: return expand_sized<4>(values, mask, n, x);
      default: return expand_sized<8>(values, mask, n, x);
    }
  }

  static int64_t count(const uint8_t* mask, int64_t n) {
    int64_t total = 0, i = 0;
    for (; i + 64 <= n; i += 64) {
      uint64_t marked;
      std::memcpy(&marked, mask + i / 8, sizeof marked);
      total += __builtin_popcountll(marked);
    }
    for (; i < n; i += 8) total += __builtin_popcount(mask[i / 8]);
    return total;
  }

  template <void (*kLines)(uint8_t*, const uint8_t*, int64_t)>
  static int64_t put(void* to, const void* from, int64_t bytes) {
    auto* out = static_cast<uint8_t*>(to);
    const auto* in = static_cast<const uint8_t*>(from);
    const int64_t head = -reinterpret_cast<uintptr_t>(out) & 63;
    if (bytes < head) return 0;
    std::memcpy(out, in, static_cast<size_t>(head));
    const int64_t lines = (bytes - head) & ~int64_t{63};
    kLines(out + head, in + head, lines);
    return head + lines;
  }
};

}  // namespace sparsekern::cpu
