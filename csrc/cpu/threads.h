// The one place that starts threads. OpenMP, because torch's own kernels run on it: the process
// then has a single pool, and a worker that still spins after a torch kernel is the one that picks
// up ours.
#pragma once

#include <algorithm>
#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "../layout.h"

namespace sparsekern::cpu {

bool in_forked_child();  // dispatch.cpp

// Calls f(begin, end) on disjoint ranges that cover [0, n), on at most `threads` threads, in chunks
// of at least `grain`; every begin is a multiple of `align`. f must not throw.
template <class F>
void parallel_for(int64_t n, int64_t grain, [[maybe_unused]] int64_t align, int threads, F f) {
  if (n <= 0) return;
  [[maybe_unused]] const int64_t chunks =
      std::max<int64_t>(1, std::min<int64_t>(threads, n / std::max<int64_t>(grain, 1)));
#ifdef _OPENMP
  // A forked child inherits the record of a pool whose threads did not survive: waiting for them
  // would hang.
  if (chunks > 1 && !omp_in_parallel() && !in_forked_child()) {
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

// Calls f(team) on each thread of one team of `team` threads, at most `threads` of them, which share
// out the work themselves: f on one thread must be able to do all of it, as a team may be smaller
// than was asked for and its threads may start late. f must not throw.
template <class F>
void parallel_team([[maybe_unused]] int threads, F f) {
#ifdef _OPENMP
  if (threads > 1 && !omp_in_parallel() && !in_forked_child()) {
#pragma omp parallel num_threads(threads)
    f(omp_get_num_threads());
    return;
  }
#endif
  f(1);
}

}  // namespace sparsekern::cpu
