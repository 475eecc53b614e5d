// prune_24_transposable: of every 4 x 4 tile two elements stay in each row and each column, the pattern
// of largest sum out of 90.
//
//   weight   row 4r     a b c d | e f g h | …        a thread takes a tile, its rows four vectors
//            row 4r+1   . . . . | . . . . |          thread  0         1
//   pairs    p[row][pair], the six sums of two of a row
//   score    (p[0] + p[1]) + (p[2] + p[3]), 90 of the 6^4 in lexicographic order; only a larger one
//            replaces the best, so the first of equals stays
//
// The sums round in the order that reference.py spells out, so every back end keeps the same elements.
// A NaN counts as infinity. 8- and 16-bit types are summed in fp32, fp64 in fp64.
//
// Lowest architecture: sm_80 (nothing here needs it). Limited by: operations. A tile is 24 + 36 + 90 + 90
// sums and 90 comparisons with a selection each, about 350 operations for 16 elements; at 2 bytes an
// element that is five times what the bytes take. Everything is unrolled: 24 sums live in registers.
#include "ptx.cuh"

namespace sparsekern::cuda {

struct Tiles24 {
  const void* weight;  // [N, K]
  void* out;
  int64_t tiles_per_row, tiles, K;
  int64_t vectors;  // rows of tiles are aligned to 4 elements, 16 bytes at most
};

namespace {

constexpr int kThreads = 128;
constexpr int kMasks = 90;
constexpr uint8_t kPairs[6] = {0b0011, 0b0101, 0b1001, 0b0110, 0b1010, 0b1100};

struct Masks {
  uint8_t upper[kMasks], lower[kMasks];  // rows 0 and 1, rows 2 and 3: 6 * pair + pair
  uint16_t keep[kMasks];                 // bit 4 * row + column
};

constexpr Masks make_masks() {
  Masks t{};
  int count = 0;
  for (int i = 0; i < 6 * 6 * 6 * 6; ++i) {
    const int pairs[4] = {i / 216, i / 36 % 6, i / 6 % 6, i % 6};
    int keep = 0, kept[4] = {};
    for (int row = 0; row < 4; ++row) {
      keep |= kPairs[pairs[row]] << 4 * row;
      for (int column = 0; column < 4; ++column) kept[column] += kPairs[pairs[row]] >> column & 1;
    }
    if (kept[0] != 2 || kept[1] != 2 || kept[2] != 2 || kept[3] != 2) continue;
    t.upper[count] = static_cast<uint8_t>(i / 36);
    t.lower[count] = static_cast<uint8_t>(i % 36);
    t.keep[count++] = static_cast<uint16_t>(keep);
  }
  return t;
}
constexpr Masks kTileMasks = make_masks();
static_assert(kTileMasks.keep[kMasks - 1] == 0x33cc, "90 masks, no more and no fewer");

template <DType D>
struct Type;  // Word: the bits; Score: what sums are kept in
template <>
struct Type<DType::f16> {
  using Word = uint16_t;
  using Score = float;
};
template <>
struct Type<DType::bf16> : Type<DType::f16> {};
template <>
struct Type<DType::f32> {
  using Word = uint32_t;
  using Score = float;
};
template <>
struct Type<DType::f64> {
  using Word = uint64_t;
  using Score = double;
};
template <>
struct Type<DType::i8> {
  using Word = uint8_t;
  using Score = float;
};
template <>
struct Type<DType::u8> : Type<DType::i8> {};

// The bits without the sign; zero only for a zero.
template <DType D, class Word>
__device__ __forceinline__ Word magnitude(Word w) {
  if constexpr (D == DType::u8) return w;
  if constexpr (D == DType::i8) return w & 0x80 ? static_cast<Word>(-w) : w;
  return w & static_cast<Word>(~(Word{1} << (8 * sizeof(Word) - 1)));
}

template <DType D, class Word>
__device__ __forceinline__ typename Type<D>::Score size_of(Word w) {
  const Word m = magnitude<D>(w);
  if constexpr (D == DType::f64) {
    const uint64_t bits = m > 0x7ff0000000000000 ? 0x7ff0000000000000 : m;
    return bits_to_double(bits);
  } else if constexpr (D == DType::f32) {
    return bits_to_float(m > 0x7f800000u ? 0x7f800000u : m);
  } else if constexpr (D == DType::f16) {
    return f16_to_float(m > 0x7c00 ? Word{0x7c00} : m);
  } else if constexpr (D == DType::bf16) {
    return bf16_to_float(m > 0x7f80 ? Word{0x7f80} : m);
  } else {
    return static_cast<float>(m);
  }
}

template <class Score>
struct Best {
  Score score;
  uint32_t keep;
};

// Masks i, i+1, … in order; the index is a template's, so that the sums stay in registers.
template <int i, class Score>
__device__ __forceinline__ void search(const Score (&p)[4][6], Best<Score>& best) {
  if constexpr (i < kMasks) {
    constexpr int upper = kTileMasks.upper[i], lower = kTileMasks.lower[i];
    enum : uint32_t { keep = kTileMasks.keep[i] };
    const Score score = (p[0][upper / 6] + p[1][upper % 6]) + (p[2][lower / 6] + p[3][lower % 6]);
    if (i == 0 || score > best.score) best = {score, keep};
    search<i + 1>(p, best);
  }
}

}  // namespace

template <DType D>
__global__ void __launch_bounds__(kThreads) prune_24_transposable(Tiles24 a) {
  using Word = typename Type<D>::Word;
  using Score = typename Type<D>::Score;
  const int64_t tile = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (tile >= a.tiles) return;
  const int64_t band = tile / a.tiles_per_row;
  const int64_t at = band * 4 * a.K + (tile - band * a.tiles_per_row) * 4;

  Elements<Word, 4> rows[4];
  Score p[4][6];
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const Word* from = static_cast<const Word*>(a.weight) + at + r * a.K;
    if (a.vectors) {
      rows[r].load(from);
    } else {
      rows[r].load(from, 4);
    }
    Score m[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) m[i] = size_of<D>(rows[r].get(i));
    p[r][0] = m[0] + m[1], p[r][1] = m[0] + m[2], p[r][2] = m[0] + m[3];
    p[r][3] = m[1] + m[2], p[r][4] = m[1] + m[3], p[r][5] = m[2] + m[3];
  }
  Best<Score> best{};
  search<0>(p, best);

#pragma unroll
  for (int r = 0; r < 4; ++r) {
    Elements<Word, 4> out;
    out.clear();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Word w = rows[r].get(i);
      out.put(i, best.keep >> (4 * r + i) & 1 && magnitude<D>(w) ? w : Word{0});
    }
    Word* to = static_cast<Word*>(a.out) + at + r * a.K;
    if (a.vectors) {
      out.store(to);
    } else {
      out.store(to, 4);
    }
  }
}

SPARSEKERN_KERNEL(prune_24_transposable<DType::f16>);
SPARSEKERN_KERNEL(prune_24_transposable<DType::bf16>);
SPARSEKERN_KERNEL(prune_24_transposable<DType::f32>);
SPARSEKERN_KERNEL(prune_24_transposable<DType::f64>);
SPARSEKERN_KERNEL(prune_24_transposable<DType::i8>);
SPARSEKERN_KERNEL(prune_24_transposable<DType::u8>);

}  // namespace sparsekern::cuda
