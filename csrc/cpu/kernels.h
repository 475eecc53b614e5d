// The CPU core's one interface. Above it: bindings_cpu.cpp. Below it: one table of kernels per
// instruction set.
//
//   bindings_cpu.cpp
//        │   whole tensors: threads, scratch, choice of kernel
//   linear_24.cpp   format_24.cpp   zvc.cpp
//        │   Tier: the kernels of one instruction set; dispatch.cpp chooses it by CPU feature
//   OP_portable.cpp   OP_avx2.cpp   OP_avx512.cpp
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "../layout.h"

namespace sparsekern::cpu {

// y[M, N] = activation(x[M, K] · weight[N, K]^T + bias[N]); x is strided in elements, the rest is
// contiguous.
struct Linear24 {
  const void* x;
  int64_t x_stride_m, x_stride_k;
  const void* values;   // [N, K/2]
  const uint8_t* meta;  // [N, ceil(K/8)]
  const void* bias;     // [N] or null
  void* y;              // [M, N]
  int64_t M, N, K;
  DType dtype;
  Activation activation;
};

// Some rows of x as fp32, transposed: panel[k][lane] is x[m0 + lane][k]; lanes past `rows` hold 0.
struct Panel {
  const float* data;
  int64_t m0;
  int rows;   // 1..lanes
  int lanes;  // a panel width of the tier
};
constexpr int kPassRows =
    512;  // rows of x per pass over the weight; bounds the scratch to 512 * K fp32

// The kernels of one instruction set. Each works serially on the range it is given, touches nothing
// else and allocates nothing.
struct Linear24Kernels {
  // Few rows of x: xf[M, K] is x as contiguous fp32. Computes columns [n0, n1) of y.
  void (*rows)(const Linear24&, const float* xf, int64_t n0, int64_t n1);
  // Many rows: columns [n0, n1) of y for the rows of x in `panels`.
  void (*panels)(const Linear24&, const Panel* panels, int count, int64_t n0, int64_t n1);
  int max_rows;              // M up to which `rows` is the faster of the two
  int max_lanes, min_lanes;  // widest and narrowest panel; widths in between double
};

// A part of at most one tile of `size`-byte elements, at any address.
struct ZvcKernels {
  // Writes the mask and the non-zeros of x, and returns their number; may write up to 64 bytes past
  // them.
  int64_t (*compress)(const void* x, int64_t n, int size, uint8_t* mask, void* values);
  // The inverse: returns the number of values used; may read up to 64 bytes past them.
  int64_t (*expand)(const void* values, const uint8_t* mask, int64_t n, int size, void* x);
  int64_t (*count)(const uint8_t* mask, int64_t n);  // of bits set in ceil(n / 8) bytes
  // Copy up to the last border of a cache line in `to` and return the number of bytes copied.
  // `stream` neither reads nor keeps those lines, if the tier can: a store fence must follow before
  // another thread reads them.
  int64_t (*store)(void* to, const void* from, int64_t bytes);
  int64_t (*stream)(void* to, const void* from, int64_t bytes);
};

extern const Linear24Kernels linear_24_portable;
extern const ZvcKernels zvc_portable;
#if defined(__x86_64__)
extern const Linear24Kernels linear_24_avx2, linear_24_avx512;
extern const ZvcKernels zvc_avx2, zvc_avx512;
#endif

struct Tier {
  const char* isa;
  bool (*supported)();
  const Linear24Kernels& linear_24;
  const ZvcKernels& zvc;
};
const Tier& tier();  // the one in use

// ---- whole tensors; called by the bindings with the GIL released ----

void linear_24(const Linear24& args, int threads);

// weight, out, dense: [rows, K]; values: [rows, K/2]; meta: [rows, ceil(K/8)]; all contiguous, K %
// 4 == 0.
void prune_24(const void* weight, void* out, int64_t rows, int64_t K, DType dtype, int threads);
void pack_24(const void* weight, void* values, uint8_t* meta, int64_t rows, int64_t K, DType dtype,
             int threads);
void unpack_24(const void* values, const uint8_t* meta, void* dense, int64_t rows, int64_t K,
               DType dtype, int threads);
void gather_24(const void* dense, const uint8_t* meta, void* values, int64_t rows, int64_t K,
               DType dtype, int threads);
void prune_24_transposable(const void* weight, void* out, int64_t rows, int64_t K, DType dtype,
                           int threads);

// Writes mask[ceil(n/8)], offsets[ceil(n/4096)] and the non-zeros of x, those below place `room`
// only, and returns how many non-zeros there are.
int64_t zvc_compress(const void* x, int64_t n, int size, uint8_t* mask, void* values, int64_t room,
                     int64_t* offsets, int threads);
// Returns an empty string, or what is wrong with the stream: then x holds nothing of use. Reads
// nothing outside the arrays whatever they hold.
std::string zvc_expand(const uint8_t* mask, const void* values, int64_t values_count,
                       const int64_t* offsets, int64_t n, int size, void* x, int threads);

// ---- the machine ----

std::vector<std::string> isas();         // what this build and this CPU can run, best first
std::vector<std::string> features();     // CPU features that matter here
std::string isa();                       // the tier in use
bool set_isa(const std::string& name);   // false when this CPU or build has no such tier
int64_t cache_bytes();                   // the last-level cache that one core can reach
void huge_pages(void* p, size_t bytes);  // a hint, for memory that nobody has touched yet
bool has_openmp();
bool sanitized();  // built with the address sanitizer

}  // namespace sparsekern::cpu
