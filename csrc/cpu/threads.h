// The one place that starts threads. OpenMP, because torch's own kernels run on it: the process
// then has a single pool, and a worker that still spins after a torch kernel is the one that picks
// up ours.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "../layout.h"

namespace sparsekern::cpu {

bool in_forked_child();  // dispatch.cpp

// Whether a call here runs on the calling thread alone: within a parallel region, or in a forked
// child, which inherits the record of a pool whose threads did not survive: waiting for them would
// hang.
inline bool one_thread_only() {
#ifdef _OPENMP
  return omp_in_parallel() || in_forked_child();
#else
  return true;
#endif
}

// Calls f(begin, end) on disjoint ranges that cover [0, n), on at most `threads` threads, in chunks
// of at least `grain`; every begin is a multiple of `align`. f must not throw.
template <class F>
void parallel_for(int64_t n, int64_t grain, [[maybe_unused]] int64_t align, int threads, F f) {
  if (n <= 0) return;
  [[maybe_unused]] const int64_t chunks =
      std::max<int64_t>(1, std::min<int64_t>(threads, n / std::max<int64_t>(grain, 1)));
#ifdef _OPENMP
  if (chunks > 1 && !one_thread_only()) {
#pragma omp parallel num_threads(static_cast<int>(chunks))
    {
      const int64_t team = omp_get_num_threads();
      const int64_t step = ceil_div(ceil_div(n, team), align) * align;
      const int64_t begin = std::min<int64_t>(n, step * omp_get_thread_num());
      const int64_t end = std::min<int64_t>(n, begin + step);
      if (begin < end) f(begin, end);
    }
    return;
  }
#endif
  f(int64_t{0}, n);
}

// Calls f(rank) on each thread of one team, of at most `threads` threads, which share out the work
// themselves. A team may be smaller than was asked for, down to one, and its threads may start
// late. f must not throw.
template <class F>
void parallel_team([[maybe_unused]] int threads, F f) {
#ifdef _OPENMP
  if (threads > 1 && !one_thread_only()) {
#pragma omp parallel num_threads(threads)
    f(omp_get_thread_num());
    return;
  }
#endif
  f(0);
}

// Numbers 0, 1, 2, ... handed to the threads of a team, and their turns, in that order. Who waits
// waits for lower numbers only, each held by a thread that runs, so a team of any size comes to its
// end.
class Turns {
 public:
  int64_t take() { return next_.fetch_add(1, std::memory_order_relaxed); }
  // What was written before pass(number - 1) is seen after wait(number).
  void wait(int64_t number) const {
    for (int spins = 0; now_.load(std::memory_order_acquire) != number; ++spins) {
      if (spins < kSpins) {
        relax();
      } else {
        std::this_thread::yield();  // more threads than processors: let the other one run
      }
    }
  }
  void pass(int64_t number) { now_.store(number + 1, std::memory_order_release); }

 private:
  static constexpr int kSpins = 1 << 12;  // tens of microseconds, a few blocks of work
  static void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<int64_t> now_{0};
};

}  // namespace sparsekern::cpu
