// linear_24 with AVX2, FMA and F16C: every x86-64 server since Haswell and Zen.
#include "target.h"
#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "convert.h"
#include "kernels.h"
#include "scalar_24.h"
#include "scratch.h"

SPARSEKERN_TARGET_BEGIN(SPARSEKERN_AVX2)

#include "linear_24.h"
#include "simd_avx2.h"

namespace sparsekern::cpu {

const Linear24Table linear_24_avx2 = {
    linear_24_kernels<Avx2, DType::f32, FloatRow, FloatTile>(8, 48, 96),
    linear_24_kernels<Avx2, DType::f16, FloatRow, FloatTile>(8, 48, 96),
    linear_24_kernels<Avx2, DType::bf16, FloatRow, FloatTile>(8, 48, 96),
};

}  // namespace sparsekern::cpu

SPARSEKERN_TARGET_END
#endif
