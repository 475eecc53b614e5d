// linear_24 in fp32 for few rows of x (M <= 64), by plain multiply-add: weights stream through shared memory, once.
//
//   block    32 features, kM tokens (4, 8, 16, 32, 64), one split of K; 8 warps = kM/T blocks of T tokens
//            (T = 32 at most) x G groups of k
//   chunk    32 k of each group: 256 k, or 128 where kM = 64
//
//   lane 4g+t multiplies of its warp's 32 k     features g, g+8, g+16, g+24
//                                               k 8t .. 8t+7: kept elements 4t .. 4t+3, 16 bytes; one byte of meta
//                                               all T tokens: 32 bytes of x each, the same for every g
//   expanded to 8 floats a feature, then 8 multiply-adds a token: half of them by zero, but to pick the kept x
//   of each feature takes a read of shared memory for every product
//
//   stage    values[32][chunk/2]   pieces of 16 bytes, c ^ row % 2 * 4        read by 16 bytes, no bank twice
//            meta[32][chunk/8]
//            x[kM][chunk]          no swizzle: four addresses a read, a bank each
//   in flight: three stages where kM <= 16, else two; 17 KB of weights each (kM = 64: 8.5)
//
//   sums     of the four lanes t, then of the groups in order (shared sums[8][T][32 + 1]), then of the splits in
//            order by linear_24_reduce: the same bits every run. A chain of additions has K/128 of the kept terms, or
//            K/64 where kM = 64: no second level is needed
//
// Rows past N, tokens past M and k past K are zeros; K % 128 == 0, and x by rows of aligned 16 bytes.
// Lowest architecture: sm_80. Registers: 128 where kM <= 8 (two blocks a multiprocessor), else 255 (one).
// Limited by: bytes, N K (2 + 1/8), while M is small: 2 M N K operations, and a read of 16 bytes of shared memory
// for 16 multiply-adds.
#include "linear_24.cuh"

namespace sparsekern::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kN = 32, kRows = kN / 8;  // features of a block; of a lane
constexpr int kUnit = 256;              // k, of which a split has a whole number

template <int kM>
struct Shared {
  static constexpr int kT = kM < 32 ? kM : 32, kGroups = kWarps / (kM / kT);
  static constexpr int kChunk = 32 * kGroups, kStages = kM <= 16 ? 3 : 2;
  static_assert(kUnit % kChunk == 0, "splits begin with a chunk");
  struct Stage {
    float values[kN][kChunk / 2];
    float x[kM][kChunk];
    uint8_t meta[kN][kChunk / 8];
  };
  union {
    alignas(128) Stage stage[kStages];
    float sums[kWarps][kT][kN + 1];
  };
};

// Copies of one chunk of k; nothing is waited for.
template <int kM>
__device__ __forceinline__ void fetch(const Linear24& a, typename Shared<kM>::Stage& s, int64_t n0,
                                      int64_t k0, Policy policy) {
  constexpr int kChunk = Shared<kM>::kChunk;
  const int thread = static_cast<int>(threadIdx.x);
  const auto* values = static_cast<const float*>(a.values);
#pragma unroll 2  // all of them take registers enough to spill
  for (int i = thread; i < kN * kChunk / 8; i += kThreads) {
    const int row = i / (kChunk / 8), c = i % (kChunk / 8);
    const int64_t n = n0 + row, k = k0 + 8 * c;
    const bool inside = n < a.N && k < a.K;
    copy_async_once16(&s.values[row][4 * (c ^ (row & 1) * 4)],
                      inside ? values + n * (a.K / 2) + k / 2 : values, inside ? 16 : 0, policy);
  }
  constexpr int kBytes = kChunk / 8;  // of meta, a row
  if (thread < kN * kBytes / 16) {
    const int row = thread / (kBytes / 16), byte = thread % (kBytes / 16) * 16;
    const int64_t n = n0 + row, at = k0 / 8 + byte;
    const bool inside = n < a.N && at < a.K / 8;
    copy_async_once16(&s.meta[row][byte], inside ? a.meta + n * (a.K / 8) + at : a.meta,
                      inside ? 16 : 0, policy);
  }
  const auto* x = static_cast<const float*>(a.x);
#pragma unroll 2
  for (int i = thread; i < kM * kChunk / 4; i += kThreads) {
    const int row = i / (kChunk / 4), c = i % (kChunk / 4);
    const int64_t k = k0 + 4 * c;
    const bool inside = row < a.M && k < a.K;
    copy_async<16>(&s.x[row][4 * c], inside ? x + row * a.x_stride + k : x, inside ? 16 : 0);
  }
}

// Eight elements of W from four kept ones and a byte of meta.
__device__ __forceinline__ void expand(float (&w)[8], const float* kept, int byte) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int slot = i / 4 * 2;
    w[i] = element(byte >> (i & 4), i % 4, kept[slot], kept[slot + 1]);
  }
}

template <int kM>
__device__ __forceinline__ void multiply(const typename Shared<kM>::Stage& s, int group, int token0,
                                         float (&sums)[kRows][Shared<kM>::kT]) {
  const int lane = threadIdx.x % 32, g = lane / 4, c = 4 * group + lane % 4;
  float w[kRows][8];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int row = g + 8 * r;
    float kept[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) kept[i] = s.values[row][4 * (c ^ (row & 1) * 4) + i];
    expand(w[r], kept, s.meta[row][c]);
  }
#pragma unroll
  for (int m = 0; m < Shared<kM>::kT; ++m) {
    float x[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = s.x[token0 + m][8 * c + i];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < 8; ++i) sums[r][m] = fused_multiply_add(w[r][i], x[i], sums[r][m]);
    }
  }
}

// Over the four lanes of a quad, the same in each.
__device__ __forceinline__ float sum_of_quad(float v) {
  const int lane = threadIdx.x % 32;
  v += bits_to_float(shuffle_from(float_to_bits(v), lane ^ 1));
  return v + bits_to_float(shuffle_from(float_to_bits(v), lane ^ 2));
}

}  // namespace

template <int kM>
__global__ void __launch_bounds__(kThreads, kM <= 8 ? 2 : 1) linear_24_decode_fma(Linear24 a) {
  using S = Shared<kM>;
  auto& s = shared_memory<S>();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = warp % S::kGroups;
  const int token0 = warp / S::kGroups * S::kT;
  const int64_t n0 = static_cast<int64_t>(blockIdx.x) * kN;
  const int64_t begin = static_cast<int64_t>(blockIdx.y) * a.units * kUnit;
  const int64_t end = begin + a.units * kUnit < a.K ? begin + a.units * kUnit : a.K;
  const int chunks = static_cast<int>((end - begin + S::kChunk - 1) / S::kChunk);
  const Policy policy = evict_first();

#pragma unroll
  for (int i = 0; i < S::kStages - 1; ++i) {
    if (i < chunks) fetch<kM>(a, s.stage[i], n0, begin + i * S::kChunk, policy);
    commit_copies();
  }
  float sums[kRows][S::kT] = {};
  int now = 0, next = S::kStages - 1;
  for (int i = 0; i < chunks; ++i) {
    wait_copies<S::kStages - 2>();
    __syncthreads();  // the chunk is here, for all, and the one before it is done with
    const int ahead = i + S::kStages - 1;
    if (ahead < chunks)
      fetch<kM>(a, s.stage[next], n0, begin + static_cast<int64_t>(ahead) * S::kChunk, policy);
    commit_copies();
    multiply<kM>(s.stage[now], group, token0, sums);
    now = now + 1 == S::kStages ? 0 : now + 1;
    next = next + 1 == S::kStages ? 0 : next + 1;
  }

  wait_copies<0>();
  __syncthreads();  // the stages may be written over
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int m = 0; m < S::kT; ++m) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float sum = sum_of_quad(sums[r][m]);
      if (t == r) s.sums[warp][m][g + 8 * r] = sum;
    }
  }
  __syncthreads();  // all sums are there
  for (int i = static_cast<int>(threadIdx.x); i < kM * kN; i += kThreads) {
    const int m = i / kN, column = i % kN;
    const int64_t n = n0 + column;
    if (m >= a.M || n >= a.N) continue;
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < S::kGroups; ++j)
      sum += s.sums[m / S::kT * S::kGroups + j][m % S::kT][column];
    finish_split<DType::f32>(a, m, n, sum);
  }
}

SPARSEKERN_KERNEL(linear_24_decode_fma<4>);
SPARSEKERN_KERNEL(linear_24_decode_fma<8>);
SPARSEKERN_KERNEL(linear_24_decode_fma<16>);
SPARSEKERN_KERNEL(linear_24_decode_fma<32>);
SPARSEKERN_KERNEL(linear_24_decode_fma<64>);

}  // namespace sparsekern::cuda
