// linear_24 for few rows of x (M <= 64), on sparse tensor cores: weights stream from memory to registers, once.
//
//   block    8 warps = 8/G blocks of 16 features x G groups of units, kM tokens (8, 16, 32, 64), one split of K; the
//            narrow blocks (G = 4, 32 features) occupy a device without splits, whose sums would be bytes too
//   unit     256 k of 16 features: 8 loads of 16 bytes a lane for values, 1 for meta; the next unit's are in flight
//            while one is multiplied: 4.6 KB a warp, 37 KB a block
//
//   lane 4g+t holds of each tile of 64 k      16 bytes of row g:    kept elements 8t .. 8t+7, groups 4t .. 4t+3
//                                             16 bytes of row g+8
//   step s of the tile (selector s)           A = words 2s and 2s+1 of each: groups 4t+2s and 4t+2s+1
//   x in the same order of groups:            within a tile's row, the 4 x 4 square of groups is transposed on its
//                                             way to shared memory, 8 bytes a copy; then B is ldmatrix as ever
//
//   meta     prepacked: four registers E, for four tiles
//            the format itself: lanes t = 0, 1 have the 32 bytes of row g, t = 2, 3 those of row g+8; four shuffles
//            and a nibble of each uint16 make E
//
//   shared   x[stages][G][kM][64 to 256 k], at most 32 KB a stage, two stages, or three where a stage is a tile;
//            pieces of 16 bytes, c ^ row % 8; afterwards the warps' sums[8][kM][16 + 4]
//   sums     over the G groups in order, then over the splits in order by linear_24_reduce: the same bits every run
//
// Rows past N load the last row, k past K zeros and nibbles 4; the format itself asks for K % 128 == 0.
// Lowest architecture: sm_80. Registers: 128 where kM <= 16 (two blocks a multiprocessor), else 255 (one).
// Limited by: bytes, N K (1 + 1/8) for 16 bits; x passes from the L2 once per block, M / (BN 9/16) of that, where
// BN = 128 / G.
#include "linear_24.cuh"

namespace sparsekern::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kUnit = 256, kTile = 64, kTiles = kUnit / kTile;
constexpr int kSumPitch = 20;  // floats; spreads the tokens of a fragment over the banks
constexpr uint32_t kNoMeta = 0x44444444;

template <int kM, int kGroups>
struct Shared {
  static constexpr int kPart = 256 / (kM * kGroups) < kTiles ? 256 / (kM * kGroups) : kTiles;
  static constexpr int kParts = kTiles / kPart;  // stages to a unit, of kPart tiles
  static constexpr int kStages = kPart == 1 ? 3 : 2;
  union {
    alignas(128) uint16_t x[kStages][kGroups][kM][kPart * kTile];
    float sums[kWarps][kM][kSumPitch];
  };
};

// What a lane holds of a unit.
struct Weights {
  uint32_t v[kTiles][2][4];  // tile, row g or g+8, words
  uint32_t meta[4];
};

template <bool prepacked>
__device__ __forceinline__ void load(Weights& w, const Linear24& a, int64_t n0, int64_t unit,
                                     Policy policy) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int64_t k0 = unit * kUnit;
  if constexpr (prepacked) {
    const int64_t block = n0 / 16, tiles = a.K / kTile;
    const auto* values = static_cast<const uint16_t*>(a.packed);
    const auto* meta = static_cast<const uint8_t*>(a.packed) + a.N * a.K;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const int64_t tile = unit * kTiles + i;
      if (tile < tiles) {
        const uint16_t* from = values + ((block * tiles + tile) * 64 + lane) * 8;
        load_once16(w.v[i][0], from, policy);
        load_once16(w.v[i][1], from + 32 * 8, policy);
      } else {
#pragma unroll
        for (int j = 0; j < 8; ++j) w.v[i][j / 4][j % 4] = 0;
      }
    }
    if ((unit + 1) * kTiles <= tiles) {
      load_once16(w.meta, meta + packed_meta_at(block, unit * kTiles, tiles, lane), policy);
    } else {
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        const int64_t tile = unit * kTiles + i;
        w.meta[i] = kNoMeta;
        if (tile < tiles)
          load_once4(w.meta + i, meta + packed_meta_at(block, tile, tiles, lane), policy);
      }
    }
  } else {
    const int64_t last = a.N - 1, low = n0 + g < last ? n0 + g : last;
    const int64_t high = n0 + g + 8 < last ? n0 + g + 8 : last;
    const auto* values = static_cast<const uint16_t*>(a.values);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      if (k0 + i * kTile < a.K) {
        const int64_t at = (k0 + i * kTile) / 2 + 8 * t;
        load_once16(w.v[i][0], values + low * (a.K / 2) + at, policy);
        load_once16(w.v[i][1], values + high * (a.K / 2) + at, policy);
      } else {
#pragma unroll
        for (int j = 0; j < 8; ++j) w.v[i][j / 4][j % 4] = 0;
      }
    }
    const int64_t byte = k0 / 8 + 16 * (t & 1);
    if (byte < a.K / 8) {
      load_once16(w.meta, a.meta + (t < 2 ? low : high) * (a.K / 8) + byte, policy);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) w.meta[i] = kNoMeta;
    }
  }
}

// E of tile i, nibble q of a half being group 4q + t of its row.
template <bool prepacked>
__device__ __forceinline__ uint32_t e_of(const Weights& w, int i) {
  if constexpr (prepacked) return w.meta[i];
  const int lane = threadIdx.x % 32, quad = lane & ~3, shift = lane % 4 * 4;
  uint32_t half[2];
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const int from = quad + 2 * row + i / 2;
    const uint32_t low = shuffle_from(w.meta[i % 2 * 2], from);       // uint16 numbers 0, 1
    const uint32_t high = shuffle_from(w.meta[i % 2 * 2 + 1], from);  // 2, 3
    const uint32_t r = (low >> shift & 0x000f000fu) | (high >> shift & 0x000f000fu) << 8;
    half[row] = r | r >> 12;
  }
  return permute(half[0], half[1], 0x5410);
}

// x of part `step % kParts` of the units from `begin` + step / kParts * kGroups on, one per group, transposed
// group-wise; nothing is waited for.
template <int kM, int kGroups>
__device__ __forceinline__ void fetch(const Linear24& a, Shared<kM, kGroups>& s, int64_t begin,
                                      int step) {
  using S = Shared<kM, kGroups>;
  constexpr int kWide = S::kPart * kTile, kPieces = kWide / 4;  // of 8 bytes, a group of k each
  auto& to = s.x[step % S::kStages];
  const auto* x = static_cast<const uint16_t*>(a.x);
  const int64_t k0 = (begin + step / S::kParts * kGroups) * kUnit + step % S::kParts * kWide;
  // Unrolled by 4, it takes the registers of the weights in flight: 8 to 104 bytes spilled from sm_90a on.
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < kGroups * kM * kPieces; i += kThreads) {
    const int piece = i % kPieces, row = i / kPieces % kM, group = i / kPieces / kM;
    const int64_t k = k0 + group * kUnit + 4 * piece;
    const bool inside = row < a.M && k < a.K;
    const int turned = piece % 4 * 4 + piece / 4 % 4;  // within the tile's 16
    const int c = piece / 16 * 8 + (turned / 2 ^ (row & 7));
    copy_async<8>(&to[group][row][c * 8 + turned % 2 * 4], inside ? x + row * a.x_stride + k : x,
                  inside ? 8 : 0);
  }
}

// Tile `tile` of the weights times tile i of a stage.
template <DType D, int kTilesM, bool prepacked, int kM, int kWide>
__device__ __forceinline__ void multiply(const Weights& w, int tile, const uint16_t (&x)[kM][kWide],
                                         int i, float (&sums)[kTilesM][4]) {
  const int lane = threadIdx.x % 32, matrix = lane / 8, row = lane % 8;
  const auto& v = w.v[tile];
  const uint32_t e = e_of<prepacked>(w, tile);
  const uint32_t first[4] = {v[0][0], v[1][0], v[0][1], v[1][1]};
  const uint32_t second[4] = {v[0][2], v[1][2], v[0][3], v[1][3]};
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
    uint32_t b[4];
    load_matrices(b, &x[8 * m + row][(8 * i + (matrix ^ row)) * 8]);
    mma_sp<D, 0>(sums[m], first, b, e);
    load_matrices(b, &x[8 * m + row][(8 * i + ((4 + matrix) ^ row)) * 8]);
    mma_sp<D, 1>(sums[m], second, b, e);
  }
}

}  // namespace

template <DType D, int kM, int kGroups, bool prepacked>
__global__ void __launch_bounds__(kThreads, kM <= 16 ? 2 : 1) linear_24_decode_sm80(Linear24 a) {
  constexpr int kTilesM = kM / 8, kN = 16 * kWarps / kGroups;
  auto& s = shared_memory<Shared<kM, kGroups>>();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = warp % kGroups;
  const int64_t n0 = static_cast<int64_t>(blockIdx.x) * kN, row0 = n0 + warp / kGroups * 16;
  const int64_t block0 =
      row0 < a.N ? row0 : (a.N - 1) / 16 * 16;  // a block past N is computed in vain
  const int64_t units = (a.K + kUnit - 1) / kUnit;
  const int64_t begin = static_cast<int64_t>(blockIdx.y) * a.units;
  const int64_t end = begin + a.units < units ? begin + a.units : units;
  const Policy policy = evict_first();

  using S = Shared<kM, kGroups>;
  Weights now, next;
  if (begin + group < end) load<prepacked>(now, a, block0, begin + group, policy);
  const int steps = static_cast<int>((end - begin + kGroups - 1) / kGroups) * S::kParts;
#pragma unroll
  for (int i = 0; i < S::kStages - 1; ++i) {
    if (i < steps) fetch(a, s, begin, i);
    commit_copies();
  }
  float sums[kTilesM][4] = {};
  for (int step = 0; step < steps; step += S::kParts) {
    const int64_t mine = begin + step / S::kParts * kGroups + group, after = mine + kGroups;
#pragma unroll
    for (int part = 0; part < S::kParts; ++part) {
      wait_copies<S::kStages - 2>();
      __syncthreads();  // x is here, for all, and the stage before is done with
      const int ahead = step + part + S::kStages - 1;
      if (ahead < steps) fetch(a, s, begin, ahead);
      commit_copies();
      if (part == 0 && after < end) load<prepacked>(next, a, block0, after, policy);
      if (mine < end) {
        const auto& x = s.x[(step + part) % S::kStages][group];
#pragma unroll
        for (int i = 0; i < S::kPart; ++i)
          multiply<D, kTilesM, prepacked>(now, part * S::kPart + i, x, i, sums);
      }
    }
    if (after < end) now = next;
  }

  wait_copies<0>();
  __syncthreads();  // the stages may be written over
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int i = 0; i < 4; ++i) s.sums[warp][8 * m + 2 * t + i % 2][g + i / 2 * 8] = sums[m][i];
  }
  __syncthreads();  // all sums are there
  for (int i = static_cast<int>(threadIdx.x); i < kM * kN; i += kThreads) {
    const int m = i / kN, column = i % kN;
    const int64_t n = n0 + column;
    if (m >= a.M || n >= a.N) continue;
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < kGroups; ++j) sum += s.sums[column / 16 * kGroups + j][m][column % 16];
    finish_split<D>(a, m, n, sum);
  }
}

// The splits' sums, in order; then what linear_24 does with a sum.
template <DType D>
__global__ void __launch_bounds__(kThreads) linear_24_reduce(Linear24 a) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= a.M * a.N) return;
  float sum = 0.0f;
  for (int split = 0; split < a.splits; ++split) sum += a.partial[split * a.M * a.N + i];
  finish<D>(a, i / a.N, i % a.N, sum);
}

SPARSEKERN_KERNEL(linear_24_decode_sm80<DType::f16, 8, 4, false>);
SPARSEKERN_KERNEL(linear_24_decode_sm80<DType::f16, 8, 4, true>);
SPARSEKERN_KERNEL(linear_24_decode_sm80<DType::f16, 16, 4, false>);
SPARSEKERN_KERNEL(linear_24_decode_sm80<DType::f16, 16, 4, true>);
SPARSEKERN_KERNEL(linear_24_decode_sm80<DType::f16, 32, 4, false>);
SPARSEKERN_KERNEL(linear_24_decode_sm80<DType::f16, 32, 4, true>);
SPARSEKERN_KERNEL(linear_24_decode_sm80<DType::f16, 32, 2, false>);
SPARSEKERN_KERNEL(linear_24_decode_sm80<DType::f16, 32, 2, true>);
SPARSEKERN_KERNEL(linear_24_decode_sm80<DType::f16, 64, 4, false>);
SPARSEKERN_KERNEL(linear_24_decode_sm80<DType::f16, 64, 4, true>);
SPARSEKERN_KERNEL(linear_24_decode_sm80<DType::f16, 64, 2, false>);
SPARSEKERN_KERNEL(linear_24_decode_sm80<DType::f16, 64, 2, true>);
SPARSEKERN_KERNEL(linear_24_decode_sm80<DType::f16, 64, 1, false>);
SPARSEKERN_KERNEL(linear_24_decode_sm80<DType::f16, 64, 1, true>);
SPARSEKERN_KERNEL(linear_24_decode_sm80<DType::bf16, 8, 4, false>);
SPARSEKERN_KERNEL(linear_24_decode_sm80<DType::bf16, 8, 4, true>);
SPARSEKERN_KERNEL(linear_24_decode_sm80<DType::bf16, 16, 4, false>);
SPARSEKERN_KERNEL(linear_24_decode_sm80<DType::bf16, 16, 4, true>);
SPARSEKERN_KERNEL(linear_24_decode_sm80<DType::bf16, 32, 4, false>);
SPARSEKERN_KERNEL(linear_24_decode_sm80<DType::bf16, 32, 4, true>);
SPARSEKERN_KERNEL(linear_24_decode_sm80<DType::bf16, 32, 2, false>);
SPARSEKERN_KERNEL(linear_24_decode_sm80<DType::bf16, 32, 2, true>);
SPARSEKERN_KERNEL(linear_24_decode_sm80<DType::bf16, 64, 4, false>);
SPARSEKERN_KERNEL(linear_24_decode_sm80<DType::bf16, 64, 4, true>);
SPARSEKERN_KERNEL(linear_24_decode_sm80<DType::bf16, 64, 2, false>);
SPARSEKERN_KERNEL(linear_24_decode_sm80<DType::bf16, 64, 2, true>);
SPARSEKERN_KERNEL(linear_24_decode_sm80<DType::bf16, 64, 1, false>);
SPARSEKERN_KERNEL(linear_24_decode_sm80<DType::bf16, 64, 1, true>);
SPARSEKERN_KERNEL(linear_24_reduce<DType::f32>);
SPARSEKERN_KERNEL(linear_24_reduce<DType::f16>);
SPARSEKERN_KERNEL(linear_24_reduce<DType::bf16>);

}  // namespace sparsekern::cuda
