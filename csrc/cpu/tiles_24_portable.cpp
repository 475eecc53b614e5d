// prune_24_transposable for every machine, on arrays of 8 tiles that compilers turn into vectors. The
// search is in tiles_24.h.
#include "tiles_24.h"

#include <cstring>
#include <limits>

#include "convert.h"
#include "format_24.h"
#include "kernels.h"

namespace sparsekern::cpu {
namespace {

template <class Score>
struct PortableScores {
  static constexpr int kLanes = 8;
  using Bits = std::conditional_t<sizeof(Score) == 8, uint64_t, uint32_t>;
  struct F {
    Score lane[kLanes];
  };
  struct Keep {
    Bits lane[kLanes];
  };

  template <class T>
  static Score score_of(typename T::Word w) {
    if constexpr (kIsFloat<T>) {
      Score v;
      if constexpr (std::is_same_v<T, F16>) {
        v = f16_to_float(w & T::kMagnitude);
      } else {
        const Bits bits = Bits{static_cast<typename T::Word>(w & T::kMagnitude)}
                          << 8 * (sizeof(Bits) - sizeof w);
        std::memcpy(&v, &bits, sizeof v);
      }
      return v <= std::numeric_limits<Score>::max() ? v : std::numeric_limits<Score>::infinity();
    } else {
      return magnitude<T>(w);
    }
  }

  template <class T>
  static void columns(const typename T::Word* row, F (&m)[4]) {
    for (int t = 0; t < kLanes; ++t) {
      for (int c = 0; c < 4; ++c) m[c].lane[t] = score_of<T>(row[4 * t + c]);
    }
  }

  static F add(const F& a, const F& b) {
    F sum;
    for (int t = 0; t < kLanes; ++t) sum.lane[t] = a.lane[t] + b.lane[t];
    return sum;
  }
  static Keep keep(Bits bits) {
    Keep all;
    for (Bits& lane : all.lane) lane = bits;
    return all;
  }
  static void take(const F& score, const Keep& keep, F& best, Keep& best_keep) {
    for (int t = 0; t < kLanes; ++t) {
      const bool larger = score.lane[t] > best.lane[t];
      best_keep.lane[t] = larger ? keep.lane[t] : best_keep.lane[t];
      best.lane[t] = larger ? score.lane[t] : best.lane[t];
    }
  }

  template <class T, int row>
  static void store(const typename T::Word* in, const Keep& keep, typename T::Word* out) {
    for (int t = 0; t < kLanes; ++t) {
      for (int c = 0; c < 4; ++c) {
        const typename T::Word w = in[4 * t + c];
        // No branch, which would be taken at random; a kept zero is +0.0.
        const typename T::Word kept = keep.lane[t] >> (4 * row + c) & (magnitude<T>(w) != 0);
        out[4 * t + c] = static_cast<typename T::Word>(w * kept);
      }
    }
  }
};

}  // namespace

const Tiles24Kernel tiles_24_portable = Tiles24<PortableScores>::tiles;

}  // namespace sparsekern::cpu
