// What happens to a sum before it is rounded: bias, activation. Included inside a target region:
// the loops are plain and left to the vectoriser.
#pragma once

#include "convert.h"
#include "kernels.h"

namespace sparsekern::cpu {
namespace {

constexpr int kFinish = 16;  // columns finished at a time

// The bias of columns [n, end) as fp32, zeros without one.
template <DType D>
void load_bias(const Linear24& a, int64_t n, int64_t end, float* bias) {
  for (int64_t i = n; i < end; ++i) bias[i - n] = a.bias ? load_float(a.bias, i, D) : 0.0f;
}

// The coefficients below are minimax fits in double, rounded: each function is within two units in
// the last place of fp32.

// e^v for v <= 0: v = k ln 2 + r, a polynomial in r, and k into the exponent. Below -87, where the
// result would soon be denormal, it is 0.
inline float exp_negative(float v) {
  const float clamped = v < -87.0f ? -87.0f : v;
  const float biased = clamped * 1.44269504f + 12582912.0f;  // + 1.5 * 2^23 rounds to an integer
  const float k = biased - 12582912.0f;
  const float r = (clamped - k * 0.693145752f) - k * 1.42860677e-6f;  // ln 2 in two parts
  float p = 0.0013941178f;
  p = p * r + 0.0083632143f;
  p = p * r + 0.0416663736f;
  p = p * r + 0.1666657627f;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  const float scaled = bits_to_float(float_to_bits(p) + (float_to_bits(biased) << 23));
  return v < -87.0f ? 0.0f : scaled;
}

inline float silu(float v) {
  const float e = exp_negative(v < 0 ? v : -v);
  return v * ((v < 0 ? e : 1.0f) / (1.0f + e));
}

// z P(z²) up to 1, 1 - e^Q(z) from there on.
inline float erf_rounded(float z) {
  const float size = z < 0 ? -z : z, square = z * z;
  float p = -9.6801359e-06f;
  p = p * square + 0.0001127054f;
  p = p * square - 0.0008484711f;
  p = p * square + 0.0052210749f;
  p = p * square - 0.0268654451f;
  p = p * square + 0.1128378287f;
  p = p * square - 0.3761263788f;
  p = p * square + 1.1283792257f;
  const float far = size < 4.0f ? size : 4.0f;  // erf(4) rounds to 1
  float q = 0.0001855748997f;
  q = q * far - 0.0029396158643f;
  q = q * far + 0.0218053516001f;
  q = q * far - 0.1030374392867f;
  q = q * far - 0.6382256150246f;
  q = q * far - 1.1270400285721f;
  q = q * far - 0.0003537089215f;
  const float tail = 1.0f - exp_negative(q);
  return size < 1.0f ? p * z : z < 0 ? -tail : tail;
}

inline float gelu(float v) { return 0.5f * v * (1.0f + erf_rounded(v * 0.70710678f)); }

inline void activate(float* v, Activation activation) {
  switch (activation) {
    case Activation::none: return;
    case Activation::relu:
      for (int i = 0; i < kFinish; ++i) v[i] = v[i] < 0 ? 0.0f : v[i];
      return;
    case Activation::relu2:
      for (int i = 0; i < kFinish; ++i) v[i] = v[i] < 0 ? 0.0f : v[i] * v[i];
      return;
    case Activation::gelu:
      for (int i = 0; i < kFinish; ++i) v[i] = gelu(v[i]);
      return;
    case Activation::silu:
      for (int i = 0; i < kFinish; ++i) v[i] = silu(v[i]);
      return;
  }
}

// Sixteen sums, of which `columns` are wanted, to y[at ..]: plus bias, activated, rounded.
template <class T, DType D>
void finish(const float* sums, const float* bias, int columns, Activation activation, void* y,
            int64_t at) {
  auto* out = static_cast<uint8_t*>(y) + at * (D == DType::f32 ? 4 : 2);
  alignas(64) float v[kFinish];
  for (int i = 0; i < kFinish; i += T::kLanes)
    T::store(v + i, T::add(T::load(sums + i), T::load(bias + i)));
  if (activation != Activation::none) activate(v, activation);
  if (columns == kFinish) {
    for (int i = 0; i < kFinish; i += T::kLanes)
      T::template store_rounded<D>(out + i * (D == DType::f32 ? 4 : 2), T::load(v + i));
  } else {
    for (int i = 0; i < columns; ++i) store_float(out, i, v[i], D);
  }
}

}  // namespace
}  // namespace sparsekern::cpu
