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

// Rows of x as the TILES kernel reads them; rows past `rows`, and k past K, hold zeros. `together`
// tiles share the memory from `data` on, and this is the one number `place` of them.
struct XTile {
  void* data;
  int64_t m0;
  int rows, height;
  int place, together;
};

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

// Some rows of a factor, transposed: panel[k][lane] is x[m0 + lane][k]; lanes past `rows` hold 0.
struct Panel {
  const float* data;
  int64_t m0;
  int rows;   // 1..lanes
  int lanes;  // a panel width of the tier
};

// Rows of x as the PANELS kernel reads them, fp32, transposed: data[k][lane] is x[m0 + lane][k].
struct XPanel {
  float* data;
  int64_t m0;
  int rows, width;  // width in vectors
  int depth;        // k to multiply at a time
};
constexpr int kMaxPanelWidth = 8;

class Scratch;

// The kernels of one instruction set and dtype. Each works serially on the range it is given and
// touches nothing else; only `scratch` grows. In the order of the number of rows of x they are for.
struct Linear24Kernels {
  int x_bytes;  // of an element of x in rows and tiles: 4, or 2 where bf16 is multiplied as it is

  void (*pack_row)(const Linear24&, int64_t m, void* x);  // row m of x[M][K]
  void (*rows)(const Linear24&, const void* x, int64_t n0, int64_t n1);

  int tile_rows, tile_span;  // the most rows of a tile; k is padded to a multiple of the span
  // False where they met an infinity or a NaN that they cannot multiply: then `instead` is asked.
  bool (*pack_tile)(const Linear24&, const XTile&);
  bool (*tiles)(const Linear24&, const XTile*, int count, int64_t n0, int64_t n1, Scratch&);

  int panel_lanes;  // of a vector
  void (*pack_panel)(const Linear24&, const XPanel&, int64_t k0, int64_t k1);
  void (*panels)(const Linear24&, const XPanel*, int count, int64_t n0, int64_t n1, Scratch&);

  // The weight's block of rows n .. n+15 (fewer at the end) from values and meta into `packed`.
  void (*prepack)(const Linear24&, int64_t n, uint8_t* packed, Scratch&);

  // The choice by M, measured: rows up to the first (packed weights never), then tiles, then panels.
  int64_t max_rows, max_tiles, max_tiles_packed;
  const Linear24Kernels* instead = nullptr;
  int tiles_together = 1;  // that share memory
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

// Rows [m0, m0 + rows) of dy in tiles of `height` rows, `apart` elements from one to the next.
struct DyTiles {
  void* data;
  int64_t m0, rows, apart;
  int height;
};

// The gradients in bf16 where the CPU multiplies tiles. A factor is packed for all threads; the
// rest works serially on the range it is given, within `scratch`. dx multiplies the zeros of the
// weight, too.
struct Gradient24Tiles {
  int rows,
      span;  // the most rows of a tile; what is summed over is padded to a multiple of the span
  void (*dx_pack)(const Linear24Dx&, const DyTiles&, int64_t tile);
  // Columns [k0, k1) of those rows of dx; k0 is a multiple of 64.
  void (*dx)(const Linear24Dx&, const DyTiles&, int64_t k0, int64_t k1, Scratch&);
  // Columns [k0, k1) of x, sixteen after sixteen, with room for whole 64; k0 is a multiple of 64.
  void (*dvalues_pack)(const Linear24Dvalues&, int64_t k0, int64_t k1, void* x);
  // The same columns of dvalues for rows [n0, n1).
  void (*dvalues)(const Linear24Dvalues&, const void* x, int64_t k0, int64_t k1, int64_t n0,
                  int64_t n1, Scratch&);
  int dx_min_rows, dvalues_min_rows;  // M from which each is the fastest
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

// Blocks of 64 elements: 16 groups, 8 bytes of meta. Nothing outside the blocks is read or written.
constexpr int64_t kFormatBlock = 64;
struct Format24Kernels {
  void (*prune)(const void* weight, void* out, int64_t blocks, DType dtype);
  void (*pack)(const void* weight, void* values, uint8_t* meta, int64_t blocks, DType dtype);
  void (*unpack)(const void* values, const uint8_t* meta, void* dense, int64_t blocks, int size);
  void (*gather)(const void* dense, const uint8_t* meta, void* values, int64_t blocks, int size);
};
// prune_24_transposable of four rows that lie `stride` elements apart, in weight and in out.
using Tiles24Kernel = void (*)(const void* weight, void* out, int64_t stride, int64_t blocks,
                               DType dtype);

using Linear24Table = Linear24Kernels[3];  // by dtype: fp32, fp16, bf16

extern const Format24Kernels format_24_portable;
extern const Tiles24Kernel tiles_24_portable;
extern const Linear24Table linear_24_portable;
extern const Gradient24Kernels linear_24_grad_portable;
extern const ZvcKernels zvc_portable;
#if defined(__x86_64__)
extern const Format24Kernels format_24_avx2, format_24_avx512;
extern const Tiles24Kernel tiles_24_avx2, tiles_24_avx512;
extern const Linear24Table linear_24_avx2, linear_24_avx512;
extern const Linear24Kernels linear_24_avx512_bf16, linear_24_amx_f16, linear_24_amx_bf16;
extern const Gradient24Kernels linear_24_grad_avx2, linear_24_grad_avx512,
    linear_24_grad_avx512_bf16;
extern const Gradient24Tiles linear_24_grad_amx;
extern const ZvcKernels zvc_avx2, zvc_avx512;
#endif

struct Tier {
  const char* isa;
  bool (*supported)();
  const Linear24Kernels* linear_24[3];  // by dtype
  const Gradient24Kernels& linear_24_grad;
  const ZvcKernels& zvc;
  const Format24Kernels& format_24;
  const Tiles24Kernel& tiles_24;
  const Gradient24Tiles* gradient_tiles = nullptr;  // where there are tiles
};
const Tier& tier();  // the one in use

// ---- whole tensors; called by the bindings with the GIL released ----

void linear_24(const Linear24& args, int threads);
void linear_24_dx(const Linear24Dx& args, int threads);
void linear_24_dvalues(const Linear24Dvalues& args, int threads);

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
