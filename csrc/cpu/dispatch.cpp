// Which instruction-set tier runs here, and what the machine is.
#include <atomic>
#include <string>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <unistd.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#include <sys/syscall.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "kernels.h"
#include "target.h"
#include "threads.h"

namespace sparsekern::cpu {
namespace {

// ---- which tier ----

#if defined(__x86_64__)
// By hand: not every compiler's __builtin_cpu_supports knows the name.
bool cpu_has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

bool cpu_has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && cpu_has_f16c() &&
         __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
}

bool cpu_has_avx512() {
  return cpu_has_avx2() && __builtin_cpu_supports("avx512f") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi") &&
         __builtin_cpu_supports("avx512vbmi2");
}

bool cpu_has_avx512_bf16() { return cpu_has_avx512() && __builtin_cpu_supports("avx512bf16"); }

// The tiles of AMX need the system's leave, which it gives a process and its children once.
bool cpu_has_amx() {
#if defined(__linux__) && defined(SPARSEKERN_AMX)
  unsigned a, b, c, d = 0;
  constexpr unsigned kTiles = 1u << 24, kBf16 = 1u << 22;  // of edx, leaf 7
  if (!cpu_has_avx512_bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  if ((d & kTiles) == 0 || (d & kBf16) == 0) return false;
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool given = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return given;
#else
  return false;
#endif
}
#endif

// Best first. A new tier is its kernels, their declarations in kernels.h and its line here.
constexpr Tier kTiers[] = {
#if defined(__x86_64__)
#if defined(SPARSEKERN_AMX)
    {"amx",
     cpu_has_amx,
     {&linear_24_avx512[0], &linear_24_amx_f16, &linear_24_amx_bf16},
     linear_24_grad_avx512_bf16,
     zvc_avx512,
     format_24_avx512,
     tiles_24_avx512,
     &linear_24_grad_amx},
#endif
    {"avx512_bf16",
     cpu_has_avx512_bf16,
     {&linear_24_avx512[0], &linear_24_avx512[1], &linear_24_avx512_bf16},
     linear_24_grad_avx512_bf16,
     zvc_avx512,
     format_24_avx512,
     tiles_24_avx512},
    {"avx512",
     cpu_has_avx512,
     {&linear_24_avx512[0], &linear_24_avx512[1], &linear_24_avx512[2]},
     linear_24_grad_avx512,
     zvc_avx512,
     format_24_avx512,
     tiles_24_avx512},
    {"avx2",
     cpu_has_avx2,
     {&linear_24_avx2[0], &linear_24_avx2[1], &linear_24_avx2[2]},
     linear_24_grad_avx2,
     zvc_avx2,
     format_24_avx2,
     tiles_24_avx2},
#endif
    {"portable",
     [] { return true; },
     {&linear_24_portable[0], &linear_24_portable[1], &linear_24_portable[2]},
     linear_24_grad_portable,
     zvc_portable,
     format_24_portable,
     tiles_24_portable},
};

const Tier* best() {
  for (const Tier& tier : kTiers) {
    if (tier.supported()) return &tier;
  }
  return nullptr;  // not reached: the portable tier runs everywhere
}

std::atomic<const Tier*>& current() {
  static std::atomic<const Tier*> tier{best()};
  return tier;
}

// ---- fork ----

std::atomic<bool> forked{false};

#if defined(__unix__) || defined(__APPLE__)
[[maybe_unused]] const int watch_fork = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

// ---- caches ----

int64_t find_cache_bytes() {
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

}  // namespace

const Tier& tier() { return *current(); }

bool in_forked_child() { return forked; }

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Tier& tier : kTiers) {
    if (tier.supported()) names.push_back(tier.isa);
  }
  return names;
}

std::string isa() { return tier().isa; }

bool set_isa(const std::string& name) {
  for (const Tier& tier : kTiers) {
    if (name == tier.isa && tier.supported()) {
      current() = &tier;
      return true;
    }
  }
  return false;
}

std::vector<std::string> features() {
  std::vector<std::string> found;
#if defined(__x86_64__)
#define SPARSEKERN_FEATURE(name) \
  if (__builtin_cpu_supports(name)) found.push_back(name)
  SPARSEKERN_FEATURE("avx2");
  SPARSEKERN_FEATURE("fma");
  if (cpu_has_f16c()) found.push_back("f16c");
  SPARSEKERN_FEATURE("bmi2");
  SPARSEKERN_FEATURE("avx512f");
  SPARSEKERN_FEATURE("avx512bw");
  SPARSEKERN_FEATURE("avx512vl");
  SPARSEKERN_FEATURE("avx512vbmi");
  SPARSEKERN_FEATURE("avx512vbmi2");
  SPARSEKERN_FEATURE("avx512vnni");
  SPARSEKERN_FEATURE("avx512bf16");
  if (cpu_has_amx()) found.push_back("amx");
#undef SPARSEKERN_FEATURE
#elif defined(__aarch64__)
  found.push_back("neon");
#endif
  return found;
}

int64_t cache_bytes() {
  static const int64_t bytes = find_cache_bytes();
  return bytes;
}

void huge_pages([[maybe_unused]] void* p, [[maybe_unused]] size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto begin = (reinterpret_cast<uintptr_t>(p) + page - 1) & -page;
  const auto end = (reinterpret_cast<uintptr_t>(p) + bytes) & -page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

bool has_openmp() {
#ifdef _OPENMP
  return true;
#else
  return false;
#endif
}

bool sanitized() {
#if defined(__SANITIZE_ADDRESS__)
  return true;
#elif defined(__has_feature)
  return __has_feature(address_sanitizer);
#else
  return false;
#endif
}

}  // namespace sparsekern::cpu
