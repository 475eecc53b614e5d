// Python's door to the CPU core: addresses and sizes in, nothing of torch. The callers in
// backends/cpu.py own every buffer and have checked every size; the GIL is released around the
// work.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>

#include "cpu/kernels.h"

namespace py = pybind11;
namespace cpu = sparsekern::cpu;

namespace {

using sparsekern::Activation;
using sparsekern::DType;
using Address = uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

using Unlocked = py::call_guard<py::gil_scoped_release>;

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "sparsekern's compiled CPU kernels; call them through sparsekern.backends.cpu";

  m.def(
      "linear_24",
      [](Address x, int64_t x_stride_m, int64_t x_stride_k, Address values, Address meta,
         Address packed, Address bias, Address y, int64_t M, int64_t N, int64_t K, int dtype,
         int activation, int threads) {
        cpu::linear_24({at<const void>(x), x_stride_m, x_stride_k, at<const void>(values),
                        at<const uint8_t>(meta), at<const uint8_t>(packed), at<const void>(bias),
                        at<void>(y), M, N, K, DType(dtype), Activation(activation)},
                       threads);
      },
      Unlocked());

  m.def(
      "prepack_24",
      [](Address values, Address meta, Address packed, int64_t N, int64_t K, int dtype,
         int threads) {
        cpu::prepack_24(at<const void>(values), at<const uint8_t>(meta), at<uint8_t>(packed), N, K,
                        DType(dtype), threads);
      },
      Unlocked());

  m.def(
      "linear_24_dx",
      [](Address dy, int64_t dy_stride_m, int64_t dy_stride_n, Address values, Address meta,
         Address dx, int64_t M, int64_t N, int64_t K, int dtype, int threads) {
        cpu::linear_24_dx({{at<const void>(dy), dy_stride_m, dy_stride_n},
                           at<const void>(values),
                           at<const uint8_t>(meta),
                           at<void>(dx),
                           M,
                           N,
                           K,
                           DType(dtype)},
                          threads);
      },
      Unlocked());

  m.def(
      "unprepack_24",
      [](Address packed, Address values, Address meta, int64_t N, int64_t K, int dtype,
         int threads) {
        cpu::unprepack_24(at<const uint8_t>(packed), at<void>(values), at<uint8_t>(meta), N, K,
                          DType(dtype), threads);
      },
      Unlocked());

  m.def(
      "linear_24_dvalues",
      [](Address dy, int64_t dy_stride_m, int64_t dy_stride_n, Address x, int64_t x_stride_m,
         int64_t x_stride_k, Address meta, Address dvalues, int64_t M, int64_t N, int64_t K,
         int dtype, int threads) {
        cpu::linear_24_dvalues({{at<const void>(dy), dy_stride_m, dy_stride_n},
                                {at<const void>(x), x_stride_m, x_stride_k},
                                at<const uint8_t>(meta),
                                at<void>(dvalues),
                                M,
                                N,
                                K,
                                DType(dtype)},
                               threads);
      },
      Unlocked());

  m.def(
      "prune_24",
      [](Address weight, Address out, int64_t rows, int64_t K, int dtype, int threads) {
        cpu::prune_24(at<const void>(weight), at<void>(out), rows, K, DType(dtype), threads);
      },
      Unlocked());

  m.def(
      "pack_24",
      [](Address weight, Address values, Address meta, int64_t rows, int64_t K, int dtype,
         int threads) {
        cpu::pack_24(at<const void>(weight), at<void>(values), at<uint8_t>(meta), rows, K,
                     DType(dtype), threads);
      },
      Unlocked());

  m.def(
      "unpack_24",
      [](Address values, Address meta, Address dense, int64_t rows, int64_t K, int dtype,
         int threads) {
        cpu::unpack_24(at<const void>(values), at<const uint8_t>(meta), at<void>(dense), rows, K,
                       DType(dtype), threads);
      },
      Unlocked());

  m.def(
      "gather_24",
      [](Address dense, Address meta, Address values, int64_t rows, int64_t K, int dtype,
         int threads) {
        cpu::gather_24(at<const void>(dense), at<const uint8_t>(meta), at<void>(values), rows, K,
                       DType(dtype), threads);
      },
      Unlocked());

  m.def(
      "prune_24_transposable",
      [](Address weight, Address out, int64_t rows, int64_t K, int dtype, int threads) {
        cpu::prune_24_transposable(at<const void>(weight), at<void>(out), rows, K, DType(dtype),
                                   threads);
      },
      Unlocked());

  m.def(
      "zvc_compress",
      [](Address x, int64_t n, int size, Address mask, Address values, int64_t room,
         Address offsets, int threads) {
        return cpu::zvc_compress(at<const void>(x), n, size, at<uint8_t>(mask), at<void>(values),
                                 room, at<int64_t>(offsets), threads);
      },
      Unlocked());

  // For what torch's own copy would not do: it hangs in a forked child, and normalises bools.
  m.def(
      "copy",
      [](Address to, Address from, size_t bytes) {
        if (bytes > 0) std::memcpy(at<void>(to), at<const void>(from), bytes);
      },
      Unlocked());

  m.def(
      "zvc_expand",
      [](Address mask, Address values, int64_t values_count, Address offsets, int64_t n, int size,
         Address x, int threads) {
        return cpu::zvc_expand(at<const uint8_t>(mask), at<const void>(values), values_count,
                               at<const int64_t>(offsets), n, size, at<void>(x), threads);
      },
      Unlocked());

  m.def(
      "huge_pages", [](Address p, size_t bytes) { cpu::huge_pages(at<void>(p), bytes); },
      "Ask for pages of 2 MB in memory that nobody has touched yet.");
  m.def("isas", &cpu::isas, "Tiers this build and this CPU can run, best first.");
  m.def("isa", &cpu::isa, "The tier in use.");
  m.def("set_isa", &cpu::set_isa, "Switch the tier; False when there is no such tier here.");
  m.def("features", &cpu::features, "CPU features the kernels ask for.");
  m.def("cache_bytes", &cpu::cache_bytes, "The last-level cache that one core can reach.");
  m.def("sanitized", &cpu::sanitized, "Whether the address sanitizer is built in.");
  m.def("has_openmp", &cpu::has_openmp, "Whether the build is threaded.");
}
