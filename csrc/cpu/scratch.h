// Memory that kernels borrow for the length of a call.
#pragma once

#include <cstddef>
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
  float* get(size_t count) {
    if (kExactScratch || count > count_) {
      data_.reset();
      count_ = 0;
      data_.reset(static_cast<float*>(::operator new(count * sizeof(float), std::align_val_t{64})));
      count_ = count;
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(float* p) const { ::operator delete(p, std::align_val_t{64}); }
  };
  std::unique_ptr<float, Free> data_;
  size_t count_ = 0;
};

}  // namespace sparsekern::cpu
