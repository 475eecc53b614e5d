// linear_24 for every machine. GNU vectors of 16 bytes: SSE2 on any x86-64, NEON on any aarch64,
// scalars elsewhere. There is no permute by a variable in them: picks are scalar.
#include <cstring>
#include <utility>

#include "convert.h"
#include "kernels.h"
#include "linear_24.h"
#include "scalar_24.h"
#include "scratch.h"

namespace sparsekern::cpu {
namespace {

struct Portable {
  typedef float F __attribute__((vector_size(16)));
  typedef int32_t I __attribute__((vector_size(16)));
  static constexpr int kLanes = 4;
  static constexpr int kTileRows = 6;
  static constexpr int kPanelAccumulators = 8;

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

  static I load_int(const void* p) {
    I v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static void store_int(void* p, I v) { std::memcpy(p, &v, sizeof v); }
  static I set1_int(int v) { return I{v, v, v, v}; }
  static I add_int(I a, I b) { return a + b; }
  static I and_int(I a, I b) { return a & b; }
  static void store_words(uint16_t* p, I v) {
    for (int i = 0; i < kLanes; ++i) p[i] = static_cast<uint16_t>(v[i]);
  }
  static I shift_right(I a, int n) {  // of a sign bit too: what is shifted in is never looked at
    return a >> n;
  }

  template <DType D>
  static F load_as_float(const void* p) {
    F v;
    for (int i = 0; i < kLanes; ++i) v[i] = load_float(p, i, D);
    return v;
  }
  template <DType D>
  static void store_rounded(void* p, F v) {
    for (int i = 0; i < kLanes; ++i) store_float(p, i, v[i], D);
  }

  static F low_bf16(I pairs) {
    const I bits = pairs << 16;
    F v;
    std::memcpy(&v, &bits, sizeof v);
    return v;
  }
  static F high_bf16(I pairs) {
    const I bits = pairs & static_cast<int32_t>(0xffff0000);
    F v;
    std::memcpy(&v, &bits, sizeof v);
    return v;
  }

  static constexpr int kTileGroups = 1;
  struct Index {};
  static Index first_index() { return {}; }
  static Index next_index(Index) { return {}; }
  static I controls(I bits, Index) { return bits; }
  static I second(I control) { return control >> 2; }
  static F pick(const float* x, I at) {
    return F{x[at[0] & 3], x[at[1] & 3], x[at[2] & 3], x[at[3] & 3]};
  }

  static void transpose(const void* rows, int64_t stride, uint32_t* out, int64_t pitch) {
    const auto* in = static_cast<const uint8_t*>(rows);
    for (int r = 0; r < 16; ++r) {
      for (int c = 0; c < 16; ++c)
        std::memcpy(out + c * pitch + r, in + r * stride + c * 4, sizeof *out);
    }
  }
  static void split_pairs(const uint32_t* pairs, uint16_t* out) {
    uint16_t halves[32];
    std::memcpy(halves, pairs, sizeof halves);
    for (int i = 0; i < 16; ++i) {
      out[i] = halves[2 * i];
      out[16 + i] = halves[2 * i + 1];
    }
  }

  static constexpr int kRowsKept = 4;
  static constexpr int kWeightRows = 1;
  static I row_positions(const uint8_t* meta) {
    return I{*meta & 3, *meta >> 2 & 3, (*meta >> 4 & 3) + 4, (*meta >> 6) + 4};
  }
  using Near = const float*;
  static Near row_load(const float* x) { return x; }
  static F row_pick(Near x, I at) { return F{x[at[0]], x[at[1]], x[at[2]], x[at[3]]}; }
  static float sum(F v) { return (v[0] + v[1]) + (v[2] + v[3]); }
};

}  // namespace

const Linear24Table linear_24_portable = {
    linear_24_kernels<Portable, DType::f32, FloatRow, FloatTile>(4, 4, 4),
    linear_24_kernels<Portable, DType::f16, FloatRow, FloatTile>(4, 4, 4),
    linear_24_kernels<Portable, DType::bf16, FloatRow, FloatTile>(4, 4, 4),
};

}  // namespace sparsekern::cpu
