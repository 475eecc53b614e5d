// What the core must compute, written again from csrc/layout.h: slow, in double precision or on
// bits, one element at a time, sharing no code with it.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "../../csrc/layout.h"

namespace naive {

using sparsekern::Activation;
using sparsekern::DType;
using Bytes = std::vector<uint8_t>;

// ---- element types ----

struct Format {
  const char* name;
  int bytes, exponent, mantissa;  // bits; 0 for integers
};

inline Format format_of(DType dtype) {
  switch (dtype) {
    case DType::f32: return {"f32", 4, 8, 23};
    case DType::f16: return {"f16", 2, 5, 10};
    case DType::bf16: return {"bf16", 2, 8, 7};
    case DType::f64: return {"f64", 8, 11, 52};
    case DType::i8: return {"i8", 1, 0, 0};
    case DType::u8: return {"u8", 1, 0, 0};
  }
  return {};
}

inline uint64_t get_bits(const uint8_t* p, int64_t i, int bytes) {
  uint64_t bits = 0;
  for (int b = 0; b < bytes; ++b) bits |= uint64_t{p[i * bytes + b]} << (8 * b);
  return bits;
}
inline void put_bits(Bytes& to, int64_t i, int bytes, uint64_t bits) {
  for (int b = 0; b < bytes; ++b) {
    to[static_cast<size_t>(i * bytes + b)] = static_cast<uint8_t>(bits >> (8 * b));
  }
}

inline double to_double(uint64_t bits, DType dtype) {
  if (dtype == DType::u8) return static_cast<double>(bits);
  if (dtype == DType::i8) return static_cast<double>(bits) - (bits >= 128 ? 256 : 0);
  const Format f = format_of(dtype);
  const int least = 2 - (1 << (f.exponent - 1));  // exponent of the smallest normal number
  const int64_t e = static_cast<int64_t>(bits >> f.mantissa) & ((1 << f.exponent) - 1);
  const double m = static_cast<double>(bits & ((uint64_t{1} << f.mantissa) - 1));
  const double sign = bits >> (f.exponent + f.mantissa) & 1 ? -1 : 1;
  if (e == (1 << f.exponent) - 1) return m != 0 ? std::nan("") : sign * HUGE_VAL;
  if (e == 0) return sign * std::ldexp(m, least - f.mantissa);
  return sign *
         std::ldexp(m + std::ldexp(1.0, f.mantissa), static_cast<int>(e) - 1 + least - f.mantissa);
}

// Rounds to nearest, ties to even.
inline uint64_t from_double(double v, DType dtype) {
  if (dtype == DType::i8 || dtype == DType::u8) {
    return static_cast<uint8_t>(static_cast<int>(v));
  }
  const Format f = format_of(dtype);
  const int least = 2 - (1 << (f.exponent - 1));
  const uint64_t infinity = ((uint64_t{1} << f.exponent) - 1) << f.mantissa;
  const uint64_t sign = std::signbit(v) ? uint64_t{1} << (f.exponent + f.mantissa) : 0;
  if (std::isnan(v)) return infinity | uint64_t{1} << (f.mantissa - 1);
  if (std::isinf(v)) return sign | infinity;
  if (v == 0) return sign;
  const int e = std::max(std::ilogb(v), least);
  const auto units =
      static_cast<uint64_t>(std::nearbyint(std::ldexp(std::fabs(v), f.mantissa - e)));
  // One unit above the mantissa's last carries into the exponent by itself.
  const uint64_t bits = (static_cast<uint64_t>(e - least) << f.mantissa) + units;
  return sign | std::min(bits, infinity);
}

// ---- 2:4 formats ----

inline uint64_t magnitude(uint64_t bits, DType dtype) {
  if (dtype == DType::u8) return bits;
  if (dtype == DType::i8) return bits >= 128 ? 256 - bits : bits;
  return bits & ~(uint64_t{1} << (8 * format_of(dtype).bytes - 1));
}

// Positions of the two largest of a group, the lower of equals first, then in order.
inline std::array<int, 2> largest_two(const uint8_t* w, int64_t group, DType dtype) {
  std::array<int, 4> order = {0, 1, 2, 3};
  const int bytes = format_of(dtype).bytes;
  const auto size = [&](int i) { return magnitude(get_bits(w, group * 4 + i, bytes), dtype); };
  std::sort(order.begin(), order.end(),
            [&](int a, int b) { return size(a) != size(b) ? size(a) > size(b) : a < b; });
  return {std::min(order[0], order[1]), std::max(order[0], order[1])};
}

// A kept zero of either sign is stored as +0.0.
inline uint64_t kept_bits(const Bytes& w, int64_t i, DType dtype) {
  const uint64_t bits = get_bits(w.data(), i, format_of(dtype).bytes);
  return magnitude(bits, dtype) ? bits : 0;
}

struct Packed {
  Bytes values, meta, dense;  // dense: the pruned weight
};

inline Packed pack(const Bytes& w, int64_t rows, int64_t K, DType dtype) {
  const int bytes = format_of(dtype).bytes;
  Packed p{Bytes(w.size() / 2), Bytes(static_cast<size_t>(rows * ((K + 7) / 8))), Bytes(w.size())};
  for (int64_t g = 0; g < rows * K / 4; ++g) {
    const std::array<int, 2> kept = largest_two(w.data(), g, dtype);
    for (int s = 0; s < 2; ++s) {
      const uint64_t bits = kept_bits(w, g * 4 + kept[s], dtype);
      put_bits(p.values, g * 2 + s, bytes, bits);
      put_bits(p.dense, g * 4 + kept[s], bytes, bits);
    }
    const int64_t row = g / (K / 4), in_row = g % (K / 4);
    uint8_t& byte = p.meta[static_cast<size_t>(row * ((K + 7) / 8) + in_row / 2)];
    const int nibble = kept[0] | kept[1] << 2;
    byte = static_cast<uint8_t>(in_row % 2 ? (byte & 15) | nibble << 4 : nibble | 4 << 4);
  }
  return p;
}

// Two kept in every row and every column of a 4x4 tile, the largest sum of magnitudes, the first of
// equals with the pairs of each row in lexicographic order.
inline Bytes prune_transposable(const Bytes& w, int64_t rows, int64_t K, DType dtype) {
  const int bytes = format_of(dtype).bytes;
  constexpr int kPairs[6][2] = {{0, 1}, {0, 2}, {0, 3}, {1, 2}, {1, 3}, {2, 3}};
  Bytes out(w.size());
  for (int64_t tile = 0; tile < rows / 4 * (K / 4); ++tile) {
    const int64_t corner = tile / (K / 4) * 4 * K + tile % (K / 4) * 4;
    double size[4][4], best = -1;
    for (int r = 0; r < 4; ++r) {
      for (int c = 0; c < 4; ++c) {
        const double v = to_double(get_bits(w.data(), corner + r * K + c, bytes), dtype);
        size[r][c] = std::isnan(v) ? HUGE_VAL : std::fabs(v);
      }
    }
    int chosen[4] = {};
    for (int code = 0; code < 6 * 6 * 6 * 6; ++code) {
      const int pair[4] = {code / 216, code / 36 % 6, code / 6 % 6, code % 6};
      int column[4] = {};
      double sum = 0;
      for (int r = 0; r < 4; ++r) {
        for (const int c : kPairs[pair[r]]) ++column[c], sum += size[r][c];
      }
      if (std::any_of(column, column + 4, [](int n) { return n != 2; }) || sum <= best) continue;
      best = sum;
      std::copy(pair, pair + 4, chosen);
    }
    for (int r = 0; r < 4; ++r) {
      for (const int c : kPairs[chosen[r]]) {
        const int64_t i = corner + r * K + c;
        put_bits(out, i, bytes, kept_bits(w, i, dtype));
      }
    }
  }
  return out;
}

// ---- 2:4 product ----

inline double activate(double v, Activation activation) {
  switch (activation) {
    case Activation::none: return v;
    case Activation::relu: return v < 0 ? 0 : v;
    case Activation::relu2: return v < 0 ? 0 : v * v;
    case Activation::gelu: return v / 2 * std::erfc(-v / std::sqrt(2.0));
    case Activation::silu: return v / (1 + std::exp(-v));
  }
  return v;
}

struct Product {
  std::vector<double> exact, size;  // of each y: the sum, and the sum of magnitudes
};

// Over the dense form of the weight, zeros included. Strides in elements.
inline Product linear(const std::vector<double>& x, int64_t stride_m, int64_t stride_k,
                      const std::vector<double>& weight, const std::vector<double>& bias, int64_t M,
                      int64_t N, int64_t K) {
  Product p;
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t n = 0; n < N; ++n) {
      double sum = bias.empty() ? 0 : bias[static_cast<size_t>(n)], size = std::fabs(sum);
      for (int64_t k = 0; k < K; ++k) {
        const double w = weight[static_cast<size_t>(n * K + k)];
        if (w == 0) continue;
        const double term = w * x[static_cast<size_t>(m * stride_m + k * stride_k)];
        sum += term;
        size += std::fabs(term);
      }
      p.exact.push_back(sum);
      p.size.push_back(size);
    }
  }
  return p;
}

inline std::vector<double> to_doubles(const Bytes& from, DType dtype) {
  const int bytes = format_of(dtype).bytes;
  std::vector<double> out;
  for (size_t i = 0; i < from.size() / static_cast<size_t>(bytes); ++i) {
    out.push_back(to_double(get_bits(from.data(), static_cast<int64_t>(i), bytes), dtype));
  }
  return out;
}

// ---- zero-value compression ----

struct Stream {
  Bytes mask, values;
  std::vector<int64_t> offsets;
};

inline Stream compress(const Bytes& x, int64_t n, int bytes) {
  Stream s{Bytes(static_cast<size_t>((n + 7) / 8)), {}, {}};
  for (int64_t i = 0; i < n; ++i) {
    if (i % sparsekern::kZvcTile == 0) {
      s.offsets.push_back(static_cast<int64_t>(s.values.size()) / bytes);
    }
    if (get_bits(x.data(), i, bytes) == 0) continue;
    s.mask[static_cast<size_t>(i / 8)] |= static_cast<uint8_t>(1 << (i % 8));
    s.values.insert(s.values.end(), x.begin() + i * bytes, x.begin() + (i + 1) * bytes);
  }
  return s;
}

}  // namespace naive
