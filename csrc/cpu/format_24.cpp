// prune_24, pack_24, unpack_24, gather_24, prune_24_transposable on whole tensors: blocks to
// threads, and what is left of a row after its last whole block.
//
//   row of K     | 64 | 64 | 64 | left |     the kernels take whole blocks straight from the tensor
//   staged                       | left 0 0 |   the rest goes through a block on the stack
//
// With K a multiple of 8 a row of meta ends with its last byte, so the tensor is one long row: at
// most one block is staged in all. Zeros pack to positions (0, 1), which is what an odd last group
// leaves in the high half of its byte (kEmptyNibble).
#include <algorithm>
#include <cstring>

#include "kernels.h"
#include "threads.h"

namespace sparsekern::cpu {
namespace {

constexpr int64_t kGrain = 1 << 15;              // elements a thread is worth waking for
constexpr int64_t kMaxBlock = kFormatBlock * 8;  // bytes

int size_of(DType dtype) {
  switch (dtype) {
    case DType::f32: return 4;
    case DType::f16:
    case DType::bf16: return 2;
    case DType::f64: return 8;
    default: return 1;
  }
}

// Part of a row: whole blocks from element k on, then `left` elements, which end the row.
struct Part {
  int64_t row, k, blocks, left;
};

// Calls f on Parts that cover rows * K elements, each standing for `lines` of the tensor.
template <class F>
void for_parts(int64_t rows, int64_t K, int64_t lines, int threads, F f) {
  const int64_t whole = K / kFormatBlock, per_row = ceil_div(K, kFormatBlock);
  parallel_for(
      rows * per_row, kGrain / kFormatBlock / lines, 1, threads, [&](int64_t begin, int64_t end) {
        while (begin < end) {
          const int64_t row = begin / per_row, block = begin % per_row;
          const int64_t count = std::min(end - begin, per_row - block);
          const int64_t blocks = std::min(count, whole - block);
          f(Part{row, block * kFormatBlock, blocks, count > blocks ? K % kFormatBlock : 0});
          begin += count;
        }
      });
}

// The same for tensors with rows of meta.
template <class F>
void for_packed_parts(int64_t rows, int64_t K, int threads, F f) {
  if (K % 8 == 0) K *= rows, rows = rows ? 1 : 0;
  for_parts(rows, K, 1, threads,
            [&](Part p) { f(p, p.row * K + p.k, p.row * meta_bytes(K) + p.k / 8); });
}

const uint8_t* at(const void* p, int64_t bytes) { return static_cast<const uint8_t*>(p) + bytes; }
uint8_t* at(void* p, int64_t bytes) { return static_cast<uint8_t*>(p) + bytes; }

}  // namespace

void prune_24(const void* weight, void* out, int64_t rows, int64_t K, DType dtype, int threads) {
  const auto prune = tier().format_24.prune;
  const int64_t size = size_of(dtype);
  for_parts(1, rows * K, 1, threads, [&](Part p) {
    prune(at(weight, p.k * size), at(out, p.k * size), p.blocks, dtype);
    if (p.left == 0) return;
    alignas(64) uint8_t in[kMaxBlock] = {}, pruned[kMaxBlock];
    const int64_t k = p.k + p.blocks * kFormatBlock, bytes = p.left * size;
    std::memcpy(in, at(weight, k * size), bytes);
    prune(in, pruned, 1, dtype);
    std::memcpy(at(out, k * size), pruned, bytes);
  });
}

void pack_24(const void* weight, void* values, uint8_t* meta, int64_t rows, int64_t K, DType dtype,
             int threads) {
  const auto pack = tier().format_24.pack;
  const int64_t size = size_of(dtype);
  for_packed_parts(rows, K, threads, [&](Part p, int64_t e, int64_t m) {
    pack(at(weight, e * size), at(values, e / 2 * size), meta + m, p.blocks, dtype);
    if (p.left == 0) return;
    alignas(64) uint8_t in[kMaxBlock] = {}, kept[kMaxBlock / 2], packed[8];
    e += p.blocks * kFormatBlock, m += p.blocks * 8;
    std::memcpy(in, at(weight, e * size), p.left * size);
    pack(in, kept, packed, 1, dtype);
    std::memcpy(at(values, e / 2 * size), kept, p.left / 2 * size);
    std::memcpy(meta + m, packed, meta_bytes(p.left));
  });
}

void unpack_24(const void* values, const uint8_t* meta, void* dense, int64_t rows, int64_t K,
               DType dtype, int threads) {
  const auto unpack = tier().format_24.unpack;
  const int size = size_of(dtype);
  for_packed_parts(rows, K, threads, [&](Part p, int64_t e, int64_t m) {
    unpack(at(values, e / 2 * size), meta + m, at(dense, e * size), p.blocks, size);
    if (p.left == 0) return;
    alignas(64) uint8_t kept[kMaxBlock / 2] = {}, packed[8] = {}, out[kMaxBlock];
    e += p.blocks * kFormatBlock, m += p.blocks * 8;
    std::memcpy(kept, at(values, e / 2 * size), p.left / 2 * size);
    std::memcpy(packed, meta + m, meta_bytes(p.left));
    unpack(kept, packed, out, 1, size);
    std::memcpy(at(dense, e * size), out, p.left * size);
  });
}

void gather_24(const void* dense, const uint8_t* meta, void* values, int64_t rows, int64_t K,
               DType dtype, int threads) {
  const auto gather = tier().format_24.gather;
  const int size = size_of(dtype);
  for_packed_parts(rows, K, threads, [&](Part p, int64_t e, int64_t m) {
    gather(at(dense, e * size), meta + m, at(values, e / 2 * size), p.blocks, size);
    if (p.left == 0) return;
    alignas(64) uint8_t in[kMaxBlock] = {}, packed[8] = {}, kept[kMaxBlock / 2];
    e += p.blocks * kFormatBlock, m += p.blocks * 8;
    std::memcpy(in, at(dense, e * size), p.left * size);
    std::memcpy(packed, meta + m, meta_bytes(p.left));
    gather(in, packed, kept, 1, size);
    std::memcpy(at(values, e / 2 * size), kept, p.left / 2 * size);
  });
}

void prune_24_transposable(const void* weight, void* out, int64_t rows, int64_t K, DType dtype,
                           int threads) {
  const auto tiles = tier().tiles_24;
  const int64_t size = size_of(dtype);
  for_parts(rows / 4, K, 4, threads, [&](Part p) {
    int64_t e = p.row * 4 * K + p.k;
    tiles(at(weight, e * size), at(out, e * size), K, p.blocks, dtype);
    if (p.left == 0) return;
    alignas(64) uint8_t in[4 * kMaxBlock] = {}, pruned[4 * kMaxBlock];
    e += p.blocks * kFormatBlock;
    for (int r = 0; r < 4; ++r) {
      std::memcpy(in + r * kFormatBlock * size, at(weight, (e + r * K) * size), p.left * size);
    }
    tiles(in, pruned, kFormatBlock, 1, dtype);
    for (int r = 0; r < 4; ++r) {
      std::memcpy(at(out, (e + r * K) * size), pruned + r * kFormatBlock * size, p.left * size);
    }
  });
}

}  // namespace sparsekern::cpu
