// Memory that kernels borrow for the length of a call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace sparsekern::cpu {

// Tools that find accesses outside a buffer know its size when it was allocated: the builds for
// them ask for it exactly, every time.
#ifdef SPARSEKERN_EXACT_SCRATCH
constexpr bool kExactScratch = true;
#else
constexpr bool kExactScratch = false;
#endif

// Grows and is kept for the thread's life: the second call of a shape allocates nothing.
class Scratch {
 public:
  // `count` of T, aligned to a cache line; what an earlier call left is in them.
  template <class T>
  T* get(int64_t count) {
    const auto bytes = static_cast<size_t>(count) * sizeof(T);
    if (kExactScratch || bytes > bytes_) {
      data_.reset();
      bytes_ = 0;
      data_.reset(::operator new(bytes, std::align_val_t{64}));
      bytes_ = bytes;
    }
    return static_cast<T*>(data_.get());
  }

 private:
  struct Free {
    void operator()(void* p) const { ::operator delete(p, std::align_val_t{64}); }
  };
  std::unique_ptr<void, Free> data_;
  size_t bytes_ = 0;
};

}  // namespace sparsekern::cpu
