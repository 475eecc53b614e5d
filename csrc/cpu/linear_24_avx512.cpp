// linear_24 with AVX-512 F, BW, DQ, VL: fp32 fmas for every dtype.
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

SPARSEKERN_TARGET_BEGIN(SPARSEKERN_AVX512)

#include "linear_24.h"
#include "simd_avx512.h"

namespace sparsekern::cpu {

const Linear24Table linear_24_avx512 = {
    linear_24_kernels<Avx512, DType::f32, FloatRow, FloatTile>(8, 96, 128),
    linear_24_kernels<Avx512, DType::f16, FloatRow, FloatTile>(8, 96, 128),
    linear_24_kernels<Avx512, DType::bf16, FloatRow, FloatTile>(8, 96, 128),
};

}  // namespace sparsekern::cpu

SPARSEKERN_TARGET_END
#endif
