// dx[m, k] = sum_n dy[m, n] * weight[n, k] on one thread, for a range of columns k. Words as in
// linear_24_grad.h: row n of weight is a word row, or, for pairs, rows 2n and 2n + 1.
//
// ROWS, few rows of dy. Lanes run along k:
//
//     values, meta ─expand─▶ w[8 rows][block of k]   dense words, in L1
//     sum[m][k] += (w[0][k] * dy[m, n] + … + w[7][k] * dy[m, n + 7])   one load and store of sum in 8
//
//   The work is dense; what is saved is half the bytes of the weight, which limit it.
//
// PANELS, many rows. Lanes run along the rows of dy, so that a kept weight meets all of them:
//
//     panel[n][lanes]  dy transposed, as many n as fit L1
//     weight block     n x 128 columns, turned: per column its words, and masks of 64 bits that say
//                      which rows keep it
//     sum[W vectors]   += w * panel[n]   for each bit of column k, in registers; then into acc[k]
//
//   Half the multiplications of the dense product, three quarters for pairs: rows 2n and 2n + 1 both
//   skip a column one time in four. A kept word of the widest panel is 23 instructions for 16 fmas
//   (39 for 16 pair products, whose loads GCC keeps apart) and 17 loads: at two a cycle 0.53 cycles
//   for each; a bare loop of these takes 0.61. Measured on a Zen 5, 2 cores, M = 1024, 4096 x 4096,
//   one thread: 0.82 to 0.90 in fp32, 0.76 in pairs. Other kDxPanelBytes, 16 to 40 KB, were no
//   faster in both.
#pragma once

#include "linear_24_grad.h"

namespace sparsekern::cpu {

constexpr int kDxColumns =
    128;  // of weight per block; 128 columns * 1024 lanes of acc: 512 KB of L2
constexpr int kDxLanes = 1024;        // lanes of all panels of one pass
constexpr int kDxDepth = 256;         // word rows per block at most
constexpr int kDxPanelBytes = 32768;  // of a panel that L1 holds beside lists and acc
constexpr int kDxRowsBlock = 16384;   // floats of sums in the ROWS kernel
constexpr int64_t kDxSums = 64;  // blocks of n whose sums meet in acc; then they join a total, so
                                 // that the error does not grow with N
// PANELS: acc, total, the turned block, rows before they are turned. ROWS needs less.
constexpr int64_t kDxScratch = int64_t{kDxColumns} * (2 * kDxLanes + kDxDepth + 16 + 16);

template <class T, bool kPair>
struct DxWeight {
  // Columns [k, k + count) of word row n as dense words; count a multiple of 4, k of 64. Bit c of
  // kept: column c is kept (in either row, for pairs).
  static void expand(const Linear24Dx& a, int64_t n, int64_t k, int64_t count, float* out,
                     uint64_t* kept) {
    const int64_t bytes = a.K / 2 * (a.dtype == DType::f32 ? 4 : 2), meta = meta_bytes(a.K);
    const auto* values = static_cast<const uint8_t*>(a.values);
    if constexpr (kPair) {
      const uint8_t *low = values + 2 * n * bytes, *low_meta = a.meta + 2 * n * meta;
      const bool last = 2 * n + 1 == a.N;  // of an odd N: no partner
      T::expand_pairs(low, low_meta, last ? nullptr : low + bytes, last ? nullptr : low_meta + meta,
                      k, count, out, kept);
    } else {
      values += n * bytes;
      const uint8_t* m = a.meta + n * meta;
      if (a.dtype == DType::f32)
        return T::template expand<DType::f32>(values, m, k, count, out, kept);
      if (a.dtype == DType::f16)
        return T::template expand<DType::f16>(values, m, k, count, out, kept);
      T::template expand<DType::bf16>(values, m, k, count, out, kept);
    }
  }

  // The rows are far apart: no hardware prefetcher follows that many streams.
  static void prefetch(const Linear24Dx& a, int64_t n, int64_t k, int64_t count) {
    const int64_t size = a.dtype == DType::f32 ? 4 : 2;
    const auto* values = static_cast<const uint8_t*>(a.values);
    for (int64_t row = kPair ? 2 * n : n, i = 0; i <= kPair; ++i) {
      if (row + i >= a.N) return;
      const uint8_t* at = values + ((row + i) * (a.K / 2) + k / 2) * size;
      for (int64_t b = 0; b < count / 2 * size; b += 64) __builtin_prefetch(at + b, 0, 2);
      __builtin_prefetch(a.meta + (row + i) * meta_bytes(a.K) + k / 8, 0, 2);
    }
  }
};

template <class T>
struct DxRows {
  using F = typename T::F;
  static constexpr int kGroup = 8;  // word rows of weight at a time
  static constexpr int kSkew = 16;  // keeps the rows of a group off each other's sets of L1
  static constexpr int kSplit =
      64;  // groups summed before their sum joins the total: keeps fp32 exact

  template <bool kPair>
  [[gnu::noinline]] static void multiply(const float* w, int64_t block, const float* dy,
                                         int64_t stride, int64_t M, float* sum) {
    for (int64_t k = 0; k < block; k += T::kLanes) {
      F row[kGroup];
#pragma GCC unroll 8
      for (int g = 0; g < kGroup; ++g) row[g] = T::load(w + g * (block + kSkew) + k);
      for (int64_t m = 0; m < M; ++m) {
        const float* d = dy + m * stride;
        F even = T::zero(), odd = T::zero();
#pragma GCC unroll 8
        for (int g = 0; g < kGroup; g += 2) {
          even = multiply_add<T, kPair>(row[g], T::set1(d[g]), even);
          odd = multiply_add<T, kPair>(row[g + 1], T::set1(d[g + 1]), odd);
        }
        float* s = sum + m * block + k;
        T::store(s, T::add(T::load(s), T::add(even, odd)));
      }
    }
  }

  // One row of dy: dx itself is the vector of sums, and the weight goes from its packed form to the
  // multiplication without passing through memory, in whole rows. Columns [k0, k1), 64 at a time.
  template <DType D>
  static void run_single_row(const Linear24Dx& a, const float* dy, int64_t k0, int64_t k1,
                             float* sum, float* total) {
    constexpr int64_t kSize = D == DType::f32 ? 4 : 2;
    const int64_t row_bytes = a.K / 2 * kSize, row_meta = meta_bytes(a.K);
    for (int64_t n = 0; n < a.N; n += kGroup) {
      const int64_t rows = a.N - n < kGroup ? a.N - n : kGroup;
      const bool join = (n / kGroup + 1) % kSplit == 0 || n + kGroup >= a.N;
      for (int64_t k = k0; k < k1; k += 64) {
        const auto* values = static_cast<const uint8_t*>(a.values) + n * row_bytes + k / 2 * kSize;
        const uint8_t* meta = a.meta + n * row_meta + k / 8;
        F part[4] = {T::zero(), T::zero(), T::zero(), T::zero()};
        for (int64_t r = 0; r < rows; ++r, values += row_bytes, meta += row_meta) {
          F w[4];
          T::template expand_64<D>(values, meta, w);
          const F d = T::set1(dy[n + r]);
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) part[i] = T::fma(w[i], d, part[i]);
        }
        float *s = sum + (k - k0), *t = total + (k - k0);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i, s += T::kLanes, t += T::kLanes) {
          part[i] = T::add(T::load(s), part[i]);
          T::store(s, join ? T::zero() : part[i]);
          if (join) T::store(t, T::add(T::load(t), part[i]));
        }
      }
    }
  }

  template <bool kPair>
  static void run_kind(const Linear24Dx& a, const float* dy, int64_t stride, int64_t k0, int64_t k1,
                       float* scratch) {
    using Weight = DxWeight<T, kPair>;
    const int64_t words = kPair ? ceil_div(a.N, 2) : a.N;
    // Columns per block: long runs of each row for few m, sums that stay in L1 for more.
    int64_t block = kDxRowsBlock / a.M / 64 * 64;
    block = block < 256 ? 256 : block > 1024 ? 1024 : block;
    if constexpr (T::kExpandsInRegisters && !kPair) {
      if (a.M == 1) {
        const int64_t whole =
            (k1 - k0) / 64 * 64 < kDxRowsBlock ? (k1 - k0) / 64 * 64 : kDxRowsBlock;
        float* total = scratch + whole;
        for (; whole > 0 && k0 + whole <= k1; k0 += whole) {
          std::memset(scratch, 0, sizeof(float) * 2 * whole);
          if (a.dtype == DType::f32) {
            run_single_row<DType::f32>(a, dy, k0, k0 + whole, scratch, total);
          } else if (a.dtype == DType::f16) {
            run_single_row<DType::f16>(a, dy, k0, k0 + whole, scratch, total);
          } else {
            run_single_row<DType::bf16>(a, dy, k0, k0 + whole, scratch, total);
          }
          for (int64_t i = 0; i < whole; i += T::kLanes) {
            T::narrow(T::load(total + i), a.dx, k0 + i, a.dtype);
          }
        }
        if (k0 >= k1) return;  // what is left are fewer columns than 64, or than a block
      }
    }
    if (block > k1 - k0) block = ceil_div(k1 - k0, 64) * 64;
    float *sum = scratch, *total = sum + a.M * block, *w = total + a.M * block;
    uint64_t kept[1024 / 64];
    for (int64_t k = k0; k < k1; k += block) {
      const int64_t count = k1 - k < block ? k1 - k : block;
      std::memset(scratch, 0, sizeof(float) * (2 * a.M * block + kGroup * (block + kSkew)));
      for (int64_t n = 0; n < words; n += kGroup) {
        for (int64_t g = 0; g < kGroup; ++g) {
          if (n + g < words) {
            Weight::prefetch(a, n + g + kGroup, k, count);
            Weight::expand(a, n + g, k, count, w + g * (block + kSkew), kept);
          } else {
            std::memset(w + g * (block + kSkew), 0, sizeof(float) * block);
          }
        }
        multiply<kPair>(w, block, dy + n, stride, a.M, sum);
        if ((n / kGroup + 1) % kSplit == 0 || n + kGroup >= words) {
          for (int64_t i = 0; i < a.M * block; i += T::kLanes) {
            T::store(total + i, T::add(T::load(total + i), T::load(sum + i)));
            T::store(sum + i, T::zero());
          }
        }
      }
      for (int64_t m = 0; m < a.M; ++m) {
        for (int64_t i = 0; i < count; i += T::kLanes) {
          narrow_some<T>(T::load(total + m * block + i), a.dx, m * a.K + k + i, count - i, a.dtype);
        }
      }
    }
  }

  static void run(const Linear24Dx& a, const float* dy, int64_t stride, int64_t k0, int64_t k1,
                  float* scratch) {
    if constexpr (T::kPairs) {
      if (a.dtype == DType::bf16) return run_kind<true>(a, dy, stride, k0, k1, scratch);
    }
    run_kind<false>(a, dy, stride, k0, k1, scratch);
  }
};

template <class T>
struct DxPanels {
  using F = typename T::F;

  // A block of the weight, turned: column c's words of all rows, and the bits of the rows that keep
  // it, 64 rows a mask.
  struct Block {
    float* words;     // [kDxColumns][stride]
    int64_t stride;   // an odd number of cache lines, so that columns spread over all sets of L1
    uint64_t* masks;  // [chunks][kDxColumns]
    int64_t chunks;
  };

  // Not inlined: the loop needs every register, and its callers' pointers would take some.
  template <bool kPair, int W>
  [[gnu::noinline]] static void multiply(const float* panel, const Block& block, int64_t columns,
                                         float* acc) {
    constexpr int64_t kWidth = W * T::kLanes;
    // Narrow panels take turns between sets of sums: one alone would wait for its own latency.
    constexpr int kChains = 4 * W <= T::kSums ? 4 : 2 * W <= T::kSums ? 2 : 1;
    for (int64_t c = 0; c < columns; ++c) {
      F sum[kChains * W];
#pragma GCC unroll 16
      for (int i = 0; i < kChains * W; ++i) sum[i] = T::zero();
      const float *words = block.words + c * block.stride, *rows = panel;
      const uint64_t* mask = block.masks + c;
      for (int64_t chunk = block.chunks; chunk > 0; --chunk) {
        uint64_t bits = *mask;
        while (bits) {
#pragma GCC unroll 8
          for (int chain = 0; chain < kChains; ++chain) {
            if (chain > 0 && !bits) break;
            const int64_t r = __builtin_ctzll(bits);
            bits &= bits - 1;
            const F w = T::set1(words[r]);
            const float* row = rows + r * kWidth;
#pragma GCC unroll 16
            for (int i = 0; i < W; ++i) {
              F& s = sum[chain * W + i];
              s = multiply_add<T, kPair>(w, T::load(row + i * T::kLanes), s);
            }
          }
        }
        words += 64, rows += 64 * kWidth, mask += kDxColumns;
      }
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) {
        float* at = acc + c * kWidth + i * T::kLanes;
        F all = sum[i];
#pragma GCC unroll 8
        for (int chain = 1; chain < kChains; ++chain) all = T::add(all, sum[chain * W + i]);
        T::store(at, T::add(T::load(at), all));
      }
    }
  }

  template <bool kPair>
  static void multiply_width(int lanes, const float* panel, const Block& block, int64_t columns,
                             float* acc) {
    switch (lanes / T::kLanes) {
      case 1: return multiply<kPair, 1>(panel, block, columns, acc);
      case 2: return multiply<kPair, 2>(panel, block, columns, acc);
      case 3: return multiply<kPair, 3>(panel, block, columns, acc);
      case 4: return multiply<kPair, 4>(panel, block, columns, acc);
      case 6: return multiply<kPair, 6>(panel, block, columns, acc);
      case 8: return multiply<kPair, 8>(panel, block, columns, acc);
    }
    if constexpr (T::kMaxWidth >= 16) {
      if (lanes == 12 * T::kLanes) return multiply<kPair, 12>(panel, block, columns, acc);
      multiply<kPair, 16>(panel, block, columns, acc);
    }
  }

  // `rows` word rows of weight from n, columns [k, k + columns). `dense` has room for kLanes rows.
  template <bool kPair>
  [[gnu::noinline]] static void build(const Linear24Dx& a, int64_t n, int64_t rows, int64_t words,
                                      int64_t k, int64_t columns, const Block& block,
                                      float* dense) {
    uint8_t kept_bytes[kDxColumns / 8]
                      [kDxDepth];  // byte b: which of columns 8b .. 8b+7 a row keeps
    std::memset(kept_bytes, 0, sizeof kept_bytes);
    for (int64_t r0 = 0; r0 < rows; r0 += T::kLanes) {
      const int64_t some = rows - r0 < T::kLanes ? rows - r0 : T::kLanes;
      for (int64_t r = r0; r < r0 + some; ++r) {
        uint64_t kept[kDxColumns / 64];
        if (n + r + rows < words) DxWeight<T, kPair>::prefetch(a, n + r + rows, k, columns);
        DxWeight<T, kPair>::expand(a, n + r, k, columns, dense + (r - r0) * kDxColumns, kept);
        for (int64_t b = 0; 8 * b < columns; ++b) {
          kept_bytes[b][r] = static_cast<uint8_t>(kept[b / 8] >> b % 8 * 8);
        }
      }
      for (int64_t c = 0; c < columns; c += T::kLanes) {
        F tile[T::kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < T::kLanes; ++i) tile[i] = T::load(dense + i * kDxColumns + c);
        T::transpose(tile);
#pragma GCC unroll 16
        for (int i = 0; i < T::kLanes; ++i) {
          T::store(block.words + (c + i) * block.stride + r0, tile[i]);
        }
      }
    }
    for (int64_t chunk = 0; chunk < block.chunks; ++chunk) {
      for (int64_t b = 0; 8 * b < columns; ++b) {
        T::turn_bits(kept_bytes[b] + 64 * chunk, block.masks + chunk * kDxColumns + 8 * b);
      }
    }
  }

  // acc[columns][lanes] of a panel to dx.
  static void write(const Linear24Dx& a, const Panel& p, const float* acc, int64_t k,
                    int64_t columns) {
    for (int l = 0; l < p.rows; l += T::kLanes) {
      for (int64_t c = 0; c < columns; c += T::kLanes) {
        F tile[T::kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < T::kLanes; ++i) tile[i] = T::load(acc + (c + i) * p.lanes + l);
        T::transpose(tile);
#pragma GCC unroll 16
        for (int i = 0; i < T::kLanes; ++i) {
          if (l + i >= p.rows) break;
          narrow_some<T>(tile[i], a.dx, (p.m0 + l + i) * a.K + k + c, columns - c, a.dtype);
        }
      }
    }
  }

  static void add(const float* from, int64_t count, float* to) {
    for (int64_t i = 0; i < count; i += T::kLanes)
      T::store(to + i, T::add(T::load(to + i), T::load(from + i)));
  }

  template <bool kPair>
  static void run_kind(const Linear24Dx& a, const Panel* panels, int count, int64_t k0, int64_t k1,
                       float* scratch) {
    const int64_t words = kPair ? ceil_div(a.N, 2) : a.N;
    float *acc = scratch, *total = acc + int64_t{kDxColumns} * kDxLanes;
    float* dense = total + int64_t{kDxColumns} * kDxLanes;
    const int64_t fit = kDxPanelBytes / 4 / panels[0].lanes;  // panels come widest first
    const int64_t depth = fit < kDxDepth ? fit : kDxDepth;
    uint64_t masks[kDxDepth / 64 * kDxColumns];
    const Block block = {dense + T::kLanes * kDxColumns, (ceil_div(depth, 16) | 1) * 16, masks,
                         ceil_div(depth, 64)};
    for (int64_t k = k0; k < k1; k += kDxColumns) {
      const int64_t columns = k1 - k < kDxColumns ? k1 - k : kDxColumns;
      int64_t lanes = 0;
      for (int p = 0; p < count; ++p) lanes += panels[p].lanes;
      const int64_t sums = kDxColumns * lanes;
      const bool split = words > kDxSums * depth;
      std::memset(acc, 0, sizeof(float) * sums);
      if (split) std::memset(total, 0, sizeof(float) * sums);
      for (int64_t n = 0; n < words; n += depth) {
        const int64_t rows = words - n < depth ? words - n : depth;
        build<kPair>(a, n, rows, words, k, columns, block, dense);
        float* at = acc;
        for (int p = 0; p < count; at += kDxColumns * panels[p].lanes, ++p) {
          multiply_width<kPair>(panels[p].lanes, panels[p].data + n * panels[p].lanes, block,
                                columns, at);
        }
        if (split && (n / depth + 1) % kDxSums == 0) {
          add(acc, sums, total);
          std::memset(acc, 0, sizeof(float) * sums);
        }
      }
      if (split) add(total, sums, acc);
      const float* at = acc;
      for (int p = 0; p < count; at += kDxColumns * panels[p].lanes, ++p) {
        write(a, panels[p], at, k, columns);
      }
    }
  }

  static void run(const Linear24Dx& a, const Panel* panels, int count, int64_t k0, int64_t k1,
                  float* scratch) {
    if constexpr (T::kPairs) {
      if (a.dtype == DType::bf16) return run_kind<true>(a, panels, count, k0, k1, scratch);
    }
    run_kind<false>(a, panels, count, k0, k1, scratch);
  }
};

}  // namespace sparsekern::cpu
