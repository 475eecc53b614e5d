// linear_24 for bf16 with the dot products of AVX-512 BF16 (Zen 4, Sapphire Rapids and later).
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

SPARSEKERN_TARGET_BEGIN(SPARSEKERN_AVX512 ",avx512vbmi,avx512bf16")

#include "linear_24.h"
#include "linear_24_dot.h"
#include "simd_avx512.h"

namespace sparsekern::cpu {

extern const Linear24Kernels linear_24_avx512_bf16 =
    linear_24_kernels<Avx512, DType::bf16, DotRow, DotTile>(8, INT64_MAX, INT64_MAX);

}  // namespace sparsekern::cpu

SPARSEKERN_TARGET_END
#endif
