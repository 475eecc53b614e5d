// What a kernel of csrc/cuda sees in place of CUDA when the C++ compiler builds it for the tests.
//
//   kernel source ── ptx.cuh, branch for the CPU ── this header ── runtime.cpp: fibers, schedules,
//                                                                  shared memory, copies in flight
//
// Every lane is a fiber on one thread of the machine. It runs until it has to wait: at a barrier, at
// a collective of its warp, in a loop that polls, at an atomic. Who goes on is for the schedule to say,
// so the same kernel is run in several orders. Assumed by nobody and modelled nowhere: weak memory
// order, bank conflicts, divergence inside one instruction, the tensor core's order of rounding.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

namespace cuda_on_cpu {

struct Dim3 {
  unsigned x, y, z;
};
// Of the lane that runs, set at every switch.
extern Dim3 thread_index, block_index, block_size, grid_size;

// Ends the launch with a message; the lanes are left where they are.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

void barrier(const char* file, int line);
void warp_barrier(unsigned mask);
// Lets the others run: where a kernel polls, and around atomics.
void pass_turn();

// A collective. The last of the lanes in `mask` to arrive calls `together` with every lane's
// `mine` (null for lanes that are not in the mask); all must name the same `op` and mask.
void meet(const char* op, unsigned mask, void* mine, void (*together)(void** lanes));

constexpr unsigned kWarp = 0xffffffffu;

template <class T>
void meet(const char* op, unsigned mask, T& mine, void (*together)(T** lanes)) {
  meet(op, mask, static_cast<void*>(&mine), reinterpret_cast<void (*)(void**)>(together));
}

// The block's dynamic shared memory. It must have been launched with exactly `bytes`.
void* shared_memory(size_t bytes);

// cp.async: `to` reads as poison until the lane has waited for the group the copy belongs to.
void copy_async(void* to, const void* bytes, int size);
void commit_copies();
void wait_copies(int groups_left);

}  // namespace cuda_on_cpu

#define threadIdx (::cuda_on_cpu::thread_index)
#define blockIdx (::cuda_on_cpu::block_index)
#define blockDim (::cuda_on_cpu::block_size)
#define gridDim (::cuda_on_cpu::grid_size)
#define __syncthreads() ::cuda_on_cpu::barrier(__FILE__, __LINE__)
