// prune_24_transposable of a band of four rows: the search for the best of 90 masks, many tiles at
// once.
//
//   weight   row 0  a b c d | e f g h | …     lane t of four vectors per row holds tile t:
//            row 1  . . . . | . . . . |         m[0] = |a|, |e|, …   m[1] = |b|, |f|, …
//   pairs    m[i] + m[j], six a row           kept as p[row][pair]
//   upper    p[0][.] + p[1][.], 36            lower: p[2][.] + p[3][.], 36, from the stack
//   score    upper + lower, 90 of the 36 * 36 in lexicographic order: each step keeps, lane by
//            lane, the larger score and the 16 keep bits of its mask; only a larger one replaces
//   out      keep bits spread to the lanes of each row
//
// Sums round as ((r0 + r1) + (r2 + r3)) and a strict comparison leaves the first of equals, so the
// answer is the reference's to the bit. NaNs count as infinity; there is no other NaN, as no
// magnitude is negative.
//
// A tier S<Score> supplies, for kLanes tiles at a time:
//   F, Keep                     a vector of scores; lanes as wide that hold keep bits
//   columns<T>(row, m)          4 * kLanes elements of a row as magnitudes, the lanes in any order
//   add                         on F
//   keep(bits)                  the same keep bits in every lane
//   take(score, keep, best, best_keep)   puts score and keep in the lanes where score > best
//   store<T, row>(in, keep, out)      4 * kLanes elements of row `row`, those not kept as zero
// Limited by operations: per kLanes tiles 24 + 72 + 90 sums, 90 comparisons, 90 maxima and 90
// selections, 456 in all. With AVX-512 the loop is 770 instructions (GCC 12: the rest loads,
// transposes, stores and broadcasts keep bits) and takes 64 ns on a Zen 5; with sums kept in memory
// it took 112 ns, in one chain of comparisons 13 % more. 4096 x 4096 there, 1 and 2 threads: AVX-512
// fp32 8.7 and 4.7 ms, bf16 5.3 and 2.7 ms; AVX2 9.4 and 4.9 ms, 9.3 and 4.7 ms.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#include "format_24.h"
#include "kernels.h"

namespace sparsekern::cpu {

template <template <class> class S>
struct Tiles24 {
  template <class Score>
  struct Search {
    using V = S<Score>;
    using F = typename V::F;
    F pairs[4][6];

    template <class T>
    void add_row(const typename T::Word* row, F (&p)[6]) {
      F m[4];
      V::template columns<T>(row, m);
      p[0] = V::add(m[0], m[1]), p[1] = V::add(m[0], m[2]), p[2] = V::add(m[0], m[3]);
      p[3] = V::add(m[1], m[2]), p[4] = V::add(m[1], m[3]), p[5] = V::add(m[2], m[3]);
    }

    // The best of the masks from `first` on.
    struct Best {
      F score;
      typename V::Keep keep;
    };
    template <size_t i>
    F score(const F (&lower)[36]) const {
      constexpr int upper = kTileMasks.upper[i];
      return V::add(V::add(pairs[0][upper / 6], pairs[1][upper % 6]), lower[kTileMasks.lower[i]]);
    }
    template <size_t first, size_t... i>
    Best best(const F (&lower)[36], std::index_sequence<i...>) const {
      Best best{score<first>(lower), V::keep(kTileMasks.keep[first])};
      (V::take(score<first + i + 1>(lower), V::keep(kTileMasks.keep[first + i + 1]), best.score,
               best.keep),
       ...);
      return best;
    }
    template <size_t... i>
    void lower_sums(F (&lower)[36], std::index_sequence<i...>) const {
      ((lower[i] = V::add(pairs[2][i / 6], pairs[3][i % 6])), ...);
    }
    // Two halves, so that one does not wait for the other's comparisons.
    typename V::Keep best() const {
      F lower[36];
      lower_sums(lower, std::make_index_sequence<36>{});
      constexpr std::make_index_sequence<kMasks / 2 - 1> others{};
      Best low = best<0>(lower, others);
      const Best high = best<kMasks / 2>(lower, others);
      V::take(high.score, high.keep, low.score, low.keep);
      return low.keep;
    }
  };

  template <class T>
  static void band(const typename T::Word* in, typename T::Word* out, int64_t stride, int64_t n) {
    using V = S<typename T::Score>;
    Search<typename T::Score> search;
    for (int64_t k = 0; k < n; k += 4 * V::kLanes, in += 4 * V::kLanes, out += 4 * V::kLanes) {
      for (int row = 0; row < 4; ++row) {
        search.template add_row<T>(in + row * stride, search.pairs[row]);
      }
      const auto keep = search.best();
      V::template store<T, 0>(in, keep, out);
      V::template store<T, 1>(in + stride, keep, out + stride);
      V::template store<T, 2>(in + 2 * stride, keep, out + 2 * stride);
      V::template store<T, 3>(in + 3 * stride, keep, out + 3 * stride);
    }
  }

  static void tiles(const void* weight, void* out, int64_t stride, int64_t blocks, DType dtype) {
    with_type(dtype, [&](auto type) {
      using T = decltype(type);
      using Word = typename T::Word;
      band<T>(static_cast<const Word*>(weight), static_cast<Word*>(out), stride,
              blocks * kFormatBlock);
    });
  }
};

}  // namespace sparsekern::cpu
