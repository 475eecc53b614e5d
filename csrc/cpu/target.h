// Target regions: one file may hold code for an instruction set that the rest of the library must
// not use.
//
// Rules that keep AVX out of the baseline (a per-file -mavx512f let the linker hand zmm code to
// baseline callers):
//   * standard headers, layout.h and convert.h are included before a region opens;
//   * inside a region everything is either in an unnamed namespace or a template on that tier's tag
//   type, so that
//     no two tiers ever share a symbol.
#pragma once

#define SPARSEKERN_PRAGMA(text) _Pragma(#text)

// What the tiers ask of a CPU; dispatch.cpp looks for the same.
#define SPARSEKERN_AVX2 "avx2,fma,f16c,bmi,bmi2,popcnt"
#define SPARSEKERN_AVX512 \
  "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2," SPARSEKERN_AVX2
// Defined where the compiler knows AMX: GCC and clang from 11 on.
#if defined(__x86_64__) && (defined(__clang__) ? __clang_major__ >= 11 : __GNUC__ >= 11)
#define SPARSEKERN_AMX SPARSEKERN_AVX512 ",avx512bf16,amx-tile,amx-bf16"
#endif

#if defined(__x86_64__) && defined(__clang__)
#define SPARSEKERN_TARGET_BEGIN(isa) \
  SPARSEKERN_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define SPARSEKERN_TARGET_END SPARSEKERN_PRAGMA(clang attribute pop)
#elif defined(__x86_64__)
#define SPARSEKERN_TARGET_BEGIN(isa) \
  SPARSEKERN_PRAGMA(GCC push_options) SPARSEKERN_PRAGMA(GCC target(isa))
#define SPARSEKERN_TARGET_END SPARSEKERN_PRAGMA(GCC pop_options)
#endif
