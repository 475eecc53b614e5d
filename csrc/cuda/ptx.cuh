// Every machine instruction the kernels use, one function each, in two branches: for the device, as
// PTX, and for the tests' execution on the CPU (tests/cuda_on_cpu), as the PTX ISA describes it.
// Nothing else in csrc/cuda knows which of the two it is built for. Lowest architecture: sm_80.
//
// Fragments of one warp; lane = 4 g + t, two 16-bit elements a register, in order:
//
//   A  16 x 16    register 0: row g, columns 2t 2t+1     1: row g+8     2: row g, columns 2t+8 2t+9
//                 3: row g+8, columns 2t+8 2t+9
//   B  k x 8      register j: rows 8j+2t 8j+2t+1 of column g
//   D  16 x 8     0, 1: row g, columns 2t 2t+1     2, 3: row g+8                             (fp32)
//
//   tf32: A is 16 x 8, register 0: row g, column t     1: row g+8     2, 3: column t+4; B is 8 x 8,
//   register j: row 4j+t of column g; ldmatrix reads both, a word as two elements
//
//   2:4: A holds the kept elements of 16 x 32, B is 32 x 8. Metadata E, selector f: lane 4g+2f+h has
//   in its low half the four nibbles of row g, k = 16h .. 16h+15, in its high half those of row g+8.
#pragma once

#include <cstdint>

#include "../layout.h"
#include "launch.h"

#ifdef SPARSEKERN_CUDA_ON_CPU
#include "../../tests/cuda_on_cpu/runtime.h"
#include "../cpu/convert.h"
#endif

namespace sparsekern::cuda {

constexpr unsigned kWarpMask = 0xffffffffu;

#ifndef SPARSEKERN_CUDA_ON_CPU

// ---- lanes of a warp ----

__device__ __forceinline__ void sync_warp() { __syncwarp(); }
__device__ __forceinline__ uint32_t shuffle_up(uint32_t value, int distance) {
  return __shfl_up_sync(kWarpMask, value, distance);
}
__device__ __forceinline__ uint32_t shuffle_from(uint32_t value, int lane) {
  return __shfl_sync(kWarpMask, value, lane);
}
__device__ __forceinline__ uint64_t shuffle_xor64(uint64_t value, int mask) {
  return __shfl_xor_sync(kWarpMask, static_cast<unsigned long long>(value), mask);
}
__device__ __forceinline__ uint32_t ballot(bool predicate) {
  return __ballot_sync(kWarpMask, predicate);
}
__device__ __forceinline__ int count_ones(uint32_t bits) { return __popc(bits); }
// The lowest bit that is set; bits is not 0.
__device__ __forceinline__ int lowest_bit(uint32_t bits) { return __ffs(bits) - 1; }
// Bytes of the eight in (high:low), chosen by the nibbles of `selector`.
__device__ __forceinline__ uint32_t permute(uint32_t low, uint32_t high, uint32_t selector) {
  return __byte_perm(low, high, selector);
}

// ---- global memory ----

template <int n>
__device__ __forceinline__ void load_global(uint32_t* r, const void* p) {
  static_assert(n == 1 || n == 2 || n == 4, "4, 8 or 16 bytes");
  if constexpr (n == 1) asm volatile("ld.global.b32 %0, [%1];" : "=r"(r[0]) : "l"(p));
  if constexpr (n == 2)
    asm volatile("ld.global.v2.b32 {%0, %1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "l"(p));
  if constexpr (n == 4)
    asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "l"(p));
}
template <int n>
__device__ __forceinline__ void store_global(void* p, const uint32_t* r) {
  static_assert(n == 1 || n == 2 || n == 4, "4, 8 or 16 bytes");
  if constexpr (n == 1) asm volatile("st.global.b32 [%0], %1;" ::"l"(p), "r"(r[0]) : "memory");
  if constexpr (n == 2)
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(p), "r"(r[0]), "r"(r[1]) : "memory");
  if constexpr (n == 4)
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(r[0]), "r"(r[1]),
                 "r"(r[2]), "r"(r[3])
                 : "memory");
}

// What is read once and by nobody else: past the L1, first to leave the L2.
using Policy = uint64_t;
__device__ __forceinline__ Policy evict_first() {
  Policy policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ void load_once16(uint32_t* r, const void* p, Policy policy) {
  asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.b32 {%0, %1, %2, %3}, [%4], %5;"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "l"(p), "l"(policy));
}
__device__ __forceinline__ void load_once4(uint32_t* r, const void* p, Policy policy) {
  asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.b32 %0, [%1], %2;"
               : "=r"(r[0])
               : "l"(p), "l"(policy));
}

__device__ __forceinline__ uint64_t atomic_add(uint64_t* p, uint64_t value) {
  return atomicAdd(reinterpret_cast<unsigned long long*>(p), value);
}
// One word, seen by other blocks as it was written; says nothing about other words.
__device__ __forceinline__ void publish(uint64_t* p, uint64_t value) {
  asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(p), "l"(value) : "memory");
}
__device__ __forceinline__ uint64_t poll(const uint64_t* p) {
  uint64_t value;
  asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(value) : "l"(p) : "memory");
  return value;
}

// ---- shared memory ----

// The block's dynamic shared memory as one struct; the launch gives exactly its size.
template <class T>
__device__ __forceinline__ T& shared_memory() {
  extern __shared__ __align__(128) unsigned char sparsekern_shared[];
  return *reinterpret_cast<T*>(sparsekern_shared);
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Asynchronous copy of 16, 8 or 4 bytes, of which `bytes` are read and the rest are zero.
template <int size>
__device__ __forceinline__ void copy_async(void* to, const void* from, int bytes = size) {
  if constexpr (size == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
                 "l"(from), "r"(bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)),
                 "l"(from), "n"(size), "r"(bytes)
                 : "memory");
  }
}
// The same of 16 bytes that are read once.
__device__ __forceinline__ void copy_async_once16(void* to, const void* from, int bytes,
                                                  Policy policy) {
  asm volatile(
      "cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(shared_address(to)),
      "l"(from), "r"(bytes), "l"(policy)
      : "memory");
}
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// All groups but the newest `left` have landed, for this lane.
template <int left>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory");
}

// Four 8 x 8 matrices of 16 bits: lane 8i+r points at row r of matrix i; register i gets row g,
// columns 2t 2t+1 (transposed: rows 2t 2t+1 of column g).
__device__ __forceinline__ void load_matrices(uint32_t* r, const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t* r, const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
// ---- arithmetic ----

__device__ __forceinline__ float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ uint32_t float_to_bits(float value) { return __float_as_uint(value); }
__device__ __forceinline__ double bits_to_double(uint64_t bits) {
  return __longlong_as_double(static_cast<long long>(bits));
}
__device__ __forceinline__ float f16_to_float(uint16_t h) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(h));
  return value;
}
// Two floats rounded to 16 bits, `low` in the low half.
template <DType D>
__device__ __forceinline__ uint32_t round_pair(float low, float high) {
  uint32_t pair;
  if constexpr (D == DType::f16)
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
__device__ __forceinline__ float erf_of(float v) { return erff(v); }
__device__ __forceinline__ float exp_of(float v) { return expf(v); }
__device__ __forceinline__ float fused_multiply_add(float a, float b, float c) {
  return __fmaf_rn(a, b, c);
}

// D += A B, A 2:4 and 16 x 32; always the ordered form.
template <DType D, int selector>
__device__ __forceinline__ void mma_sp(float* d, const uint32_t* a, const uint32_t* b, uint32_t e) {
  static_assert(D == DType::f16 || D == DType::bf16, "16-bit operands");
#define SPARSEKERN_MMA_SP(type)                                                                 \
  asm volatile(                                                                                 \
      "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." type "." type               \
      ".f32 "                                                                                   \
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"     \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                          \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), \
        "r"(e), "n"(selector))
  if constexpr (D == DType::f16)
    SPARSEKERN_MMA_SP("f16");
  else
    SPARSEKERN_MMA_SP("bf16");
#undef SPARSEKERN_MMA_SP
}

// The nearest of 10 bits of mantissa, ties away from zero.
__device__ __forceinline__ uint32_t round_to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}
// D += A B, A dense and 16 x 8, operands in tf32.
__device__ __forceinline__ void mma_tf32(float* d, const uint32_t* a, const uint32_t* b) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// D += A B, A dense and 16 x 16.
template <DType D>
__device__ __forceinline__ void mma(float* d, const uint32_t* a, const uint32_t* b) {
  static_assert(D == DType::f16 || D == DType::bf16, "16-bit operands");
#define SPARSEKERN_MMA(type)                                                          \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
  if constexpr (D == DType::f16)
    SPARSEKERN_MMA("f16");
  else
    SPARSEKERN_MMA("bf16");
#undef SPARSEKERN_MMA
}

#else  // on the CPU

namespace on_cpu = ::cuda_on_cpu;

inline void sync_warp() { on_cpu::warp_barrier(kWarpMask); }

template <class T>
struct Exchange {
  T given, taken;
  int lane;
};
template <class T>
void exchange_all(Exchange<T>** lanes) {
  for (int i = 0; i < 32; ++i) lanes[i]->taken = lanes[lanes[i]->lane]->given;
}
template <class T>
T exchange(const char* op, T value, int from) {
  Exchange<T> mine{value, T{}, from};
  on_cpu::meet(op, kWarpMask, mine, exchange_all<T>);
  return mine.taken;
}
inline int this_lane() { return threadIdx.x % 32; }
inline uint32_t shuffle_up(uint32_t value, int distance) {
  const int from = this_lane() - distance;
  return exchange("shfl.up", value, from < 0 ? this_lane() : from);
}
inline uint32_t shuffle_from(uint32_t value, int lane) { return exchange("shfl", value, lane); }
inline uint64_t shuffle_xor64(uint64_t value, int mask) {
  return exchange("shfl.xor", value, this_lane() ^ mask);
}
inline uint32_t ballot(bool predicate) {
  struct Vote {
    bool mine;
    uint32_t all;
  } vote{predicate, 0};
  on_cpu::meet(
      "vote.ballot", kWarpMask, vote, +[](Vote** lanes) {
        uint32_t bits = 0;
        for (int i = 0; i < 32; ++i) bits |= static_cast<uint32_t>(lanes[i]->mine) << i;
        for (int i = 0; i < 32; ++i) lanes[i]->all = bits;
      });
  return vote.all;
}
inline int count_ones(uint32_t bits) { return __builtin_popcount(bits); }
inline int lowest_bit(uint32_t bits) { return __builtin_ctz(bits); }
inline uint32_t permute(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i)
    result |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
}

inline void need_aligned(const char* op, const void* p, int bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes)
    on_cpu::fail("%s of %d bytes at a misaligned address", op, bytes);
}
template <int n>
void load_global(uint32_t* r, const void* p) {
  need_aligned("ld.global", p, 4 * n);
  for (int i = 0; i < n; ++i) r[i] = static_cast<const uint32_t*>(p)[i];
}
template <int n>
void store_global(void* p, const uint32_t* r) {
  need_aligned("st.global", p, 4 * n);
  for (int i = 0; i < n; ++i) static_cast<uint32_t*>(p)[i] = r[i];
}
struct Policy {};
inline Policy evict_first() { return {}; }
inline void load_once16(uint32_t* r, const void* p, Policy) { load_global<4>(r, p); }
inline void load_once4(uint32_t* r, const void* p, Policy) { load_global<1>(r, p); }

inline uint64_t atomic_add(uint64_t* p, uint64_t value) {
  on_cpu::pass_turn();
  const uint64_t before = *p;
  *p += value;
  on_cpu::pass_turn();
  return before;
}
inline void publish(uint64_t* p, uint64_t value) {
  *p = value;
  on_cpu::pass_turn();
}
inline uint64_t poll(const uint64_t* p) {
  on_cpu::pass_turn();
  return *p;
}

template <class T>
T& shared_memory() {
  return *static_cast<T*>(on_cpu::shared_memory(sizeof(T)));
}

template <int size>
void copy_async(void* to, const void* from, int bytes = size) {
  need_aligned("cp.async", from, size);
  uint8_t data[size] = {};  // read here, where the sanitizer sees it, and visible from the wait on
  for (int i = 0; i < bytes; ++i) data[i] = static_cast<const uint8_t*>(from)[i];
  on_cpu::copy_async(to, data, size);
}
inline void copy_async_once16(void* to, const void* from, int bytes, Policy) {
  copy_async<16>(to, from, bytes);
}
inline void commit_copies() { on_cpu::commit_copies(); }
template <int left>
void wait_copies() {
  on_cpu::wait_copies(left);
}

struct Matrices {
  uint16_t row[8];
  uint32_t* r;
};
template <bool transposed>
void load_matrices_as(const char* op, uint32_t* r, const void* row) {
  need_aligned(op, row, 16);
  Matrices mine{{}, r};
  for (int i = 0; i < 8; ++i) mine.row[i] = static_cast<const uint16_t*>(row)[i];
  on_cpu::meet(
      op, kWarpMask, mine, +[](Matrices** lanes) {
        for (int lane = 0; lane < 32; ++lane) {
          const int g = lane / 4, t = lane % 4;
          for (int j = 0; j < 4; ++j) {
            const uint32_t low =
                transposed ? lanes[8 * j + 2 * t]->row[g] : lanes[8 * j + g]->row[2 * t];
            const uint32_t high =
                transposed ? lanes[8 * j + 2 * t + 1]->row[g] : lanes[8 * j + g]->row[2 * t + 1];
            lanes[lane]->r[j] = low | high << 16;
          }
        }
      });
}
inline void load_matrices(uint32_t* r, const void* row) {
  load_matrices_as<false>("ldmatrix.x4", r, row);
}
inline void load_matrices_transposed(uint32_t* r, const void* row) {
  load_matrices_as<true>("ldmatrix.x4.trans", r, row);
}
inline float bits_to_float(uint32_t bits) { return cpu::bits_to_float(bits); }
inline uint32_t float_to_bits(float value) { return cpu::float_to_bits(value); }
inline double bits_to_double(uint64_t bits) {
  double value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline float f16_to_float(uint16_t h) { return cpu::f16_to_float(h); }
template <DType D>
uint32_t round_pair(float low, float high) {
  if (D == DType::f16) return cpu::float_to_f16(low) | uint32_t{cpu::float_to_f16(high)} << 16;
  return cpu::float_to_bf16(low) | uint32_t{cpu::float_to_bf16(high)} << 16;
}
inline float erf_of(float v) { return std::erf(v); }
inline float exp_of(float v) { return std::exp(v); }
inline float fused_multiply_add(float a, float b, float c) { return std::fma(a, b, c); }

struct Mma {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
  uint32_t e;
};
// Element [row][column] of a fragment; `r` finds the register of a lane.
inline uint32_t half_of(uint32_t r, int i) { return r >> 16 * (i % 2) & 0xffff; }
template <DType D>
float widened(uint32_t half) {
  return D == DType::f16 ? cpu::f16_to_float(static_cast<uint16_t>(half))
                         : cpu::bf16_to_float(static_cast<uint16_t>(half));
}
template <DType D, int selector>
void mma_sp(float* d, const uint32_t* a, const uint32_t* b, uint32_t e) {
  static_assert(selector == 0 || selector == 1, "m16n8k32 has two");
  Mma mine{d, a, b, e};
  const char* op = selector ? "mma.sp, selector 1" : "mma.sp, selector 0";
  on_cpu::meet(
      op, kWarpMask, mine, +[](Mma** lanes) {
        float wide[8][32];
        for (int n = 0; n < 8; ++n) {
          for (int k = 0; k < 32; ++k)
            wide[n][k] = widened<D>(half_of(lanes[4 * n + k % 8 / 2]->b[k / 8], k));
        }
        for (int row = 0; row < 16; ++row) {
          const int g = row % 8, below = row / 8;
          float sums[8] = {};
          for (int group = 0; group < 8; ++group) {
            const uint32_t e16 = lanes[4 * g + 2 * selector + group / 4]->e >> 16 * below;
            const int nibble = e16 >> 4 * (group % 4) & 15, i0 = nibble & 3, i1 = nibble >> 2;
            if (i0 >= i1) on_cpu::fail("mma.sp: illegal metadata nibble %d in row %d", nibble, row);
            for (int slot = 0; slot < 2; ++slot) {
              const int c = 2 * group + slot, k = 4 * group + (slot ? i1 : i0);
              const float v =
                  widened<D>(half_of(lanes[4 * g + c % 8 / 2]->a[below + 2 * (c / 8)], c));
              for (int n = 0; n < 8; ++n) sums[n] += v * wide[n][k];
            }
          }
          for (int n = 0; n < 8; ++n) lanes[4 * g + n / 2]->d[2 * below + n % 2] += sums[n];
        }
      });
}
inline uint32_t round_to_tf32(float value) {
  const uint32_t bits = float_to_bits(value);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  return (finite ? bits + 0x1000u : bits | (bits & 0x007fffffu ? 0x00400000u : 0u)) & ~0x1fffu;
}
inline void mma_tf32(float* d, const uint32_t* a, const uint32_t* b) {
  Mma mine{d, a, b, 0};
  on_cpu::meet(
      "mma.tf32", kWarpMask, mine, +[](Mma** lanes) {
        for (int row = 0; row < 16; ++row) {
          const int g = row % 8, below = row / 8;
          for (int n = 0; n < 8; ++n) {
            float sum = 0.0f;
            for (int k = 0; k < 8; ++k) {
              const uint32_t left = lanes[4 * g + k % 4]->a[below + k / 4 * 2];
              const uint32_t right = lanes[4 * n + k % 4]->b[k / 4];
              if ((left | right) & 0x1fffu) on_cpu::fail("mma.tf32: an operand was not rounded");
              sum += bits_to_float(left) * bits_to_float(right);
            }
            lanes[4 * g + n / 2]->d[2 * below + n % 2] += sum;
          }
        }
      });
}
template <DType D>
void mma(float* d, const uint32_t* a, const uint32_t* b) {
  Mma mine{d, a, b, 0};
  on_cpu::meet(
      "mma", kWarpMask, mine, +[](Mma** lanes) {
        float wide[8][16];
        for (int n = 0; n < 8; ++n) {
          for (int k = 0; k < 16; ++k)
            wide[n][k] = widened<D>(half_of(lanes[4 * n + k % 8 / 2]->b[k / 8], k));
        }
        for (int row = 0; row < 16; ++row) {
          const int g = row % 8, below = row / 8;
          float sums[8] = {};
          for (int c = 0; c < 16; ++c) {
            const float v =
                widened<D>(half_of(lanes[4 * g + c % 8 / 2]->a[below + 2 * (c / 8)], c));
            for (int n = 0; n < 8; ++n) sums[n] += v * wide[n][c];
          }
          for (int n = 0; n < 8; ++n) lanes[4 * g + n / 2]->d[2 * below + n % 2] += sums[n];
        }
      });
}

#endif

// ---- for both ----

__device__ __forceinline__ float bf16_to_float(uint16_t h) {
  return bits_to_float(static_cast<uint32_t>(h) << 16);
}

// n elements of type Word (unsigned, 1 to 8 bytes) in registers, as they lie in memory.
template <class Word, int n>
struct Elements {
  static constexpr int kRegisters = n * sizeof(Word) / 4;
  static_assert(kRegisters >= 1, "at least one register");
  uint32_t r[kRegisters];

  __device__ __forceinline__ Word get(int i) const {
    if constexpr (sizeof(Word) == 8)
      return static_cast<Word>(r[2 * i]) | static_cast<Word>(r[2 * i + 1]) << 32;
    constexpr int per = sizeof(Word) >= 4 ? 1 : 4 / sizeof(Word);
    return static_cast<Word>(r[i / per] >> (8 * sizeof(Word) * (i % per) & 31));
  }
  // Onto zeros.
  __device__ __forceinline__ void put(int i, Word w) {
    if constexpr (sizeof(Word) == 8) {
      r[2 * i] = static_cast<uint32_t>(w);
      r[2 * i + 1] = static_cast<uint32_t>(w >> 32);
    } else {
      constexpr int per = 4 / sizeof(Word);
      r[i / per] |= static_cast<uint32_t>(w) << (8 * sizeof(Word) * (i % per) & 31);
    }
  }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kRegisters; ++i) r[i] = 0;
  }
  // All n, at an address aligned to 16 bytes or to their size if that is less.
  __device__ __forceinline__ void load(const Word* p) {
    constexpr int step = kRegisters < 4 ? kRegisters : 4;
#pragma unroll
    for (int i = 0; i < kRegisters; i += step)
      load_global<step>(r + i, reinterpret_cast<const uint32_t*>(p) + i);
  }
  __device__ __forceinline__ void store(Word* p) const {
    constexpr int step = kRegisters < 4 ? kRegisters : 4;
#pragma unroll
    for (int i = 0; i < kRegisters; i += step)
      store_global<step>(reinterpret_cast<uint32_t*>(p) + i, r + i);
  }
  // The first `count`, one by one; the others read as zero and are not written.
  __device__ __forceinline__ void load(const Word* p, int64_t count) {
    clear();
#pragma unroll
    for (int i = 0; i < n; ++i)
      if (i < count) put(i, p[i]);
  }
  __device__ __forceinline__ void store(Word* p, int64_t count) const {
#pragma unroll
    for (int i = 0; i < n; ++i)
      if (i < count) p[i] = get(i);
  }
};

}  // namespace sparsekern::cuda
