// zvc on whole tensors: tiles to threads, values to their places.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <numeric>
#include <utility>

#include "cache.h"
#include "kernels.h"
#include "scratch.h"
#include "threads.h"

namespace sparsekern::cpu {
extern int64_t g_pf;
struct Tune { int64_t block=131072, nt_c=2, nt_x=2, piece=2048, pf=0, cache=32<<20; } tune;
namespace {

constexpr int64_t kOverrun = 64;     // bytes that kernels may touch past the values
constexpr int64_t kMaskTile = kZvcTile / 8;
#define kPiece tune.piece
#define kBlock tune.block
constexpr int64_t kTileGrain = 8;    // tiles a thread is worth waking for

int64_t tile_length(int64_t tile, int64_t n) { return std::min(kZvcTile, n - tile * kZvcTile); }

void store_fence() {
#if defined(__x86_64__)
  __builtin_ia32_sfence();
#endif
}

// One call of compress.
struct Compress {
  const ZvcKernels& kernels;
  const uint8_t* x;
  int64_t n;
  int size;
  uint8_t* mask;
  uint8_t* values;
  int64_t room;  // bytes of values
  int64_t* offsets;

  int64_t tiles() const { return ceil_div(n, kZvcTile); }

  // Packs tiles [first, last) to `to`, which takes `space` bytes, and returns how many they fill;
  // their offsets count from `to`.
  int64_t pack(int64_t first, int64_t last, uint8_t* to, int64_t space, bool stream) const {
    alignas(64) uint8_t buffer[4096 + 8192 + 256];
    uint8_t* const staged = buffer + ((uintptr_t(x) - uintptr_t(buffer) - 128) & 4095 & ~63);
    int64_t end = 0;   // bytes packed so far
    int64_t kept = 0;  // the last of them, less than a line, still in `staged`
    for (int64_t t = first; t < last; ++t) {
      const uint8_t* in = x + t * kZvcTile * size;
      const int64_t length = tile_length(t, n);
      offsets[t] = end / size;
      for (int64_t i = 0; i < length; i += kPiece / size) {
        const int64_t m = std::min(length - i, kPiece / size);
        const int64_t bytes = kernels.compress(in + i * size, m, size, mask + t * kMaskTile + i / 8, staged + kept) * size;
        const int64_t at = end - kept;
        end += bytes;
        kept = put(to + at, staged, end - at, space - at, stream);
        std::memcpy(staged, staged + (end - at - kept), 64);
      }
    }
    copy(to + end - kept, staged, kept, space - (end - kept));
    return end;
  }

  // Whether values are on the way to fill more than the cache, when `tiles_done` gave `bytes`.
  bool streams(int64_t bytes, int64_t tiles_done) const {
    if (tune.nt_c < 2) return tune.nt_c == 1;
    return static_cast<double>(bytes) * static_cast<double>(tiles()) >
           static_cast<double>(tune.cache) * static_cast<double>(tiles_done);
  }

  static void copy(uint8_t* to, const uint8_t* from, int64_t bytes, int64_t space) {
    if (space > 0 && bytes > 0) std::memcpy(to, from, static_cast<size_t>(std::min(bytes, space)));
  }
  // Puts `bytes`, those that fit; returns how many of the last ones are left for later.
  int64_t put(uint8_t* to, const uint8_t* from, int64_t bytes, int64_t space, bool stream) const {
    if (stream && bytes <= space) return bytes - kernels.stream(to, from, bytes);
    copy(to, from, bytes, space);
    return 0;
  }

  int64_t run(int64_t threads) const {
    const int64_t block = std::max<int64_t>(1, kBlock / (kZvcTile * size));  // tiles
    const int64_t blocks = ceil_div(tiles(), block);
    const int64_t stage = block * kZvcTile * size + kOverrun;
    static thread_local Scratch scratch;
    uint8_t* const stages = threads < 2 ? nullptr : reinterpret_cast<uint8_t*>(scratch.get(static_cast<size_t>(threads * stage / 4)));
    Turns turns;
    int64_t place = 0;  // in bytes; belongs to the thread whose turn it is
    parallel_team(threads, [&](int64_t rank, int64_t team) {
      uint8_t* const staged = stages + rank * stage;
      for (int64_t b = turns.take(); b < blocks; b = turns.take()) {
        const int64_t first = b * block, last = std::min(tiles(), first + block);
        int64_t at;
        if (team == 1) {
          at = place;
          place += pack(first, last, values + at, room - at, b > 0 && streams(at, first));
        } else {
          const int64_t bytes = pack(first, last, staged, stage, false);
          turns.wait(b);
          at = place;
          place += bytes;
          turns.pass(b);
          const int64_t kept = put(values + at, staged, bytes, room - at, streams(at + bytes, last));
          copy(values + at + bytes - kept, staged + bytes - kept, kept, room - (at + bytes - kept));
        }
        for (int64_t t = first; t < last; ++t) offsets[t] += at / size;
      }
      store_fence();
    });
    return place / size;
  }
};

}  // namespace

int64_t zvc_compress(const void* x, int64_t n, int size, uint8_t* mask, void* values, int64_t room,
                     int64_t* offsets, int threads) {
  const Compress compress{tier().zvc, static_cast<const uint8_t*>(x), n, size, mask,
                          static_cast<uint8_t*>(values), room * size, offsets};
  g_pf = tune.pf & 1;
  threads = static_cast<int>(std::min<int64_t>(threads, compress.tiles() / kTileGrain));
  return compress.run(one_thread_only() ? 1 : threads);
}

namespace {

// Returns an empty string, or what is wrong with a stream of which no more is known than that its
// arrays have the lengths they should have.
std::string zvc_check(const ZvcKernels& kernels, const uint8_t* mask, const int64_t* offsets,
                      int64_t n, int64_t values, int threads) {
  const int64_t tiles = ceil_div(n, kZvcTile);
  std::vector<int64_t> counts(static_cast<size_t>(tiles));
  parallel_for(tiles, kTileGrain * 8, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      counts[t] = kernels.count(mask + t * kMaskTile, tile_length(t, n));
    }
  });
  const int64_t total = std::accumulate(counts.begin(), counts.end(), int64_t{0});
  if (total != values) {
    return "mask marks " + std::to_string(total) + " non-zero elements, values holds " +
           std::to_string(values);
  }
  std::vector<int64_t> order;
  for (int64_t t = 0; t < tiles; ++t) {
    if (offsets[t] < 0 || offsets[t] > values - counts[t]) {
      return "offsets[" + std::to_string(t) + "] is " + std::to_string(offsets[t]) + ", its " +
             std::to_string(counts[t]) + " values lie outside the " + std::to_string(values) +
             " there are";
    }
    if (counts[t] > 0) order.push_back(t);
  }
  // Tiles in any order are legal (a GPU places them as they finish), as long as no two share a
  // value.
  std::sort(order.begin(), order.end(),
            [&](int64_t a, int64_t b) { return offsets[a] < offsets[b]; });
  int64_t place = 0;
  for (const int64_t t : order) {
    if (offsets[t] != place)
      return "offsets[" + std::to_string(t) + "] overlaps another tile's values or leaves a gap";
    place += counts[t];
  }
  return {};
}

}  // namespace

std::string zvc_expand(const uint8_t* mask, const void* from, int64_t values_count,
                       const int64_t* offsets, int64_t n, int size, void* to, int threads) {
  if (n % 8 != 0 && mask[n / 8] >> (n % 8) != 0) return "mask has bits set past the last element";
  const ZvcKernels& kernels = tier().zvc;
  const auto* values = static_cast<const uint8_t*>(from);
  auto* x = static_cast<uint8_t*>(to);
  const int64_t tiles = ceil_div(n, kZvcTile);
  const bool stream = tune.nt_x == 1 || (tune.nt_x == 2 && n * size > tune.cache);
  const int64_t piece = tune.piece / size;
  // True as long as every tile's values lie within the array and end where the next tile's start:
  // then the stream is right, and no pass over mask was needed to know it.
  std::atomic<bool> in_order{(tiles > 0 ? offsets[0] : values_count) == 0};
  parallel_for(tiles, kTileGrain, 1, threads, [&](int64_t begin, int64_t end) {
    alignas(64) uint8_t padded[kZvcTile * 8 + kOverrun] = {};
    alignas(64) uint8_t buffer[8192*2];
    uint8_t* staged = buffer;
    int64_t kept = 0;
    bool chained = true;
    for (int64_t t = begin; t < end; ++t) {
      const int64_t length = tile_length(t, n);
      const uint8_t* marks = mask + t * kMaskTile;
      const int64_t count = kernels.count(marks, length), start = offsets[t];
      if (start < 0 || start > values_count - count) {
        chained = false;
        continue;
      }
      const int64_t after = start + count;
      chained &= after == (t + 1 < tiles ? offsets[t + 1] : values_count);
      const uint8_t* in = values + start * size;
      if ((values_count - after) * size < kOverrun) {
        if (count > 0) std::memcpy(padded, in, static_cast<size_t>(count * size));
        in = padded;
      }
      uint8_t* out = x + t * kZvcTile * size;
      if (!stream) {
        kernels.expand(in, marks, length, size, out);
        continue;
      }
      for (int64_t i = 0; i < length; i += piece) {
        const int64_t m = std::min(piece, length - i);
        if (tune.pf >= 100 && !kept) staged = buffer + ((uintptr_t(in) - uintptr_t(buffer) + tune.pf) & 4095 & ~63);
        in += kernels.expand(in, marks + i / 8, m, size, staged + kept) * size;
        const int64_t bytes = kept + m * size;
        const int64_t done = kernels.stream(out + i * size - kept, staged, bytes);
        kept = bytes - done;
        std::memcpy(staged, staged + done, 64);
      }
      // flush at the tile's end
      if (kept) std::memcpy(out + length * size - kept, staged, static_cast<size_t>(kept));
      kept = 0;
    }
    store_fence();
    if (!chained) in_order = false;
  });
  if (in_order) return {};
  return zvc_check(kernels, mask, offsets, n, values_count, threads);
}

}  // namespace sparsekern::cpu
