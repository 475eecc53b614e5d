// linear_24 for bf16 and fp16 with the tiles of AMX (Sapphire Rapids and later).
//
// A tile product multiplies 16 rows of x with 32 k of 16 rows of the weight in sixteen cycles: as many
// dense multiply-adds in a cycle as sixteen instructions of AVX-512 BF16. It skips no zeros, and need
// not: a small product waits for the bytes of the weight, a large one for operands in the tiles' order,
// which a dense weight has to be brought into as well. So kept values are spread out where they are used:
//
//     pairs       [ n: first second | n+1: first second | … ]     a group of the block (prepack_24.h)
//     nibble      i0 | i1 << 2 of n, n+1, …  ─vpermd in two tables of 16─▶  which byte goes where
//     spread      ─vpshufb─▶ [ n: w0 w1 | n+1: w0 w1 | … ]        rows 2g and 2g + 1 of a tile,
//                 ─vpshufb─▶ [ n: w2 w3 | n+1: w2 w3 | … ]        zeros where nothing is kept
//
//     weight      [ 16 pairs of k ][ 16 n ][ 2 ]   1 KiB, eight groups
//     x           [ 16 m ][ 32 k ]                 1 KiB
//     sums        [ 16 m ][ 16 n ] fp32            += x · weight
//
//   An fp16 of eleven bits is a bf16 of its first eight and one of the other three, exactly. So there
//   are two tiles of everything and four products, all into the same sums. What is infinite or a NaN
//   has no such parts: the call is made again with AVX-512.
//
//   for 512 rows of weight and 512 of x     their sums stay in L2: 1 MiB
//     for chunks of 512 k                   x of a chunk, too: 512 KiB
//       for pairs of blocks
//         for halves of the chunk           spread for 256 k, 16 KiB: in L1, as is what meets it of x
//           for pairs of tiles of x         four tiles of sums, two of x, two of weight: all there are
//
// Limited by the bytes of the weight up to some tens of rows of x: 0.56 of a dense product's, asked for
// 8 KiB ahead, or a core waits for them (2.2 ms in place of 1.5 at 4096 x 4096, 12 GB/s). Beyond by the
// loads of the tiles of x: a tile product takes 16 cycles, 19 measured with operands from L1, 26 to 29
// in this loop, as a load from L2 takes 24 (Xeon 6, 3.2 GHz under AMX). Spreading takes four
// shuffles a group on the one port that shuffles, 32 cycles a tile of weight, for every 512 rows of x.
// fp16 has four times the products and twice the loads.
#include "target.h"
#if defined(SPARSEKERN_AMX)

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <utility>

#include "convert.h"
#include "kernels.h"
#include "scalar_24.h"
#include "scratch.h"

SPARSEKERN_TARGET_BEGIN(SPARSEKERN_AMX)

#include "amx.h"
#include "linear_24.h"
#include "linear_24_dot.h"
#include "simd_avx512.h"

namespace sparsekern::cpu {
namespace {

template <DType D>
constexpr int kParts = D == DType::f16 ? 2 : 1;  // bf16 that an element is a sum of

// Sixteen fp16 as sums of two bf16, each in the upper half of a dword. Eleven bits of significand are
// eight and three: both are exact.
struct Halves {
  __m512i large, small;
  explicit Halves(__m256i halves) {
    const __m512 value = _mm512_cvtph_ps(halves);
    large = _mm512_and_si512(_mm512_castps_si512(value),
                             _mm512_set1_epi32(static_cast<int>(0xffff0000)));
    small = _mm512_castps_si512(_mm512_sub_ps(value, _mm512_castsi512_ps(large)));
  }
};

__m512i pairs_of(__m512i first, __m512i second) {
  return _mm512_or_si512(_mm512_srli_epi32(first, 16), second);
}

// Of 32 fp16. An infinity has no second part.
__mmask32 not_finite(__m512i halves) {
  const __m512i exponent = _mm512_set1_epi16(0x7c00);
  return _mm512_cmpeq_epi16_mask(_mm512_and_si512(halves, exponent), exponent);
}

// Which byte of a group's pairs goes to which of its dense elements, by nibble.
struct Spread {
  __m512i low, high, lane;

  Spread() {
    alignas(64) uint8_t tables[2][16][4];
    for (int nibble = 0; nibble < 16; ++nibble) {
      for (int i = 0; i < 4; ++i) {
        const int slot = i == (nibble & 3) ? 0 : i == nibble >> 2 ? 1 : -1;
        for (int byte = 0; byte < 2; ++byte)
          tables[i / 2][nibble][i % 2 * 2 + byte] = slot < 0 ? 0x80 : 2 * slot + byte;
      }
    }
    low = _mm512_load_si512(tables[0]);
    high = _mm512_load_si512(tables[1]);
    lane = _mm512_broadcast_i32x4(_mm_set_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0));
  }

  // Groups [0, groups) of a block to tiles[ceil(groups / 8)][parts][16][16] dwords, zeros after the
  // last. Brings the values `ahead` bytes on nearer. False if one of fp16 is infinite or a NaN.
  template <DType D>
  bool run(const Block& block, int64_t groups, int64_t ahead, uint32_t* to) const {
    __mmask32 odd = 0;
    for (int64_t g = 0; g < groups;) {
      __m512i bits = _mm512_loadu_si512(block.meta + g / 8 * kBlock);
      for (const int64_t end = g + 8 < groups ? g + 8 : groups; g < end; ++g, to += 2 * kBlock) {
        const uint8_t* values = block.values + g * kGroupBytes<D>;
        __builtin_prefetch(values + ahead, 0, 2);
        const __m512i where_low = _mm512_or_si512(_mm512_permutexvar_epi32(bits, low), lane);
        const __m512i where_high = _mm512_or_si512(_mm512_permutexvar_epi32(bits, high), lane);
        bits = _mm512_srli_epi32(bits, 4);
        const __m512i stored = _mm512_loadu_si512(values);
        if constexpr (D == DType::bf16) {
          _mm512_store_si512(to, _mm512_shuffle_epi8(stored, where_low));
          _mm512_store_si512(to + kBlock, _mm512_shuffle_epi8(stored, where_high));
        } else {
          odd |= not_finite(stored);
          const Halves first(_mm512_castsi512_si256(stored));
          const Halves second(_mm512_extracti64x4_epi64(stored, 1));
          const __m512i large = pairs_of(first.large, second.large);
          const __m512i small = pairs_of(first.small, second.small);
          _mm512_store_si512(to, _mm512_shuffle_epi8(large, where_low));
          _mm512_store_si512(to + kBlock, _mm512_shuffle_epi8(large, where_high));
          _mm512_store_si512(to + kTile, _mm512_shuffle_epi8(small, where_low));
          _mm512_store_si512(to + kTile + kBlock, _mm512_shuffle_epi8(small, where_high));
        }
      }
      if (g % 8 == 0) to += (kParts<D> - 1) * kTile;
    }
    for (int64_t g = groups; g % 8 != 0; ++g, to += 2 * kBlock) {
      for (int part = 0; part < kParts<D>; ++part) {
        _mm512_store_si512(to + part * kTile, _mm512_setzero_si512());
        _mm512_store_si512(to + part * kTile + kBlock, _mm512_setzero_si512());
      }
    }
    return odd == 0;
  }
};

template <DType D>
struct LinearAmx {
  using Weight = Blocks<Avx512, D>;
  static constexpr int64_t kTileGroups = 8;
  // Groups whose x is in L2 at a time: a whole cache line of a row's meta. Groups spread at a time:
  // two blocks of them and their x are in L1 together.
  static constexpr int64_t kDepth = 128, kSpread = 64 / kParts<D>;
  static constexpr int64_t kAhead = 8192;  // bytes
  static constexpr int kBlocks = 32;       // of weight that share a chunk of x while it is in L2
  static constexpr int kTiles = 32;        // of x whose sums with them stay in L2
  static constexpr int kFewTiles = 4;      // up to here a packed weight is read as one stream

  static bool pack(const Linear24& a, const XTile& tile) {
    if (a.K == 0) return true;  // there may be no memory at all
    const auto* x = static_cast<const uint16_t*>(a.x) + tile.m0 * a.x_stride_m;
    auto* out = static_cast<uint16_t*>(tile.data);
    const int64_t size = tile.height * kTileSpan;
    __mmask32 odd = 0;
    if (kParts<D> == 1) {
      pack_a(x, a.x_stride_m, a.x_stride_k, a.K, tile.rows, tile.height, out);
      return true;
    }
    for (int64_t k = 0; k < a.K; k += kTileSpan, out += 2 * size) {
      pack_a(x + k * a.x_stride_k, a.x_stride_m, a.x_stride_k,
             std::min<int64_t>(kTileSpan, a.K - k), tile.rows, tile.height, out);
      for (int64_t i = 0; i < size; i += kTileSpan) {
        const __m512i row = _mm512_loadu_si512(out + i);
        odd |= not_finite(row);
        for (int half = 0; half < 2; ++half) {
          const Halves parts(half == 0 ? _mm512_castsi512_si256(row)
                                       : _mm512_extracti64x4_epi64(row, 1));
          const auto store = [](uint16_t* to, __m512i upper) {
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                                _mm512_cvtepi32_epi16(_mm512_srli_epi32(upper, 16)));
          };
          store(out + i + half * 16, parts.large);
          store(out + size + i + half * 16, parts.small);
        }
      }
    }
    return odd == 0;
  }

  static bool run(const Linear24& a, const XTile* tiles, int count, int64_t n0, int64_t n1,
                  Scratch& scratch) {
    const int64_t height = tiles[0].height;
    const int most = count > kFewTiles ? kBlocks : a.packed ? 1 : 2;
    const int64_t acc_size = height * kBlock;  // of a tile with a block
    const int64_t acc_room = most * std::min(count, kTiles) * acc_size;
    float* acc =
        scratch.get<float>(acc_room + 2 * kWeightSize + 2 * Weight::room_bytes(kDepth) / 4);
    auto* weight = reinterpret_cast<uint32_t*>(acc + acc_room);
    auto* room = reinterpret_cast<uint8_t*>(weight + 2 * kWeightSize);
    const Tiles configured(static_cast<int>(height));
    bool fine = true;
    for (int64_t n = n0; n < n1; n += most * kBlock) {
      const int64_t end = std::min(n1, n + most * kBlock);
      for (int t = 0; t < count; t += kTiles) {
        const int here = std::min(count - t, kTiles);
        fine &= sum(a, tiles + t, here, n, end, acc, weight, room);
        write(a, tiles + t, here, n, end, acc);
      }
    }
    return fine;
  }

 private:
  static constexpr int64_t kWeightSize =
      kSpread / kTileGroups * kParts<D> * kTile;  // dwords of a block's chunk

  // acc[blocks][count][height][16] of columns [n, end).
  static bool sum(const Linear24& a, const XTile* tiles, int count, int64_t n, int64_t end,
                  float* acc, uint32_t* weight, uint8_t* room) {
    static const Spread spread;
    const int64_t groups = a.K / 4, x_step = tiles[0].height * kTileSpan * kParts<D>;
    const int64_t acc_size = tiles[0].height * kBlock, acc_w = count * acc_size;
    const int blocks = static_cast<int>(ceil_div(end - n, kBlock));
    bool fine = true;
    if (groups == 0) std::memset(acc, 0, sizeof(float) * blocks * acc_w);
    for (int64_t chunk = 0; chunk < groups; chunk += kDepth) {
      const int64_t stop = std::min(chunk + kDepth, groups);
      for (int b = 0; b < blocks; b += 2) {
        const bool two = b + 1 < blocks;
        Block block[2];
        for (int i = 0; i < 1 + two; ++i) {
          int skip;  // none: the depth is whole words of meta
          block[i] = Weight::get(a, n + (b + i) * kBlock, chunk, stop - chunk,
                                 Weight::room(room + i * Weight::room_bytes(kDepth), kDepth), &skip,
                                 blocks > 2 ? 2 * kBlock : 0);
        }
        for (int64_t g = chunk; g < stop; g += kSpread) {
          const int64_t here = std::min(kSpread, stop - g), along = ceil_div(here, kTileGroups);
          for (int i = 0; i < 1 + two; ++i) {
            const Block part = {block[i].values + (g - chunk) * kGroupBytes<D>,
                                block[i].meta + (g - chunk) / 8 * kBlock};
            fine &= spread.run<D>(part, here, kAhead, weight + i * kWeightSize);
          }
          for (int t = 0; t < count; t += 2) {
            const auto at = [&](int i) {
              return static_cast<const uint16_t*>(tiles[i].data) + g / kTileGroups * x_step;
            };
            const bool pair = t + 1 < count;
            multiply_some<kParts<D>>(pair, two, at(t), x_step, pair ? at(t + 1) - at(t) : 0, weight,
                                     kWeightSize, along, g == 0, acc + b * acc_w + t * acc_size,
                                     acc_size, acc_w);
          }
        }
      }
    }
    return fine;
  }

  static void write(const Linear24& a, const XTile* tiles, int count, int64_t n, int64_t end,
                    const float* acc) {
    alignas(64) float bias[kBlocks * kBlock];
    load_bias<D>(a, n, end, bias);
    const int64_t acc_size = tiles[0].height * kBlock, acc_w = count * acc_size;
    for (int t = 0; t < count; ++t, acc += acc_size) {
      for (int r = 0; r < tiles[t].rows; ++r) {
        const float* from = acc + r * kBlock;
        for (int64_t at = n; at < end; at += kBlock, from += acc_w) {
          finish<Avx512, D>(from, bias + (at - n),
                            static_cast<int>(std::min<int64_t>(end - at, kBlock)), a.activation,
                            a.y, (tiles[t].m0 + r) * a.N + at);
        }
      }
    }
  }
};

template <DType D>
constexpr Linear24Kernels with_amx(Linear24Kernels kernels, const Linear24Kernels* instead) {
  kernels.tile_rows = kTileRows;
  kernels.tile_span = kTileSpan;
  kernels.pack_tile = LinearAmx<D>::pack;
  kernels.tiles = LinearAmx<D>::run;
  kernels.instead = instead;
  return kernels;
}

}  // namespace

extern const Linear24Kernels linear_24_amx_bf16 = with_amx<DType::bf16>(
    linear_24_kernels<Avx512, DType::bf16, DotRow, DotTile>(5, INT64_MAX, INT64_MAX), nullptr);
extern const Linear24Kernels linear_24_amx_f16 = with_amx<DType::f16>(
    linear_24_kernels<Avx512, DType::f16, FloatRow, FloatTile>(8, INT64_MAX, INT64_MAX),
    &linear_24_avx512[static_cast<int>(DType::f16)]);

}  // namespace sparsekern::cpu

SPARSEKERN_TARGET_END
#endif
