// The gradients of linear_24 for bf16 with the tiles of AMX (Sapphire Rapids and later), for many
// rows. As in linear_24_amx.cpp the tiles multiply densely; what 2:4 saves is bytes of the weight.
//
// dx: kept values are spread out where they are used, two rows at a time.
//
//     nibble           i0 | i1 << 2 of a group  ─vpermt2q in a table of 16─▶  which byte goes where
//     values of n      [ 8 groups: first second ]  ─vpermb─▶  [ 32 k of n ]   zeros elsewhere
//     n and n + 1      ─vpunpckl/hwd─▶ rows of two tiles of pairs; their columns lie
//                      0-3 8-11 16-19 24-27 and 4-7 12-15 20-23 28-31, until the sums are written
//
//     dy        [ 16 m ][ 32 n ]                1 KiB
//     weight    [ 16 pairs of n ][ 16 k ][ 2 ]  1 KiB
//     sums      [ 16 m ][ 16 k ] fp32           += dy · weight
//
//   for 512 columns k and 512 rows of dy        their sums stay in L2: 1 MiB
//     for chunks of 256 n                       dy of a chunk, too: 256 KiB
//       for 64 columns                          spread, 32 KiB
//         for halves of them                    16 KiB: in L1
//           for pairs of tiles of dy            four tiles of sums, two of dy, two of weight
//
// dvalues: all products are made, and the kept ones written.
//
//     dy        [ 16 n ][ 32 m ]                turned, a block of rows n at a time: in L2
//     x         [ 16 pairs of m ][ 16 k ][ 2 ]  once for all n
//     sums      [ 16 n ][ 16 k ] fp32           += dy · x
//     dvalues   sums that meta names            a permute of 32 columns to sixteen kept ones
//
//   for 256 rows n, turned
//     for 64 columns k
//       for chunks of 256 m                     x of a chunk, 32 KiB: in L1
//         for pairs of tiles of dy              four tiles of sums, twice; then the kept ones
//
// Limited for few rows by bytes: of the weight, 0.56 of a dense product's, or of dvalues, half of a
// dense product's. Their lines lie a row apart, where no hardware prefetcher follows, so each is
// asked for ahead: without it dvalues took 14 ms in place of 9 at M = 256, 4096 x 4096. For many
// rows by what comes from L2 and by the sums that wait there: a tile product takes 5 ns with operands
// from L1, a tile from L2 6 to load and 19 to store, and these loops take 13 and 15 a product (Xeon
// 6).
#include "target.h"
#if defined(SPARSEKERN_AMX)

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cstring>

#include "convert.h"
#include "kernels.h"
#include "scratch.h"

SPARSEKERN_TARGET_BEGIN(SPARSEKERN_AMX)

#include "amx.h"
#include "simd_avx512.h"

namespace sparsekern::cpu {
namespace {

constexpr int64_t kColumns = 64;  // k at a time: a cache line of values
constexpr int64_t kDepth = 256;   // of the summed dimension whose 64 columns are in L1
constexpr int64_t kDepthTiles = kDepth / kTileSpan;

// Sixteen sums to `count` bf16.
void write_some(__m512 sums, int64_t count, uint16_t* out) {
  if (count >= 16) return Avx512::store_rounded<DType::bf16>(out, sums);
  uint16_t some[16];
  Avx512::store_rounded<DType::bf16>(some, sums);
  std::memcpy(out, some, static_cast<size_t>(count) * 2);
}

// Which of 64 bytes, of them the first 32 values, goes to which byte of eight groups; by nibble.
struct Spread {
  __m512i low, high, group, first_shift, second_shift;

  Spread() {
    alignas(64) uint8_t table[16][8], offset[64];
    alignas(64) int64_t shift[8];
    for (int nibble = 0; nibble < 16; ++nibble) {
      for (int i = 0; i < 4; ++i) {
        const int slot = i == (nibble & 3) ? 0 : i == nibble >> 2 ? 1 : -1;
        for (int byte = 0; byte < 2; ++byte)
          table[nibble][2 * i + byte] = static_cast<uint8_t>(slot < 0 ? 32 : 2 * slot + byte);
      }
    }
    for (int i = 0; i < 64; ++i) offset[i] = static_cast<uint8_t>(i / 8 * 4);
    for (int i = 0; i < 8; ++i) shift[i] = 4 * i;
    low = _mm512_load_si512(table[0]);
    high = _mm512_load_si512(table[8]);
    group = _mm512_load_si512(offset);
    first_shift = _mm512_load_si512(shift);
    second_shift = _mm512_add_epi64(first_shift, _mm512_set1_epi64(32));
  }

  // Eight groups, whose meta is shifted down by `shift` and whose values fill the lower half.
  __m512i dense(__m512i meta, __m512i shift, __m512i values) const {
    const __m512i nibbles = _mm512_srlv_epi64(meta, shift);
    const __m512i bytes = _mm512_permutex2var_epi64(low, nibbles, high);
    return _mm512_permutexvar_epi8(_mm512_or_si512(bytes, group), values);
  }
};

struct DxAmx {
  static constexpr int64_t kBlock = 512;                   // columns whose sums stay in L2
  static constexpr int64_t kTiles = 32;                    // of dy, likewise
  static constexpr int64_t kWeight = kDepthTiles * kTile;  // dwords of sixteen columns
  static constexpr int64_t kAhead = 48;                    // rows of weight

  static void pack(const Linear24Dx& a, const DyTiles& to, int64_t tile) {
    if (a.N == 0) return;  // there may be no memory at all
    const int64_t first = tile * to.height, rows = std::min<int64_t>(to.height, to.rows - first);
    const auto* dy = static_cast<const uint16_t*>(a.dy.data) + (to.m0 + first) * a.dy.stride_m;
    pack_a(dy, a.dy.stride_m, a.dy.stride_i, a.N, static_cast<int>(rows), to.height,
           static_cast<uint16_t*>(to.data) + tile * to.apart);
  }

  // Rows [n, n + 32 * tiles) and columns [k, k + 64) of weight to b[4][kDepthTiles][16][16], zeros
  // past the weight's ends. Brings values kAhead rows on nearer, at the end of a chunk
  // of the next, whose rows lie `next` bytes from these; and meta `next_meta` bytes on, unless 0.
  static void spread(const Spread& spread, const Linear24Dx& a, int64_t n, int64_t tiles, int64_t k,
                     int64_t next, int64_t next_meta, uint32_t* b) {
    const int64_t width = std::min(kColumns, a.K - k), row_meta = meta_bytes(a.K);
    const auto* values = static_cast<const uint8_t*>(a.values) + k;
    const uint8_t* meta = a.meta + k / 8;
    const uint32_t kept = ~0u >> (32 - width / 2);
    const int64_t last = n + tiles * kTileSpan;
    const auto row = [&](int64_t at, __m512i* dense) {
      const bool there = at < a.N;
      const int64_t from = there ? at : a.N - 1;
      const uint8_t *v = values + from * a.K, *m = meta + from * row_meta;
      __builtin_prefetch(v + (at + kAhead < last ? kAhead * a.K : next - (kDepth - kAhead) * a.K),
                         0, 2);
      if (next_meta != 0) __builtin_prefetch(m + next_meta, 0, 2);
      uint64_t bits = 0;
      if (width == kColumns) {
        std::memcpy(&bits, m, 8);
      } else {
        std::memcpy(&bits, m, static_cast<size_t>(meta_bytes(width)));
      }
      const auto load = [&](int half) {
        const auto mask = static_cast<__mmask16>(there ? kept >> 16 * half : 0);
        return _mm512_zextsi256_si512(_mm256_maskz_loadu_epi16(mask, v + 32 * half));
      };
      const __m512i all = _mm512_set1_epi64(static_cast<int64_t>(bits));
      dense[0] = spread.dense(all, spread.first_shift, load(0));
      dense[1] = spread.dense(all, spread.second_shift, load(1));
    };
    for (; n < last; n += 2, b += 16) {
      __m512i even[2], odd[2];
      row(n, even);
      row(n + 1, odd);
      for (int half = 0; half < 2; ++half) {
        uint32_t* to = b + 2 * half * kWeight;
        _mm512_store_si512(to, _mm512_unpacklo_epi16(even[half], odd[half]));
        _mm512_store_si512(to + kWeight, _mm512_unpackhi_epi16(even[half], odd[half]));
      }
    }
  }

  static void run(const Linear24Dx& a, const DyTiles& dy, int64_t k0, int64_t k1,
                  Scratch& scratch) {
    static const Spread table;
    const auto* data = static_cast<const uint16_t*>(dy.data);
    const int64_t height = dy.height, count = ceil_div(dy.rows, height);
    const int64_t sums_tile = height * 16;  // of a tile of dy with one of weight
    const int64_t sums_room = std::min(count, kTiles) * sums_tile * (kBlock / 16);
    float* sums = scratch.get<float>(sums_room + kColumns / 16 * kWeight);
    auto* weight = reinterpret_cast<uint32_t*>(sums + sums_room);
    const Tiles configured(dy.height);
    for (int64_t k = k0; k < k1; k += kBlock) {
      const int64_t end = std::min(k1, k + kBlock);
      for (int64_t t0 = 0; t0 < count; t0 += kTiles) {
        const int64_t t1 = std::min(count, t0 + kTiles), sums_b = (t1 - t0) * sums_tile;
        for (int64_t n = 0; n < a.N; n += kDepth) {
          const int64_t along = ceil_div(std::min(kDepth, a.N - n), kTileSpan);
          for (int64_t j = k; j < end; j += kColumns) {
            const int64_t next = j + kColumns < end ? kColumns : kDepth * a.K - (j - k);
            spread(table, a, n, along, j, next, j == k ? kDepth * meta_bytes(a.K) : 0, weight);
            for (int64_t w = 0; w < kColumns / 16 && j + 16 * w < end; w += 2) {
              for (int64_t t = t0; t < t1; t += 2) {
                float* here = sums + ((j - k) / 16 + w) * sums_b + (t - t0) * sums_tile;
                multiply_some<1>(t + 1 < t1, true, data + t * dy.apart + n * height,
                                 kTileSpan * height, dy.apart, weight + w * kWeight, kWeight, along,
                                 n == 0, here, sums_tile, sums_b,
                                 sums_ahead(here, sums_tile, sums_b));
              }
            }
          }
        }
        for (int64_t r = t0 * height; r < std::min(dy.rows, t1 * height); ++r) {
          write(a, dy.m0 + r, k, end, sums + (r - t0 * height) * 16, sums_b);
        }
      }
    }
  }

 private:
  // Columns [k, end) of row m from pairs of tiles, `apart` floats from one to the next.
  static void write(const Linear24Dx& a, int64_t m, int64_t k, int64_t end, const float* sums,
                    int64_t apart) {
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    auto* out = static_cast<uint16_t*>(a.dx) + m * a.K;
    for (; k < end; k += 32, sums += 2 * apart) {
      const __m512 low = _mm512_loadu_ps(sums), high = _mm512_loadu_ps(sums + apart);
      write_some(_mm512_permutex2var_ps(low, first, high), end - k, out + k);
      if (k + 16 < end) {
        write_some(_mm512_permutex2var_ps(low, second, high), end - k - 16, out + k + 16);
      }
    }
  }
};

struct DvaluesAmx {
  // Rows n whose dy stays in L2, and the bytes of it; at least two tiles.
  static constexpr int64_t kRows = 256, kBlockBytes = 1 << 20;

  // Elements [i, i + 16) of rows m and m + 1, side by side; zeros past the ends.
  static __m512i pairs(const Strided& s, int64_t M, int64_t I, int64_t m, int64_t i) {
    if (m >= M || i >= I) return _mm512_setzero_si512();
    const auto* at = static_cast<const uint16_t*>(s.data) + m * s.stride_m + i * s.stride_i;
    const bool two = m + 1 < M;
    const uint16_t* next = two ? at + s.stride_m : at;
    const int width = static_cast<int>(std::min<int64_t>(16, I - i));
    __m256i low, high;
    if (s.stride_i == 1) {
      const auto mask = static_cast<__mmask16>(0xffff >> (16 - width));
      low = _mm256_maskz_loadu_epi16(mask, at);
      high = _mm256_maskz_loadu_epi16(two ? mask : 0, next);
    } else {
      alignas(32) uint16_t some[2][16] = {};
      for (int j = 0; j < width; ++j) {
        some[0][j] = at[j * s.stride_i];
        if (two) some[1][j] = next[j * s.stride_i];
      }
      low = _mm256_load_si256(reinterpret_cast<const __m256i*>(some[0]));
      high = _mm256_load_si256(reinterpret_cast<const __m256i*>(some[1]));
    }
    return _mm512_or_si512(_mm512_cvtepu16_epi32(low),
                           _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
  }

  // Columns [i0, i1) of s[M, I] to tiles out[ceil((i1 - i0) / 16)][ceil(M / 32)]: [pair of m][i],
  // or [i][pair of m] if `turned`.
  static void pack_pairs(const Strided& s, int64_t M, int64_t I, int64_t i0, int64_t i1,
                         bool turned, uint32_t* out) {
    const int64_t depth = ceil_div(M, kTileSpan);
    for (int64_t d = 0; d < depth; ++d, out += kTile) {
      uint32_t* to = out;
      for (int64_t i = i0; i < i1; i += 16, to += depth * kTile) {
        alignas(64) uint32_t square[kTile];
        uint32_t* tile = turned ? square : to;
        for (int r = 0; r < 16; ++r) {
          _mm512_store_si512(tile + r * 16, pairs(s, M, I, d * kTileSpan + 2 * r, i));
        }
        if (turned) Avx512::transpose(square, 64, to, 16);
      }
    }
  }

  static void pack(const Linear24Dvalues& a, int64_t k0, int64_t k1, void* x) {
    pack_pairs(a.x, a.M, a.K, k0, k1, false, static_cast<uint32_t*>(x));
  }

  static void run(const Linear24Dvalues& a, const void* x, int64_t k0, int64_t k1, int64_t n0,
                  int64_t n1, Scratch& scratch) {
    const int64_t depth = ceil_div(a.M, kTileSpan), a_tile = depth * kTile;
    const int64_t rows =
        std::min(std::clamp<int64_t>(kBlockBytes / (depth * 64) / 32 * 32, 32, kRows),
                 ceil_div(n1 - n0, 16) * 16);
    // Sums of sixteen rows; those of all rows where they have to wait for the next chunk.
    const int64_t sums_tile = kColumns / 16 * kTile;
    const bool waits = depth > kDepthTiles;
    const int64_t dy_room = rows / 16 * a_tile;
    auto* dy = scratch.get<uint32_t>(dy_room + (waits ? rows / 16 : 2) * sums_tile);
    auto* sums = reinterpret_cast<float*>(dy + dy_room);
    const Tiles configured(kTileRows);
    for (int64_t n = n0; n < n1; n += rows) {
      const int64_t n_end = std::min(n1, n + rows), count = ceil_div(n_end - n, 16);
      pack_pairs(a.dy, a.M, a.N, n, n_end, true, dy);
      for (int64_t k = k0; k < k1; k += kColumns) {
        const auto* b = static_cast<const uint32_t*>(x) + (k - k0) / 16 * a_tile;
        for (int64_t d = 0; d < depth; d += kDepthTiles) {
          const int64_t along = std::min(kDepthTiles, depth - d);
          for (int64_t t = 0; t < count; t += 2) {
            float* here = sums + (waits ? t * sums_tile : 0);
            for (int64_t w = 0; w < kColumns / 16 && k + 16 * w < k1; w += 2) {
              multiply_some<1>(t + 1 < count, true,
                               reinterpret_cast<const uint16_t*>(dy + t * a_tile + d * kTile),
                               2 * kTile, 2 * a_tile, b + w * a_tile + d * kTile, a_tile, along,
                               d == 0, here + w * kTile, sums_tile, kTile,
                               sums_ahead(here + w * kTile, sums_tile, kTile));
            }
            if (d + along < depth) continue;
            for (int64_t at = n + 16 * t; at < std::min(n_end, n + 16 * t + 32); ++at) {
              const int64_t r = at - n - 16 * t;
              write(a, at, k, k1, here + r / 16 * sums_tile + r % 16 * 16);
            }
          }
        }
      }
    }
  }

 private:
  // The kept ones of columns [k, k + 64), or to k1, of row n.
  static void write(const Linear24Dvalues& a, int64_t n, int64_t k, int64_t k1, const float* sums) {
    const uint8_t* meta = a.meta + n * meta_bytes(a.K);
    auto* out = static_cast<uint16_t*>(a.dvalues) + n * (a.K / 2);
    __builtin_prefetch(out + k / 2 + kColumns / 2, 1, 2);  // to be written next
    for (const int64_t end = std::min(k1, k + kColumns); k < end; k += 32, sums += 2 * kTile) {
      uint8_t some[4] = {};
      const uint8_t* bits = meta + k / 8;
      if (k + 32 > end) {
        std::memcpy(some, bits, static_cast<size_t>(meta_bytes(end - k)));
        bits = some;
      }
      const Avx512::Near near = {_mm512_loadu_ps(sums), _mm512_loadu_ps(sums + kTile)};
      write_some(Avx512::row_pick(near, Avx512::row_positions(bits)), (end - k) / 2, out + k / 2);
    }
  }
};

}  // namespace

extern const Gradient24Tiles linear_24_grad_amx = {
    kTileRows, kTileSpan, DxAmx::pack, DxAmx::run, DvaluesAmx::pack, DvaluesAmx::run, 3, 5,
};

}  // namespace sparsekern::cpu

SPARSEKERN_TARGET_END
#endif
