// prune_24, pack_24, unpack_24, gather_24: each one pass over memory.
//
//   row of K         | a b c d | e f g h | i j k l | …      a thread takes eight elements, two groups:
//   thread             0         0         1                16 bytes of fp16, one byte of meta
//   values             | b d | e g |  …                     half as many
//   meta               | nibble, nibble << 4 |              byte c of the row
//
// Magnitudes are compared as integers, on the bits: without the sign for floats (a NaN exceeds
// infinity), as |w| for int8. Rank of an element = those larger, or equal and before it; ranks 0 and
// 1 are kept, so a tie keeps the lower index. Which positions are kept is four bits, and bits are all
// that decoding needs: no table, no branch.
//
// A row of an odd number of groups ends in a thread with one group, whose byte has 4 on top; then, and
// where an address is not aligned, elements move one by one.
//
// Lowest architecture: sm_80 (nothing here needs it). Limited by: bytes. At most 48 registers, five blocks a
// multiprocessor: a vector in flight for each of 1280 threads is 20 KB, what latency times bandwidth asks for.
#include "ptx.cuh"

namespace sparsekern::cuda {

// The argument of all four; each reads what it needs. `vectors`: every row starts at a multiple of
// 16 bytes of the dense side (8 of the other) and has whole chunks.
struct Format24 {
  const void* dense;    // [rows, K]
  const void* values;   // [rows, K/2]
  const uint8_t* meta;  // [rows, ceil(K/8)]
  void* out;
  uint8_t* out_meta;
  int64_t rows, K, vectors;
};

namespace {

constexpr int kThreads = 256;
constexpr int kChunk = 8;  // elements a thread takes: the two groups of a byte of meta

// What |w| means.
enum { kFloat, kSigned, kUnsigned };

template <class Word, int kind>
__device__ __forceinline__ Word magnitude(Word w) {
  if constexpr (kind == kFloat) return w & static_cast<Word>(~(Word{1} << (8 * sizeof(Word) - 1)));
  if constexpr (kind == kSigned) return w & 0x80 ? static_cast<Word>(-w) : w;
  return w;
}

// Which of the four elements from `first` on are kept: a bit each.
template <class Word, int kind, class E>
__device__ __forceinline__ uint32_t kept(const E& e, int first) {
  Word m[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) m[i] = magnitude<Word, kind>(e.get(first + i));
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    int rank = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (j != i) rank += j < i ? m[j] >= m[i] : m[j] > m[i];
    bits |= static_cast<uint32_t>(rank < 2) << i;
  }
  return bits;
}

// A kept zero is written as +0.0, so that bytes do not depend on which zero was there.
template <class Word, int kind>
__device__ __forceinline__ Word canonical(Word w) {
  return magnitude<Word, kind>(w) ? w : Word{0};
}

// The nibble i0 | i1 << 2 of two bits out of four.
__device__ __forceinline__ uint32_t nibble_of(uint32_t bits) {
  const uint32_t first = lowest_bit(bits), second = lowest_bit(bits & (bits - 1));
  return first | second << 2;
}

struct Chunk {
  int64_t row, byte;  // of meta
  int elements;       // 8, or 4 at the end of an odd row
  bool inside;
};

__device__ __forceinline__ Chunk chunk_of(const Format24& a) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (a.K % kChunk == 0)  // then rows do not matter: one long row, and no division
    return {0, i, kChunk, i < a.rows * (a.K / kChunk)};
  const int64_t bytes = meta_bytes(a.K), row = i / bytes, byte = i - row * bytes;
  return {row, byte, byte == bytes - 1 ? 4 : kChunk, row < a.rows};
}

template <class Word, int n>
__device__ __forceinline__ Elements<Word, n> load(const void* base, int64_t at, int count,
                                                  bool vector) {
  Elements<Word, n> e;
  const Word* p = static_cast<const Word*>(base) + at;
  if (vector) {
    e.load(p);
  } else {
    e.load(p, count);
  }
  return e;
}
template <class Word, int n>
__device__ __forceinline__ void store(const Elements<Word, n>& e, void* base, int64_t at, int count,
                                      bool vector) {
  Word* p = static_cast<Word*>(base) + at;
  if (vector) {
    e.store(p);
  } else {
    e.store(p, count);
  }
}

}  // namespace

template <class Word, int kind>
__global__ void __launch_bounds__(kThreads) prune_24(Format24 a) {
  const Chunk c = chunk_of(a);
  if (!c.inside) return;
  const int64_t at = c.row * a.K + c.byte * kChunk;
  const auto in = load<Word, kChunk>(a.dense, at, c.elements, a.vectors);
  const uint32_t keep = kept<Word, kind>(in, 0) | kept<Word, kind>(in, 4) << 4;
  Elements<Word, kChunk> out;
  out.clear();
#pragma unroll
  for (int i = 0; i < kChunk; ++i)
    out.put(i, keep >> i & 1 ? canonical<Word, kind>(in.get(i)) : Word{0});
  store(out, a.out, at, c.elements, a.vectors);
}

template <class Word, int kind>
__global__ void __launch_bounds__(kThreads) pack_24(Format24 a) {
  const Chunk c = chunk_of(a);
  if (!c.inside) return;
  const auto in = load<Word, kChunk>(a.dense, c.row * a.K + c.byte * kChunk, c.elements, a.vectors);
  Elements<Word, 4> out;
  out.clear();
  uint32_t byte = kEmptyNibble << 4;
#pragma unroll
  for (int group = 0; group < 2; ++group) {
    const uint32_t keep = kept<Word, kind>(in, 4 * group);
    const int from = 4 * group;
    const Word low = keep & 1 ? in.get(from) : keep & 2 ? in.get(from + 1) : in.get(from + 2);
    const Word high = keep & 8 ? in.get(from + 3) : keep & 4 ? in.get(from + 2) : in.get(from + 1);
    out.put(2 * group, canonical<Word, kind>(low));
    out.put(2 * group + 1, canonical<Word, kind>(high));
    if (4 * group < c.elements) {
      byte &= group ? 0x0fu : 0xf0u;
      byte |= nibble_of(keep) << 4 * group;
    }
  }
  store(out, a.out, c.row * (a.K / 2) + c.byte * 4, c.elements / 2, a.vectors);
  a.out_meta[c.row * meta_bytes(a.K) + c.byte] = static_cast<uint8_t>(byte);
}

template <class Word>
__global__ void __launch_bounds__(kThreads) unpack_24(Format24 a) {
  const Chunk c = chunk_of(a);
  if (!c.inside) return;
  const auto in =
      load<Word, 4>(a.values, c.row * (a.K / 2) + c.byte * 4, c.elements / 2, a.vectors);
  const uint32_t byte = a.meta[c.row * meta_bytes(a.K) + c.byte];
  Elements<Word, kChunk> out;
  out.clear();
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    const uint32_t nibble = byte >> 4 * (i / 4) & 15;
    const uint32_t k = i % 4;
    const int slot = 2 * (i / 4);
    const Word first = (nibble & 3) == k ? in.get(slot) : Word{0};
    out.put(i, nibble >> 2 == k ? in.get(slot + 1) : first);
  }
  store(out, a.out, c.row * a.K + c.byte * kChunk, c.elements, a.vectors);
}

template <class Word>
__global__ void __launch_bounds__(kThreads) gather_24(Format24 a) {
  const Chunk c = chunk_of(a);
  if (!c.inside) return;
  const auto in = load<Word, kChunk>(a.dense, c.row * a.K + c.byte * kChunk, c.elements, a.vectors);
  const uint32_t byte = a.meta[c.row * meta_bytes(a.K) + c.byte];
  Elements<Word, 4> out;
  out.clear();
#pragma unroll
  for (int slot = 0; slot < 4; ++slot) {
    const int from = 4 * (slot / 2);
    const uint32_t k = byte >> 2 * slot & 3;
    const Word low = k & 1 ? in.get(from + 1) : in.get(from);
    const Word high = k & 1 ? in.get(from + 3) : in.get(from + 2);
    out.put(slot, k & 2 ? high : low);
  }
  store(out, a.out, c.row * (a.K / 2) + c.byte * 4, c.elements / 2, a.vectors);
}

SPARSEKERN_KERNEL(prune_24<uint8_t, kSigned>);
SPARSEKERN_KERNEL(prune_24<uint8_t, kUnsigned>);
SPARSEKERN_KERNEL(prune_24<uint16_t, kFloat>);
SPARSEKERN_KERNEL(prune_24<uint32_t, kFloat>);
SPARSEKERN_KERNEL(prune_24<uint64_t, kFloat>);
SPARSEKERN_KERNEL(pack_24<uint8_t, kSigned>);
SPARSEKERN_KERNEL(pack_24<uint8_t, kUnsigned>);
SPARSEKERN_KERNEL(pack_24<uint16_t, kFloat>);
SPARSEKERN_KERNEL(pack_24<uint32_t, kFloat>);
SPARSEKERN_KERNEL(pack_24<uint64_t, kFloat>);
SPARSEKERN_KERNEL(unpack_24<uint8_t>);
SPARSEKERN_KERNEL(unpack_24<uint16_t>);
SPARSEKERN_KERNEL(unpack_24<uint32_t>);
SPARSEKERN_KERNEL(unpack_24<uint64_t>);
SPARSEKERN_KERNEL(gather_24<uint8_t>);
SPARSEKERN_KERNEL(gather_24<uint16_t>);
SPARSEKERN_KERNEL(gather_24<uint32_t>);
SPARSEKERN_KERNEL(gather_24<uint64_t>);

}  // namespace sparsekern::cuda
