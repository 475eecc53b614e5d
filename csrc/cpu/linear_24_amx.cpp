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
//     for chunks of 256 k                   x of a chunk, too: 256 KiB, in one piece
//       for pairs of blocks                 spread: 16 KiB, in L1, as is what meets it of x
//         for pairs of tiles of x           four tiles of sums, two of x, two of weight: all there are
//           for 32 k                        beside them the lines that come next are asked for:
//                                           a few of the next pair's weight and of the next chunk's x
//
//   A canonical weight is packed first, 512 rows at a time.
//
// Limited by the bytes of the weight up to some tens of rows of x: 0.56 of a dense product's, asked for
// 8 KiB ahead, or a core waits for them (2.2 ms in place of 1.5 at 4096 x 4096, 12 GB/s). Beyond by the
// loads of the tiles of x: a tile product takes 16 cycles, 19 measured with operands from L1, 26 to 29
// in this loop, as a load from L2 takes 24 (Xeon 6, 3.2 GHz under AMX). Spreading takes four
// shuffles a group on the one port that shuffles, 32 cycles a tile of weight, for every 512 rows of x.
// Of 12.6 ns a product in the whole (2048 x 3072 x 768, packed ahead), 9.4 are in that loop and its
// sums, 1.7 spreading, 1.5 writing y.
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

// Memory asked for a line at a time, beside the products: many lines at once would hold up the loads
// of the tiles.
struct Lines {
  const uint8_t* at = nullptr;
  int64_t bytes = 0, stride = 0, rows = 0;  // what is left; of the first row from `column` on
  int64_t column = 0;

  int64_t count() const { return rows * ceil_div(bytes, 64); }
  bool next() {
    if (rows == 0) return false;
    __builtin_prefetch(at + column, 0, 2);
    column += 64;
    if (column >= bytes) {
      column = 0;
      at += stride;
      --rows;
    }
    return true;
  }
};

template <DType D>
struct LinearAmx {
  using Weight = Blocks<Avx512, D>;
  static constexpr int64_t kTileGroups = 8;
  // Groups that are spread, and whose x lies together: two blocks of them and their x are in L1.
  static constexpr int64_t kSpread = 64 / kParts<D>;
  static constexpr int64_t kLine = 128;    // of the canonical form: a cache line of a row's meta
  static constexpr int64_t kAhead = 8192;  // bytes
  static constexpr int kBlocks = 32;       // of weight that share a chunk of x while it is in L2
  static constexpr int kTiles = 32;        // of x whose sums with them stay in L2
  static constexpr int kFewTiles = 4;      // up to here a packed weight is read as one stream

  static bool pack(const Linear24& a, const XTile& tile) {
    if (a.K == 0) return true;  // there may be no memory at all
    const auto* x = static_cast<const uint16_t*>(a.x) + tile.m0 * a.x_stride_m;
    const int64_t size = tile.height * kTileSpan;
    __mmask32 odd = 0;
    for (int64_t chunk = 0; chunk < a.K / 4; chunk += kSpread) {
      uint16_t* out = at(a, tile, chunk);
      const int64_t k0 = 4 * chunk, k1 = std::min(k0 + 4 * kSpread, a.K);
      if (kParts<D> == 1) {
        pack_a(x + k0 * a.x_stride_k, a.x_stride_m, a.x_stride_k, k1 - k0, tile.rows, tile.height,
               out);
        continue;
      }
      for (int64_t k = k0; k < k1; k += kTileSpan, out += 2 * size) {
        pack_a(x + k * a.x_stride_k, a.x_stride_m, a.x_stride_k,
               std::min<int64_t>(kTileSpan, k1 - k), tile.rows, tile.height, out);
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
    }
    return odd == 0;
  }

  static bool run(const Linear24& a, const XTile* tiles, int count, int64_t n0, int64_t n1,
                  Scratch& scratch) {
    const int64_t height = tiles[0].height;
    const bool few = count <= kFewTiles;
    // Read once for 1024 rows of x, a canonical weight is packed first, as many rows as share them.
    const bool repack = !few && !a.packed;
    Walk walk{a, a, tiles, count, n1, few ? a.packed ? 1 : 2 : kBlocks, kSpread};
    if (few) walk.depth = kLine;
    const int64_t acc_room = walk.most * std::min(count, kTiles) * height * kBlock;
    const int64_t room_groups = repack ? std::max(a.K / 4, kLine) : kLine;
    const int64_t row = a.K / 2 * kItem<D> + meta_bytes(a.K), packed_rows = walk.most * kBlock;
    float* acc =
        scratch.get<float>(acc_room + 2 * kWeightSize + 2 * Weight::room_bytes(room_groups) / 4 +
                           (repack ? packed_rows * row / 4 + 16 : 0));
    auto* weight = reinterpret_cast<uint32_t*>(acc + acc_room);
    auto* room = reinterpret_cast<uint8_t*>(weight + 2 * kWeightSize);
    uint8_t* packed = room + 2 * Weight::room_bytes(room_groups);
    const Tiles configured(static_cast<int>(height));
    bool fine = true, more = true;
    Ahead ahead;
    for (Place here{n0, 0, 0, 0}, next; more; here = next) {
      next = here;
      more = walk.step(&next);
      if (repack && here.t == 0 && here.chunk == 0 && here.b == 0) {
        walk.weight = rows_of(a, here.n, walk.end(here));
        for (int64_t n = 0; n < walk.weight.N; n += kBlock)
          Weight::prepack(walk.weight, n, packed, Weight::room(room, room_groups));
        walk.weight.packed = packed;
        walk.first = here.n;
      }
      if (!few && here.b == 0) walk.x_after(here, &ahead);
      if (!few && more && !(repack && next.n != here.n)) walk.weight_of(next, &ahead);
      fine &= multiply(walk, here, few, acc, weight, room, &ahead);
      if (walk.last(here)) write(walk, here, acc);
    }
    return fine;
  }

 private:
  // Dwords of a block's chunk.
  static constexpr int64_t kWeightSize = kSpread / kTileGroups * kParts<D> * kTile;

  // What is multiplied at a time: blocks b and b + 1 of those from row n of the weight on, groups of k
  // from `chunk` on, and the tiles of x from t on.
  struct Place {
    int64_t n;
    int t;
    int64_t chunk;
    int b;
  };

  // What is asked for beside the products of a place.
  struct Ahead {
    Lines values, meta, x;
    int64_t x_each = 0;  // lines of x beside the tiles of a place
  };

  // The places in order: pairs of blocks, then chunks, then tiles, then rows of the weight.
  struct Walk {
    const Linear24& a;
    Linear24 weight;  // of `a`, or some rows of it, packed
    const XTile* all;
    int count;          // of tiles
    int64_t n1;         // rows of the weight end here
    int most;           // blocks that share x in L2
    int64_t depth;      // groups of a chunk
    int64_t first = 0;  // row of the weight that is the first of `weight`

    int64_t end(const Place& p) const { return std::min(n1, p.n + most * kBlock); }
    int blocks(const Place& p) const { return static_cast<int>(ceil_div(end(p) - p.n, kBlock)); }
    int tiles(const Place& p) const { return std::min(count - p.t, kTiles); }
    int64_t groups(const Place& p) const { return std::min(depth, a.K / 4 - p.chunk); }
    int64_t along(const Place& p) const { return ceil_div(groups(p), kTileGroups); }
    int64_t acc_size() const { return all[0].height * kBlock; }  // of a tile with a block
    int64_t x_step() const { return all[0].height * kTileSpan * kParts<D>; }
    // Whether its sums are whole, and those of the blocks before.
    bool last(const Place& p) const { return p.b + 2 >= blocks(p) && p.chunk + depth >= a.K / 4; }

    bool step(Place* p) const {
      p->b += 2;
      if (p->b < blocks(*p)) return true;
      p->b = 0;
      p->chunk += depth;
      if (p->chunk < a.K / 4) return true;
      p->chunk = 0;
      p->t += kTiles;
      if (p->t < count) return true;
      p->t = 0;
      p->n += most * kBlock;
      return p->n < n1;
    }

    // x of the chunk after that of `p`, a share of it beside each pair of blocks.
    void x_after(const Place& p, Ahead* ahead) const {
      Place next = p;
      next.b = blocks(p);
      if (!step(&next) || (next.chunk == p.chunk && next.t == p.t)) {
        ahead->x = {};
        return;
      }
      ahead->x = {reinterpret_cast<const uint8_t*>(at(a, all[next.t], next.chunk)),
                  tiles(next) * along(next) * x_step() * 2, 0, 1};
      ahead->x_each = ceil_div(ahead->x.count(), ceil_div(blocks(p), 2));
    }

    void weight_of(const Place& p, Ahead* ahead) const {
      const int64_t n = p.n - first + p.b * kBlock, blocks = std::min(2, this->blocks(p) - p.b);
      const int64_t row = a.K / 2 * kItem<D>, meta_row = meta_bytes(a.K);
      ahead->values = {weight.packed + n * row + p.chunk * kGroupBytes<D>,
                       groups(p) * kGroupBytes<D>, kBlock * row, blocks};
      ahead->meta = {weight.packed + weight.N * row + n * meta_row + p.chunk / 8 * kBlock * 4,
                     meta_words(groups(p)) * kBlock * 4, kBlock * meta_row, blocks};
    }
  };

  // Rows [n, end) of the canonical weight.
  static Linear24 rows_of(const Linear24& a, int64_t n, int64_t end) {
    Linear24 part = a;
    part.values = static_cast<const uint8_t*>(a.values) + n * (a.K / 2) * kItem<D>;
    part.meta = a.meta + n * meta_bytes(a.K);
    part.N = end - n;
    return part;
  }

  // Where the x of groups from `chunk` on, a multiple of kSpread, begins: chunks of so many groups one
  // after the other, in each the tiles one after the other.
  static uint16_t* at(const Linear24& a, const XTile& tile, int64_t chunk) {
    const int64_t groups = a.K / 4, step = tile.height * kTileSpan * kParts<D>;
    const int64_t along = ceil_div(std::min(kSpread, groups - chunk), kTileGroups);
    return static_cast<uint16_t*>(tile.data) +
           (chunk / kTileGroups * tile.together + tile.place * along) * step;
  }

  // acc[blocks][tiles][height][16] of the place += weight · x
  static bool multiply(const Walk& walk, const Place& p, bool few, float* acc, uint32_t* weight,
                       uint8_t* room, Ahead* ahead) {
    static const Spread spread;
    const int count = walk.tiles(p), blocks = std::min(2, walk.blocks(p) - p.b);
    const int64_t acc_size = walk.acc_size(), acc_w = count * acc_size;
    const int64_t groups = walk.groups(p);
    // Lines beside each tile along k.
    const int64_t steps = std::max<int64_t>(1, ceil_div(count, 2) * walk.along(p));
    const int64_t each_w = ceil_div(ahead->values.count() + ahead->meta.count(), steps);
    const int64_t each_x = ceil_div(ahead->x_each, steps);
    Block block[2] = {};
    for (int i = 0; i < blocks && groups > 0; ++i) {
      int skip;  // none: the depth is whole words of meta
      block[i] = Weight::get(walk.weight, p.n - walk.first + (p.b + i) * kBlock, p.chunk, groups,
                             Weight::room(room + i * Weight::room_bytes(kLine), kLine), &skip);
    }
    bool fine = true;
    int64_t g = 0;
    do {
      const int64_t here = std::min(kSpread, groups - g);
      for (int i = 0; i < blocks; ++i) {
        const Block part = {block[i].values + g * kGroupBytes<D>, block[i].meta + g / 8 * kBlock};
        fine &= spread.run<D>(part, here, few ? kAhead : 0, weight + i * kWeightSize);
      }
      for (int t = 0; t < count; t += 2) {
        float* sums = acc + p.b * acc_w + t * acc_size;
        const auto beside = [&, sums_beside = sums_ahead(sums, acc_size, acc_w)](int64_t step) {
          sums_beside(step);
          for (int64_t i = 0; i < each_w; ++i)
            if (!ahead->values.next()) ahead->meta.next();
          for (int64_t i = 0; i < each_x; ++i) ahead->x.next();
        };
        const int64_t along = ceil_div(here, kTileGroups);
        multiply_some<kParts<D>>(t + 1 < count, blocks == 2,
                                 at(walk.a, walk.all[p.t + t], p.chunk + g), walk.x_step(),
                                 along * walk.x_step(), weight, kWeightSize, along,
                                 p.chunk + g == 0, sums, acc_size, acc_w, beside);
      }
      g += kSpread;
    } while (g < groups);  // once where there are none, for sums of zero
    return fine;
  }

  // The sums of all blocks up to that of `p`, to y.
  static void write(const Walk& walk, const Place& p, const float* acc) {
    const Linear24& a = walk.a;
    const int64_t n = p.n, end = walk.end(p), acc_w = walk.tiles(p) * walk.acc_size();
    alignas(64) float bias[kBlocks * kBlock];
    load_bias<D>(a, n, end, bias);
    for (int t = 0; t < walk.tiles(p); ++t, acc += walk.acc_size()) {
      const XTile& tile = walk.all[p.t + t];
      for (int r = 0; r < tile.rows; ++r) {
        const float* from = acc + r * kBlock;
        const int64_t to = (tile.m0 + r) * a.N;
        int64_t at = n;
        if (D == DType::bf16 && a.activation == Activation::none) {
          for (; at + 2 * kBlock <= end; at += 2 * kBlock, from += 2 * acc_w)
            write_pair(from, from + acc_w, bias + (at - n), static_cast<uint16_t*>(a.y) + to + at);
        }
        for (; at < end; at += kBlock, from += acc_w) {
          finish<Avx512, D>(from, bias + (at - n),
                            static_cast<int>(std::min<int64_t>(end - at, kBlock)), a.activation,
                            a.y, to + at);
        }
      }
    }
  }

  // As `finish`, in a third of the instructions.
  static void write_pair(const float* first, const float* second, const float* bias, uint16_t* y) {
    const __m512 a = _mm512_add_ps(_mm512_loadu_ps(first), _mm512_load_ps(bias));
    const __m512 b = _mm512_add_ps(_mm512_loadu_ps(second), _mm512_load_ps(bias + kBlock));
    constexpr int kDenormal = 0x20;  // would be flushed
    if (_mm512_fpclass_ps_mask(a, kDenormal) | _mm512_fpclass_ps_mask(b, kDenormal)) {
      Avx512::store_rounded<DType::bf16>(y, a);
      Avx512::store_rounded<DType::bf16>(y + kBlock, b);
    } else {
      const __m512bh rounded = _mm512_cvtne2ps_pbh(b, a);
      std::memcpy(y, &rounded, sizeof rounded);
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
  kernels.tiles_together = LinearAmx<D>::kTiles;
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
