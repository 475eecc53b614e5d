// linear_24 on whole tensors: which kernel of the tier, how many threads, and the scratch they share.
#include <algorithm>
#include <atomic>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

#include "kernels.h"
#include "scratch.h"
#include "threads.h"

namespace sparsekern::cpu {
namespace {

// Of the caller: x as the kernels read it. Of every thread: what a kernel works on.
thread_local Scratch x_scratch, work_scratch;

constexpr int64_t kGrain = 1 << 16;      // multiply-adds a thread is worth waking for
constexpr int64_t kPackGrain = 1 << 15;  // elements, likewise
// Rows of x at a time; they bound the scratch to so many times K. The sums of a pass stay in L2.
constexpr int64_t kTilePassRows = 1024, kPassRows = 512;

int64_t l1_bytes() {
#if defined(_SC_LEVEL1_DCACHE_SIZE)
  static const int64_t bytes = sysconf(_SC_LEVEL1_DCACHE_SIZE);
  if (bytes >= 16 << 10) return bytes;
#endif
  return 32 << 10;
}

// `step` rows of weight at a time, as many as make waking a thread worth it.
template <class F>
void over_weight(const Linear24& a, int64_t rows, int64_t step, int threads, F f) {
  const int64_t work = std::max<int64_t>(1, rows * a.K / 2);
  parallel_for(a.N, kGrain / work + 1, step, threads, f);
}

void by_rows(const Linear24& a, const Linear24Kernels& kernels, int threads) {
  auto* x = x_scratch.get<uint8_t>(a.M * a.K * kernels.x_bytes);
  for (int64_t m = 0; m < a.M; ++m) kernels.pack_row(a, m, x);
  // Whole sixteens, so that which rows share a loop, and so the bits, does not depend on threads.
  over_weight(a, a.M, 16, threads, [&](int64_t n0, int64_t n1) { kernels.rows(a, x, n0, n1); });
}

// False where the kernels cannot multiply what they met; y is not whole then.
bool by_tiles(const Linear24& a, const Linear24Kernels& kernels, int threads) {
  // Equal tiles, so that no rows of zeros are multiplied but those of the last one.
  const int64_t rows = std::min(a.M, kTilePassRows);
  const int64_t height = ceil_div(rows, ceil_div(rows, kernels.tile_rows));
  const int64_t depth = ceil_div(a.K, kernels.tile_span) * kernels.tile_span;
  const int64_t tile_bytes = ceil_div(height * depth * kernels.x_bytes, 64) * 64;
  auto* x = x_scratch.get<uint8_t>(ceil_div(rows, height) * tile_bytes);
  std::vector<XTile> tiles;
  std::atomic<bool> fine{true};
  for (int64_t m = 0; m < a.M; m += kTilePassRows) {
    const int64_t end = std::min(a.M, m + kTilePassRows), count = ceil_div(end - m, height);
    tiles.clear();
    for (int64_t t = 0; t < count; ++t) {
      const int64_t at = m + t * height, place = t % kernels.tiles_together, first = t - place;
      tiles.push_back({x + first * tile_bytes, at, static_cast<int>(std::min(height, end - at)),
                       static_cast<int>(height), static_cast<int>(place),
                       static_cast<int>(std::min<int64_t>(kernels.tiles_together, count - first))});
    }
    parallel_for(count, kPackGrain / (height * depth + 1) + 1, 1, threads,
                 [&](int64_t begin, int64_t stop) {
                   for (int64_t t = begin; t < stop; ++t) {
                     if (!kernels.pack_tile(a, tiles[t])) fine = false;
                   }
                 });
    if (!fine) return false;
    over_weight(a, end - m, 16, threads, [&](int64_t n0, int64_t n1) {
      if (!kernels.tiles(a, tiles.data(), static_cast<int>(count), n0, n1, work_scratch)) {
        fine = false;
      }
    });
    if (!fine) return false;
  }
  return true;
}

void by_panels(const Linear24& a, const Linear24Kernels& kernels, int threads) {
  const int64_t lanes = kernels.panel_lanes, row_bytes = lanes * 4;
  const int64_t room = l1_bytes() * 3 / 4;  // for a panel's chunk; the rest is for the weights
  const int64_t widest = std::min<int64_t>(kMaxPanelWidth, room / (48 * row_bytes));
  const int64_t passed = std::min(ceil_div(a.M, lanes) * lanes, kPassRows);
  float* data = x_scratch.get<float>(passed * std::max<int64_t>(a.K, 1));
  std::vector<XPanel> panels;
  for (int64_t m = 0; m < a.M; m += kPassRows) {
    const int64_t end = std::min(a.M, m + kPassRows);
    const int64_t vectors = ceil_div(end - m, lanes), count = ceil_div(vectors, widest);
    panels.clear();
    int64_t at = 0;  // in vectors
    for (int64_t p = 0; p < count; ++p) {
      const int64_t width = (vectors - at) / (count - p);
      const int64_t left = end - m - at * lanes;
      panels.push_back({data + at * lanes * a.K, m + at * lanes,
                        static_cast<int>(std::min(left, width * lanes)), static_cast<int>(width),
                        0});
      at += width;
    }
    const int64_t depth =
        std::clamp<int64_t>(room / (panels.back().width * row_bytes) / 16 * 16, 16, 128);
    for (XPanel& panel : panels) panel.depth = static_cast<int>(depth);
    parallel_for(a.K, kPackGrain / (end - m) + 1, 16, threads, [&](int64_t k0, int64_t k1) {
      for (const XPanel& panel : panels) kernels.pack_panel(a, panel, k0, k1);
    });
    over_weight(a, end - m, 16, threads, [&](int64_t n0, int64_t n1) {
      kernels.panels(a, panels.data(), static_cast<int>(count), n0, n1, work_scratch);
    });
  }
}

const Linear24Kernels& kernels_for(DType dtype) {
  return *tier().linear_24[static_cast<int>(dtype)];
}

void multiply(const Linear24& a, const Linear24Kernels& kernels, int threads) {
  if (!a.packed && a.M <= kernels.max_rows) return by_rows(a, kernels, threads);
  if (a.M > (a.packed ? kernels.max_tiles_packed : kernels.max_tiles))
    return by_panels(a, kernels, threads);
  if (!by_tiles(a, kernels, threads)) multiply(a, *kernels.instead, threads);
}

}  // namespace

void linear_24(const Linear24& a, int threads) {
  if (a.M != 0 && a.N != 0) multiply(a, kernels_for(a.dtype), threads);
}

void prepack_24(const void* values, const uint8_t* meta, uint8_t* packed, int64_t N, int64_t K,
                DType dtype, int threads) {
  Linear24 a{};
  a.values = values;
  a.meta = meta;
  a.N = N;
  a.K = K;
  const Linear24Kernels& kernels = kernels_for(dtype);
  parallel_for(ceil_div(N, 16), kPackGrain / (16 * K + 1) + 1, 1, threads,
               [&](int64_t begin, int64_t end) {
                 for (int64_t b = begin; b < end; ++b)
                   kernels.prepack(a, 16 * b, packed, work_scratch);
               });
}

void unprepack_24(const uint8_t* packed, void* values, uint8_t* meta, int64_t N, int64_t K,
                  DType dtype, int threads) {
  // Not hot: element by element, through the same permutation read backwards.
  const int64_t item = dtype == DType::f32 ? 4 : 2, row = K / 2 * item, meta_row = meta_bytes(K);
  const bool pairs = dtype == DType::bf16;
  parallel_for(
      ceil_div(N, 16), kPackGrain / (16 * K + 1) + 1, 1, threads, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
          const int64_t n = 16 * b, rows = std::min<int64_t>(16, N - n);
          const uint8_t* from = packed + n * row;
          const uint8_t* bits = packed + N * row + n * meta_row;
          for (int64_t r = 0; r < rows; ++r) {
            uint8_t* to = static_cast<uint8_t*>(values) + (n + r) * row;
            for (int64_t j = 0; j < K / 2; ++j) {
              const int64_t at = pairs ? (j / 2 * rows + r) * 2 + j % 2 : j * rows + r;
              std::copy_n(from + at * item, item, to + j * item);
            }
            for (int64_t i = 0; i < meta_row; ++i) {
              const int64_t word = i / 4, width = std::min<int64_t>(4, meta_row - 4 * word);
              const bool whole = word < K / 32;
              meta[(n + r) * meta_row + i] =
                  bits[word * 4 * rows + (whole ? r * 4 : r * width) + i % 4];
            }
          }
        }
      });
}

}  // namespace sparsekern::cpu
