// The workers behind by_pieces. One call is served at a time; a word holds its number and how many pieces nobody has
// begun, so that a worker which takes one by compare-and-swap has it of the call it looked at, and of no later one.

#include "pool.h"

#include <omp.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <exception>
#include <system_error>
#include <thread>
#include <utility>

#ifndef BEFORE_TAKING
#define BEFORE_TAKING(slot)  // tests put a worker to sleep here
#endif

namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::microseconds;
constexpr microseconds WATCH(5000);   // that an idle worker looks out for the next call, as OpenMP's threads do,
constexpr microseconds CROWDED(50);   // and where there are more threads than cores
constexpr microseconds PATIENCE(50);  // for a piece that is being worked on, which takes less
constexpr int LOOKS = 64;  // before the core is offered to others
constexpr int MOST = 256;  // threads

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Looks until ready() or for `time`, and lets others have the core meanwhile. Returns ready().
template <class Ready>
inline bool look(microseconds time, Ready&& ready) {
  const auto end = Clock::now() + time;
  do {
    for (int i = 0; i < LOOKS; i++) {
      if (ready()) return true;
      relax();
    }
    sched_yield();
  } while (Clock::now() < end);
  return ready();
}

struct alignas(128) Worker {
  std::atomic<uint32_t> asleep{0};
};

struct Pool {
  std::atomic<bool> taken{false};             // by the call that is served
  alignas(128) std::atomic<uint64_t> left{0};  // its number << 32 | pieces that nobody has begun
  alignas(128) std::atomic<uint32_t> done{0};
  alignas(128) std::atomic<int> threads{0};
  // Read by whoever has a piece of the call, which does not end before that piece.
  uint32_t n = 0;
  RunPiece run = nullptr;
  void* context = nullptr;
  std::atomic<bool> failed{false};
  std::exception_ptr thrown;
  int started = 0;  // workers, slots 1 to this
  std::atomic<microseconds> watch{WATCH};
  Worker workers[MOST];

  bool open_to(int slot) const {
    return uint32_t(left.load(std::memory_order_seq_cst)) && slot < threads.load(std::memory_order_relaxed);
  }

  // Works on one piece, if there is any left.
  bool take(int slot) {
    uint64_t seen = left.load(std::memory_order_acquire);
    do {
      if (!uint32_t(seen) || slot >= threads.load(std::memory_order_relaxed)) return false;
    } while (!left.compare_exchange_weak(seen, seen - 1, std::memory_order_acq_rel, std::memory_order_acquire));
    const uint32_t all = n;
    try {
      if (!failed.load(std::memory_order_relaxed)) run(context, all - uint32_t(seen), slot);
    } catch (...) {
      if (!failed.exchange(true)) thrown = std::current_exception();
    }
    if (done.fetch_add(1, std::memory_order_acq_rel) + 1 == all) done.notify_one();  // the call may be over from here
    return true;
  }

  void work(int slot) {
    std::atomic<uint32_t>& asleep = workers[slot].asleep;
    for (;;) {
      BEFORE_TAKING(slot);
      while (take(slot)) continue;
      if (look(watch.load(std::memory_order_relaxed), [&] { return open_to(slot); })) continue;
      asleep.store(1, std::memory_order_seq_cst);  // before it looks once more: serve() looks here after it has opened
      if (!open_to(slot)) asleep.wait(1);
      asleep.store(0, std::memory_order_relaxed);
    }
  }

  void start(int count) {
    if (started >= count) return;
    const int first = started + 1;
    started = count;
    if (count >= int(std::thread::hardware_concurrency())) watch = CROWDED;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);  // signals are the program's own threads'
    try {
      // Through OpenMP, which counts its threads: from more than there are cores on, its own wait by sleeping. Else they
      // would spin for milliseconds after each of torch's own parallel loops, on the cores of ours.
      std::thread([this, first, count] {
#pragma omp parallel num_threads(count - first + 2)
        if (const int t = omp_get_thread_num())
          work(first + t - 1);
        else
          for (;;) ::pause();
      }).detach();
    } catch (const std::system_error&) {
      // as many threads as there may be: calls go on without
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  void serve(uint32_t pieces, int most, RunPiece f, void* with) {
    start(most - 1);
    n = pieces, run = f, context = with;
    done.store(0, std::memory_order_relaxed);
    threads.store(most, std::memory_order_relaxed);
    const uint64_t number = (left.load(std::memory_order_relaxed) >> 32) + 1;
    left.store(number << 32 | pieces, std::memory_order_seq_cst);
    for (int slot = 1; slot < most; slot++) {
      std::atomic<uint32_t>& asleep = workers[slot].asleep;
      if (asleep.load(std::memory_order_seq_cst) && asleep.exchange(0)) asleep.notify_one();
    }
    while (take(0)) continue;
    auto over = [&] { return done.load(std::memory_order_acquire) == pieces; };
    if (look(PATIENCE, over)) return;
    // Asleep, so that a worker whose core was taken may go on on this one.
    for (uint32_t seen; (seen = done.load(std::memory_order_acquire)) != pieces;) done.wait(seen);
  }
};

Pool* pool = new Pool;  // never deleted: workers live as long as the process
// A forked child has none of the workers, and the call that was served is not its own.
const int at_fork = pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });

}  // namespace

void run_pieces(int64_t n, int threads, RunPiece run, void* context) {
  Pool& p = *pool;
  if (n > int64_t(UINT32_MAX) || p.taken.exchange(true, std::memory_order_acquire)) {
    for (int64_t i = 0; i < n; i++) run(context, i, 0);
    return;
  }
  p.serve(uint32_t(n), int(std::min<int64_t>({n, threads, MOST})), run, context);
  const std::exception_ptr thrown = std::exchange(p.thrown, nullptr);
  p.failed.store(false, std::memory_order_relaxed);
  p.taken.store(false, std::memory_order_release);
  if (thrown) std::rethrow_exception(thrown);
}
