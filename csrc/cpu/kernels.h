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

// A factor of the gradients, strided in elements: element (m, i) is data[m * stride_m + i *
// stride_i].
struct Strided {
  const void* data;
  int64_t stride_m, stride_i;
};

// dx[M, K] = dy[M, N] · weight[N, K]; all but dy is contiguous.
struct Linear24Dx {
  Strided dy;
  const void* values;   // [N, K/2]
  const uint8_t* meta;  // [N, ceil(K/8)]
  void* dx;             // [M, K]
  int64_t M, N, K;
  DType dtype;
};

// dvalues[N, K/2] = (dy[M, N]^T · x[M, K]) at the positions that meta keeps.
struct Linear24Dvalues {
  Strided dy, x;
  const uint8_t* meta;  // [N, ceil(K/8)]
  void* dvalues;        // [N, K/2]
  int64_t M, N, K;
  DType dtype;
};

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

// The gradients work on words of 32 bits: an fp32 each, or, where the CPU multiplies pairs of bf16,
// two bf16 that are neighbours along the summed dimension. linear_24_grad.h says how each is laid
// out.
struct Gradient24Kernels {
  // Words of s[M, I] for rows of words [r0, r0 + rows) and columns of words [j0, j1):
  // out[(r - r0) * row_stride + (j - j0) * column_stride]. `along_m`: a pair is two rows, not two columns.
  void (*pack)(const Strided& s, DType dtype, bool along_m, int64_t M, int64_t I, int64_t r0,
               int rows, int64_t j0, int64_t j1, float* out, int64_t row_stride,
               int64_t column_stride);
  // Columns [k0, k1) of dx; k0 is a multiple of 64. dy is [M][stride] words.
  void (*dx_rows)(const Linear24Dx&, const float* dy, int64_t stride, int64_t k0, int64_t k1,
                  float* scratch);
  void (*dx_panels)(const Linear24Dx&, const Panel* dy, int count, int64_t k0, int64_t k1,
                    float* scratch);
  // Columns [k0, k1) of dvalues for rows [n0, n1). x is [words][stride], from column k0 on and with
  // room to a multiple of 64; dy is [N][words].
  void (*dvalues_rows)(const Linear24Dvalues&, const float* x, int64_t stride, const float* dy,
                       int64_t words, int64_t k0, int64_t k1, int64_t n0, int64_t n1);
  // Panels of x start at column k0, those of dy at row n0.
  void (*dvalues_panels)(const Linear24Dvalues&, const Panel* x, const Panel* dy, int count,
                         int64_t k0, int64_t k1, int64_t n0, int64_t n1, float* scratch);
  int dx_max_rows, dvalues_max_rows;  // M up to which the first of each two is the faster
  int lanes, max_lanes;               // of the narrowest and the widest panel
  bool pairs;                         // bf16 as pairs
};

// One tile of at most 4096 elements of `size` bytes.
struct ZvcKernels {
  int64_t (*mask)(const void* x, int64_t n, int size, uint8_t* mask);  // returns the non-zeros
  void (*compress)(const void* x, const uint8_t* mask, int64_t n, int size,
                   void* values);  // room for n, +64 B
  void (*expand)(const void* values, const uint8_t* mask, int64_t n, int size,
                 void* x);  // readable to +64 B
};

extern const Linear24Kernels linear_24_portable;
extern const Gradient24Kernels linear_24_grad_portable;
extern const ZvcKernels zvc_portable;
#if defined(__x86_64__)
extern const Linear24Kernels linear_24_avx2, linear_24_avx512;
extern const Gradient24Kernels linear_24_grad_avx2, linear_24_grad_avx512,
    linear_24_grad_avx512_bf16;
extern const ZvcKernels zvc_avx2, zvc_avx512;
#endif

struct Tier {
  const char* isa;
  bool (*supported)();
  const Linear24Kernels& linear_24;
  const Gradient24Kernels& linear_24_grad;
  const ZvcKernels& zvc;
};
const Tier& tier();  // the one in use

// ---- whole tensors; called by the bindings with the GIL released ----

void linear_24(const Linear24& args, int threads);
void linear_24_dx(const Linear24Dx& args, int threads);
void linear_24_dvalues(const Linear24Dvalues& args, int threads);

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

// Writes mask[ceil(n/8)] and offsets[ceil(n/4096)] of x and returns the number of non-zero
// elements.
int64_t zvc_index(const void* x, int64_t n, int size, uint8_t* mask, int64_t* offsets, int threads);
// Writes the non-zeros, those below place `room` only.
void zvc_compress(const void* x, int64_t n, int size, const uint8_t* mask, const int64_t* offsets,
                  void* values, int64_t room, int threads);
// Returns an empty string, or what is wrong with the stream. Reads mask and offsets only.
std::string zvc_check(const uint8_t* mask, const int64_t* offsets, int64_t n, int64_t values,
                      int threads);
// Requires a stream that zvc_check accepts.
void zvc_expand(const uint8_t* mask, const void* values, int64_t values_count,
                const int64_t* offsets, int64_t n, int size, void* x, int threads);

// ---- the machine ----

std::vector<std::string> isas();        // what this build and this CPU can run, best first
std::vector<std::string> features();    // CPU features that matter here
std::string isa();                      // the tier in use
bool set_isa(const std::string& name);  // false when this CPU or build has no such tier
bool has_openmp();
bool sanitized();  // built with the address sanitizer

}  // namespace sparsekern::cpu
