// The 2:4 formats for every machine.
//
//   weight  a b c d   magnitudes, as integers: |bits| for floats, |v| for signed, v for unsigned
//   six compares a>=b, a>=c, …, c>=d: element i "wins" against j, a tie goes to the lower index
//   kept    = the two elements with at least two wins (a NaN's bits exceed infinity's, so it wins)
//   nibble  = kNibble[wins as 4 bits]
//
// Branch-free scalar code. Limited by operations: about 30 a group.
#include "format_24.h"
#include "kernels.h"

namespace sparsekern::cpu {
namespace {

// The keep mask of one group: exactly two bits.
template <class T>
unsigned keep_mask(const typename T::Word* g) {
  const auto a = magnitude<T>(g[0]), b = magnitude<T>(g[1]), c = magnitude<T>(g[2]),
             d = magnitude<T>(g[3]);
  const int ab = a >= b, ac = a >= c, ad = a >= d, bc = b >= c, bd = b >= d, cd = c >= d;
  const unsigned keep_a = ab + ac + ad >= 2, keep_b = !ab + bc + bd >= 2;
  const unsigned keep_c = !ac + !bc + cd >= 2, keep_d = !ad + !bd + !cd >= 2;
  return keep_a | keep_b << 1 | keep_c << 2 | keep_d << 3;
}

template <class T>
void prune_groups(const typename T::Word* in, typename T::Word* out, int64_t groups) {
  for (int64_t g = 0; g < groups; ++g, in += 4, out += 4) {
    const unsigned keep = keep_mask<T>(in);
    for (int i = 0; i < 4; ++i) out[i] = keep >> i & 1 ? canonical<T>(in[i]) : typename T::Word{0};
  }
}

template <class T>
unsigned pack_group(const typename T::Word* in, typename T::Word* values) {
  const unsigned nibble = kNibble[keep_mask<T>(in)];
  values[0] = canonical<T>(in[nibble & 3]);
  values[1] = canonical<T>(in[nibble >> 2]);
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
