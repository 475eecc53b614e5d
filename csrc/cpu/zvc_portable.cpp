// zvc for every machine: branch-free scalar code.
#include "zvc.h"

#include "kernels.h"

namespace sparsekern::cpu {
namespace {

template <class Word>
struct PortableZvc {
  static constexpr int kLanes = 8;

  static uint64_t nonzero(const Word* x) {
    unsigned bits = 0;
    for (int i = 0; i < 8; ++i) bits |= unsigned{x[i] != 0} << i;
    return bits;
  }
  static void compress(const Word* x, uint64_t bits, Word* out) {
    for (int i = 0; i < 8; ++i) {
      *out = x[i];
      out += bits >> i & 1;
    }
  }
  static void expand(const Word* values, uint64_t bits, Word* x) {
    for (int i = 0; i < 8; ++i) {
      const Word bit = static_cast<Word>(bits >> i & 1);
      x[i] = static_cast<Word>(*values * bit);
      values += bit;
    }
  }
};

}  // namespace

const ZvcKernels zvc_portable = {
    Zvc<PortableZvc>::mask,
    Zvc<PortableZvc>::compress,
    Zvc<PortableZvc>::expand,
};

}  // namespace sparsekern::cpu
