// How tiers' groups of neurons are shared by threads: sums of a run of groups are made by one thread in one order, and those
// of the runs are added in order, so that a token's result is the same beside any others and on any number of threads.
#pragma once

#include "columns.h"
#include "pool.h"

namespace {

constexpr int64_t TIER_TOKENS = 64;         // whose hidden units are kept at a time
constexpr int64_t TIER_NEURONS = 64;        // of a group: the rows that it asks for stay in L2 until they are read
constexpr int64_t TIER_RUNS = 32;           // of groups, whose sums are kept at most
constexpr int64_t RUN_GROUPS = 3;           // in one at least
constexpr int64_t PIECES_A_THREAD = 2;      // of runs, where there are several threads
constexpr int64_t SLICE_BYTES = 512 << 10;  // of down's codes, which several tokens read one after the other

class TierRuns {
 public:
  TierRuns(const Proxy& p, int64_t blocks)
      : d_model_(p.d_model), d_ff_(p.d_ff), blocks_(blocks), groups_((p.d_ff + TIER_NEURONS - 1) / TIER_NEURONS) {
    each_ = std::max((groups_ + TIER_RUNS - 1) / TIER_RUNS, RUN_GROUPS);
    runs_ = (groups_ + each_ - 1) / each_;
  }
  int64_t groups() const { return groups_; }
  size_t bytes() const { return Scratch::bytes_for<float>(runs_ * width()); }

  // One token. f(begin, end, sums_of): of groups [begin, end), whole runs of them; sums_of(g)[0 .. 32 blocks) are what the
  // run of g writes, 0 at first. y: [d_model]
  template <class E, class F>
  void one_token(int threads, Scratch& s, const void* bias, typename E::T* y, F&& f) const {
    float* sums = s.take<float>(runs_ * width());
    const int64_t pieces = threads == 1 ? 1 : std::min(runs_, PIECES_A_THREAD * threads);
    by_runs(pieces, threads, [&](int64_t i) {
      const int64_t begin = runs_ * i / pieces, end = runs_ * (i + 1) / pieces;
      std::fill(sums + begin * width(), sums + end * width(), 0.0f);
      f(begin * each_, std::min(end * each_, groups_), [&](int64_t g) { return sums + g / each_ * width(); });
    });
    const int64_t slice = slice_of((blocks_ + threads - 1) / threads), slices = (blocks_ + slice - 1) / slice;
    by_pieces(slices, runs_ * width() > WORTH_A_THREAD ? threads : 1, [&](int64_t i, int) {
      const int64_t b0 = i * slice, n = std::min(slice, blocks_ - b0);
      float total[MOST_BLOCKS * BLOCK] = {};
      for (int64_t run = 0; run < runs_; run++)
        for (int64_t o = 0; o < n * BLOCK; o++) total[o] += sums[run * width() + b0 * BLOCK + o];
      write<E>(b0, n, total, bias, y);
    });
  }

  // Many tokens. f(begin, end, token, b0, n, sum): sum[0 .. 32 n) += what groups [begin, end) write to blocks [b0, b0 + n).
  // y: [tokens, d_model]
  template <class E, class F>
  void many_tokens(int64_t tokens, int threads, const void* bias, typename E::T* y, F&& f) const {
    const int64_t slice = slice_of(SLICE_BYTES / (BLOCK / 2) / d_ff_), slices = (blocks_ + slice - 1) / slice;
    by_runs(slices * tokens, threads, [&](int64_t i) {
      const int64_t token = i % tokens, b0 = i / tokens * slice, n = std::min(slice, blocks_ - b0);
      float total[MOST_BLOCKS * BLOCK] = {};
      for (int64_t g = 0; g < groups_; g += each_) {
        float sum[MOST_BLOCKS * BLOCK] = {};
        f(g, std::min(g + each_, groups_), token, b0, n, sum);
        for (int64_t o = 0; o < n * BLOCK; o++) total[o] += sum[o];
      }
      write<E>(b0, n, total, bias, y + token * d_model_);
    });
  }

 private:
  int64_t width() const { return blocks_ * BLOCK; }
  static int64_t slice_of(int64_t blocks) { return std::clamp(round_up(blocks, LINE_BLOCKS), LINE_BLOCKS, MOST_BLOCKS); }
  template <class E>
  void write(int64_t b0, int64_t n, const float* sum, const void* bias, typename E::T* y) const {
    const int64_t first = b0 * BLOCK, end = std::min((b0 + n) * BLOCK, d_model_);
    for (int64_t o = first; o < end; o++) y[o] = E::from_float(sum[o - first] + bias_at<E>(bias, o));
  }
  int64_t d_model_, d_ff_, blocks_, groups_, each_, runs_;
};

}  // namespace
