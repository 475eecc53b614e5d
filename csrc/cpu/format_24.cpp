// prune_24, pack_24, unpack_24, gather_24, prune_24_transposable on the CPU.
//
//   weight  a b c d | e f g h      magnitudes, as integers: |bits| for floats, |v| for signed, v
//   for unsigned
//           six compares a>=b, a>=c, …, c>=d: element i "wins" against j, a tie goes to the lower
//           index kept    = the two elements with at least two wins (a NaN's bits exceed
//           infinity's, so it wins) nibble  = kKept[wins as 4 bits]
//
// Portable code on purpose: the selection is branch-free and compilers vectorise the compares.
// Limited by: bytes (weight read once, result written once) once it is vectorised; by the compares
// until then.
#include <cstring>
#include <limits>
#include <type_traits>

#include "convert.h"
#include "kernels.h"
#include "threads.h"

namespace sparsekern::cpu {
namespace {

// Keep mask (bit i: position i kept; two bits set) to the nibble i0 | i1 << 2.
constexpr uint8_t kNibble[16] = {0, 0, 0, 4, 0, 8, 9, 0, 0, 12, 13, 0, 14, 0, 0, 0};
constexpr int64_t kGrain = 1 << 15;  // elements a thread is worth waking for

// What the formats need to know of an element type: its bits, and its magnitude as an ordered
// integer.
template <class Bits>
struct Float {
  using Word = Bits;
  static Bits magnitude(Bits w) { return w & (std::numeric_limits<Bits>::max() >> 1); }
};
struct Signed8 {
  using Word = uint8_t;
  static uint8_t magnitude(uint8_t w) { return w & 0x80 ? static_cast<uint8_t>(-w) : w; }
};
struct Unsigned8 {
  using Word = uint8_t;
  static uint8_t magnitude(uint8_t w) { return w; }
};

// Calls f with the type that describes `dtype`.
template <class F>
void with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::f32: return f(Float<uint32_t>{});
    case DType::f16:
    case DType::bf16: return f(Float<uint16_t>{});
    case DType::f64: return f(Float<uint64_t>{});
    case DType::i8: return f(Signed8{});
    case DType::u8: return f(Unsigned8{});
  }
}

template <class F>
void with_word(DType dtype, F f) {
  with_type(dtype, [&](auto type) { f(typename decltype(type)::Word{}); });
}

// The keep mask of one group: exactly two bits.
template <class T>
inline unsigned keep_mask(const typename T::Word* g) {
  const auto a = T::magnitude(g[0]), b = T::magnitude(g[1]), c = T::magnitude(g[2]),
             d = T::magnitude(g[3]);
  const int ab = a >= b, ac = a >= c, ad = a >= d, bc = b >= c, bd = b >= d, cd = c >= d;
  const unsigned keep_a = ab + ac + ad >= 2, keep_b = !ab + bc + bd >= 2;
  const unsigned keep_c = !ac + !bc + cd >= 2, keep_d = !ad + !bd + !cd >= 2;
  return keep_a | keep_b << 1 | keep_c << 2 | keep_d << 3;
}

// A kept zero is stored as +0.0, so that the bytes do not depend on which zero was named.
template <class T>
inline typename T::Word canonical(typename T::Word w) {
  return T::magnitude(w) ? w : typename T::Word{0};
}

template <class T>
void prune_groups(const typename T::Word* in, typename T::Word* out, int64_t groups) {
  for (int64_t g = 0; g < groups; ++g, in += 4, out += 4) {
    const unsigned keep = keep_mask<T>(in);
    for (int i = 0; i < 4; ++i) out[i] = keep >> i & 1 ? canonical<T>(in[i]) : typename T::Word{0};
  }
}

template <class T>
void pack_row(const typename T::Word* in, typename T::Word* values, uint8_t* meta, int64_t groups) {
  for (int64_t g = 0; g < groups; ++g, in += 4, values += 2) {
    const unsigned nibble = kNibble[keep_mask<T>(in)];
    values[0] = canonical<T>(in[nibble & 3]);
    values[1] = canonical<T>(in[nibble >> 2]);
    if (g % 2 == 0) {
      meta[g / 2] = static_cast<uint8_t>(nibble | kEmptyNibble << 4);
    } else {
      meta[g / 2] = static_cast<uint8_t>((meta[g / 2] & 15) | nibble << 4);
    }
  }
}

template <class Word>
void unpack_row(const Word* values, const uint8_t* meta, Word* dense, int64_t groups) {
  for (int64_t g = 0; g < groups; ++g, values += 2, dense += 4) {
    const unsigned nibble = meta[g / 2] >> (g % 2 * 4) & 15;
    // Straight to memory: through a local array, the load after the scattered stores would stall.
    dense[0] = dense[1] = dense[2] = dense[3] = 0;
    dense[nibble & 3] = values[0];
    dense[nibble >> 2] = values[1];
  }
}

template <class Word>
void gather_row(const Word* dense, const uint8_t* meta, Word* values, int64_t groups) {
  for (int64_t g = 0; g < groups; ++g, values += 2, dense += 4) {
    const unsigned nibble = meta[g / 2] >> (g % 2 * 4) & 15;
    values[0] = dense[nibble & 3];
    values[1] = dense[nibble >> 2];
  }
}

// ---- 4x4 tiles, two kept in every row and every column ----

// The 6 ways to keep two of four, in the order that breaks ties, and the 90 ways to stack four of
// them so that every column also keeps two. The order is lexicographic; reference.py builds the
// same list.
constexpr uint8_t kPairs[6] = {0b0011, 0b0101, 0b1001, 0b0110, 0b1010, 0b1100};

struct TileMasks {
  uint8_t row[90][4];  // indices into kPairs
};

constexpr TileMasks make_tile_masks() {
  TileMasks t{};
  int count = 0;
  for (int i = 0; i < 6 * 6 * 6 * 6; ++i) {
    const int r[4] = {i / 216, i / 36 % 6, i / 6 % 6, i % 6};
    bool balanced = true;
    for (int column = 0; column < 4; ++column) {
      int kept = 0;
      for (int row = 0; row < 4; ++row) kept += kPairs[r[row]] >> column & 1;
      balanced = balanced && kept == 2;
    }
    if (!balanced) continue;
    for (int row = 0; row < 4; ++row) t.row[count][row] = static_cast<uint8_t>(r[row]);
    ++count;
  }
  return t;
}
constexpr TileMasks kTileMasks = make_tile_masks();
static_assert(kTileMasks.row[89][0] == 5 && kTileMasks.row[89][3] == 0,
              "90 masks, no more and no fewer");

// Magnitude as the number whose sum is maximised: fp32, or fp64 for fp64; a NaN counts as infinity.
template <class Score>
Score magnitude_of(const void* p, int64_t i, DType dtype) {
  Score v;
  switch (dtype) {
    case DType::f64: v = static_cast<Score>(static_cast<const double*>(p)[i]); break;
    case DType::i8: v = static_cast<const int8_t*>(p)[i]; break;
    case DType::u8: v = static_cast<const uint8_t*>(p)[i]; break;
    default: v = load_float(p, i, dtype);
  }
  if (v != v) return std::numeric_limits<Score>::infinity();
  return v < 0 ? -v : v;
}

template <class T, class Score>
void prune_tile(const typename T::Word* in, typename T::Word* out, int64_t K, DType dtype) {
  Score pair[4][6];
  for (int r = 0; r < 4; ++r) {
    Score m[4];
    for (int c = 0; c < 4; ++c) m[c] = magnitude_of<Score>(in + r * K, c, dtype);
    const Score sums[6] = {m[0] + m[1], m[0] + m[2], m[0] + m[3],
                           m[1] + m[2], m[1] + m[3], m[2] + m[3]};
    std::memcpy(pair[r], sums, sizeof sums);
  }
  int best = 0;
  Score best_score = -1;
  for (int i = 0; i < 90; ++i) {
    const uint8_t* r = kTileMasks.row[i];
    const Score score = (pair[0][r[0]] + pair[1][r[1]]) + (pair[2][r[2]] + pair[3][r[3]]);
    if (score > best_score) best = i, best_score = score;
  }
  for (int r = 0; r < 4; ++r) {
    const unsigned keep = kPairs[kTileMasks.row[best][r]];
    for (int c = 0; c < 4; ++c) {
      const auto w = in[r * K + c];
      out[r * K + c] = keep >> c & 1 ? canonical<T>(w) : typename T::Word{0};
    }
  }
}

}  // namespace

void prune_24(const void* weight, void* out, int64_t rows, int64_t K, DType dtype, int threads) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    using Word = typename T::Word;
    parallel_for(rows * K / 4, kGrain / 4, 1, threads, [&](int64_t begin, int64_t end) {
      prune_groups<T>(static_cast<const Word*>(weight) + begin * 4,
                      static_cast<Word*>(out) + begin * 4, end - begin);
    });
  });
}

void pack_24(const void* weight, void* values, uint8_t* meta, int64_t rows, int64_t K, DType dtype,
             int threads) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    using Word = typename T::Word;
    parallel_for(rows, kGrain / (K + 1) + 1, 1, threads, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        pack_row<T>(static_cast<const Word*>(weight) + r * K,
                    static_cast<Word*>(values) + r * (K / 2), meta + r * meta_bytes(K), K / 4);
      }
    });
  });
}

void unpack_24(const void* values, const uint8_t* meta, void* dense, int64_t rows, int64_t K,
               DType dtype, int threads) {
  with_word(dtype, [&](auto word) {
    using Word = decltype(word);
    parallel_for(rows, kGrain / (K + 1) + 1, 1, threads, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        unpack_row(static_cast<const Word*>(values) + r * (K / 2), meta + r * meta_bytes(K),
                   static_cast<Word*>(dense) + r * K, K / 4);
      }
    });
  });
}

void gather_24(const void* dense, const uint8_t* meta, void* values, int64_t rows, int64_t K,
               DType dtype, int threads) {
  with_word(dtype, [&](auto word) {
    using Word = decltype(word);
    parallel_for(rows, kGrain / (K + 1) + 1, 1, threads, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        gather_row(static_cast<const Word*>(dense) + r * K, meta + r * meta_bytes(K),
                   static_cast<Word*>(values) + r * (K / 2), K / 4);
      }
    });
  });
}

void prune_24_transposable(const void* weight, void* out, int64_t rows, int64_t K, DType dtype,
                           int threads) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    using Word = typename T::Word;
    using Score = std::conditional_t<std::is_same_v<Word, uint64_t>, double, float>;
    parallel_for(rows / 4, kGrain / 16 / (K + 1) + 1, 1, threads, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin * 4; r < end * 4; r += 4) {
        for (int64_t k = 0; k < K; k += 4) {
          prune_tile<T, Score>(static_cast<const Word*>(weight) + r * K + k,
                               static_cast<Word*>(out) + r * K + k, K, dtype);
        }
      }
    });
  });
}

}  // namespace sparsekern::cpu
