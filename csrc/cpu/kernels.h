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
// contiguous. The weight is either values and meta, or packed.
struct Linear24 {
  const void* x;
  int64_t x_stride_m, x_stride_k;
  const void* values;     // [N, K/2]
  const uint8_t* meta;    // [N, ceil(K/8)]
  const uint8_t* packed;  // prepack_24.h, or null
  const void* bias;       // [N] or null
  void* y;                // [M, N]
  int64_t M, N, K;
  DType dtype;
  Activation activation;
};

// Rows of x as the TILES kernel reads them; rows past `rows`, and k past K, hold zeros.
struct XTile {
  void* data;
  int64_t m0;
  int rows, height;
};

// Rows of x as the PANELS kernel reads them, fp32, transposed: data[k][lane] is x[m0 + lane][k].
struct XPanel {
  float* data;
  int64_t m0;
  int rows, width;  // width in vectors
  int depth;        // k to multiply at a time
};
constexpr int kMaxPanelWidth = 12;

class Scratch;

// The kernels of one instruction set and dtype. Each works serially on the range it is given and
// touches nothing else; only `scratch` grows. In the order of the number of rows of x they are for.
struct Linear24Kernels {
  int x_bytes;  // of an element of x in rows and tiles: 4, or 2 where bf16 is multiplied as it is

  void (*pack_row)(const Linear24&, int64_t m, void* x);  // row m of x[M][K]
  void (*rows)(const Linear24&, const void* x, int64_t n0, int64_t n1);

  int tile_rows, tile_span;  // the most rows of a tile; k is padded to a multiple of the span
  void (*pack_tile)(const Linear24&, const XTile&);
  void (*tiles)(const Linear24&, const XTile*, int count, int64_t n0, int64_t n1, Scratch&);

  int panel_lanes;  // of a vector
  void (*pack_panel)(const Linear24&, const XPanel&, int64_t k0, int64_t k1);
  void (*panels)(const Linear24&, const XPanel*, int count, int64_t n0, int64_t n1, Scratch&);

  // The weight's block of rows n .. n+15 (fewer at the end) from values and meta into `packed`.
  void (*prepack)(const Linear24&, int64_t n, uint8_t* packed, Scratch&);

  // The choice by M, measured: rows up to the first (packed weights never), then tiles, then panels.
  int64_t max_rows, max_tiles, max_tiles_packed;
};

// One tile of at most 4096 elements of `size` bytes.
struct ZvcKernels {
  int64_t (*mask)(const void* x, int64_t n, int size, uint8_t* mask);  // returns the non-zeros
  void (*compress)(const void* x, const uint8_t* mask, int64_t n, int size,
                   void* values);  // room for n, +64 B
  void (*expand)(const void* values, const uint8_t* mask, int64_t n, int size,
                 void* x);  // readable to +64 B
};

using Linear24Table = Linear24Kernels[3];  // by dtype: fp32, fp16, bf16

extern const Linear24Table linear_24_portable;
extern const ZvcKernels zvc_portable;
#if defined(__x86_64__)
extern const Linear24Table linear_24_avx2, linear_24_avx512;
extern const Linear24Kernels linear_24_avx512_bf16;
extern const ZvcKernels zvc_avx2, zvc_avx512;
#endif

struct Tier {
  const char* isa;
  bool (*supported)();
  const Linear24Kernels* linear_24[3];  // by dtype
  const ZvcKernels& zvc;
};
const Tier& tier();  // the one in use

// ---- whole tensors; called by the bindings with the GIL released ----

void linear_24(const Linear24& args, int threads);

// values and meta to packed and back; the layout depends on the dtype alone, not on the tier.
void prepack_24(const void* values, const uint8_t* meta, uint8_t* packed, int64_t N, int64_t K,
                DType dtype, int threads);
void unprepack_24(const uint8_t* packed, void* values, uint8_t* meta, int64_t N, int64_t K,
                  DType dtype, int threads);

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
