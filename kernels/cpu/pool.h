// A loop over pieces of work, taken one by one by the calling thread and by whichever worker comes by. Nobody has a share
// and nobody waits for a worker that has begun nothing: one whose core another process has taken finds all of it done.
#pragma once

#include <atomic>
#include <cstdint>
#include <type_traits>
#include <vector>

using RunPiece = void (*)(void* context, int64_t piece, int slot);

// As by_pieces, for two threads and more.
__attribute__((visibility("hidden"))) void run_pieces(int64_t n, int threads, RunPiece run, void* context);

namespace {

// f(i, slot) for all i < n, by at most `threads` threads; each has a slot of its own below that. Returns when all are
// done, and throws the first exception of any of them. The caller works on its own where another call has the workers,
// so f may call this again.
template <class F>
inline void by_pieces(int64_t n, int threads, F&& f) {
#ifdef LTEPASS_PIECES_BACKWARDS  // a test's build: what a piece takes from an earlier one is wrong in every run
  for (int64_t i = n; i-- > 0;) f(i, 0);
  return;
#endif
  if (threads <= 1 || n <= 1) {
    for (int64_t i = 0; i < n; i++) f(i, 0);
    return;
  }
  auto run = [](void* context, int64_t i, int slot) { (*static_cast<std::remove_reference_t<F>*>(context))(i, slot); };
  run_pieces(n, threads, run, &f);
}

// f(i) for all i < n: each thread goes through a run of its own in order, then helps with what is left of the others'.
template <class F>
inline void by_runs(int64_t n, int threads, F&& f) {
  if (threads <= 1) {
    for (int64_t i = 0; i < n; i++) f(i);
    return;
  }
  std::vector<std::atomic<int64_t>> taken(static_cast<size_t>(threads));
  // A piece is the right to one of the n, so that there is one left for each.
  by_pieces(n, threads, [&](int64_t, int slot) {
    for (int k = slot;; k++) {
      const int run = k % threads;
      const int64_t begin = n * run / threads, end = n * (run + 1) / threads;
      const int64_t i = begin + taken[size_t(run)].fetch_add(1, std::memory_order_relaxed);
      if (i < end) return f(i);
    }
  });
}

}  // namespace
