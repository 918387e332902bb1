// Built and run by test_pool.py: `pool_driver CASE` ends with 0 where the workers behave. A test may hold a worker back.
#include <atomic>
#include <condition_variable>
#include <mutex>

namespace {
std::mutex mutex;
std::condition_variable changed;
std::atomic<int> held{0};  // this slot's worker goes no further
std::atomic<int> stands{0};

void before_taking(int slot) {
  std::unique_lock<std::mutex> lock(mutex);
  if (slot != held) return;
  stands = slot;
  changed.wait(lock, [&] { return slot != held; });
  stands = 0;
}
}  // namespace

#define BEFORE_TAKING(slot) before_taking(slot)
#include "pool.cpp"

#include <sys/wait.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

#define CHECK(condition) \
  if (!(condition)) std::fprintf(stderr, "line %d: %s\n", __LINE__, #condition), std::_Exit(1)

struct Seen {
  std::vector<std::atomic<int>> times;
  std::vector<std::atomic<bool>> busy;  // slots
  explicit Seen(int64_t n, int threads) : times(size_t(n)), busy(size_t(threads)) {}
  void piece(int64_t i, int slot, const std::function<void()>& work = [] {}) {
    CHECK(slot >= 0 && slot < int(busy.size()));
    CHECK(!busy[size_t(slot)].exchange(true));
    times[size_t(i)]++;
    work();
    busy[size_t(slot)] = false;
  }
  bool all_once() const {
    for (const auto& t : times)
      if (t != 1) return false;
    return true;
  }
};

void call(int64_t n, int threads, const std::function<void()>& work = [] {}) {
  Seen seen(n, threads);
  by_pieces(n, threads, [&](int64_t i, int slot) { seen.piece(i, slot, work); });
  CHECK(seen.all_once());
  for (auto& t : seen.times) t = 0;
  by_runs(n, threads, [&](int64_t i) { seen.times[size_t(i)]++; });
  CHECK(seen.all_once());
}

// Until the worker of this slot has taken a piece: it does so some time, however busy the machine is.
void until_it_works(int slot) {
  for (std::atomic<bool> worked{false}; !worked;)
    by_pieces(64, slot + 1, [&](int64_t, int by) {
      if (by == slot) worked = true;
      sched_yield();
    });
}

void any_counts() {
  std::mt19937 random(1);
  for (int i = 0; i < 3000; i++) call(random() % (i % 10 ? 12 : 500), 1 + int(random() % 9));
}

void nested() {
  for (int i = 0; i < 200; i++) call(7, 3, [] { call(5, 4, [] { call(3, 2); }); });
}

void callers() {
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < 6; t++)
    threads.emplace_back([t] {
      std::mt19937 random(t);
      for (int i = 0; i < 500; i++) call(random() % 30, 1 + int(random() % 4), [&] { if (t % 2) call(2, 2); });
    });
  for (auto& t : threads) t.join();
}

void exceptions() {
  std::mt19937 random(2);
  for (int i = 0; i < 500; i++) {
    const int64_t n = 1 + random() % 20, bad = random() % n;
    const int threads = 1 + int(random() % 4);
    std::atomic<int> running{0};
    std::string what;
    try {
      by_pieces(n, threads, [&](int64_t piece, int) {
        running++;
        if (piece == bad) {
          running--;
          throw std::runtime_error(std::to_string(bad));
        }
        running--;
      });
    } catch (const std::runtime_error& error) {
      what = error.what();
    }
    CHECK(what == std::to_string(bad));
    CHECK(running == 0);
    call(n, threads);
  }
}

void late_worker() {
  until_it_works(1);
  held = 1;
  while (!stands) call(20, 2);  // it comes by the place where it is held
  for (int i = 0; i < 100; i++) call(50, 2);
  call(50, 4);  // others work on
  {
    std::lock_guard<std::mutex> lock(mutex);
    held = 0;
  }
  changed.notify_all();
  until_it_works(1);
}

void sleeping_worker() {
  for (int i = 0; i < 20; i++) {
    until_it_works(2);
    while (!pool->workers[1].asleep || !pool->workers[2].asleep) sched_yield();
    call(1 + i, 3);
  }
  until_it_works(1);
}

// The call ends after the last piece that was begun, though its worker takes a while.
void slow_piece() {
  for (int i = 0; i < 20; i++) {
    std::atomic<bool> ended{false}, begun{false};
    by_pieces(2, 2, [&](int64_t, int slot) {
      if (slot == 0) {
        for (int k = 0; k < 1000 && !begun; k++) sched_yield();
        return;
      }
      begun = true;
      std::this_thread::sleep_for(std::chrono::milliseconds(2));  // longer than anybody watches
      ended = true;
    });
    CHECK(ended == begun);
  }
}

int status_of(pid_t child) {
  int status = 0;
  CHECK(waitpid(child, &status, 0) == child);
  return status;
}

void forks() {
  std::atomic<bool> stop{false};
  std::thread other([&] { while (!stop) call(40, 3); });
  for (int i = 0; i < 30; i++) {
    call(30, 3);
    const pid_t child = fork();
    if (!child) {
      until_it_works(1);
      const pid_t grandchild = fork();
      if (!grandchild) call(30, 3), std::_Exit(7);
      CHECK(WEXITSTATUS(status_of(grandchild)) == 7);
      std::exit(8);
    }
    CHECK(WEXITSTATUS(status_of(child)) == 8);
  }
  stop = true;
  other.join();
}

void ends_at_once() {
  until_it_works(2);
  std::thread([] { for (;;) call(40, 3); }).detach();  // and in the middle of calls
}

void hears_no_signal() {
  until_it_works(1);
  static std::atomic<int> heard{0};
  static const pthread_t own = pthread_self();
  std::signal(SIGUSR1, [](int) { heard += pthread_equal(own, pthread_self()) ? 1 : 1000; });
  sigset_t one;
  sigemptyset(&one), sigaddset(&one, SIGUSR1);
  pthread_sigmask(SIG_BLOCK, &one, nullptr);
  kill(getpid(), SIGUSR1);  // would go to a worker
  call(30, 2);
  CHECK(heard == 0);
  pthread_sigmask(SIG_UNBLOCK, &one, nullptr);
  CHECK(heard == 1);
}

}  // namespace

int main(int, char** argv) {
  const std::map<std::string, void (*)()> cases = {
      {"any_counts", any_counts}, {"nested", nested},
      {"callers", callers},       {"exceptions", exceptions},
      {"late_worker", late_worker}, {"sleeping_worker", sleeping_worker},
      {"slow_piece", slow_piece}, {"forks", forks},
      {"ends_at_once", ends_at_once}, {"hears_no_signal", hears_no_signal},
  };
  cases.at(argv[1])();
}
