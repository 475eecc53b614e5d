// pack_zvc, pack_zvc_out, unpack_zvc: zero-value compression, one tile of 4096 elements a block, x and
// values touched once.
//
//   x        | tile 0: 4096 elements | tile 1 | …       block = 256 threads
//   round r    thread t has elements r * 2048 + 8t ..    2 rounds of 8; bytes: 1 round of 16
//   mask       byte r * 256 + t                          one bit an element, a byte a thread
//   rank       those before it in the tile               popcounts, a scan in the warp, sums of 8 warps
//   place      where the tile's values start             atomic bump, or look-back in order
//   values     | tile's values |                         many: through shared memory, in whole vectors
//                                                        few: straight from the registers
//
// Atomic bump: a tile takes the next free place; tiles lie in any order, each decodes alone. In order
// (bytes the same on every run): tiles are numbered by a ticket, so that those before a tile have begun;
// each publishes its own count, then adds up those before it until one has published its whole sum. Count
// and state are one 64-bit word, so no fence is needed.
//
// Past the room nothing is written. Decoding checks a tile's offset against the length of values before it
// reads, and adds up hashes: of where tiles start, less where they end. The sum is that of [0, length)
// exactly if tiles cover values once, in whatever order (but for a collision of a 64-bit hash).
//
// Lowest architecture: sm_80. Limited by: bytes, x + x * density + x / bits. At most 64 registers, four blocks a
// multiprocessor: 1024 threads with 32 bytes of 16-bit x each in flight.
#include "ptx.cuh"

namespace sparsekern::cuda {

struct PackZvc {
  const void* x;
  uint8_t* mask;
  void* values;
  int64_t* offsets;
  uint64_t* count;  // zero at the start unless in order
  uint64_t* state;  // in order: [1 + tiles], zero at the start: the ticket, then a word per tile
  int64_t n, room;  // elements
  int64_t vectors;  // x is aligned to 16 bytes
};

struct UnpackZvc {
  const uint8_t* mask;
  const void* values;
  const int64_t* offsets;
  void* x;
  uint64_t* check;  // [2], zero at the start and, of an honest stream, at the end
  int64_t n, length, vectors;
};

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
enum : uint64_t { kPartial = 1, kInclusive = 2 };  // low bits of a tile's state; 0: nothing yet

template <class Word>
struct Tile {
  static constexpr int kEach = sizeof(Word) == 1 ? 16 : 8;  // elements of a thread and round
  static constexpr int kRounds = static_cast<int>(kZvcTile) / (kThreads * kEach);
  static constexpr int kVector = 16 / sizeof(Word);  // elements of 16 bytes
  using E = Elements<Word, kEach>;

  struct Shared {
    alignas(16) Word stage[kZvcTile + kVector];
    uint32_t sums[kWarps];  // of each warp, a half per round
    int64_t place;
    uint32_t number;  // of the tile
  };
  static_assert(kRounds <= 2, "counts of the rounds share a register");
};

// Ranks of a thread's first elements within the tile, and the tile's total, from the thread's counts (round 1
// in the high half). Ends with every thread past a barrier.
template <class Shared>
__device__ __forceinline__ uint32_t scan(uint32_t counts, Shared& s, uint32_t (&rank)[2]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint32_t inclusive = counts;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const uint32_t before = shuffle_up(inclusive, distance);
    if (lane >= distance) inclusive += before;
  }
  if (lane == 31) s.sums[warp] = inclusive;
  __syncthreads();
  uint32_t exclusive = inclusive - counts, total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) exclusive += s.sums[w];
    total += s.sums[w];
  }
  const uint32_t first_round = total & 0xffff;
  rank[0] = exclusive & 0xffff;
  rank[1] = first_round + (exclusive >> 16);
  return first_round + (total >> 16);
}

// Warp 0: how many values lie before tile `i`, which has `total`.
__device__ __forceinline__ int64_t look_back(const PackZvc& a, int64_t i, uint32_t total) {
  const int lane = threadIdx.x % 32;
  uint64_t* state = a.state + 1;
  if (lane == 0) publish(state + i, uint64_t{total} << 2 | (i ? kPartial : kInclusive));
  uint64_t before = 0;
  for (int64_t next = i - 1; next >= 0; next -= 32) {
    const int64_t at = next - lane;  // of this lane; before the first tile there is nothing
    uint64_t word;
    do {
      word = at >= 0 ? poll(state + at) : uint64_t{kInclusive};
    } while (ballot((word & 3) == 0));
    const uint32_t whole = ballot((word & 3) == kInclusive);
    const int last = whole ? lowest_bit(whole) : 31;
    uint64_t sum = lane <= last ? word >> 2 : 0;
#pragma unroll
    for (int mask = 16; mask; mask /= 2) sum += shuffle_xor64(sum, mask);
    before += sum;
    if (whole) break;
  }
  if (lane == 0 && i) publish(state + i, (before + total) << 2 | kInclusive);
  return static_cast<int64_t>(before);
}

// Well mixed, and 0 for no position that matters (splitmix64).
__device__ __forceinline__ uint64_t hash(uint64_t position) {
  uint64_t h = position + 0x9e3779b97f4a7c15;
  h = (h ^ h >> 30) * 0xbf58476d1ce4e5b9;
  h = (h ^ h >> 27) * 0x94d049bb133111eb;
  return h ^ h >> 31;
}

// How far into 16 bytes an address lies, in elements.
template <class Word>
__device__ __forceinline__ int phase_of(const Word* p) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(p) % 16 / sizeof(Word));
}

}  // namespace

template <class Word, bool in_order>
__global__ void __launch_bounds__(kThreads) pack_zvc(PackZvc a) {
  using T = Tile<Word>;
  auto& s = shared_memory<typename T::Shared>();
  int64_t tile = blockIdx.x;
  if constexpr (in_order) {
    if (threadIdx.x == 0) s.number = static_cast<uint32_t>(atomic_add(a.state, 1));
    __syncthreads();
    tile = s.number;
  }

  typename T::E x[T::kRounds];
  uint32_t bits[T::kRounds], counts = 0;
#pragma unroll
  for (int r = 0; r < T::kRounds; ++r) {
    const int64_t at = tile * kZvcTile + (r * kThreads + threadIdx.x) * T::kEach;
    const Word* from = static_cast<const Word*>(a.x) + at;
    if (a.vectors && at + T::kEach <= a.n) {
      x[r].load(from);
    } else {
      x[r].load(from, a.n - at);
    }
    bits[r] = 0;
#pragma unroll
    for (int i = 0; i < T::kEach; ++i) bits[r] |= static_cast<uint32_t>(x[r].get(i) != 0) << i;
#pragma unroll
    for (int i = 0; i < T::kEach; i += 8)
      if (at + i < a.n) a.mask[at / 8 + i / 8] = static_cast<uint8_t>(bits[r] >> i);
    counts += static_cast<uint32_t>(count_ones(bits[r])) << 16 * r;
  }

  uint32_t rank[2];
  const uint32_t total = scan(counts, s, rank);
  if constexpr (in_order) {
    if (threadIdx.x < 32) {
      const int64_t before = look_back(a, tile, total);
      if (threadIdx.x == 0) {
        s.place = before;
        if ((tile + 1) * kZvcTile >= a.n) *a.count = before + total;
      }
    }
  } else {
    if (threadIdx.x == 0) s.place = static_cast<int64_t>(atomic_add(a.count, total));
  }
  __syncthreads();  // the tile's place is known
  const int64_t place = s.place;
  if (threadIdx.x == 0) a.offsets[tile] = place;

  Word* to = static_cast<Word*>(a.values) + place;
  const int64_t left = a.room - place;  // may be negative
  const int room = static_cast<int>(left < 0 ? 0 : left < total ? left : total);
  if (total <= kThreads) {  // one each at most, on average: not worth the way through shared memory
#pragma unroll
    for (int r = 0; r < T::kRounds; ++r) {
      int j = static_cast<int>(rank[r]);
#pragma unroll
      for (int i = 0; i < T::kEach; ++i) {
        if (bits[r] >> i & 1) {
          if (j < room) to[j] = x[r].get(i);
          ++j;
        }
      }
    }
    return;
  }
  // As far into 16 bytes as their place in memory, so that vectors of the stage are vectors there.
  const int phase = phase_of(to);
#pragma unroll
  for (int r = 0; r < T::kRounds; ++r) {
    int j = phase + static_cast<int>(rank[r]);
#pragma unroll
    for (int i = 0; i < T::kEach; ++i)
      if (bits[r] >> i & 1) s.stage[j++] = x[r].get(i);
  }
  __syncthreads();  // the stage is full
  for (int v = static_cast<int>(threadIdx.x); v * T::kVector < phase + room; v += kThreads) {
    const int first = v * T::kVector;
    if (first >= phase && first + T::kVector <= phase + room) {
      store_global<4>(to + (first - phase), reinterpret_cast<const uint32_t*>(s.stage + first));
    } else {
      for (int j = first < phase ? phase : first; j < first + T::kVector && j < phase + room; ++j)
        to[j - phase] = s.stage[j];
    }
  }
}

template <class Word>
__global__ void __launch_bounds__(kThreads) unpack_zvc(UnpackZvc a) {
  using T = Tile<Word>;
  auto& s = shared_memory<typename T::Shared>();
  const int64_t tile = blockIdx.x;
  uint32_t bits[T::kRounds], counts = 0;
#pragma unroll
  for (int r = 0; r < T::kRounds; ++r) {
    const int64_t at = tile * kZvcTile + (r * kThreads + threadIdx.x) * T::kEach;
    bits[r] = 0;
#pragma unroll
    for (int i = 0; i < T::kEach; i += 8)
      if (at + i < a.n) bits[r] |= static_cast<uint32_t>(a.mask[at / 8 + i / 8]) << i;
    if (at < a.n && at + T::kEach > a.n) {
      const uint32_t past = bits[r] >> (a.n - at);
      if (past) atomic_add(a.check + 1, 1);
      bits[r] -= past << (a.n - at);
    }
    counts += static_cast<uint32_t>(count_ones(bits[r])) << 16 * r;
  }
  uint32_t rank[2];
  const int total = static_cast<int>(scan(counts, s, rank));

  const int64_t place = a.offsets[tile];
  const bool inside = place >= 0 && place <= a.length - total;
  if (threadIdx.x == 0) {
    uint64_t sum = hash(place) - hash(place + total);
    if (tile == 0) sum += hash(a.length) - hash(0);
    if (sum) atomic_add(a.check, sum);
    if (!inside) atomic_add(a.check + 1, 1);
  }
  const Word* from = static_cast<const Word*>(a.values) + (inside ? place : 0);
  const int phase = phase_of(from), length = inside ? total : 0;
  for (int v = static_cast<int>(threadIdx.x); v * T::kVector < phase + length; v += kThreads) {
    const int first = v * T::kVector;
    if (first >= phase && first + T::kVector <= phase + length) {
      load_global<4>(reinterpret_cast<uint32_t*>(s.stage + first), from + (first - phase));
    } else {
      for (int j = first < phase ? phase : first; j < first + T::kVector && j < phase + length; ++j)
        s.stage[j] = from[j - phase];
    }
  }
  __syncthreads();  // the values are here

#pragma unroll
  for (int r = 0; r < T::kRounds; ++r) {
    const int64_t at = tile * kZvcTile + (r * kThreads + threadIdx.x) * T::kEach;
    typename T::E x;
    x.clear();
    int j = phase + static_cast<int>(rank[r]);
    if (inside) {
#pragma unroll
      for (int i = 0; i < T::kEach; ++i)
        if (bits[r] >> i & 1) x.put(i, s.stage[j++]);
    }
    Word* to = static_cast<Word*>(a.x) + at;
    if (a.vectors && at + T::kEach <= a.n) {
      x.store(to);
    } else {
      x.store(to, a.n - at);
    }
  }
}

SPARSEKERN_KERNEL(pack_zvc<uint8_t, false>);
SPARSEKERN_KERNEL(pack_zvc<uint16_t, false>);
SPARSEKERN_KERNEL(pack_zvc<uint32_t, false>);
SPARSEKERN_KERNEL(pack_zvc<uint64_t, false>);
SPARSEKERN_KERNEL(pack_zvc<uint8_t, true>);
SPARSEKERN_KERNEL(pack_zvc<uint16_t, true>);
SPARSEKERN_KERNEL(pack_zvc<uint32_t, true>);
SPARSEKERN_KERNEL(pack_zvc<uint64_t, true>);
SPARSEKERN_KERNEL(unpack_zvc<uint8_t>);
SPARSEKERN_KERNEL(unpack_zvc<uint16_t>);
SPARSEKERN_KERNEL(unpack_zvc<uint32_t>);
SPARSEKERN_KERNEL(unpack_zvc<uint64_t>);

}  // namespace sparsekern::cuda
