// Memory that ends the run when it is touched outside: every buffer lies flush against a page that
// may not be accessed, and the signal handler says which case it was and which buffer.
//
//   flush at its end     [ guard ][ margin  | the buffer ][ guard ]
//   flush at its start   [ guard ][ the buffer |  margin ][ guard ]
//
// Every case runs both ways: what leaves a buffer at one end by less than the margin, meets the
// guard in the other placement. The margin holds a pattern, which a write would spoil.
#pragma once

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <list>
#include <mutex>
#include <new>

namespace guard {

enum class Flush { end, start };

class Buffer {
 public:
  Buffer(const char* name, size_t size, Flush flush, size_t align = 1) : name_(name), size_(size) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t least = flush == Flush::start ? size + kLeastMargin : std::max<size_t>(size, 1);
    inner_ = (least + page - 1) / page * page;
    mapped_ = inner_ + 2 * page;
    void* at = mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) {
      std::perror("guard::Buffer");
      std::abort();
    }
    base_ = static_cast<uint8_t*>(at);
    first_ = base_ + page;
    data_ = flush == Flush::start ? first_ : first_ + (inner_ - size) / align * align;
    mprotect(first_, inner_, PROT_READ | PROT_WRITE);
    std::memset(first_, kMargin, inner_);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { munmap(base_, mapped_); }

  const char* name() const { return name_; }
  uint8_t* data() const { return data_; }
  size_t size() const { return size_; }
  bool holds(const void* p) const { return p >= base_ && p < base_ + mapped_; }
  void forbid_writes() { mprotect(first_, inner_, PROT_READ); }
  bool margin_is_intact() const {
    const auto intact = [](uint8_t byte) { return byte == kMargin; };
    return std::all_of(first_, data_, intact) &&
           std::all_of(data_ + size_, first_ + inner_, intact);
  }

 private:
  static constexpr uint8_t kMargin = 0xA5;
  static constexpr size_t kLeastMargin = 64;  // after a buffer flush at its start
  const char* name_;
  size_t size_, inner_ = 0, mapped_ = 0;
  uint8_t *base_ = nullptr, *first_ = nullptr, *data_ = nullptr;
};

// What runs now. The handler allocates nothing: it prints what already lies here.
struct Running {
  char text[256] = "nothing";
  const std::list<Buffer>* buffers = nullptr;
  std::list<Buffer> scratch;  // the core's own, see operator new below
  std::mutex mutex;           // of `scratch`
  Flush scratch_flush = Flush::end;
};

inline Running& running() {
  static Running& r = *new Running;  // outlives the thread-local scratch of every thread
  return r;
}

inline bool scratch_is_intact() {
  const std::lock_guard<std::mutex> lock(running().mutex);
  const auto& live = running().scratch;
  return std::all_of(live.begin(), live.end(), [](const auto& b) { return b.margin_is_intact(); });
}

#if defined(__x86_64__)
__attribute__((force_align_arg_pointer))  // qemu 7.2 enters handlers on a misaligned stack
#endif
inline void report_fault(int signal, siginfo_t* info, void*) {
  char line[512];
  const auto* at = static_cast<const uint8_t*>(info->si_addr);
  int n = std::snprintf(line, 320, "\nFAULT, signal %d, in: %s\n", signal, running().text);
  const auto locate = [&](const std::list<Buffer>* buffers) {
    if (!buffers) return;
    for (const Buffer& b : *buffers) {
      if (b.holds(at) && n < 400) {
        n += std::snprintf(line + n, 100, "  at byte %td of `%s`, which has %zu bytes\n",
                           at - b.data(), b.name(), b.size());
      }
    }
  };
  locate(running().buffers);
  locate(&running().scratch);
  if (write(STDOUT_FILENO, line, static_cast<size_t>(n)) < 0) _exit(2);
  _exit(1);
}

inline void catch_faults() {
  struct sigaction action = {};
  action.sa_sigaction = report_fault;
  action.sa_flags = SA_SIGINFO;
  for (const int signal : {SIGSEGV, SIGBUS, SIGILL}) sigaction(signal, &action, nullptr);
}

}  // namespace guard

// The core takes its scratch from the aligned operator new: that lies flush against guards, too.
// A program includes this header once.
void* operator new(std::size_t size, std::align_val_t align) {
  auto& r = guard::running();
  const std::lock_guard<std::mutex> lock(r.mutex);
  r.scratch.emplace_back("scratch", size, r.scratch_flush, static_cast<std::size_t>(align));
  return r.scratch.back().data();
}

void operator delete(void* p, std::align_val_t) noexcept {
  auto& r = guard::running();
  const std::lock_guard<std::mutex> lock(r.mutex);
  r.scratch.remove_if([&](const guard::Buffer& b) { return b.data() == p; });
}
void operator delete(void* p, std::size_t, std::align_val_t align) noexcept {
  operator delete(p, align);
}
