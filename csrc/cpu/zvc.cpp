// zvc on whole tensors: tiles to threads, and the check of a stream before it is read.
#include <algorithm>
#include <cstring>
#include <numeric>
#include <utility>

#include "kernels.h"
#include "threads.h"

namespace sparsekern::cpu {
namespace {

int64_t tile_length(int64_t tile, int64_t n) { return std::min(kZvcTile, n - tile * kZvcTile); }

int64_t tile_count(const uint8_t* mask, int64_t tile, int64_t n) {
  const uint8_t* bytes = mask + tile * (kZvcTile / 8);
  const int64_t length = ceil_div(tile_length(tile, n), 8);
  int64_t count = 0, i = 0;
  for (; i + 8 <= length; i += 8) {
    uint64_t word;
    std::memcpy(&word, bytes + i, sizeof word);
    count += __builtin_popcountll(word);
  }
  for (; i < length; ++i) count += __builtin_popcount(bytes[i]);
  return count;
}

constexpr int64_t kTileGrain = 8;  // tiles a thread is worth waking for

}  // namespace

int64_t zvc_index(const void* x, int64_t n, int size, uint8_t* mask, int64_t* offsets,
                  int threads) {
  const ZvcKernels& kernels = tier().zvc;
  const int64_t tiles = ceil_div(n, kZvcTile);
  parallel_for(tiles, kTileGrain, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      offsets[t] = kernels.mask(static_cast<const uint8_t*>(x) + t * kZvcTile * size,
                                tile_length(t, n), size, mask + t * (kZvcTile / 8));
    }
  });
  int64_t total = 0;
  for (int64_t t = 0; t < tiles; ++t) total += std::exchange(offsets[t], total);
  return total;
}

void zvc_compress(const void* x, int64_t n, int size, const uint8_t* mask, const int64_t* offsets,
                  void* values, int64_t room, int threads) {
  const ZvcKernels& kernels = tier().zvc;
  const int64_t tiles = ceil_div(n, kZvcTile);
  parallel_for(tiles, kTileGrain, 1, threads, [&](int64_t begin, int64_t end) {
    // Tiles are packed here first: full-width stores run past a tile's end, where another thread
    // may be writing.
    alignas(64) uint8_t staged[kZvcTile * 8 + 64];
    for (int64_t t = begin; t < end && offsets[t] < room; ++t) {
      const int64_t count = std::min(tile_count(mask, t, n), room - offsets[t]);
      kernels.compress(static_cast<const uint8_t*>(x) + t * kZvcTile * size,
                       mask + t * (kZvcTile / 8), tile_length(t, n), size, staged);
      std::memcpy(static_cast<uint8_t*>(values) + offsets[t] * size, staged,
                  static_cast<size_t>(count * size));
    }
  });
}

std::string zvc_check(const uint8_t* mask, const int64_t* offsets, int64_t n, int64_t values,
                      int threads) {
  const int64_t tiles = ceil_div(n, kZvcTile);
  if (n % 8 != 0 && mask[n / 8] >> (n % 8) != 0) return "mask has bits set past the last element";
  std::vector<int64_t> counts(static_cast<size_t>(tiles));
  parallel_for(tiles, kTileGrain * 8, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) counts[t] = tile_count(mask, t, n);
  });
  const int64_t total = std::accumulate(counts.begin(), counts.end(), int64_t{0});
  if (total != values) {
    return "mask marks " + std::to_string(total) + " non-zero elements, values holds " +
           std::to_string(values);
  }
  std::vector<int64_t> order;
  bool sorted = true;
  int64_t place = 0;
  for (int64_t t = 0; t < tiles; ++t) {
    if (offsets[t] < 0 || offsets[t] > values - counts[t]) {
      return "offsets[" + std::to_string(t) + "] is " + std::to_string(offsets[t]) + ", its " +
             std::to_string(counts[t]) + " values lie outside the " + std::to_string(values) +
             " there are";
    }
    if (counts[t] == 0) continue;
    sorted = sorted && offsets[t] == place;
    place += counts[t];
    order.push_back(t);
  }
  if (sorted) return {};
  // Tiles in any order are legal (a GPU places them as they finish), as long as no two share a
  // value.
  std::sort(order.begin(), order.end(),
            [&](int64_t a, int64_t b) { return offsets[a] < offsets[b]; });
  place = 0;
  for (const int64_t t : order) {
    if (offsets[t] != place)
      return "offsets[" + std::to_string(t) + "] overlaps another tile's values or leaves a gap";
    place += counts[t];
  }
  return {};
}

void zvc_expand(const uint8_t* mask, const void* values, int64_t values_count,
                const int64_t* offsets, int64_t n, int size, void* x, int threads) {
  const ZvcKernels& kernels = tier().zvc;
  const int64_t tiles = ceil_div(n, kZvcTile);
  parallel_for(tiles, kTileGrain, 1, threads, [&](int64_t begin, int64_t end) {
    alignas(64) uint8_t staged[kZvcTile * 8 + 64] = {};
    for (int64_t t = begin; t < end; ++t) {
      const int64_t count = tile_count(mask, t, n);
      const uint8_t* in = staged;
      if (count > 0) {
        in = static_cast<const uint8_t*>(values) + offsets[t] * size;
        // Full-width loads run up to 64 bytes past a tile's values: near the buffer's end, read a
        // padded copy.
        if ((values_count - offsets[t] - count) * size < 64) {
          std::memcpy(staged, in, static_cast<size_t>(count * size));
          in = staged;
        }
      }
      kernels.expand(in, mask + t * (kZvcTile / 8), tile_length(t, n), size,
                     static_cast<uint8_t*>(x) + t * kZvcTile * size);
    }
  });
}

}  // namespace sparsekern::cpu
