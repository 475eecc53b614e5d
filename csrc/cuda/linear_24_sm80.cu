// linear_24 for many rows of x, on sparse tensor cores: y[m, n] = activation(sum over k of x[m, k] W[n, k] + bias[n])
//
// W is the 2:4 operand A (its rows are the m of the instruction), x is B, so one accumulator tile holds
// features down and tokens across; y is written row by row after a turn through shared memory.
//
//   block    128 features x BM tokens (128 or 64), 4 warps as 2 x 2, each 64 x BM/2, k by 64
//   warp     4 tiles of 16 features  x  BM/16 tiles of 8 tokens, two steps of m16n8k32 a tile of k
//
//   stage (3 in flight)      rows         swizzle of 16-byte pieces      read by
//     x       [BM][64]       128 bytes    c ^ row % 8                    ldmatrix, as B: row = token
//     values  [128][32]       64 bytes    c ^ row / 2 % 4                ldmatrix, as A: row = feature
//     meta    [128] 8 bytes               none                           lane 4g+t: 16 bits t of rows g, g+8
//
//   E        the uint16 number t of a row covers k = 16t .. 16t+15 of the tile, so one register made of rows g
//            and g+8 serves selector 0 (k 0..31, lanes t = 0, 1) and selector 1 (k 32..63, t = 2, 3)
//
//   epilogue sums -> shared y[BM][128 + 4] in fp32, tokens down and features across -> eight features a thread:
//            bias, activation, rounding, 16 bytes to memory. In the registers of the sums the activation would be
//            unrolled 128 times: 230 KB of code instead of a fifth
//
// Prepacked weights (linear_24.cuh) come through the same stage: pieces from other places, and meta as E
// registers in another order of nibbles, which four shifts undo.
//
// Ragged M, N, K are masked: rows past N load row N-1's meta (a legal nibble) and zero values, k past K zeros and
// nibbles 4. Blocks are numbered so that eight rows of tiles share their columns of x in the L2.
// Lowest architecture: sm_80. Registers: at most 255, two blocks a multiprocessor (launch bounds).
// Limited by: operations, where M and N fill the device: 128 x 128 x 64 takes 25 KB from the L2 for 1 M
// multiply-adds of dense count.
#include "linear_24.cuh"

namespace sparsekern::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kN = 128, kK = 64, kStages = 3;
constexpr int kTilesN = 4;      // of 16 features, per warp
constexpr int kPitch = kN + 4;  // floats; the pad spreads the tokens of a fragment over the banks

// How global memory is read.
enum { kBy4, kBy16, kPrepacked };

template <int kM>
struct Shared {
  struct Stage {
    uint16_t x[kM * kK];
    uint16_t values[kN * kK / 2];
    uint32_t meta[kN * 2];
  };
  union {
    alignas(128) Stage stage[kStages];
    float y[kM * kPitch];
  };
};

// Where piece c of 8 elements of a row lies.
__device__ __forceinline__ int x_at(int row, int c) { return row * kK + (c ^ (row & 7)) * 8; }
__device__ __forceinline__ int values_at(int row, int c) {
  return row * (kK / 2) + (c ^ (row >> 1 & 3)) * 8;
}

// Copies of one tile of k into a stage; nothing is waited for.
template <int kM, int access>
__device__ __forceinline__ void fetch(const Linear24& a, typename Shared<kM>::Stage& s, int64_t m0,
                                      int64_t n0, int64_t tile) {
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t k0 = tile * kK;
  constexpr int kSize = access == kBy4 ? 4 : 16;             // bytes of a copy
  constexpr int kElements = kSize / 2, kParts = 16 / kSize;  // of a copy; copies to a piece
  const auto* x = static_cast<const uint16_t*>(a.x);
#pragma unroll 4
  for (int i = thread; i < kM * kK / kElements; i += kThreads) {
    const int row = i / (kK / kElements), part = i % (kK / kElements), k = part * kElements;
    const int bytes = m0 + row < a.M ? clip<2>(a.K - k0 - k, kSize) : 0;
    const uint16_t* from = bytes ? x + (m0 + row) * a.x_stride + k0 + k : x;
    copy_async<kSize>(s.x + x_at(row, part / kParts) + part % kParts * kElements, from, bytes);
  }
#pragma unroll 4
  for (int i = thread; i < kN * kK / 2 / kElements; i += kThreads) {
    const int row = i / (kK / 2 / kElements), part = i % (kK / 2 / kElements), k = part * kElements;
    const int64_t n = n0 + row;
    uint16_t* to = s.values + values_at(row, part / kParts) + part % kParts * kElements;
    if constexpr (access == kPrepacked) {
      const int64_t block = n / 16, piece = ((block * (a.K / kK) + tile) * 2 + row / 8 % 2) * 32;
      const int bytes = n < a.N ? 16 : 0;
      const auto* packed = static_cast<const uint16_t*>(a.packed);
      copy_async<16>(to, bytes ? packed + (piece + row % 8 * 4 + part) * 8 : packed, bytes);
    } else {
      const auto* values = static_cast<const uint16_t*>(a.values);
      const int bytes = n < a.N ? clip<2>((a.K - k0) / 2 - k, kSize) : 0;
      copy_async<kSize>(to, bytes ? values + n * (a.K / 2) + k0 / 2 + k : values, bytes);
    }
  }
  if constexpr (access == kPrepacked) {
    const auto* meta = static_cast<const uint8_t*>(a.packed) + a.N * a.K;
#pragma unroll
    for (int i = thread; i < kN * 2; i += kThreads) {
      const int64_t last = a.N / 16 - 1, block = n0 / 16 + i / 32;
      copy_async<4>(s.meta + i,
                    meta + packed_meta_at(block < last ? block : last, tile, a.K / kK, i % 32));
    }
  } else {
    static_assert(kN == kThreads, "a thread has a row of meta");
    const int64_t n = n0 + thread < a.N ? n0 + thread : a.N - 1, bytes = meta_bytes(a.K);
    const uint8_t* from = a.meta + n * bytes + k0 / 8;
    if (access == kBy16 && a.vectors & 1) {
      copy_async<8>(s.meta + thread * 2, from);
    } else {
      uint32_t word[2] = {};
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const uint32_t byte = k0 / 8 + i < bytes ? from[i] : kEmptyNibble * 0x11u;
        word[i / 4] |= byte << 8 * (i % 4);
      }
      s.meta[thread * 2] = word[0];
      s.meta[thread * 2 + 1] = word[1];
    }
  }
}

// E of the 16 features from `row` on.
template <int access>
__device__ __forceinline__ uint32_t load_e(const uint32_t* meta, int row) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  if constexpr (access == kPrepacked) {
    // Nibble t of each of the quad's four registers, in both halves at once.
    const uint32_t* quad = meta + row * 2 + 4 * g;
    uint32_t e = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) e |= (quad[i] >> 4 * t & 0x000f000fu) << 4 * i;
    return e;
  } else {
    const auto* halves = reinterpret_cast<const uint16_t*>(meta);
    return halves[(row + g) * 4 + t] | static_cast<uint32_t>(halves[(row + g + 8) * 4 + t]) << 16;
  }
}

// One m16n8k32 step of a tile of k for all of a warp's tiles.
template <DType D, int kTilesM, int step, class Stage>
__device__ __forceinline__ void multiply(const Stage& s, const uint32_t (&e)[kTilesN],
                                         float (&sums)[kTilesN][kTilesM][4], int row_n, int row_m) {
  const int lane = threadIdx.x % 32, i = lane / 8, r = lane % 8;
  uint32_t b[kTilesM][4];
#pragma unroll
  for (int m = 0; m < kTilesM; ++m)
    load_matrices(b[m], s.x + x_at(row_m + 8 * m + r, 4 * step + i));
#pragma unroll
  for (int n = 0; n < kTilesN; ++n) {
    uint32_t a[4];
    load_matrices(a, s.values + values_at(row_n + 16 * n + 8 * (i & 1) + r, 2 * step + (i >> 1)));
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) mma_sp<D, step>(sums[n][m], a, b[m], e[n]);
  }
}

// Sums to shared y[token][feature].
template <int kTilesM>
__device__ __forceinline__ void turn(const float (&sums)[kTilesN][kTilesM][4], float* y, int row_n,
                                     int row_m) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = row_m + 8 * m + 2 * t + i % 2, feature = row_n + 16 * n + 8 * (i / 2) + g;
        y[token * kPitch + feature] = sums[n][m][i];
      }
    }
  }
}

}  // namespace

template <DType D, int kM, int access>
__global__ void __launch_bounds__(kThreads, 2) linear_24_sm80(Linear24 a) {
  constexpr int kTilesM = kM / 16;
  auto& s = shared_memory<Shared<kM>>();
  const auto [m0, n0] = tile_of_block<kM, kN>(a.M, a.N);
  const int warp = threadIdx.x / 32, row_n = warp / 2 * 64, row_m = warp % 2 * (kM / 2);

  const int64_t tiles = (a.K + kK - 1) / kK;
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    if (i < tiles) fetch<kM, access>(a, s.stage[i], m0, n0, i);
    commit_copies();
  }
  float sums[kTilesN][kTilesM][4] = {};
  int now = 0, next = kStages - 1;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    wait_copies<kStages - 2>();
    __syncthreads();  // the tile is here, for all, and the one before it is done with
    if (tile + kStages - 1 < tiles) fetch<kM, access>(a, s.stage[next], m0, n0, tile + kStages - 1);
    commit_copies();
    uint32_t e[kTilesN];
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) e[n] = load_e<access>(s.stage[now].meta, row_n + 16 * n);
    multiply<D, kTilesM, 0>(s.stage[now], e, sums, row_n, row_m);
    multiply<D, kTilesM, 1>(s.stage[now], e, sums, row_n, row_m);
    now = now + 1 == kStages ? 0 : now + 1;
    next = next + 1 == kStages ? 0 : next + 1;
  }

  wait_copies<0>();
  __syncthreads();  // the stages may be written over
  turn<kTilesM>(sums, s.y, row_n, row_m);
  __syncthreads();  // y is whole
  for (int i = static_cast<int>(threadIdx.x); i < kM * kN / 8; i += kThreads) {
    const int row = i / (kN / 8), column = i % (kN / 8) * 8;
    const int64_t m = m0 + row, n = n0 + column;
    if (m >= a.M || n >= a.N) continue;
    const float* from = s.y + row * kPitch + column;
    float v[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float bias = a.bias && n + j < a.N ? load_float<D>(a.bias, n + j) : 0.0f;
      v[j] = activate(from[j] + bias, a.activation);
    }
    if (a.vectors & 2) {
      uint32_t pairs[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) pairs[j] = round_pair<D>(v[2 * j], v[2 * j + 1]);
      store_global<4>(static_cast<uint16_t*>(a.y) + m * a.N + n, pairs);
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j)
        if (n + j < a.N) store_float<D>(a.y, m * a.N + n + j, v[j]);
    }
  }
}

SPARSEKERN_KERNEL(linear_24_sm80<DType::f16, 64, kBy4>);
SPARSEKERN_KERNEL(linear_24_sm80<DType::f16, 64, kBy16>);
SPARSEKERN_KERNEL(linear_24_sm80<DType::f16, 64, kPrepacked>);
SPARSEKERN_KERNEL(linear_24_sm80<DType::f16, 128, kBy4>);
SPARSEKERN_KERNEL(linear_24_sm80<DType::f16, 128, kBy16>);
SPARSEKERN_KERNEL(linear_24_sm80<DType::f16, 128, kPrepacked>);
SPARSEKERN_KERNEL(linear_24_sm80<DType::bf16, 64, kBy4>);
SPARSEKERN_KERNEL(linear_24_sm80<DType::bf16, 64, kBy16>);
SPARSEKERN_KERNEL(linear_24_sm80<DType::bf16, 64, kPrepacked>);
SPARSEKERN_KERNEL(linear_24_sm80<DType::bf16, 128, kBy4>);
SPARSEKERN_KERNEL(linear_24_sm80<DType::bf16, 128, kBy16>);
SPARSEKERN_KERNEL(linear_24_sm80<DType::bf16, 128, kPrepacked>);

}  // namespace sparsekern::cuda
