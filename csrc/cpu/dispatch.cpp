// Whole tensors to serial kernels: which tier, which of its kernels, how many threads, and the
// scratch they share.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <numeric>
#include <utility>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "convert.h"
#include "kernels.h"
#include "threads.h"

namespace sparsekern::cpu {
namespace {

// ---- which tier ----

#if defined(__x86_64__)
// By hand: not every compiler's __builtin_cpu_supports knows the name.
bool cpu_has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

bool cpu_has_avx2() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && cpu_has_f16c() &&
         __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
#else
  return false;
#endif
}

bool cpu_has_avx512() {
#if defined(__x86_64__)
  return cpu_has_avx2() && __builtin_cpu_supports("avx512f") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi2");
#else
  return false;
#endif
}

// Best first. A new tier is its file, its declaration in kernels.h and its line here.
std::vector<const Kernels*> tiers() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  if (cpu_has_avx512()) found.push_back(&kernels_avx512);
  if (cpu_has_avx2()) found.push_back(&kernels_avx2);
#endif
  found.push_back(&kernels_portable);
  return found;
}

std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> kernels{tiers().front()};
  return kernels;
}

// ---- fork ----

std::atomic<bool> forked{false};

#if defined(__unix__) || defined(__APPLE__)
[[maybe_unused]] const int watch_fork = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

// ---- scratch ----

// Grows and is kept for the thread's life: the second call of a shape allocates nothing.
class Scratch {
 public:
  float* get(size_t count) {
    if (count > count_) {
      data_.reset();
      count_ = 0;
      data_.reset(static_cast<float*>(::operator new(count * sizeof(float), std::align_val_t{64})));
      count_ = count;
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(float* p) const { ::operator delete(p, std::align_val_t{64}); }
  };
  std::unique_ptr<float, Free> data_;
  size_t count_ = 0;
};

thread_local Scratch scratch;

// ---- linear_24 ----

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

void linear_24_few_rows(const Linear24& a, const Kernels& kernels, int threads) {
  float* xf = scratch.get(static_cast<size_t>(a.M * a.K));
  with_float_type(a.dtype, [&](auto load) {
    for (int64_t m = 0; m < a.M; ++m) {
      for (int64_t k = 0; k < a.K; ++k)
        xf[m * a.K + k] = load(a.x, m * a.x_stride_m + k * a.x_stride_k);
    }
  });
  const int64_t work = std::max<int64_t>(1, a.M * a.K / 2);
  parallel_for(a.N, kRowsGrain / work + 1, 1, threads,
               [&](int64_t n0, int64_t n1) { kernels.linear_24_rows(a, xf, n0, n1); });
}

void linear_24_many_rows(const Linear24& a, const Kernels& kernels, int threads) {
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
      kernels.linear_24_panels(a, panels.data(), static_cast<int>(panels.size()), n0, n1);
    });
  }
}

// ---- zvc ----

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

bool in_forked_child() { return forked; }

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
  const Kernels& kernels = *current();
  if (a.M <= kernels.max_rows) {
    linear_24_few_rows(a, kernels, threads);
  } else {
    linear_24_many_rows(a, kernels, threads);
  }
}

int64_t zvc_index(const void* x, int64_t n, int size, uint8_t* mask, int64_t* offsets,
                  int threads) {
  const Kernels& kernels = *current();
  const int64_t tiles = ceil_div(n, kZvcTile);
  parallel_for(tiles, kTileGrain, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      offsets[t] = kernels.zvc_mask(static_cast<const uint8_t*>(x) + t * kZvcTile * size,
                                    tile_length(t, n), size, mask + t * (kZvcTile / 8));
    }
  });
  int64_t total = 0;
  for (int64_t t = 0; t < tiles; ++t) total += std::exchange(offsets[t], total);
  return total;
}

void zvc_compress(const void* x, int64_t n, int size, const uint8_t* mask, const int64_t* offsets,
                  void* values, int64_t room, int threads) {
  const Kernels& kernels = *current();
  const int64_t tiles = ceil_div(n, kZvcTile);
  parallel_for(tiles, kTileGrain, 1, threads, [&](int64_t begin, int64_t end) {
    // Tiles are packed here first: full-width stores run past a tile's end, where another thread
    // may be writing.
    alignas(64) uint8_t staged[kZvcTile * 8 + 64];
    for (int64_t t = begin; t < end && offsets[t] < room; ++t) {
      const int64_t count = std::min(tile_count(mask, t, n), room - offsets[t]);
      kernels.zvc_compress(static_cast<const uint8_t*>(x) + t * kZvcTile * size,
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
  const Kernels& kernels = *current();
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
      kernels.zvc_expand(in, mask + t * (kZvcTile / 8), tile_length(t, n), size,
                         static_cast<uint8_t*>(x) + t * kZvcTile * size);
    }
  });
}

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Kernels* tier : tiers()) names.push_back(tier->isa);
  return names;
}

std::string isa() { return current().load()->isa; }

bool set_isa(const std::string& name) {
  for (const Kernels* tier : tiers()) {
    if (name == tier->isa) {
      current() = tier;
      return true;
    }
  }
  return false;
}

std::vector<std::string> features() {
  std::vector<std::string> found;
#if defined(__x86_64__)
#define SPARSEKERN_FEATURE(name) \
  if (__builtin_cpu_supports(name)) found.push_back(name)
  SPARSEKERN_FEATURE("avx2");
  SPARSEKERN_FEATURE("fma");
  if (cpu_has_f16c()) found.push_back("f16c");
  SPARSEKERN_FEATURE("bmi2");
  SPARSEKERN_FEATURE("avx512f");
  SPARSEKERN_FEATURE("avx512bw");
  SPARSEKERN_FEATURE("avx512vl");
  SPARSEKERN_FEATURE("avx512vbmi");
  SPARSEKERN_FEATURE("avx512vbmi2");
  SPARSEKERN_FEATURE("avx512vnni");
  SPARSEKERN_FEATURE("avx512bf16");
#undef SPARSEKERN_FEATURE
#elif defined(__aarch64__)
  found.push_back("neon");
#endif
  return found;
}

bool has_openmp() {
#ifdef _OPENMP
  return true;
#else
  return false;
#endif
}

bool sanitized() {
#if defined(__SANITIZE_ADDRESS__)
  return true;
#elif defined(__has_feature)
  return __has_feature(address_sanitizer);
#else
  return false;
#endif
}

}  // namespace sparsekern::cpu
