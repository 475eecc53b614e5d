// zvc for every machine: branch-free scalar code.
#include "zvc.h"

#include "kernels.h"

namespace sparsekern::cpu {
namespace {

template <int kSize>
struct PortableZvc {
  static uint8_t* compress(const uint8_t* x, uint8_t* values, uint64_t& marked) {
    marked = 0;
    for (int i = 0; i < 64; ++i) {
      uint64_t word = 0;
      std::memcpy(&word, x + i * kSize, kSize);
      std::memcpy(values, &word, kSize);
      values += word != 0 ? kSize : 0;
      marked |= uint64_t{word != 0} << i;
    }
    return values;
  }
  static const uint8_t* expand(const uint8_t* values, uint64_t marked, uint8_t* x) {
    for (int i = 0; i < 64; ++i) {
      const uint64_t bit = marked >> i & 1;
      uint64_t word = 0;
      std::memcpy(&word, values, kSize);
      word &= -bit;
      std::memcpy(x + i * kSize, &word, kSize);
      values += bit * kSize;
    }
    return values;
  }
};

void stream_lines(uint8_t* to, const uint8_t* from, int64_t bytes) {
  std::memcpy(to, from, static_cast<size_t>(bytes));
}

}  // namespace

const ZvcKernels zvc_portable = {
    Zvc<PortableZvc>::compress,
    Zvc<PortableZvc>::expand,
    Zvc<PortableZvc>::count,
    Zvc<PortableZvc>::stream<stream_lines>,
    Zvc<PortableZvc>::stream<stream_lines>,
};

}  // namespace sparsekern::cpu
