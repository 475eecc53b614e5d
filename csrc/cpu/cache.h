// How large the last-level cache is, as far as one core can reach.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__unix__)
#include <unistd.h>
#endif

namespace sparsekern::cpu {

inline int64_t last_level_cache() {
  constexpr int64_t kDefault = 32 << 20;
#if defined(__x86_64__)
  // Not sysconf: on AMD it adds up all slices of the package, 384 MB where a core reaches 32.
  // Leaf 4 (Intel) and 0x8000001d (AMD) describe one cache per subleaf: its type in bits 4..0 of a,
  // 0 after the last one; ways, partitions and line size, each less one, in b; sets less one in c.
  int64_t largest = 0;
  for (const unsigned leaf : {4u, 0x8000001du}) {
    unsigned a, b, c, d;
    for (unsigned i = 0; i < 8 && __get_cpuid_count(leaf, i, &a, &b, &c, &d) && (a & 31); ++i) {
      const int64_t bytes =
          ((b >> 22) + 1LL) * ((b >> 12 & 1023) + 1) * ((b & 4095) + 1) * (c + 1LL);
      if (bytes > largest) largest = bytes;
    }
  }
  return largest > 0 ? largest : kDefault;
#elif defined(_SC_LEVEL3_CACHE_SIZE)
  const int64_t bytes = sysconf(_SC_LEVEL3_CACHE_SIZE);
  return bytes > 0 ? bytes : kDefault;
#else
  return kDefault;
#endif
}

}  // namespace sparsekern::cpu
