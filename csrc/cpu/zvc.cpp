// zvc on whole tensors: blocks of tiles to threads, values to their places, lies found out.
//
//   x        | block 0 | block 1 | block 2 | ...      threads take blocks in order
//                 |         |         |               compress piece after piece (4 KB of x) into
//   staged    v0..    v1..      v2..                  slots in the thread's L1 or L2
//                 |         |         |               a block's place is known when the one before
//   values   |v0....|v1......|v2....|                 has passed its turn; then whole lines are put
//
// One pass: x is read once and values are written once, in order and without gaps, the same bytes
// on any number of threads. A thread alone knows every place and puts each piece at once.
// Assumes: buffers of the sizes that ops.py checked, at any address.
// Limited by: bytes from and to memory: x, values and mask where memcpy moves x twice, or three
// times as the lines it writes are read first. Time of torch's copy_ of 64 MB over ours (Zen 5, 2
// cores; 4-byte elements, AVX-512, one thread | two):
//                    50 % zeros     90 % zeros
//     compress       1.63 | 1.35    1.84 | 1.97
//     decompress     1.53 | 1.49    2.15 | 2.41
// On two threads reads mixed with non-temporal writes reach 56 GB/s here, whoever moves them: the
// 98 MB of 50 % zeros take 1.75 ms of copy_'s 2.6, a bound of 1.5.
//
// What made the difference on this machine:
//   * Misaligned stores of 64 bytes to lines that miss the L1 wait for each line in turn (8 cycles
//     per vector against 2.5), so values are packed into a slot that stays in the cache and leave
//     it in whole lines.
//   * A load is held up by an older store whose address has the same low 12 bits (1.9 down to 0.9
//     times copy_ by the luck of where a buffer lay), so slots have a fixed phase to what is read:
//     stores that advance slower than loads start just behind them, faster ones half a page away.
//   * x is prefetched 8 KB ahead, across the page borders where the hardware stops.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <numeric>

#include "kernels.h"
#include "scratch.h"
#include "threads.h"

namespace sparsekern::cpu {
namespace {

constexpr int64_t kMaskTile = kZvcTile / 8;  // bytes
constexpr int64_t kTileGrain = 8;            // tiles a thread is worth waking for
constexpr int64_t kLine = 64;
constexpr int64_t kOverrun = 64;  // bytes that kernels may touch past the values
constexpr int64_t kPage = 4096;   // addresses are compared modulo this
constexpr int64_t kPiece = 4096;  // bytes of x between two visits to the output
// Bytes of x per turn. What a thread stages must stay in its L2; 64 KB were 10 % slower.
constexpr int64_t kMaxBlock = 256 << 10, kMinBlock = 32 << 10;

static_assert(kZvcTile % kPiece == 0 && kPiece / 8 % 64 == 0, "a piece is whole words of mask");

// Whether a tensor of `bytes` is past the cache, so that neither it nor its values are still there
// when the call returns: then lines are written without reading them first (64 MB at 50 % zeros:
// compress 1.25 -> 1.7, decompress 1.3 -> 1.7 on one thread). Below, who reads the output next
// would pay more than is saved (8 MB: 25 to 50 % slower together).
bool past_cache(int64_t bytes) { return bytes > cache_bytes(); }

int64_t tile_length(int64_t tile, int64_t n) { return std::min(kZvcTile, n - tile * kZvcTile); }

void store_fence() {
#if defined(__x86_64__)
  __builtin_ia32_sfence();
#endif
}

// The first address from `base` on that lies `distance` bytes after `p` modulo a page, but for less
// than a line.
uint8_t* in_phase(uint8_t* base, const uint8_t* p, int64_t distance) {
  const auto shift = reinterpret_cast<uintptr_t>(p) - reinterpret_cast<uintptr_t>(base) + distance;
  return base + (shift & (kPage - 1) & -kLine);
}

// Bytes in order, put where they belong in whole lines as far as possible; those past the room are
// dropped.
class Output {
 public:
  Output(const ZvcKernels& kernels, uint8_t* to, int64_t room, bool stream)
      : copy_(stream ? kernels.stream : kernels.store), to_(to), room_(room) {}

  // Takes from[0, bytes); the line before it is free to use.
  void put(uint8_t* from, int64_t bytes) {
    std::memcpy(from - kLine, line_, kLine);
    from -= kept_;
    bytes = std::min(bytes + kept_, room_);
    if (bytes == 0) return;
    const int64_t done = copy_(to_, from, bytes);
    to_ += done;
    room_ -= done;
    kept_ = bytes - done;
    std::memcpy(line_, from + bytes - kLine, kLine);
  }
  void close() {
    if (kept_ > 0) std::memcpy(to_, line_ + kLine - kept_, static_cast<size_t>(kept_));
  }

 private:
  int64_t (*copy_)(void*, const void*, int64_t);
  uint8_t* to_;
  int64_t room_;
  int64_t kept_ = 0;  // bytes of a line not complete yet, at the end of line_
  alignas(kLine) uint8_t line_[kLine] = {};
};

// One call of compress.
struct Compress {
  const ZvcKernels& kernels;
  const uint8_t* x;
  int64_t n, size;
  uint8_t* mask;
  uint8_t* values;
  int64_t room;  // bytes
  int64_t* offsets;

  const int64_t tiles = ceil_div(n, kZvcTile);
  const int64_t pieces = kZvcTile * size / kPiece;  // of a tile
  const bool stream = past_cache(n * size);

  // Packs one piece of a tile into a slot and returns the bytes filled.
  int64_t pack(int64_t tile, int64_t piece, uint8_t* slot) const {
    const int64_t begin = tile * kZvcTile + piece * (kPiece / size);
    const int64_t length = std::min(kPiece / size, n - begin);
    if (length <= 0) return 0;
    return size * kernels.compress(x + begin * size, length, static_cast<int>(size),
                                   mask + begin / 8, slot);
  }

  int64_t alone() const {
    alignas(kLine) uint8_t stage[kPage + kLine + kPiece + kOverrun];
    uint8_t* const slot = in_phase(stage + kLine, x, -2 * kLine);
    Output out(kernels, values, room, stream);
    int64_t place = 0;  // bytes
    for (int64_t t = 0; t < tiles; ++t) {
      offsets[t] = place / size;
      for (int64_t i = 0; i < pieces; ++i) {
        const int64_t bytes = pack(t, i, slot);
        out.put(slot, bytes);
        place += bytes;
      }
    }
    out.close();
    store_fence();
    return place / size;
  }

  int64_t team(int threads) const {
    const int64_t share = std::max(kMinBlock, n * size / (4 * threads));
    const int64_t block = std::min(share, kMaxBlock) / (kZvcTile * size);  // tiles
    const int64_t blocks = ceil_div(tiles, block);
    const int64_t stage = kPage + kLine + block * kZvcTile * size + kOverrun;
    static_assert((kPage + kLine + kOverrun) % kLine == 0, "stages start on a line");
    static thread_local Scratch scratch;  // the caller's: a worker has nowhere to throw to
    auto* const stages = scratch.get<uint8_t>(threads * stage);
    Turns turns;
    int64_t place = 0;  // in bytes; belongs to the thread whose turn it is
    parallel_team(threads, [&](int rank) {
      uint8_t* const slots = in_phase(stages + rank * stage + kLine, x, -2 * kLine);
      int64_t filled[kMaxBlock / kPiece];
      for (int64_t b = turns.take(); b < blocks; b = turns.take()) {
        const int64_t first = b * block, last = std::min(tiles, first + block);
        int64_t bytes = 0, p = 0;
        for (int64_t t = first; t < last; ++t) {
          offsets[t] = bytes / size;
          for (int64_t i = 0; i < pieces; ++i, ++p) {
            bytes += filled[p] = pack(t, i, slots + p * kPiece);
          }
        }
        turns.wait(b);
        const int64_t at = place;
        place += bytes;
        turns.pass(b);
        for (int64_t t = first; t < last; ++t) offsets[t] += at / size;
        const int64_t start = std::min(at, room);
        Output out(kernels, values + start, room - start, stream);
        for (int64_t i = 0; i < p; ++i) out.put(slots + i * kPiece, filled[i]);
        out.close();
      }
      store_fence();
    });
    return place / size;
  }
};

}  // namespace

int64_t zvc_compress(const void* x, int64_t n, int size, uint8_t* mask, void* values, int64_t room,
                     int64_t* offsets, int threads) {
  const Compress compress{tier().zvc, static_cast<const uint8_t*>(x), n,           size,
                          mask,       static_cast<uint8_t*>(values),  room * size, offsets};
  const auto most = static_cast<int>(std::min<int64_t>(threads, compress.tiles / kTileGrain));
  return most > 1 && !one_thread_only() ? compress.team(most) : compress.alone();
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
  const bool stream = past_cache(n * size);
  // True as long as every tile's values lie within the array and end where the next tile's start:
  // then the stream is right, and no pass over mask was needed to know it.
  std::atomic<bool> in_order{(tiles > 0 ? offsets[0] : values_count) == 0};
  parallel_for(tiles, kTileGrain, 1, threads, [&](int64_t begin, int64_t end) {
    alignas(kLine) uint8_t padded[kZvcTile * 8 + kOverrun] = {};
    alignas(kLine) uint8_t staged[kPage + kLine + kPiece];
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
      if ((values_count - after) * size < kOverrun) {  // loads would run past the array
        if (count > 0) std::memcpy(padded, in, static_cast<size_t>(count * size));
        in = padded;
      }
      uint8_t* out = x + t * kZvcTile * size;
      if (!stream) {
        kernels.expand(in, marks, length, size, out);
        continue;
      }
      Output lines(kernels, out, length * size, true);
      for (int64_t i = 0; i < length; i += kPiece / size) {
        const int64_t m = std::min(kPiece / size, length - i);
        uint8_t* const slot = in_phase(staged + kLine, in, kPage / 2);
        in += kernels.expand(in, marks + i / 8, m, size, slot) * size;
        lines.put(slot, m * size);
      }
      lines.close();
    }
    store_fence();
    if (!chained) in_order = false;
  });
  if (in_order) return {};
  return zvc_check(kernels, mask, offsets, n, values_count, threads);
}

}  // namespace sparsekern::cpu
