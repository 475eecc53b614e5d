// The gradients of linear_24 for every machine. GNU vectors of 16 bytes: SSE2 on any x86-64, NEON on
// any aarch64, scalars elsewhere.
#include <cstring>

#include "convert.h"
#include "kernels.h"
#include "linear_24_dvalues.h"
#include "linear_24_dx.h"
#include "scalar_24.h"

namespace sparsekern::cpu {
namespace {

struct Portable {
  typedef float F __attribute__((vector_size(16)));
  static constexpr int kLanes = 4, kLevels = 2, kMaxWidth = 8, kSums = 10;
  static constexpr bool kPairs = false, kExpandsInRegisters = false;

  static F zero() { return F{}; }
  static F set1(float v) { return F{v, v, v, v}; }
  static F load(const float* p) {
    F v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static void store(float* p, F v) { std::memcpy(p, &v, sizeof v); }
  static F add(F a, F b) { return a + b; }
  static F mul(F a, F b) { return a * b; }
  static F fma(F a, F b, F c) { return a * b + c; }

  template <DType D>
  static F load_values(const uint8_t* values, int64_t i) {
    return F{load_float(values, i, D), load_float(values, i + 1, D), load_float(values, i + 2, D),
             load_float(values, i + 3, D)};
  }

  static void transpose(F* v) {
    for (int i = 0; i < 4; ++i) {
      for (int j = 0; j < i; ++j) {
        const float t = v[i][j];
        v[i][j] = v[j][i];
        v[j][i] = t;
      }
    }
  }

  template <int Level>
  static F fold(F a, F b) {
    if constexpr (Level == 1) return F{a[0], b[0], a[1], b[1]} + F{a[2], b[2], a[3], b[3]};
    return F{a[0], a[1], b[0], b[1]} + F{a[2], a[3], b[2], b[3]};
  }

  static void narrow(F v, void* out, int64_t at, DType dtype) {
    for (int i = 0; i < kLanes; ++i) store_float(out, at + i, v[i], dtype);
  }

  template <DType D>
  static void expand(const uint8_t* values, const uint8_t* meta, int64_t k, int64_t count,
                     float* out, uint64_t* kept) {
    std::memset(out, 0, sizeof(float) * count);
    std::memset(kept, 0, sizeof(uint64_t) * ceil_div(count, 64));
    for (int64_t j = k / 2; j < (k + count) / 2; ++j) {
      const int64_t c = j / 2 * 4 + slot_position(meta, j) - k;
      out[c] = load_float(values, j, D);
      kept[c / 64] |= uint64_t{1} << c % 64;
    }
  }

  // Bit b of 64 bytes is bits 0..63 of out[b].
  static void turn_bits(const uint8_t* bytes, uint64_t* out) {
    for (int b = 0; b < 8; ++b) {
      out[b] = 0;
      for (int i = 0; i < 64; ++i) out[b] |= uint64_t{bytes[i] >> b & 1u} << i;
    }
  }

  struct Index {
    int32_t at[kLanes];
  };

  static Index index(const uint8_t* meta, int64_t j, int64_t slots) {
    Index index;
    store_positions(index.at, meta, j, slots);
    return index;
  }

  static F pick(const float* x, const Index& index) {
    return F{x[index.at[0]], x[index.at[1]], x[index.at[2]], x[index.at[3]]};
  }

  static void store_positions(int32_t* position, const uint8_t* meta, int64_t j, int64_t) {
    for (int i = 0; i < kLanes; ++i) position[i] = i / 2 * 4 + slot_position(meta, j + i);
  }
};

}  // namespace

const Gradient24Kernels linear_24_grad_portable = {
    GradientPack<Portable>::pack,
    DxRows<Portable>::run,
    DxPanels<Portable>::run,
    DvaluesRows<Portable>::run,
    DvaluesPanels<Portable>::run,
    8,
    8,
    Portable::kLanes,
    Portable::kLanes * Portable::kMaxWidth,
    Portable::kPairs,
};

}  // namespace sparsekern::cpu
