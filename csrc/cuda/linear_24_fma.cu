// linear_24 and its two gradients by plain multiply-add in fp32: exact fp32 products, and every 16-bit case that
// the tensor-core kernels do not take. Any shape, any strides.
//
//   y[m, n]       = sum over k of x[m, k] W[n, k]          a block owns 64 x 64 outputs, 256 threads a
//   dx[m, k]      = sum over n of dy[m, n] W[n, k]         square of 16 x 16, each 4 x 4 outputs
//   dvalues[n, j] = sum over m of dy[m, n] x[m, k(n, j)]
//
//   shared    a[16][64]   slab of the left factor, in fp32      thread (i, j) reads a[.][4i .. 4i+3]
//             b[16][64]   slab of the right factor                            b[.][4j .. 4j+3]
//             W is expanded on the way in: a thread has one group, two values and a nibble, and writes four
//             elements; dvalues picks the kept of its 64 x 64 on the way out. Dense W is never larger than this.
//
// Sums meet in a second level every 512 terms, so that the error does not grow with the length of a sum.
// Lowest architecture: sm_80 (nothing here needs it). Limited by: operations, twice those of a kernel that
// would skip the zeros, at four floats read from shared memory per eight multiply-adds.
#include "linear_24.cuh"

namespace sparsekern::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kTile = 64, kSlab = 16;
constexpr int kPitch = kTile + 4;  // keeps 16-byte reads aligned and spreads the columns written
constexpr int kLevel = 512;        // terms of a first-level sum
static_assert(kTile * kSlab / 4 == kThreads, "a thread expands one group of W");

struct Shared {
  union {
    struct {
      float a[kSlab][kPitch], b[kSlab][kPitch];
    };
    float out[kTile][kTile + 1];
  };
};

// A slab of a matrix [rows, terms] with any strides, as to[term][row]; what lies outside is zero.
template <DType D>
__device__ __forceinline__ void load_slab(float (&to)[kSlab][kPitch], const void* p,
                                          int64_t row_stride, int64_t term_stride, int64_t row0,
                                          int64_t rows, int64_t term0, int64_t terms) {
#pragma unroll
  for (int i = 0; i < kTile * kSlab / kThreads; ++i) {
    // Neighbours in a warp follow the dimension that is contiguous.
    const int at = static_cast<int>(threadIdx.x) + i * kThreads;
    const int row = term_stride == 1 ? at / kSlab : at % kTile;
    const int term = term_stride == 1 ? at % kSlab : at / kTile;
    const bool inside = row0 + row < rows && term0 + term < terms;
    to[term][row] =
        inside ? load_float<D>(p, (row0 + row) * row_stride + (term0 + term) * term_stride) : 0.0f;
  }
}

// The four elements of group g of row n of W.
template <DType D>
__device__ __forceinline__ void expand(float (&w)[4], const void* values, const uint8_t* meta,
                                       int64_t n, int64_t g, int64_t N, int64_t K) {
  w[0] = w[1] = w[2] = w[3] = 0.0f;
  if (n >= N || 4 * g >= K) return;
  const int nibble = meta[n * meta_bytes(K) + g / 2] >> 4 * (g & 1) & 15;
  const float first = load_float<D>(values, n * (K / 2) + 2 * g);
  const float second = load_float<D>(values, n * (K / 2) + 2 * g + 1);
#pragma unroll
  for (int i = 0; i < 4; ++i) w[i] = element(nibble, i, first, second);
}

// sums[i][j] of this thread over all terms; `load(term0)` fills a and b.
template <class Load>
__device__ __forceinline__ void multiply(Shared& s, float (&sums)[4][4], int64_t terms, Load load) {
  const int i0 = static_cast<int>(threadIdx.x) / 16 * 4,
            j0 = static_cast<int>(threadIdx.x) % 16 * 4;
  float level[4][4] = {};
  for (int64_t term0 = 0; term0 < terms; term0 += kSlab) {
    load(term0);
    __syncthreads();  // the slab is here
#pragma unroll
    for (int t = 0; t < kSlab; ++t) {
      float a[4], b[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = s.a[t][i0 + i], b[i] = s.b[t][j0 + i];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) level[i][j] = fused_multiply_add(a[i], b[j], level[i][j]);
      }
    }
    __syncthreads();  // and may be written over
    if ((term0 / kSlab + 1) % (kLevel / kSlab) == 0 || term0 + kSlab >= terms) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          sums[i][j] += level[i][j];
          level[i][j] = 0.0f;
        }
      }
    }
  }
}

struct Tile {
  int64_t i, j;  // of the first row and column
};
__device__ __forceinline__ Tile tile_of(int64_t columns) {
  const int64_t across = (columns + kTile - 1) / kTile, i = blockIdx.x / across;
  return {i * kTile, (blockIdx.x - i * across) * kTile};
}

}  // namespace

template <DType D>
__global__ void __launch_bounds__(kThreads, 2) linear_24_fma(Linear24 a) {
  auto& s = shared_memory<Shared>();
  const Tile tile = tile_of(a.N);
  float sums[4][4] = {};
  multiply(s, sums, a.K, [&](int64_t k0) {
    load_slab<D>(s.a, a.x, a.x_stride, a.x_step, tile.i, a.M, k0, a.K);
    const int row = static_cast<int>(threadIdx.x) / 4, group = static_cast<int>(threadIdx.x) % 4;
    float w[4];
    expand<D>(w, a.values, a.meta, tile.j + row, k0 / 4 + group, a.N, a.K);
#pragma unroll
    for (int i = 0; i < 4; ++i) s.b[4 * group + i][row] = w[i];
  });
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t m = tile.i + static_cast<int>(threadIdx.x) / 16 * 4 + i;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t n = tile.j + static_cast<int>(threadIdx.x) % 16 * 4 + j;
      if (m < a.M && n < a.N) finish<D>(a, m, n, sums[i][j]);
    }
  }
}

template <DType D>
__global__ void __launch_bounds__(kThreads, 2) linear_24_dx_fma(Gradient24 a) {
  auto& s = shared_memory<Shared>();
  const Tile tile = tile_of(a.K);
  float sums[4][4] = {};
  multiply(s, sums, a.N, [&](int64_t n0) {
    load_slab<D>(s.a, a.dy, a.dy_stride, a.dy_step, tile.i, a.M, n0, a.N);
    const int term = static_cast<int>(threadIdx.x) / 16, group = static_cast<int>(threadIdx.x) % 16;
    float w[4];
    expand<D>(w, a.values, a.meta, n0 + term, tile.j / 4 + group, a.N, a.K);
#pragma unroll
    for (int i = 0; i < 4; ++i) s.b[term][4 * group + i] = w[i];
  });
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t m = tile.i + static_cast<int>(threadIdx.x) / 16 * 4 + i;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t k = tile.j + static_cast<int>(threadIdx.x) % 16 * 4 + j;
      if (m < a.M && k < a.K) store_float<D>(a.out, m * a.K + k, sums[i][j]);
    }
  }
}

template <DType D>
__global__ void __launch_bounds__(kThreads, 2) linear_24_dvalues_fma(Gradient24 a) {
  auto& s = shared_memory<Shared>();
  const Tile tile = tile_of(a.K);
  float sums[4][4] = {};
  multiply(s, sums, a.M, [&](int64_t m0) {
    load_slab<D>(s.a, a.dy, a.dy_step, a.dy_stride, tile.i, a.N, m0, a.M);
    load_slab<D>(s.b, a.x, a.x_step, a.x_stride, tile.j, a.K, m0, a.M);
  });
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j)
      s.out[static_cast<int>(threadIdx.x) / 16 * 4 + i]
           [static_cast<int>(threadIdx.x) % 16 * 4 + j] = sums[i][j];
  }
  __syncthreads();  // dense 64 x 64 of dW, of which half is kept
#pragma unroll
  for (int i = 0; i < kTile * kTile / 4 / kThreads; ++i) {
    const int at = static_cast<int>(threadIdx.x) + i * kThreads, row = at / 16, group = at % 16;
    const int64_t n = tile.i + row, g = tile.j / 4 + group;
    if (n < a.N && 4 * g < a.K) {
      const int nibble = a.meta[n * meta_bytes(a.K) + g / 2] >> 4 * (g & 1) & 15;
      const int64_t to = n * (a.K / 2) + 2 * g;
      store_float<D>(a.out, to, s.out[row][4 * group + (nibble & 3)]);
      store_float<D>(a.out, to + 1, s.out[row][4 * group + (nibble >> 2)]);
    }
  }
}

SPARSEKERN_KERNEL(linear_24_fma<DType::f32>);
SPARSEKERN_KERNEL(linear_24_fma<DType::f16>);
SPARSEKERN_KERNEL(linear_24_fma<DType::bf16>);
SPARSEKERN_KERNEL(linear_24_dx_fma<DType::f32>);
SPARSEKERN_KERNEL(linear_24_dx_fma<DType::f16>);
SPARSEKERN_KERNEL(linear_24_dx_fma<DType::bf16>);
SPARSEKERN_KERNEL(linear_24_dvalues_fma<DType::f32>);
SPARSEKERN_KERNEL(linear_24_dvalues_fma<DType::f16>);
SPARSEKERN_KERNEL(linear_24_dvalues_fma<DType::bf16>);

}  // namespace sparsekern::cuda
