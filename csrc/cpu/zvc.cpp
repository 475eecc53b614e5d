// zvc on whole tensors
#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <numeric>
#include <thread>

#include "kernels.h"
#include "threads.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace sparsekern::cpu {
struct Tune { int64_t block=65536, nt_c=0, nt_x=0, piece=4096, pf=0, cache=32<<20; } tune;
namespace {

int64_t tile_length(int64_t tile, int64_t n) { return std::min(kZvcTile, n - tile * kZvcTile); }

void pause() { _mm_pause(); }

}  // namespace

int64_t zvc_compress(const void* from, int64_t n, int size, uint8_t* mask, void* values,
                     int64_t room, int64_t* offsets, int threads) {
  const ZvcKernels& kernels = tier().zvc;
  const auto* x = static_cast<const uint8_t*>(from);
  auto* out = static_cast<uint8_t*>(values);
  const int64_t tiles = ceil_div(n, kZvcTile);
  const int64_t per_block = std::max<int64_t>(1, tune.block / (kZvcTile * size));
  const int64_t blocks = ceil_div(tiles, per_block);
  alignas(64) std::atomic<int64_t> next{0};
  alignas(64) std::atomic<int64_t> turn{0};
  int64_t place = 0;
  const auto streams = [&](int64_t end, int64_t tiles_done) {
    if (tune.nt_c < 2) return tune.nt_c == 1;
    return double(end) / double(tiles_done) * double(tiles) * size > double(tune.cache);
  };
  const auto emit = [&](const uint8_t* staged, int64_t at, int64_t count, bool stream) {
    const int64_t bytes = std::max<int64_t>(0, std::min(count, room - at)) * size;
    if (stream) kernels.stream(out + at * size, staged, bytes);
    else std::memcpy(out + at * size, staged, bytes);
  };
  parallel_team(static_cast<int>(std::min<int64_t>(threads, blocks)), [&](int team) {
    if (team == 1) {
      alignas(64) uint8_t staged[kZvcTile * 8 + 64];
      bool stream = tune.nt_c == 1;
      for (int64_t t = 0; t < tiles; ++t) {
        const uint8_t* tile = x + t * kZvcTile * size;
        const int64_t length = tile_length(t, n);
        const bool direct = !stream && (room - place - length) * size >= 64;
        const int64_t count = kernels.compress(tile, length, size, mask + t * (kZvcTile / 8),
                                               direct ? out + place * size : staged);
        if (tune.pf) for (int64_t i = 0; i < tune.pf; i += 64) __builtin_prefetch(tile + kZvcTile * size + i, 0, 2);
        offsets[t] = place;
        if (!direct) emit(staged, place, count, stream);
        place += count;
        if (t % 8 == 0) stream = streams(place, t + 1);
      }
      _mm_sfence();
      return;
    }
    static thread_local std::unique_ptr<uint8_t[]> buf(new uint8_t[(4<<20) + 128]);
    uint8_t* staged = (uint8_t*)(((uintptr_t)buf.get() + 63) & ~uintptr_t{63});
    int64_t b;
    while ((b = next.fetch_add(1, std::memory_order_relaxed)) < blocks) {
      const int64_t first = b * per_block, last = std::min(tiles, first + per_block);
      int64_t count = 0;
      for (int64_t t = first; t < last; ++t) {
        offsets[t] = count;
        count += kernels.compress(x + t * kZvcTile * size, tile_length(t, n), size,
                                  mask + t * (kZvcTile / 8), staged + count * size);
      }
      for (int spins = 0; turn.load(std::memory_order_acquire) != b; ++spins) {
        if (spins < 2000) pause(); else std::this_thread::yield();
      }
      const int64_t at = place;
      place = at + count;
      turn.store(b + 1, std::memory_order_release);
      for (int64_t t = first; t < last; ++t) offsets[t] += at;
      emit(staged, at, count, streams(at + count, last));
    }
    _mm_sfence();
  });
  return place;
}

namespace {
std::string zvc_check(const uint8_t* mask, const int64_t* offsets, int64_t n, int64_t values,
                      int threads) {
  const int64_t tiles = ceil_div(n, kZvcTile);
  const ZvcKernels& kernels = tier().zvc;
  std::vector<int64_t> counts(static_cast<size_t>(tiles));
  parallel_for(tiles, 64, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      counts[t] = kernels.count(mask + t * (kZvcTile / 8), tile_length(t, n));
    }
  });
  const int64_t total = std::accumulate(counts.begin(), counts.end(), int64_t{0});
  if (total != values) {
    return "mask marks " + std::to_string(total) + " non-zero elements, values holds " +
           std::to_string(values);
  }
  std::vector<int64_t> order;
  int64_t place = 0;
  for (int64_t t = 0; t < tiles; ++t) {
    if (offsets[t] < 0 || offsets[t] > values - counts[t]) {
      return "offsets[" + std::to_string(t) + "] is " + std::to_string(offsets[t]) + ", its " +
             std::to_string(counts[t]) + " values lie outside the " + std::to_string(values) +
             " there are";
    }
    if (counts[t] > 0) order.push_back(t);
  }
  std::sort(order.begin(), order.end(),
            [&](int64_t a, int64_t b) { return offsets[a] < offsets[b]; });
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
  std::atomic<bool> in_order{tiles > 0 ? offsets[0] == 0 : values_count == 0};
  parallel_for(tiles, 8, 1, threads, [&](int64_t begin, int64_t end) {
    alignas(64) uint8_t staged[kZvcTile * 8 + 64] = {};
    alignas(64) uint8_t wide[32768];
    bool chained = true;
    for (int64_t t = begin; t < end; ++t) {
      const int64_t length = tile_length(t, n);
      const uint8_t* marks = mask + t * (kZvcTile / 8);
      const int64_t count = kernels.count(marks, length);
      if (offsets[t] < 0 || offsets[t] > values_count - count) { chained = false; continue; }
      const int64_t after = offsets[t] + count;
      chained &= after == (t + 1 < tiles ? offsets[t + 1] : values_count);
      const uint8_t* in = values + offsets[t] * size;
      if ((values_count - after) * size < 64) {
        if (count) std::memcpy(staged, in, count * size);
        in = staged;
      }
      uint8_t* out = x + t * kZvcTile * size;
      if (!stream) { kernels.expand(in, marks, length, size, out); continue; }
      if (tune.piece == 0) { kernels.expand_stream(in, marks, length, size, out); continue; }
      for (int64_t i = 0; i < length; i += piece) {
        const int64_t m = std::min(piece, length - i);
        kernels.expand(in, marks + i / 8, m, size, wide);
        in += kernels.count(marks + i / 8, m) * size;
        kernels.stream(out + i * size, wide, m * size);
      }
    }
    _mm_sfence();
    if (!chained) in_order = false;
  });
  if (in_order) return {};
  return zvc_check(mask, offsets, n, values_count, threads);
}

}  // namespace sparsekern::cpu
