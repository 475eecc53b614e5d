// Kernels by name. A launch is described once, in sparsekern/backends/cuda_launch.py: the kernel's
// name as a template-id, grid, block, bytes of shared memory and the bytes of its one argument, a
// struct. Who carries it out looks the name up here (nvcc, and the C++ compiler for the tests) or
// hands it to NVRTC as a name expression.
#pragma once

#ifdef __CUDACC_RTC__

#define SPARSEKERN_KERNEL(...)

#else

#include <cstddef>
#include <cstring>

namespace sparsekern::cuda {

struct Kernel {
  const char* name;
  const void* function;
  size_t argument_bytes;
  const Kernel* next;
#ifdef SPARSEKERN_CUDA_ON_CPU
  void (*call)(const void* function, const void* argument);
#endif
  static inline const Kernel* first = nullptr;

  template <class Argument>
  Kernel(const char* name, void (*function)(Argument))
      : name(name),
        function(reinterpret_cast<const void*>(function)),
        argument_bytes(sizeof(Argument)),
        next(first) {
#ifdef SPARSEKERN_CUDA_ON_CPU
    call = [](const void* f, const void* argument) {
      reinterpret_cast<void (*)(Argument)>(const_cast<void*>(f))(
          *static_cast<const Argument*>(argument));
    };
#endif
    first = this;
  }
};

inline const Kernel* find_kernel(const char* name) {
  const Kernel* kernel = Kernel::first;
  while (kernel && std::strcmp(kernel->name, name) != 0) kernel = kernel->next;
  return kernel;
}

}  // namespace sparsekern::cuda

// At the end of a kernel's file, one line per instantiation. Python writes the name as it is here.
#define SPARSEKERN_JOIN2(a, b) a##b
#define SPARSEKERN_JOIN(a, b) SPARSEKERN_JOIN2(a, b)
#define SPARSEKERN_KERNEL(...) \
  static const Kernel SPARSEKERN_JOIN(kernel_, __COUNTER__) { #__VA_ARGS__, &__VA_ARGS__ }

#endif
