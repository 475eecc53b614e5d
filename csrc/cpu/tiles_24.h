// prune_24_transposable of a band of four rows: the search for the best of 90 masks, many tiles at
// once.
//
//   weight   row 0  a b c d | e f g h | …     lane t of four vectors per row holds tile t:
//            row 1  . . . . | . . . . |         m[0] = |a|, |e|, …   m[1] = |b|, |f|, …
//   pairs    m[i] + m[j], six a row           kept as p[row][pair]
//   upper    p[0][.] + p[1][.], 36            lower: p[2][.] + p[3][.], 36
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
//   add, larger                 on F
//   better(score, best, keep, bits)   keep, or `bits` in the lanes where score > best
//   store<T, row>(in, keep, out)      4 * kLanes elements of row `row`, those not kept as zero
// Limited by: operations. Per tile of kLanes * 16 elements: 24 + 72 + 90 sums, 90 comparisons, 90
// maxima, 90 selections.
#pragma once

#include <cstdint>
#include <utility>

#include "format_24.h"

namespace sparsekern::cpu {

template <template <class> class S>
struct Tiles24 {
  template <class Score>
  struct Search {
    using V = S<Score>;
    using F = typename V::F;
    F upper[36], lower[36];

    static void pairs(const F (&m)[4], F (&p)[6]) {
      p[0] = V::add(m[0], m[1]), p[1] = V::add(m[0], m[2]), p[2] = V::add(m[0], m[3]);
      p[3] = V::add(m[1], m[2]), p[4] = V::add(m[1], m[3]), p[5] = V::add(m[2], m[3]);
    }

    // `sums` of two rows, from their elements at `row` and `row + stride`.
    template <class T>
    static void half(const typename T::Word* row, int64_t stride, F (&sums)[36]) {
      F m[4], first[6], second[6];
      V::template columns<T>(row, m);
      pairs(m, first);
      V::template columns<T>(row + stride, m);
      pairs(m, second);
      for (int i = 0; i < 36; ++i) sums[i] = V::add(first[i / 6], second[i % 6]);
    }

    template <size_t i>
    void step(F& best, typename V::Keep& keep) const {
      const F score = V::add(upper[kTileMasks.upper[i]], lower[kTileMasks.lower[i]]);
      keep = V::better(score, best, keep, kTileMasks.keep[i]);
      best = V::larger(best, score);
    }
    template <size_t... i>
    typename V::Keep best(std::index_sequence<i...>) const {
      F score = V::add(upper[kTileMasks.upper[0]], lower[kTileMasks.lower[0]]);
      typename V::Keep keep = V::keep(kTileMasks.keep[0]);
      (step<i + 1>(score, keep), ...);
      return keep;
    }
  };

  template <class T>
  static void band(const typename T::Word* in, typename T::Word* out, int64_t stride, int64_t n) {
    using V = S<typename T::Score>;
    Search<typename T::Score> search;
    for (int64_t k = 0; k < n; k += 4 * V::kLanes, in += 4 * V::kLanes, out += 4 * V::kLanes) {
      search.template half<T>(in, stride, search.upper);
      search.template half<T>(in + 2 * stride, stride, search.lower);
      const auto keep = search.best(std::make_index_sequence<kMasks - 1>{});
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
