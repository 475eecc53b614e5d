// linear_24 for every machine. GNU vectors of 16 bytes: SSE2 on any x86-64, NEON on any aarch64,
// scalars elsewhere.
#include <cstring>

#include "convert.h"
#include "kernels.h"
#include "linear_24.h"
#include "scalar_24.h"

namespace sparsekern::cpu {
namespace {

struct Portable {
  typedef float F __attribute__((vector_size(16)));
  static constexpr int kLanes = 4, kMaxWidth = 4, kDepth = 96;

  static F zero() { return F{}; }
  static F set1(float v) { return F{v, v, v, v}; }
  static F load(const float* p) {
    F v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static void store(float* p, F v) { std::memcpy(p, &v, sizeof v); }
  static F add(F a, F b) { return a + b; }
  static F fma(F a, F b, F c) { return a * b + c; }

  static void decode(const uint8_t* values, const uint8_t* meta, int64_t first, int kept,
                     DType dtype, float* w, int32_t* position) {
    decode_scalar(values, meta, first, 0, kept, dtype, w, position);
  }

  static void narrow(const float* in, void* out, int64_t at, int count, DType dtype) {
    for (int i = 0; i < count; ++i) store_float(out, at + i, in[i], dtype);
  }

  template <int R>
  static void dot_rows(const uint8_t* values, const uint8_t* meta, const float* x, int64_t K,
                       DType dtype, float* sums) {
    dot_rows_scalar<R>(values, meta, x, 0, K, K, dtype, sums);
  }
};

}  // namespace

const Linear24Kernels linear_24_portable = {
    LinearRows<Portable>::run,
    LinearPanels<Portable>::run,
    3,
    Portable::kMaxWidth * Portable::kLanes,
    Portable::kLanes,
};

}  // namespace sparsekern::cpu
