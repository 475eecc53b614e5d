// Python's door to the CUDA kernels: a launch as sparsekern/backends/cuda_launch.py describes it, by the
// kernel's name. No torch: addresses are in the argument's bytes, the stream is a number.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cuda/launch.h"

namespace py = pybind11;
using sparsekern::cuda::Kernel;

namespace {

constexpr size_t kSharedByDefault = 48
                                    << 10;  // more has to be asked for, once per kernel and device

void check(cudaError_t error, const char* kernel) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(kernel) + ": " + cudaGetErrorString(error));
}

void allow_shared(const Kernel& kernel, size_t bytes) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  int device = 0;
  check(cudaGetDevice(&device), kernel.name);
  const std::lock_guard<std::mutex> lock(mutex);
  if (!allowed.insert({kernel.function, device}).second) return;
  check(cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(bytes)),
        kernel.name);
}

void launch(const std::string& name, const std::array<unsigned, 3>& grid, unsigned block,
            size_t shared, const std::string& argument, uintptr_t stream) {
  const Kernel* kernel = sparsekern::cuda::find_kernel(name.c_str());
  if (!kernel) throw std::invalid_argument("no kernel " + name);
  if (kernel->argument_bytes != argument.size())
    throw std::invalid_argument(name + " takes an argument of " +
                                std::to_string(kernel->argument_bytes) + " bytes, got " +
                                std::to_string(argument.size()));
  if (shared > kSharedByDefault) allow_shared(*kernel, shared);
  void* arguments[] = {const_cast<char*>(argument.data())};
  check(cudaLaunchKernel(kernel->function, dim3(grid[0], grid[1], grid[2]), dim3(block), arguments,
                         shared, reinterpret_cast<cudaStream_t>(stream)),
        kernel->name);
}

std::vector<std::string> kernels() {
  std::vector<std::string> names;
  for (const Kernel* kernel = Kernel::first; kernel; kernel = kernel->next)
    names.emplace_back(kernel->name);
  return names;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() =
      "sparsekern's CUDA kernels as nvcc built them; call them through sparsekern.backends.cuda";
  m.def("launch", [](const std::string& name, const std::array<unsigned, 3>& grid, unsigned block,
                     size_t shared, const py::bytes& argument, uintptr_t stream) {
    const std::string bytes = argument;
    const py::gil_scoped_release unlocked;
    launch(name, grid, block, shared, bytes, stream);
  });
  m.def("kernels", kernels);
}
