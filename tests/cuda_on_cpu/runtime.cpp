// Fibers, schedules, shared memory and copies in flight for kernels that run on the CPU, and the
// race checker. Never compiled with a sanitizer itself: its own containers are not the subject.
//
// Race checker (CHECK_RACES): kernels are compiled with -fsanitize=thread, which calls a hook before
// every access; the hooks are at the end of this file. For each byte of shared memory a shadow holds
// who wrote and who read it last, and when. Two lanes may touch a byte, one of them writing, only if
// a __syncthreads lies between, or a __syncwarp where they share a warp. A byte nobody wrote may not
// be read.
#include "runtime.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cuda/launch.h"

#ifdef CHECK_ADDRESSES
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace cuda_on_cpu {

Dim3 thread_index, block_index, block_size, grid_size;

namespace {

constexpr size_t kStack = 256 << 10;
constexpr int kPoison = 0xff;  // a NaN in every float type, an illegal nibble, a wild offset
constexpr int kNobody = -1, kSeveral = -2;

// ---- stacks and the switch between them ----

#ifdef __x86_64__
// Saves what the calling convention keeps, swaps the stacks, restores.
extern "C" void cuda_on_cpu_switch(void** from, void* to);
asm(R"(
  .text
  .local cuda_on_cpu_switch
  .type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

struct Context {
  void* sp = nullptr;
  void start(char* stack, void (*entry)()) {
    auto** top = reinterpret_cast<void**>(stack + kStack - 64);
    *top = reinterpret_cast<void*>(entry);  // as the return address; aligned as at a call
    sp = top - 6;
  }
  void go(Context& to) { cuda_on_cpu_switch(&sp, to.sp); }
};
#else
struct Context {
  ucontext_t u;
  void start(char* stack, void (*entry)()) {
    getcontext(&u);
    u.uc_stack.ss_sp = stack;
    u.uc_stack.ss_size = kStack;
    makecontext(&u, entry, 0);
  }
  void go(Context& to) { swapcontext(&u, &to.u); }
};
#endif

// ---- state ----

struct Copy {
  char* to;
  int size;
  char bytes[16];
};

struct Warp {
  const char* op = nullptr;
  unsigned mask = 0, arrived = 0;
  void* lanes[32] = {};
  unsigned epoch = 0;  // __syncwarps so far
};

struct Byte {  // of shared memory, for the race checker
  int writer = kNobody, reader = kNobody;
  unsigned write_epoch = 0, write_warp_epoch = 0, read_epoch = 0, read_warp_epoch = 0;
  int reader_warp = kNobody;  // if several read, the warp they are all in, or kSeveral
};

struct Block {
  Dim3 index;
  int live = 0, arrived = 0;
  const char* file = nullptr;
  int line = 0;
  unsigned epoch = 0;  // __syncthreads so far
  std::vector<Warp> warps;
  char* shared = nullptr;
  std::vector<Byte> shadow;
};

struct Fiber {
  Context context;
  char* stack = nullptr;
  int slot = 0, thread = 0;
  Block* block = nullptr;
  const char* waits = "";
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
};

struct Launch {
  const sparsekern::cuda::Kernel* kernel;
  const void* argument;
  size_t shared_bytes;
  int threads;
};

Launch launch;
Context scheduler;
Fiber* now = nullptr;
std::vector<char*> stacks;
std::vector<Fiber> fibers;
std::vector<uint64_t> ready, deferred;  // bits by slot
std::string message;
bool failed = false;

void set(std::vector<uint64_t>& bits, int slot) { bits[slot / 64] |= uint64_t{1} << slot % 64; }
void clear(std::vector<uint64_t>& bits, int slot) {
  bits[slot / 64] &= ~(uint64_t{1} << slot % 64);
}

#ifdef CHECK_ADDRESSES
const void* main_bottom;
size_t main_size;
#endif

void to_scheduler(bool for_good = false) {
  Fiber* self = now;
#ifdef CHECK_ADDRESSES
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fake, main_bottom, main_size);
#endif
  self->context.go(scheduler);
#ifdef CHECK_ADDRESSES
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  (void)for_good;
}

void to_fiber(Fiber& fiber) {
  now = &fiber;
  const auto t = static_cast<unsigned>(fiber.thread);
  thread_index = {t % block_size.x, t / block_size.x % block_size.y,
                  t / block_size.x / block_size.y};
  block_index = fiber.block->index;
#ifdef CHECK_ADDRESSES
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, fiber.stack, kStack);
#endif
  scheduler.go(fiber.context);
#ifdef CHECK_ADDRESSES
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

void wait(const char* what) {
  now->waits = what;
  clear(ready, now->slot);
  to_scheduler();
}

void fiber_main() {
#ifdef CHECK_ADDRESSES
  __sanitizer_finish_switch_fiber(nullptr, &main_bottom, &main_size);
#endif
  launch.kernel->call(launch.kernel->function, launch.argument);
  if (!now->open.empty() || !now->groups.empty()) fail("a lane ends with cp.async in flight");
  clear(ready, now->slot);
  --now->block->live;
  to_scheduler(true);
}

// ---- races ----

void note(const void* p, size_t size, bool write) {
#ifdef CHECK_RACES
  if (!now) return;
  Block& block = *now->block;
  const auto at = static_cast<size_t>(static_cast<const char*>(p) - block.shared);
  if (at >= launch.shared_bytes) return;
  const int self = now->thread, warp = self / 32;
  const unsigned warp_epoch = block.warps[warp].epoch;
  for (size_t i = at; i < std::min(at + size, launch.shared_bytes); ++i) {
    Byte& b = block.shadow[i];
    const bool after_write = b.writer == self || b.write_epoch != block.epoch ||
                             (b.writer / 32 == warp && b.write_warp_epoch != warp_epoch);
    if (b.writer == kNobody) {
      if (!write) fail("thread %d reads shared byte %zu, which nobody wrote", self, i);
    } else if (!after_write) {
      fail("race: thread %d %s shared byte %zu, thread %d wrote it and no barrier lies between",
           self, write ? "writes" : "reads", i, b.writer);
    }
    if (!write) {
      if (b.reader == kNobody || b.read_epoch != block.epoch) {
        b.reader = self, b.reader_warp = warp;
      } else if (b.reader_warp != warp) {
        b.reader = kSeveral, b.reader_warp = kSeveral;
      } else if (b.reader != self) {
        // Reads before a __syncwarp are settled for this warp, and another warp needs a barrier in
        // any case, which the warp's number alone tells.
        b.reader = b.read_warp_epoch != warp_epoch ? self : kSeveral;
      }
      b.read_epoch = block.epoch, b.read_warp_epoch = warp_epoch;
      continue;
    }
    const bool after_read = b.reader == kNobody || b.reader == self ||
                            b.read_epoch != block.epoch ||
                            (b.reader_warp == warp && b.read_warp_epoch != warp_epoch);
    if (!after_read) {
      fail("race: thread %d writes shared byte %zu, which %s read and no barrier lies between",
           self, i, b.reader == kSeveral ? "several threads" : "another thread");
    }
    b.writer = self, b.write_epoch = block.epoch, b.write_warp_epoch = warp_epoch;
    b.reader = kNobody;
  }
#else
  (void)p, (void)size, (void)write;
#endif
}

// ---- blocks ----

void start_block(Block& block, Dim3 index, int first_slot) {
  block = Block{};
  block.index = index;
  block.live = launch.threads;
  block.warps.resize((launch.threads + 31) / 32);
  if (launch.shared_bytes) {
    // Fresh for every block, so that the address sanitizer sees its end.
    void* memory = nullptr;
    if (posix_memalign(&memory, 128, launch.shared_bytes)) abort();
    std::memset(memory, kPoison, launch.shared_bytes);
    block.shared = static_cast<char*>(memory);
#ifdef CHECK_RACES
    block.shadow.resize(launch.shared_bytes);
#endif
  }
  for (int t = 0; t < launch.threads; ++t) {
    Fiber& fiber = fibers[first_slot + t];
    fiber.slot = first_slot + t;
    fiber.thread = t;
    fiber.block = &block;
    fiber.stack = stacks[fiber.slot];
    fiber.open.clear();
    fiber.groups.clear();
#ifdef CHECK_ADDRESSES
    __asan_unpoison_memory_region(fiber.stack, kStack);
#endif
    fiber.context.start(fiber.stack, fiber_main);
    set(ready, fiber.slot);
  }
}

// Who runs next. 0: the first that can; 1: the last that can; 2: in turn; from 3: by lot.
class Schedule {
 public:
  explicit Schedule(int number) : number_(number), lot_(static_cast<unsigned>(number)) {}

  int resident() const { return number_ == 0 ? 1 : number_ == 1 ? 3 : 2; }

  std::vector<int64_t> block_order(int64_t first, int64_t count) {
    std::vector<int64_t> order(count);
    for (int64_t i = 0; i < count; ++i) order[i] = first + (number_ == 1 ? count - 1 - i : i);
    if (number_ > 2) std::shuffle(order.begin(), order.end(), lot_);
    return order;
  }

  // -1 if nobody can.
  int next() {
    const int slots = static_cast<int>(ready.size()) * 64;
    if (number_ == 1) {
      for (int w = static_cast<int>(ready.size()) - 1; w >= 0; --w)
        if (ready[w]) return w * 64 + 63 - __builtin_clzll(ready[w]);
      return -1;
    }
    const int from = number_ == 0   ? 0
                     : number_ == 2 ? (last_ + 1) % slots
                                    : static_cast<int>(lot_() % slots);
    for (int i = 0; i <= static_cast<int>(ready.size()); ++i) {
      const int w = (from / 64 + i) % static_cast<int>(ready.size());
      uint64_t bits = ready[w];
      if (i == 0) bits &= ~uint64_t{0} << from % 64;
      if (bits) return last_ = w * 64 + __builtin_ctzll(bits);
    }
    return -1;
  }

 private:
  int number_, last_ = -1;
  std::mt19937 lot_;
};

void report_deadlock(const std::vector<Block>& blocks) {
  for (const Fiber& f : fibers) {
    if (!f.block || !f.block->live) continue;
    const Warp& warp = f.block->warps[f.thread / 32];
    message = "deadlock: thread " + std::to_string(f.thread) + " waits at " + f.waits;
    if (warp.op && warp.arrived)
      message += std::string(", its warp at ") + warp.op + " for lanes that do not come";
    break;
  }
  (void)blocks;
  failed = true;
}

void run(int64_t first_block, int64_t blocks, int schedule_number) {
  Schedule schedule(schedule_number);
  const int resident = static_cast<int>(std::min<int64_t>(schedule.resident(), blocks));
  const int slots = resident * launch.threads;
  while (static_cast<int>(stacks.size()) < slots) {
    void* stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) abort();
    stacks.push_back(static_cast<char*>(stack));
  }
  fibers.clear();
  fibers.resize(slots);
  ready.assign((slots + 63) / 64, 0);
  deferred = ready;
  std::vector<Block> running(resident);
  const auto order = schedule.block_order(first_block, blocks);
  size_t started = 0;
  failed = false;
  const auto start = [&](int r) {
    const int64_t i = order[started++];
    start_block(running[r],
                {static_cast<unsigned>(i % grid_size.x),
                 static_cast<unsigned>(i / grid_size.x % grid_size.y),
                 static_cast<unsigned>(i / grid_size.x / grid_size.y)},
                r * launch.threads);
  };
  for (int r = 0; r < resident; ++r) start(r);
  int live = resident;
  while (live > 0 && !failed) {
    const int slot = schedule.next();
    if (slot < 0) {
      if (std::all_of(deferred.begin(), deferred.end(), [](uint64_t w) { return w == 0; })) {
        report_deadlock(running);
        break;
      }
      ready.swap(deferred);
      continue;
    }
    to_fiber(fibers[slot]);
    now = nullptr;
    if (failed) break;
    Block& block = *fibers[slot].block;
    if (block.live == 0) {
      std::free(block.shared);
      block.shared = nullptr;
      if (started < order.size()) {
        start(static_cast<int>(&block - running.data()));
      } else {
        --live;
      }
    }
  }
  for (Block& block : running) std::free(block.shared);
}

}  // namespace

// ---- what kernels call ----

void fail(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  char where[96];
  std::snprintf(where, sizeof where, " (block %u, thread %u)", block_index.x, thread_index.x);
  message = std::string(text) + where;
  failed = true;
  to_scheduler(true);
  abort();
}

void barrier(const char* file, int line) {
  Block& block = *now->block;
  if (block.arrived == 0) {
    block.file = file, block.line = line;
  } else if (block.line != line || std::strcmp(block.file, file) != 0) {
    fail("barriers diverge: %s:%d and %s:%d", block.file, block.line, file, line);
  }
  if (++block.arrived < launch.threads) return wait("__syncthreads");
  block.arrived = 0;
  ++block.epoch;
  const int first = now->slot - now->thread;
  for (int t = 0; t < launch.threads; ++t) set(ready, first + t);
}

void meet(const char* op, unsigned mask, void* mine, void (*together)(void** lanes)) {
  Warp& warp = now->block->warps[now->thread / 32];
  const int lane = now->thread % 32;
  if (!(mask >> lane & 1)) fail("%s: lane %d is not in its own mask %08x", op, lane, mask);
  if (warp.arrived == 0) {
    warp.op = op, warp.mask = mask;
  } else if (std::strcmp(warp.op, op) != 0 || warp.mask != mask) {
    fail("collectives diverge: %s (mask %08x) and %s (mask %08x)", warp.op, warp.mask, op, mask);
  }
  warp.lanes[lane] = mine;
  warp.arrived |= 1u << lane;
  if (warp.arrived != warp.mask) return wait(op);
  together(warp.lanes);
  warp.arrived = 0;
  const int first = now->slot - lane;
  for (int l = 0; l < 32; ++l) {
    warp.lanes[l] = nullptr;
    if (mask >> l & 1) set(ready, first + l);
  }
}

void warp_barrier(unsigned mask) {
  meet("__syncwarp", mask, nullptr, [](void**) { ++now->block->warps[now->thread / 32].epoch; });
}

void pass_turn() {
  clear(ready, now->slot);
  set(deferred, now->slot);
  to_scheduler();
}

void* shared_memory(size_t bytes) {
  if (bytes != launch.shared_bytes)
    fail("the kernel has %zu bytes of shared memory, its launch %zu", bytes, launch.shared_bytes);
  return now->block->shared;
}

void copy_async(void* to, const void* bytes, int size) {
  if (reinterpret_cast<uintptr_t>(to) % size)
    fail("cp.async of %d bytes to a misaligned address", size);
  Copy copy{static_cast<char*>(to), size, {}};
  std::memcpy(copy.bytes, bytes, size);
  note(to, size, true);
  std::memset(to, kPoison, size);
  now->open.push_back(copy);
}

void commit_copies() {
  now->groups.push_back(std::move(now->open));
  now->open.clear();
}

void wait_copies(int groups_left) {
  while (static_cast<int>(now->groups.size()) > groups_left) {
    for (const Copy& copy : now->groups.front()) {
      note(copy.to, copy.size, true);
      std::memcpy(copy.to, copy.bytes, copy.size);
    }
    now->groups.pop_front();
  }
}

}  // namespace cuda_on_cpu

// ---- the door for Python (execution.py) ----

// Null, or what went wrong; valid until the next call. Blocks [first_block, first_block + blocks) of
// the grid are run, so that a test of large indices need not run them all.
extern "C" __attribute__((visibility("default"))) const char* cuda_on_cpu_launch(
    const char* name, const unsigned* grid, const unsigned* block, size_t shared_bytes,
    const void* argument, size_t argument_bytes, int64_t first_block, int64_t blocks,
    int schedule) {
  using namespace cuda_on_cpu;
  const auto* kernel = sparsekern::cuda::find_kernel(name);
  message.clear();
  if (!kernel) {
    message = std::string("no kernel ") + name;
  } else if (kernel->argument_bytes != argument_bytes) {
    message = std::string(name) + " takes " + std::to_string(kernel->argument_bytes) +
              " bytes of arguments, its launch has " + std::to_string(argument_bytes);
  } else {
    grid_size = {grid[0], grid[1], grid[2]};
    block_size = {block[0], block[1], block[2]};
    launch = {kernel, argument, shared_bytes, static_cast<int>(block[0] * block[1] * block[2])};
    run(first_block, blocks, schedule);
  }
  return message.empty() ? nullptr : message.c_str();
}

extern "C" __attribute__((visibility("default"))) const char* cuda_on_cpu_kernel(int i) {
  const auto* kernel = sparsekern::cuda::Kernel::first;
  for (; kernel && i > 0; --i) kernel = kernel->next;
  return kernel ? kernel->name : nullptr;
}

// ---- the compiler's hooks before every access of a kernel ----

#ifdef CHECK_RACES
#define HOOKS(bytes)                                                                 \
  void __tsan_read##bytes(void* p) { cuda_on_cpu::note(p, bytes, false); }           \
  void __tsan_write##bytes(void* p) { cuda_on_cpu::note(p, bytes, true); }           \
  void __tsan_unaligned_read##bytes(void* p) { cuda_on_cpu::note(p, bytes, false); } \
  void __tsan_unaligned_write##bytes(void* p) { cuda_on_cpu::note(p, bytes, true); } \
  void __tsan_volatile_read##bytes(void* p) { cuda_on_cpu::note(p, bytes, false); }  \
  void __tsan_volatile_write##bytes(void* p) { cuda_on_cpu::note(p, bytes, true); }
extern "C" {
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
void __tsan_read_range(void* p, size_t n) { cuda_on_cpu::note(p, n, false); }
void __tsan_write_range(void* p, size_t n) { cuda_on_cpu::note(p, n, true); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}
#endif
