// What the kernels of linear_24 share: their argument, what happens to a sum before it is rounded, and
// the prepacked layout.
//
// Prepacked (N % 16 == 0 and K % 64 == 0, else prepacking is the identity): blocks of 16 rows and tiles of
// 64 k, a permutation of the 16-byte pieces of `values`, so that a warp reads 512 bytes in a row and each
// lane has its two A registers of two steps of m16n8k32 in one load.
//
//   values    [N/16][K/64][half h][lane 4g + t]   16 bytes: row 8h + g, kept elements 8t .. 8t+7 of the
//                                                 tile's 32, that is k = 16t .. 16t+15, groups 4t .. 4t+3
//   step s of the tile multiplies groups 4t + 2s (A's first half) and 4t + 2s + 1 (second half) of each t:
//   a sum does not care for the order of k, as long as x comes in the same order
//
//   meta      [N/16][K/64][lane 4g + t]           one register E: low half row g, high half row g + 8;
//                                                 nibbles q = 0..3 are groups 4q + t
//             E of selector s, half h of the ISA is then lane 4g + 2s + h: no exchange between lanes
//             four tiles of k lie together in each lane's 16 bytes: [N/16][K/256][lane][4]; what K % 256
//             leaves over is [lane][1 .. 3]
#pragma once

#include "ptx.cuh"

namespace sparsekern::cuda {

struct Linear24 {
  const void* x;        // [M, K], a row every x_stride elements, k every x_step
  const void* values;   // [N, K/2]
  const uint8_t* meta;  // [N, ceil(K/8)]
  const void* packed;   // or both of them, prepacked
  const void* bias;     // [N] or null
  void* y;              // [M, N]
  float* partial;       // [splits, M, N] where K is split, else null
  int64_t x_stride, x_step, M, N, K;
  int32_t activation;  // an Activation
  int32_t vectors;     // bit 0: meta moves by 8 bytes (tf32: 4), bit 1: y by 16
  int32_t units;       // 256 k, per split
  int32_t splits;
};

// Of linear_24_dx and linear_24_dvalues.
struct Gradient24 {
  const void* dy;  // [M, N], a row every dy_stride elements, n every dy_step
  const void* x;   // [M, K], of dvalues
  const void* values;
  const uint8_t* meta;
  void* out;
  int64_t dy_stride, dy_step, x_stride, x_step, M, N, K;
  int64_t vectors;  // bit 0: values move by 8 bytes, bit 1: out by 16 (dvalues: 8)
};

template <DType D>
__device__ __forceinline__ float load_float(const void* p, int64_t i) {
  if constexpr (D == DType::f32) return static_cast<const float*>(p)[i];
  const uint16_t word = static_cast<const uint16_t*>(p)[i];
  return D == DType::f16 ? f16_to_float(word) : bf16_to_float(word);
}
template <DType D>
__device__ __forceinline__ void store_float(void* p, int64_t i, float v) {
  if constexpr (D == DType::f32)
    static_cast<float*>(p)[i] = v;
  else
    static_cast<uint16_t*>(p)[i] = static_cast<uint16_t>(round_pair<D>(v, 0.0f));
}

__device__ __forceinline__ float activate(float v, int activation) {
  switch (static_cast<Activation>(activation)) {
    case Activation::none: return v;
    case Activation::relu: return v < 0 ? 0.0f : v;  // a NaN stays one
    case Activation::relu2: return v < 0 ? 0.0f : v * v;
    case Activation::gelu: return 0.5f * v * (1.0f + erf_of(v * 0.707106781f));
    case Activation::silu: return v / (1.0f + exp_of(-v));
  }
  return v;
}

// y[m, n] from its sum.
template <DType D>
__device__ __forceinline__ void finish(const Linear24& a, int64_t m, int64_t n, float sum) {
  const float bias = a.bias ? load_float<D>(a.bias, n) : 0.0f;
  store_float<D>(a.y, m * a.N + n, activate(sum + bias, a.activation));
}
// The same; or, where K is split, this split's sum to where linear_24_reduce finds it.
template <DType D>
__device__ __forceinline__ void finish_split(const Linear24& a, int64_t m, int64_t n, float sum) {
  if (a.splits > 1) {
    a.partial[(static_cast<int64_t>(blockIdx.y) * a.M + m) * a.N + n] = sum;
  } else {
    finish<D>(a, m, n, sum);
  }
}

// Element i of a group, from its nibble and what it keeps.
template <class T>
__device__ __forceinline__ T element(int nibble, int i, T first, T second) {
  return (nibble & 3) == i ? first : (nibble >> 2 & 3) == i ? second : T{0};
}

// The bytes of a piece of `size` that lie before `left` elements of `item` bytes.
template <int item>
__device__ __forceinline__ int clip(int64_t left, int size) {
  return left <= 0 ? 0 : item * left < size ? static_cast<int>(item * left) : size;
}

// The first token and feature of this block, of tiles of height x width; eight rows of tiles go through the
// columns together, so that they share their columns of x in the L2.
struct Tile24 {
  int64_t m0, n0;
};
template <int height, int width>
__device__ __forceinline__ Tile24 tile_of_block(int64_t M, int64_t N) {
  constexpr int kGroup = 8;
  const int64_t down = (M + height - 1) / height, across = (N + width - 1) / width;
  const int64_t first = blockIdx.x / (kGroup * across) * kGroup;
  const int64_t rows = down - first < kGroup ? down - first : kGroup;
  const int64_t inside = blockIdx.x - first * across;
  return {(first + inside % rows) * height, inside / rows * width};
}

// E registers of a prepacked tile of k, in bytes from the start of the packed meta.
__device__ __forceinline__ int64_t packed_meta_at(int64_t block, int64_t tile, int64_t tiles,
                                                  int lane) {
  const int64_t quad = tile / 4, left = tiles - 4 * quad, width = left < 4 ? left : 4;
  return (block * tiles + 4 * quad) * 128 + lane * width * 4 + (tile - 4 * quad) * 4;
}

}  // namespace sparsekern::cuda
