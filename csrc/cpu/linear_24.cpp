// linear_24 on whole tensors: which kernel of the tier, how many threads, and the scratch they share.
#include <algorithm>
#include <cmath>
#include <vector>

#include "convert.h"
#include "kernels.h"
#include "scratch.h"
#include "threads.h"

namespace sparsekern::cpu {
namespace {

thread_local Scratch scratch;

constexpr int64_t kRowsGrain = 1 << 16;  // multiply-adds a thread is worth waking for
constexpr int64_t kPackGrain = 1 << 14;  // elements, likewise

template <class F>
void with_float_type(DType dtype, F f) {
  if (dtype == DType::f32)
    return f([](const void* p, int64_t i) { return static_cast<const float*>(p)[i]; });
  if (dtype == DType::bf16) {
    return f(
        [](const void* p, int64_t i) { return bf16_to_float(static_cast<const uint16_t*>(p)[i]); });
  }
  f([](const void* p, int64_t i) { return f16_to_float(static_cast<const uint16_t*>(p)[i]); });
}

void linear_24_few_rows(const Linear24& a, const Linear24Kernels& kernels, int threads) {
  float* xf = scratch.get(static_cast<size_t>(a.M * a.K));
  with_float_type(a.dtype, [&](auto load) {
    for (int64_t m = 0; m < a.M; ++m) {
      for (int64_t k = 0; k < a.K; ++k)
        xf[m * a.K + k] = load(a.x, m * a.x_stride_m + k * a.x_stride_k);
    }
  });
  const int64_t work = std::max<int64_t>(1, a.M * a.K / 2);
  parallel_for(a.N, kRowsGrain / work + 1, 1, threads,
               [&](int64_t n0, int64_t n1) { kernels.rows(a, xf, n0, n1); });
}

void linear_24_many_rows(const Linear24& a, const Linear24Kernels& kernels, int threads) {
  const int narrow = kernels.min_lanes;
  const int64_t pass = std::min<int64_t>(kPassRows, ceil_div(a.M, narrow) * narrow);
  float* data = scratch.get(static_cast<size_t>(pass * std::max<int64_t>(a.K, 1)));
  std::vector<Panel> panels;
  for (int64_t m = 0; m < a.M; m += kPassRows) {
    const int64_t rows = std::min<int64_t>(kPassRows, a.M - m);
    panels.clear();
    for (int64_t done = 0; done < rows;) {
      int lanes = kernels.max_lanes;
      while (lanes > narrow && lanes > rows - done) lanes /= 2;
      const int used = static_cast<int>(std::min<int64_t>(lanes, rows - done));
      panels.push_back({data + done * a.K, m + done, used, lanes});
      done += used;
    }
    // Transpose x into the panels; threads take ranges of k, in steps of one cache line of x.
    parallel_for(a.K, kPackGrain / rows + 1, 16, threads, [&](int64_t k0, int64_t k1) {
      with_float_type(a.dtype, [&](auto load) {
        for (const Panel& p : panels) {
          float* out = const_cast<float*>(p.data);
          for (int64_t k = k0; k < k1; k += 16) {
            const int64_t end = std::min<int64_t>(k1, k + 16);
            for (int lane = 0; lane < p.rows; ++lane) {
              const int64_t row = (p.m0 + lane) * a.x_stride_m;
              for (int64_t i = k; i < end; ++i)
                out[i * p.lanes + lane] = load(a.x, row + i * a.x_stride_k);
            }
            for (int64_t i = k; i < end; ++i) {
              std::fill(out + i * p.lanes + p.rows, out + (i + 1) * p.lanes, 0.0f);
            }
          }
        }
      });
    });
    const int64_t work = std::max<int64_t>(1, rows * a.K / 2);
    parallel_for(a.N, kRowsGrain / work + 1, 16, threads, [&](int64_t n0, int64_t n1) {
      kernels.panels(a, panels.data(), static_cast<int>(panels.size()), n0, n1);
    });
  }
}

}  // namespace

float activate(float v, Activation activation) {
  switch (activation) {
    case Activation::none: return v;
    case Activation::relu: return v < 0 ? 0.0f : v;
    case Activation::relu2: return v < 0 ? 0.0f : v * v;
    case Activation::gelu: return 0.5f * v * (1.0f + std::erf(v * 0.70710678118654752f));
    case Activation::silu: return v / (1.0f + std::exp(-v));
  }
  return v;
}

void linear_24(const Linear24& a, int threads) {
  if (a.M == 0 || a.N == 0) return;
  const Linear24Kernels& kernels = tier().linear_24;
  if (a.M <= kernels.max_rows) {
    linear_24_few_rows(a, kernels, threads);
  } else {
    linear_24_many_rows(a, kernels, threads);
  }
}

}  // namespace sparsekern::cpu
