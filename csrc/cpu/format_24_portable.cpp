// The 2:4 formats for every machine.
//
//   weight  a b c d   magnitudes, as integers: |bits| for floats, |v| for signed, v for unsigned
//   six compares a>=b, a>=c, …, c>=d: element i "wins" against j, a tie goes to the lower index
//   kept    = the two elements with at least two wins (a NaN's bits exceed infinity's, so it wins)
//
// Branch-free code: a branch on which elements are kept would be taken at random, and costs six
// times as much. Limited by operations: about 40 a group.
#include "format_24.h"
#include "kernels.h"

namespace sparsekern::cpu {
namespace {

// Keep mask of a group (bit i: position i kept; two bits set) to the nibble i0 | i1 << 2.
constexpr uint8_t kNibble[16] = {0, 0, 0, 4, 0, 8, 9, 0, 0, 12, 13, 0, 14, 0, 0, 0};

// Which of four elements are kept, each 0 or 1: exactly two. In words of 32 bits at least: narrower
// ones cost twice as much in general registers.
template <class Word>
struct Kept {
  Word a, b, c, d;
};
template <class T>
using Wide = std::conditional_t<sizeof(typename T::Word) == 8, uint64_t, uint32_t>;

template <class T>
Kept<Wide<T>> kept(const typename T::Word* g) {
  using Word = Wide<T>;
  const Word a = magnitude<T>(g[0]), b = magnitude<T>(g[1]), c = magnitude<T>(g[2]),
             d = magnitude<T>(g[3]);
  const Word ab = a >= b, ac = a >= c, ad = a >= d, bc = b >= c, bd = b >= d, cd = c >= d;
  const auto majority = [](Word x, Word y, Word z) -> Word { return (x & y) | (z & (x | y)); };
  return {majority(ab, ac, ad), majority(ab ^ 1, bc, bd), majority(ac ^ 1, bc ^ 1, cd),
          majority(ad ^ 1, bd ^ 1, cd ^ 1)};
}

// w or zero, without a branch, which would be taken at random; a kept zero is +0.0.
template <class T>
typename T::Word masked(typename T::Word w, Wide<T> kept) {
  const Wide<T> keep = kept & Wide<T>{magnitude<T>(w) != 0};
  return static_cast<typename T::Word>(w & (Wide<T>{0} - keep));
}

template <class T>
void prune_groups(const typename T::Word* in, typename T::Word* out, int64_t groups) {
  for (int64_t g = 0; g < groups; ++g, in += 4, out += 4) {
    const auto keep = kept<T>(in);
    out[0] = masked<T>(in[0], keep.a);
    out[1] = masked<T>(in[1], keep.b);
    out[2] = masked<T>(in[2], keep.c);
    out[3] = masked<T>(in[3], keep.d);
  }
}

template <class T>
unsigned pack_group(const typename T::Word* in, typename T::Word* values) {
  const auto keep = kept<T>(in);
  const unsigned nibble = kNibble[keep.a | keep.b << 1 | keep.c << 2 | keep.d << 3];
  values[0] = masked<T>(in[nibble & 3], 1);
  values[1] = masked<T>(in[nibble >> 2], 1);
  return nibble;
}

template <class Word>
void unpack_group(const Word* values, unsigned nibble, Word* out) {
  // Straight to memory: through a local array, the load after the scattered stores would stall.
  out[0] = out[1] = out[2] = out[3] = 0;
  out[nibble & 3] = values[0];
  out[nibble >> 2] = values[1];
}

void prune(const void* weight, void* out, int64_t blocks, DType dtype) {
  with_order(dtype, [&](auto type) {
    using T = decltype(type);
    using Word = typename T::Word;
    prune_groups<T>(static_cast<const Word*>(weight), static_cast<Word*>(out),
                    blocks * kFormatBlock / 4);
  });
}

void pack(const void* weight, void* values, uint8_t* meta, int64_t blocks, DType dtype) {
  with_order(dtype, [&](auto type) {
    using T = decltype(type);
    using Word = typename T::Word;
    auto in = static_cast<const Word*>(weight);
    auto kept = static_cast<Word*>(values);
    for (int64_t i = 0; i < blocks * 8; ++i, in += 8, kept += 4) {
      const unsigned even = pack_group<T>(in, kept), odd = pack_group<T>(in + 4, kept + 2);
      meta[i] = static_cast<uint8_t>(even | odd << 4);
    }
  });
}

void unpack(const void* values, const uint8_t* meta, void* dense, int64_t blocks, int size) {
  with_word(size, [&](auto word) {
    using Word = decltype(word);
    auto kept = static_cast<const Word*>(values);
    auto out = static_cast<Word*>(dense);
    for (int64_t i = 0; i < blocks * 8; ++i, kept += 4, out += 8) {
      unpack_group(kept, meta[i] & 15u, out);
      unpack_group(kept + 2, meta[i] >> 4, out + 4);
    }
  });
}

void gather(const void* dense, const uint8_t* meta, void* values, int64_t blocks, int size) {
  with_word(size, [&](auto word) {
    using Word = decltype(word);
    auto in = static_cast<const Word*>(dense);
    auto kept = static_cast<Word*>(values);
    for (int64_t i = 0; i < blocks * 8; ++i, in += 8, kept += 4) {
      for (int slot = 0; slot < 4; ++slot) {
        kept[slot] = in[slot / 2 * 4 + (meta[i] >> 2 * slot & 3)];
      }
    }
  });
}

}  // namespace

const Format24Kernels format_24_portable = {prune, pack, unpack, gather};

}  // namespace sparsekern::cpu
