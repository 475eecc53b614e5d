// Which instruction-set tier runs here, and what the machine is.
#include <atomic>
#include <string>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "kernels.h"
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
#endif

// Best first. A new tier is its kernels, their declarations in kernels.h and its line here.
constexpr Tier kTiers[] = {
#if defined(__x86_64__)
    {"avx512_bf16",
     cpu_has_avx512_bf16,
     {&linear_24_avx512[0], &linear_24_avx512[1], &linear_24_avx512_bf16},
     zvc_avx512},
    {"avx512",
     cpu_has_avx512,
     {&linear_24_avx512[0], &linear_24_avx512[1], &linear_24_avx512[2]},
     zvc_avx512},
    {"avx2", cpu_has_avx2, {&linear_24_avx2[0], &linear_24_avx2[1], &linear_24_avx2[2]}, zvc_avx2},
#endif
    {"portable",
     [] { return true; },
     {&linear_24_portable[0], &linear_24_portable[1], &linear_24_portable[2]},
     zvc_portable},
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
#undef SPARSEKERN_FEATURE
#elif defined(__aarch64__)
  found.push_back("neon");
#endif
  return found;
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
