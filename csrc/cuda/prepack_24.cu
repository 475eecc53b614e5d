// prepack_24 and unprepack_24 of 16-bit weights with N % 16 == 0 and K % 64 == 0: the permutation of
// linear_24.cuh, one thread a register E (of 32 rows' and tiles' worth: two 16-byte pieces) each way.
//
//   thread = [block of 16 rows][tile of 64 k][lane 4g + t]
//     values   pieces t of rows g and g+8  <->  piece `lane` of halves 0 and 1
//     meta     there:  nibble t of each uint16 of rows g and g+8     -> E
//              back:   nibble t of each of the quad's four registers -> uint16 number t of rows g and g+8
//   both are the same 4 x 4 transpose of nibbles
//
// Lowest architecture: sm_80 (nothing here needs it). Limited by: bytes, twice those of the weight; done once.
#include "linear_24.cuh"

namespace sparsekern::cuda {

struct Prepack24 {
  const uint16_t* from_values;
  const uint8_t* from_meta;
  uint16_t* to_values;
  uint8_t* to_meta;
  int64_t N, K, vectors;  // values are aligned to 16 bytes on both sides
};

namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ void copy_piece(uint16_t* to, const uint16_t* from, bool vector) {
  Elements<uint16_t, 8> piece;
  if (vector) {
    piece.load(from);
    piece.store(to);
  } else {
    piece.load(from, 8);
    piece.store(to, 8);
  }
}

__device__ __forceinline__ uint32_t load16(const uint8_t* p) { return p[0] | p[1] << 8; }

struct Place {
  int64_t block, tile, tiles;
  int g, t, lane;
  bool inside;
};
__device__ __forceinline__ Place place_of(const Prepack24& a) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, tiles = a.K / 64;
  const int lane = static_cast<int>(i % 32);
  const int64_t pair = i / 32, block = pair / tiles;
  return {block, pair - block * tiles, tiles, lane / 4, lane % 4, lane, block < a.N / 16};
}

}  // namespace

__global__ void __launch_bounds__(kThreads) prepack_24(Prepack24 a) {
  const Place p = place_of(a);
  if (!p.inside) return;
  uint32_t e = 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t row = p.block * 16 + 8 * half + p.g;
    copy_piece(a.to_values + (((p.block * p.tiles + p.tile) * 2 + half) * 32 + p.lane) * 8,
               a.from_values + row * (a.K / 2) + p.tile * 32 + p.t * 8, a.vectors);
#pragma unroll
    for (int q = 0; q < 4; ++q)
      e |= (load16(a.from_meta + row * (a.K / 8) + p.tile * 8 + 2 * q) >> 4 * p.t & 15)
           << (16 * half + 4 * q);
  }
  *reinterpret_cast<uint32_t*>(a.to_meta + packed_meta_at(p.block, p.tile, p.tiles, p.lane)) = e;
}

__global__ void __launch_bounds__(kThreads) unprepack_24(Prepack24 a) {
  const Place p = place_of(a);
  if (!p.inside) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t row = p.block * 16 + 8 * half + p.g;
    copy_piece(a.to_values + row * (a.K / 2) + p.tile * 32 + p.t * 8,
               a.from_values + (((p.block * p.tiles + p.tile) * 2 + half) * 32 + p.lane) * 8,
               a.vectors);
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint8_t* e = a.from_meta + packed_meta_at(p.block, p.tile, p.tiles, 4 * p.g + i);
      bits |= (load16(e + 2 * half) >> 4 * p.t & 15) << 4 * i;
    }
    uint8_t* to = a.to_meta + row * (a.K / 8) + p.tile * 8 + 2 * p.t;
    to[0] = static_cast<uint8_t>(bits);
    to[1] = static_cast<uint8_t>(bits >> 8);
  }
}

SPARSEKERN_KERNEL(prepack_24);
SPARSEKERN_KERNEL(unprepack_24);

}  // namespace sparsekern::cuda
