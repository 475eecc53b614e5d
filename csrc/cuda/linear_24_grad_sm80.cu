// The gradients of linear_24 for 16-bit types, on dense tensor cores: 2:4 runs along k, which neither sum runs along.
//
//   dx[m, k]      = sum over n of dy[m, n] W[n, k]        rows i = m, terms n, W expanded a tile at a time
//   dvalues[n, j] = sum over m of dy[m, n] x[m, k(n, j)]  rows i = n, terms m, of 128 x 128 the kept half
//
//   block    128 rows x 128 k, terms by 32, 4 warps as 2 x 2, each 64 x 64; m16n8k16
//
//   stage (3 in flight)          rows         swizzle of 16-byte pieces     read by
//     dx:  dy [128 m][32 n]       64 bytes    c ^ row / 2 % 4               ldmatrix, as A
//     dv:  dy [32 m][128 n]      256 bytes    c ^ row % 8                   ldmatrix.trans, as A
//          x  [32 m][128 k]      256 bytes    c ^ row % 8                   ldmatrix.trans, as B
//   dense W (dx only, 2)  [32 n][128 k], as x; a thread has four pieces of two groups: values and a byte of meta go to
//            registers while the tile before is multiplied, then eight elements to shared memory
//   out      sums rounded to 16 bits, [128][128 + 8] in shared memory; dx by rows of 16 bytes, dvalues by the kept
//            of eight
//
// Ragged M, N, K are masked with zeros. Lowest architecture: sm_80. Registers: at most 255, two blocks a multiprocessor.
// Limited by: operations, those of a dense product.
#include "linear_24.cuh"

namespace sparsekern::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kTile = 128, kTerms = 32, kStages = 3;
constexpr int kTilesI = 4, kTilesK = 8;  // of 16 rows and 8 k, per warp
constexpr int kPitch = kTile + 8;        // elements; spreads the rows of a fragment over the banks
constexpr int kPieces = kTerms * kTile / 8 / kThreads;  // of 8 elements of W, per thread

// How rows of dy and x are read.
enum { kBy4, kBy16 };

struct SharedDx {
  union {
    struct {
      alignas(128) uint16_t dy[kStages][kTile * kTerms];
      uint16_t w[2][kTerms * kTile];
    };
    uint16_t out[kTile * kPitch];
  };
};
struct SharedDvalues {
  union {
    struct {
      alignas(128) uint16_t dy[kStages][kTerms * kTile];
      uint16_t x[kStages][kTerms * kTile];
    };
    uint16_t out[kTile * kPitch];
  };
};

// Where piece c of 8 elements of a row lies, rows of 32 and of 128 elements.
__device__ __forceinline__ int narrow_at(int row, int c) {
  return row * kTerms + (c ^ (row >> 1 & 3)) * 8;
}
__device__ __forceinline__ int wide_at(int row, int c) { return row * kTile + (c ^ (row & 7)) * 8; }

// Copies of a tile of a row-major matrix: rows [row0, ..) and columns [column0, ..), zeros outside.
template <int rows, int columns, int access>
__device__ __forceinline__ void fetch(uint16_t* to, const void* p, int64_t stride, int64_t row0,
                                      int64_t all_rows, int64_t column0, int64_t all_columns) {
  constexpr int kSize = access == kBy4 ? 4 : 16, kElements = kSize / 2, kParts = 16 / kSize;
#pragma unroll 2
  for (int i = static_cast<int>(threadIdx.x); i < rows * columns / kElements; i += kThreads) {
    const int row = i / (columns / kElements), part = i % (columns / kElements);
    const int64_t left = all_columns - column0 - part * kElements;
    const int bytes = row0 + row < all_rows ? clip<2>(left, kSize) : 0;
    const auto* from = static_cast<const uint16_t*>(p);
    if (bytes) from += (row0 + row) * stride + column0 + part * kElements;
    const int piece =
        columns == kTile ? wide_at(row, part / kParts) : narrow_at(row, part / kParts);
    copy_async<kSize>(to + piece + part % kParts * kElements, from, bytes);
  }
}

// Two groups of a row of W: four kept elements and their byte of meta.
struct Piece {
  Elements<uint16_t, 4> values;
  uint32_t meta;
};

__device__ __forceinline__ void load(Piece (&pieces)[kPieces], const Gradient24& a, int64_t n0,
                                     int64_t k0) {
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    const int at = static_cast<int>(threadIdx.x) + i * kThreads, c = at % (kTile / 8);
    const int64_t n = n0 + at / (kTile / 8), k = k0 + 8 * c;
    pieces[i].values.clear();
    pieces[i].meta = kEmptyNibble * 0x11u;
    if (n < a.N && k < a.K) {
      const auto* from = static_cast<const uint16_t*>(a.values) + n * (a.K / 2) + k / 2;
      if (a.vectors & 1) {
        pieces[i].values.load(from);
      } else {
        pieces[i].values.load(from, (a.K - k) / 2);
      }
      pieces[i].meta = a.meta[n * meta_bytes(a.K) + k / 8];
    }
  }
}

__device__ __forceinline__ void expand(const Piece (&pieces)[kPieces], uint16_t* w) {
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    const int at = static_cast<int>(threadIdx.x) + i * kThreads;
    Elements<uint16_t, 8> dense;
    dense.clear();
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const uint32_t nibble = pieces[i].meta >> 4 * (j / 4) & 15, k = j % 4;
      const uint16_t first = (nibble & 3) == k ? pieces[i].values.get(j / 4 * 2) : uint16_t{0};
      dense.put(j, nibble >> 2 == k ? pieces[i].values.get(j / 4 * 2 + 1) : first);
    }
    auto* to = reinterpret_cast<uint32_t*>(w + wide_at(at / (kTile / 8), at % (kTile / 8)));
#pragma unroll
    for (int j = 0; j < 4; ++j) to[j] = dense.r[j];
  }
}

// A tile's 32 terms for all of a warp's tiles. A: rows from row_i on, of `a` by rows or by terms; B: k from row_k on.
template <DType D, bool a_by_terms>
__device__ __forceinline__ void multiply(const uint16_t* a, const uint16_t* b,
                                         float (&sums)[kTilesI][kTilesK][4], int row_i, int row_k) {
  const int lane = threadIdx.x % 32, matrix = lane / 8, r = lane % 8;
#pragma unroll
  for (int step = 0; step < kTerms / 16; ++step) {
    uint32_t bs[kTilesK][2];
#pragma unroll
    for (int k = 0; k < kTilesK; k += 2) {  // matrices: terms 0..7 and 8..15 of two tiles
      uint32_t both[4];
      load_matrices_transposed(
          both, b + wide_at(16 * step + 8 * (matrix & 1) + r, row_k / 8 + k + (matrix >> 1)));
      bs[k][0] = both[0], bs[k][1] = both[1], bs[k + 1][0] = both[2], bs[k + 1][1] = both[3];
    }
#pragma unroll
    for (int i = 0; i < kTilesI; ++i) {
      uint32_t as[4];
      if constexpr (a_by_terms) {
        load_matrices_transposed(
            as, a + wide_at(16 * step + 8 * (matrix >> 1) + r, row_i / 8 + 2 * i + (matrix & 1)));
      } else {
        load_matrices(
            as, a + narrow_at(row_i + 16 * i + 8 * (matrix & 1) + r, 2 * step + (matrix >> 1)));
      }
#pragma unroll
      for (int k = 0; k < kTilesK; ++k) mma<D>(sums[i][k], as, bs[k]);
    }
  }
}

template <DType D>
__device__ __forceinline__ void round_to(uint16_t* out, const float (&sums)[kTilesI][kTilesK][4],
                                         int row_i, int row_k) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int i = 0; i < kTilesI; ++i) {
#pragma unroll
    for (int k = 0; k < kTilesK; ++k) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int at = (row_i + 16 * i + 8 * half + g) * kPitch + row_k + 8 * k + 2 * t;
        *reinterpret_cast<uint32_t*>(out + at) =
            round_pair<D>(sums[i][k][2 * half], sums[i][k][2 * half + 1]);
      }
    }
  }
}

struct Place {
  int64_t i0, k0;    // of the block
  int row_i, row_k;  // of the warp
};
__device__ __forceinline__ Place place_of(int64_t K) {
  const int64_t across = (K + kTile - 1) / kTile, down = blockIdx.x / across;
  const int warp = threadIdx.x / 32;
  return {down * kTile, (blockIdx.x - down * across) * kTile, warp / 2 * 64, warp % 2 * 64};
}

}  // namespace

template <DType D, int access>
__global__ void __launch_bounds__(kThreads, 2) linear_24_dx_sm80(Gradient24 a) {
  auto& s = shared_memory<SharedDx>();
  const Place p = place_of(a.K);
  const int64_t tiles = (a.N + kTerms - 1) / kTerms;
  Piece pieces[kPieces];
  load(pieces, a, 0, p.k0);
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    if (i < tiles)
      fetch<kTile, kTerms, access>(s.dy[i], a.dy, a.dy_stride, p.i0, a.M, i * kTerms, a.N);
    commit_copies();
  }
  expand(pieces, s.w[0]);
  float sums[kTilesI][kTilesK][4] = {};
  int now = 0, next = kStages - 1;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    wait_copies<kStages - 2>();
    __syncthreads();  // dy and W are here, for all, and the tile before is done with
    if (tile + kStages - 1 < tiles)
      fetch<kTile, kTerms, access>(s.dy[next], a.dy, a.dy_stride, p.i0, a.M,
                                   (tile + kStages - 1) * kTerms, a.N);
    commit_copies();
    if (tile + 1 < tiles) load(pieces, a, (tile + 1) * kTerms, p.k0);
    multiply<D, false>(s.dy[now], s.w[tile & 1], sums, p.row_i, p.row_k);
    if (tile + 1 < tiles) expand(pieces, s.w[(tile + 1) & 1]);
    now = now + 1 == kStages ? 0 : now + 1;
    next = next + 1 == kStages ? 0 : next + 1;
  }
  wait_copies<0>();
  __syncthreads();  // the stages may be written over
  round_to<D>(s.out, sums, p.row_i, p.row_k);
  __syncthreads();  // out is whole
  for (int i = static_cast<int>(threadIdx.x); i < kTile * kTile / 8; i += kThreads) {
    const int row = i / (kTile / 8), column = i % (kTile / 8) * 8;
    const int64_t m = p.i0 + row, k = p.k0 + column;
    if (m >= a.M || k >= a.K) continue;
    const uint16_t* from = s.out + row * kPitch + column;
    uint16_t* to = static_cast<uint16_t*>(a.out) + m * a.K + k;
    if (a.vectors & 2) {
      store_global<4>(to, reinterpret_cast<const uint32_t*>(from));
    } else {
      for (int j = 0; j < 8 && k + j < a.K; ++j) to[j] = from[j];
    }
  }
}

template <DType D, int access>
__global__ void __launch_bounds__(kThreads, 2) linear_24_dvalues_sm80(Gradient24 a) {
  auto& s = shared_memory<SharedDvalues>();
  const Place p = place_of(a.K);
  const int64_t tiles = (a.M + kTerms - 1) / kTerms;
  const auto fetch_both = [&](int stage, int64_t tile) {
    fetch<kTerms, kTile, access>(s.dy[stage], a.dy, a.dy_stride, tile * kTerms, a.M, p.i0, a.N);
    fetch<kTerms, kTile, access>(s.x[stage], a.x, a.x_stride, tile * kTerms, a.M, p.k0, a.K);
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    if (i < tiles) fetch_both(i, i);
    commit_copies();
  }
  float sums[kTilesI][kTilesK][4] = {};
  int now = 0, next = kStages - 1;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    wait_copies<kStages - 2>();
    __syncthreads();  // dy and x are here, for all, and the tile before is done with
    if (tile + kStages - 1 < tiles) fetch_both(next, tile + kStages - 1);
    commit_copies();
    multiply<D, true>(s.dy[now], s.x[now], sums, p.row_i, p.row_k);
    now = now + 1 == kStages ? 0 : now + 1;
    next = next + 1 == kStages ? 0 : next + 1;
  }
  wait_copies<0>();
  __syncthreads();  // the stages may be written over
  round_to<D>(s.out, sums, p.row_i, p.row_k);
  __syncthreads();  // out is whole
  for (int i = static_cast<int>(threadIdx.x); i < kTile * kTile / 8; i += kThreads) {
    const int row = i / (kTile / 8), column = i % (kTile / 8) * 8;
    const int64_t n = p.i0 + row, k = p.k0 + column;
    if (n >= a.N || k >= a.K) continue;
    const uint32_t meta = a.meta[n * meta_bytes(a.K) + k / 8];
    Elements<uint16_t, 4> kept;
    kept.clear();
#pragma unroll
    for (int j = 0; j < 4; ++j)
      kept.put(j, s.out[row * kPitch + column + j / 2 * 4 + (meta >> 2 * j & 3)]);
    uint16_t* to = static_cast<uint16_t*>(a.out) + n * (a.K / 2) + k / 2;
    if (a.vectors & 2) {
      kept.store(to);
    } else {
      kept.store(to, (a.K - k) / 2);
    }
  }
}

SPARSEKERN_KERNEL(linear_24_dx_sm80<DType::f16, kBy4>);
SPARSEKERN_KERNEL(linear_24_dx_sm80<DType::f16, kBy16>);
SPARSEKERN_KERNEL(linear_24_dx_sm80<DType::bf16, kBy4>);
SPARSEKERN_KERNEL(linear_24_dx_sm80<DType::bf16, kBy16>);
SPARSEKERN_KERNEL(linear_24_dvalues_sm80<DType::f16, kBy4>);
SPARSEKERN_KERNEL(linear_24_dvalues_sm80<DType::f16, kBy16>);
SPARSEKERN_KERNEL(linear_24_dvalues_sm80<DType::bf16, kBy4>);
SPARSEKERN_KERNEL(linear_24_dvalues_sm80<DType::bf16, kBy16>);

}  // namespace sparsekern::cuda
