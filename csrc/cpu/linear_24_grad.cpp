// The gradients of linear_24 on whole tensors: which kernel of the tier, the words they share, how
// threads divide the work. Threads own outputs and never part of a sum, so that results do not
// depend on how many there are.
#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "linear_24_dvalues.h"
#include "linear_24_dx.h"
#include "scratch.h"
#include "threads.h"

namespace sparsekern::cpu {
namespace {

thread_local Scratch shared_words;  // of the calling thread, read by all
thread_local Scratch thread_words;  // each thread's own
thread_local Scratch thread_sums;

constexpr int64_t kGrain = 1 << 16;         // multiply-adds a thread is worth waking for
constexpr int64_t kPackGrain = 1 << 14;     // words, likewise
constexpr int64_t kDvaluesWords = 8 << 20;  // of x packed at a time: 32 MB
constexpr int64_t kDxTileRows = 1024;       // of dy packed in tiles at a time
constexpr int64_t kDxTileSkew = 256;        // columns; keeps tiles off each other's sets of L2

int64_t round_up(int64_t n, int64_t to) { return ceil_div(n, to) * to; }

// The narrowest panel that takes `rows`, or the widest.
int panel_lanes(const Gradient24Kernels& kernels, int64_t rows) {
  for (int width : kPanelWidths) {
    const int lanes = width * kernels.lanes;
    if (lanes >= rows || lanes == kernels.max_lanes) return lanes;
  }
  return kernels.max_lanes;
}

// Panels of `words` rows of words, `length` columns each, one after the other in `data`.
std::vector<Panel> cut_panels(const Gradient24Kernels& kernels, const float* data, int64_t words,
                              int64_t length) {
  std::vector<Panel> panels;
  for (int64_t m = 0, lanes = 0; m < words;) {
    const int width = panel_lanes(kernels, words - m);
    const int rows = static_cast<int>(std::min<int64_t>(width, words - m));
    panels.push_back({data + lanes * length, m, rows, width});
    m += rows, lanes += width;
  }
  return panels;
}

void dx_few_rows(const Linear24Dx& a, const Gradient24Kernels& kernels, bool pairs, int threads) {
  // Whole groups of eight words: the kernel reads them without a tail.
  const int64_t stride = round_up(pairs ? ceil_div(a.N, 2) : a.N, 8);
  float* words = shared_words.get<float>(static_cast<size_t>(a.M * stride));
  kernels.pack(a.dy, a.dtype, false, a.M, a.N, 0, static_cast<int>(a.M), 0, stride, words, stride,
               1);
  parallel_for(a.K, kGrain / (a.M * a.N) + 1, 64, threads, [&](int64_t k0, int64_t k1) {
    kernels.dx_rows(a, words, stride, k0, k1, thread_sums.get<float>(kDxScratch));
  });
}

void dx_many_rows(const Linear24Dx& a, const Gradient24Kernels& kernels, bool pairs, int threads) {
  const int64_t columns = pairs ? ceil_div(a.N, 2) : a.N;
  for (int64_t m = 0; m < a.M; m += kDxLanes) {
    const int64_t rows = std::min<int64_t>(kDxLanes, a.M - m);
    const int64_t lanes = round_up(rows, kernels.max_lanes);
    float* data = shared_words.get<float>(static_cast<size_t>(lanes * columns));
    std::vector<Panel> panels = cut_panels(kernels, data, rows, columns);
    for (Panel& panel : panels) panel.m0 += m;
    parallel_for(columns, kPackGrain / rows + 1, 16, threads, [&](int64_t n0, int64_t n1) {
      for (const Panel& p : panels) {
        kernels.pack(a.dy, a.dtype, false, a.M, a.N, p.m0, p.lanes, n0, n1,
                     const_cast<float*>(p.data) + n0 * p.lanes, 1, p.lanes);
      }
    });
    parallel_for(a.K, kGrain / (rows * a.N) + 1, 64, threads, [&](int64_t k0, int64_t k1) {
      kernels.dx_panels(a, panels.data(), static_cast<int>(panels.size()), k0, k1,
                        thread_sums.get<float>(kDxScratch));
    });
  }
}

void dvalues_few_rows(const Linear24Dvalues& a, const Gradient24Kernels& kernels, bool pairs,
                      int threads) {
  const int64_t words = pairs ? ceil_div(a.M, 2) : a.M, stride = round_up(a.K, 64);
  float* x = shared_words.get<float>(static_cast<size_t>(words * (stride + a.N)));
  float* dy = x + words * stride;
  const int rows = static_cast<int>(words);
  kernels.pack(a.x, a.dtype, true, a.M, a.K, 0, rows, 0, stride, x, stride, 1);
  kernels.pack(a.dy, a.dtype, true, a.M, a.N, 0, rows, 0, a.N, dy, 1, words);
  parallel_for(a.N, kGrain / (a.M * a.K) + 1, 1, threads, [&](int64_t n0, int64_t n1) {
    kernels.dvalues_rows(a, x, stride, dy, words, 0, a.K, n0, n1);
  });
}

void dvalues_many_rows(const Linear24Dvalues& a, const Gradient24Kernels& kernels, bool pairs,
                       int threads) {
  const int64_t words = pairs ? ceil_div(a.M, 2) : a.M;
  const int64_t lanes = round_up(words, kernels.max_lanes);
  const int64_t columns =
      std::min(round_up(a.K, 64), std::max<int64_t>(64, kDvaluesWords / lanes / 64 * 64));
  const int64_t rows = std::clamp(kDvaluesBlockWords / lanes, kDvaluesMinRows, kDvaluesRows);
  float* data = shared_words.get<float>(static_cast<size_t>(lanes * columns));
  const std::vector<Panel> x = cut_panels(kernels, data, words, columns);
  const auto pack = [&](const Strided& s, int64_t I, const std::vector<Panel>& panels,
                        int64_t origin, int64_t j0, int64_t j1) {
    for (const Panel& p : panels) {
      kernels.pack(s, a.dtype, true, a.M, I, p.m0, p.lanes, j0, j1,
                   const_cast<float*>(p.data) + (j0 - origin) * p.lanes, 1, p.lanes);
    }
  };
  for (int64_t k = 0; k < a.K; k += columns) {
    const int64_t k_end = std::min(a.K, k + columns);
    parallel_for(round_up(k_end - k, 64), kPackGrain / a.M + 1, 64, threads,
                 [&](int64_t j0, int64_t j1) { pack(a.x, a.K, x, k, k + j0, k + j1); });
    parallel_for(a.N, kGrain / (a.M * a.K) + 1, 1, threads, [&](int64_t n0, int64_t n1) {
      float* block = thread_words.get<float>(static_cast<size_t>(lanes * rows));
      const std::vector<Panel> dy = cut_panels(kernels, block, words, rows);
      for (int64_t n = n0; n < n1; n += rows) {
        const int64_t n_end = std::min(n1, n + rows);
        pack(a.dy, a.N, dy, n, n, n_end);
        kernels.dvalues_panels(a, x.data(), dy.data(), static_cast<int>(dy.size()), k, k_end, n,
                               n_end, thread_sums.get<float>(kDvaluesScratch));
      }
    });
  }
}

void dx_by_tiles(const Linear24Dx& a, const Gradient24Tiles& kernels, int threads) {
  // Equal tiles, so that no rows of zeros are multiplied but those of the last one.
  const int64_t most = std::min(a.M, kDxTileRows);
  const auto height = static_cast<int>(ceil_div(most, ceil_div(most, kernels.rows)));
  const int64_t apart = height * (round_up(a.N, kernels.span) + kDxTileSkew);
  auto* data = shared_words.get<uint16_t>(ceil_div(most, height) * apart);
  for (int64_t m = 0; m < a.M; m += kDxTileRows) {
    const DyTiles dy = {data, m, std::min(kDxTileRows, a.M - m), apart, height};
    parallel_for(ceil_div(dy.rows, height), kPackGrain / apart + 1, 1, threads,
                 [&](int64_t begin, int64_t end) {
                   for (int64_t t = begin; t < end; ++t) kernels.dx_pack(a, dy, t);
                 });
    parallel_for(a.K, kGrain / (dy.rows * a.N) + 1, 64, threads,
                 [&](int64_t k0, int64_t k1) { kernels.dx(a, dy, k0, k1, thread_words); });
  }
}

void dvalues_by_tiles(const Linear24Dvalues& a, const Gradient24Tiles& kernels, int threads) {
  const int64_t words = round_up(a.M, kernels.span) / 2;
  const int64_t columns =
      std::min(round_up(a.K, 64), std::max<int64_t>(64, kDvaluesWords / words / 64 * 64));
  float* x = shared_words.get<float>(words * columns);
  for (int64_t k = 0; k < a.K; k += columns) {
    const int64_t k_end = std::min(a.K, k + columns);
    parallel_for(k_end - k, kPackGrain / a.M + 1, 64, threads, [&](int64_t k0, int64_t k1) {
      kernels.dvalues_pack(a, k + k0, k + k1, x + k0 * words);
    });
    parallel_for(a.N, kGrain / (a.M * a.K) + 1, 32, threads, [&](int64_t n0, int64_t n1) {
      kernels.dvalues(a, x, k, k_end, n0, n1, thread_words);
    });
  }
}

// The tier's kernels by tiles if it has them and they take this dtype.
const Gradient24Tiles* gradient_tiles(DType dtype) {
  return dtype == DType::bf16 ? tier().gradient_tiles : nullptr;
}

}  // namespace

void linear_24_dx(const Linear24Dx& a, int threads) {
  if (a.M == 0 || a.K == 0) return;
  if (a.N == 0) {
    std::memset(a.dx, 0, static_cast<size_t>(a.M * a.K * (a.dtype == DType::f32 ? 4 : 2)));
    return;
  }
  if (const Gradient24Tiles* tiles = gradient_tiles(a.dtype); tiles && a.M >= tiles->dx_min_rows) {
    return dx_by_tiles(a, *tiles, threads);
  }
  const Gradient24Kernels& kernels = tier().linear_24_grad;
  const bool pairs = kernels.pairs && a.dtype == DType::bf16;
  if (a.M <= kernels.dx_max_rows) {
    dx_few_rows(a, kernels, pairs, threads);
  } else {
    dx_many_rows(a, kernels, pairs, threads);
  }
}

void linear_24_dvalues(const Linear24Dvalues& a, int threads) {
  if (a.N == 0 || a.K == 0) return;
  if (a.M == 0) {
    std::memset(a.dvalues, 0,
                static_cast<size_t>(a.N * (a.K / 2) * (a.dtype == DType::f32 ? 4 : 2)));
    return;
  }
  if (const Gradient24Tiles* tiles = gradient_tiles(a.dtype);
      tiles && a.M >= tiles->dvalues_min_rows) {
    return dvalues_by_tiles(a, *tiles, threads);
  }
  const Gradient24Kernels& kernels = tier().linear_24_grad;
  const bool pairs = kernels.pairs && a.dtype == DType::bf16;
  if (a.M <= kernels.dvalues_max_rows) {
    dvalues_few_rows(a, kernels, pairs, threads);
  } else {
    dvalues_many_rows(a, kernels, pairs, threads);
  }
}

}  // namespace sparsekern::cpu
