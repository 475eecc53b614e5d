// linear_24 in fp32 for many rows of x, on dense tensor cores in tf32, where the user's settings of torch allow it:
// x and W are rounded to 10 bits of mantissa, sums are fp32. mma.sp cannot serve: in tf32 it is 1:2, one of every
// two, and a group that keeps k 0 and 1 has no such form.
//
//   block    BM tokens (128 or 64) x 128 features, 8 warps as 2 x 4, each BM/2 x 32, k by 32
//   warp     x is A, W is B: BM/32 tiles of 16 tokens  x  4 tiles of 8 features, four steps of m16n8k8 a tile of k
//
//   stage (2)            rows         swizzle of 16-byte pieces    read by
//     x       [BM][32]   128 bytes    c ^ row % 8                  ldmatrix, as A: a row of a matrix is 4 floats
//     values  [128][16]   64 bytes    none                         the thread that expands the group
//     meta    [128]        4 bytes    none                         likewise
//   W         [128][32]  128 bytes    c ^ row % 8                  ldmatrix, as B; a group of k is a piece
//
//   a tile of k: it lands | barrier | expand it to W, fetch the next | barrier | multiply
//   epilogue: sums -> shared y[BM][128 + 4] -> bias, activation, rows of y
//
// Ragged M, N, K are masked with zeros. Rows past N and k past K are zero values, so their nibbles do not matter.
// Blocks are numbered so that eight rows of tiles share their columns of x in the L2.
// Lowest architecture: sm_80. Registers: at most 128, two blocks a multiprocessor (launch bounds).
// Limited by: operations, twice those that 2:4 keeps; the weight's bytes are half.
#include "linear_24.cuh"

namespace sparsekern::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kN = 128, kK = 32, kStages = 2;
constexpr int kTilesN = 4;      // of 8 features, per warp
constexpr int kPitch = kN + 4;  // floats; the pad spreads the tokens of a fragment over the banks

// How global memory is read.
enum { kBy4, kBy16 };

template <int kM>
struct Shared {
  struct Stage {
    float x[kM * kK];
    float values[kN * kK / 2];
    uint32_t meta[kN];
  };
  union {
    struct {
      alignas(128) Stage stage[kStages];
      uint32_t w[kN * kK];
    };
    float y[kM * kPitch];
  };
};

// Where piece c of 4 elements of a row of x or W lies.
__device__ __forceinline__ int at(int row, int c) { return row * kK + (c ^ (row & 7)) * 4; }

// Copies of one tile of k into a stage; nothing is waited for.
template <int kM, int access>
__device__ __forceinline__ void fetch(const Linear24& a, typename Shared<kM>::Stage& s, int64_t m0,
                                      int64_t n0, int64_t k0) {
  const int thread = static_cast<int>(threadIdx.x);
  constexpr int kSize = access == kBy4 ? 4 : 16;  // bytes of a copy
  constexpr int kElements = kSize / 4;
  const auto* x = static_cast<const float*>(a.x);
#pragma unroll 2
  for (int i = thread; i < kM * kK / kElements; i += kThreads) {
    const int row = i / (kK / kElements), k = i % (kK / kElements) * kElements;
    const int bytes = m0 + row < a.M ? clip<4>(a.K - k0 - k, kSize) : 0;
    copy_async<kSize>(s.x + at(row, k / 4) + k % 4,
                      bytes ? x + (m0 + row) * a.x_stride + k0 + k : x, bytes);
  }
  const auto* values = static_cast<const float*>(a.values);
#pragma unroll 2
  for (int i = thread; i < kN * kK / 2 / kElements; i += kThreads) {
    const int row = i / (kK / 2 / kElements), j = i % (kK / 2 / kElements) * kElements;
    const int64_t n = n0 + row;
    const int bytes = n < a.N ? clip<4>((a.K - k0) / 2 - j, kSize) : 0;
    copy_async<kSize>(s.values + row * (kK / 2) + j,
                      bytes ? values + n * (a.K / 2) + k0 / 2 + j : values, bytes);
  }
  if (thread < kN) {
    const int64_t n = n0 + thread < a.N ? n0 + thread : a.N - 1, bytes = meta_bytes(a.K);
    const uint8_t* from = a.meta + n * bytes + k0 / 8;
    if (a.vectors & 1) {
      copy_async<4>(s.meta + thread, from);
    } else {
      uint32_t word = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t byte = k0 / 8 + i < bytes ? from[i] : 0;
        word |= byte << 8 * i;
      }
      s.meta[thread] = word;
    }
  }
}

// W of a stage, dense and rounded to tf32.
template <int kM>
__device__ __forceinline__ void expand(const typename Shared<kM>::Stage& s, uint32_t* w) {
  constexpr int kGroups = kK / 4;
#pragma unroll
  for (int i = static_cast<int>(threadIdx.x); i < kN * kGroups; i += kThreads) {
    const int row = i / kGroups, group = i % kGroups;
    const int nibble = s.meta[row] >> 4 * group & 15;
    const uint32_t first = round_to_tf32(s.values[row * (kK / 2) + 2 * group]);
    const uint32_t second = round_to_tf32(s.values[row * (kK / 2) + 2 * group + 1]);
    uint32_t* to = w + at(row, group);
#pragma unroll
    for (int j = 0; j < 4; ++j) to[j] = element(nibble, j, first, second);
  }
}

// A tile of k for all of a warp's tiles.
template <int kTilesM>
__device__ __forceinline__ void multiply(const float* x, const uint32_t* w,
                                         float (&sums)[kTilesM][kTilesN][4], int row_m, int row_n) {
  const int lane = threadIdx.x % 32, i = lane / 8, r = lane % 8;
#pragma unroll
  for (int step = 0; step < kK / 8; ++step) {
    uint32_t b[kTilesN][2];
#pragma unroll
    for (int n = 0; n < kTilesN; n += 2) {
      uint32_t pair[4];  // two tiles of features
      load_matrices(pair, w + at(row_n + 8 * (n + i / 2) + r, 2 * step + i % 2));
#pragma unroll
      for (int j = 0; j < 4; ++j) b[n + j / 2][j % 2] = pair[j];
    }
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
      uint32_t a[4];
      load_matrices(a, x + at(row_m + 16 * m + 8 * (i % 2) + r, 2 * step + i / 2));
#pragma unroll
      for (int j = 0; j < 4; ++j) a[j] = round_to_tf32(bits_to_float(a[j]));
#pragma unroll
      for (int n = 0; n < kTilesN; ++n) mma_tf32(sums[m][n], a, b[n]);
    }
  }
}

}  // namespace

template <int kM, int access>
__global__ void __launch_bounds__(kThreads, 2) linear_24_tf32_sm80(Linear24 a) {
  constexpr int kTilesM = kM / 32;
  auto& s = shared_memory<Shared<kM>>();
  const auto [m0, n0] = tile_of_block<kM, kN>(a.M, a.N);
  const int warp = threadIdx.x / 32, row_m = warp / 4 * (kM / 2), row_n = warp % 4 * 32;

  fetch<kM, access>(a, s.stage[0], m0, n0, 0);
  commit_copies();
  float sums[kTilesM][kTilesN][4] = {};
  int now = 0;
  for (int64_t k0 = 0; k0 < a.K; k0 += kK, now ^= 1) {
    wait_copies<0>();
    __syncthreads();  // the tile is here, for all, and the one before it is done with
    if (k0 + kK < a.K) fetch<kM, access>(a, s.stage[now ^ 1], m0, n0, k0 + kK);
    commit_copies();
    expand<kM>(s.stage[now], s.w);
    __syncthreads();  // W is whole
    multiply<kTilesM>(s.stage[now].x, s.w, sums, row_m, row_n);
  }

  wait_copies<0>();
  __syncthreads();  // the stages and W may be written over
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = row_m + 16 * m + g + i / 2 * 8, feature = row_n + 8 * n + 2 * t + i % 2;
        s.y[token * kPitch + feature] = sums[m][n][i];
      }
    }
  }
  __syncthreads();  // y is whole
  for (int i = static_cast<int>(threadIdx.x); i < kM * kN; i += kThreads) {
    const int row = i / kN, column = i % kN;
    const int64_t m = m0 + row, n = n0 + column;
    if (m < a.M && n < a.N) finish<DType::f32>(a, m, n, s.y[row * kPitch + column]);
  }
}

SPARSEKERN_KERNEL(linear_24_tf32_sm80<64, kBy4>);
SPARSEKERN_KERNEL(linear_24_tf32_sm80<64, kBy16>);
SPARSEKERN_KERNEL(linear_24_tf32_sm80<128, kBy4>);
SPARSEKERN_KERNEL(linear_24_tf32_sm80<128, kBy16>);

}  // namespace sparsekern::cuda
