// The gradients of linear_24 with AVX-512 F, BW, DQ, VL and VBMI2.
#include "target.h"
#if defined(__x86_64__)

#include <immintrin.h>

#include <cstring>

#include "convert.h"
#include "kernels.h"
#include "scalar_24.h"

SPARSEKERN_TARGET_BEGIN(
    "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi2,avx2,fma,f16c,bmi,bmi2,popcnt")

#include "linear_24_dvalues.h"
#include "linear_24_dx.h"
#include "linear_24_grad_avx512.h"

namespace sparsekern::cpu {

const Gradient24Kernels linear_24_grad_avx512 = {
    GradientPack<Avx512>::pack,
    DxRows<Avx512>::run,
    DxPanels<Avx512>::run,
    DvaluesRows<Avx512>::run,
    DvaluesPanels<Avx512>::run,
    16,
    16,
    Avx512::kLanes,
    Avx512::kLanes * Avx512::kMaxWidth,
    Avx512::kPairs,
};

}  // namespace sparsekern::cpu

SPARSEKERN_TARGET_END
#endif
