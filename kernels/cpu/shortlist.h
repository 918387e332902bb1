// The largest outputs of a linear that was computed from 4 bits: which they are, and the same outputs from 8 bits.
#pragma once

#include <functional>

#include "pool.h"
#include "quantised.h"

namespace {

// Places of the outputs that are not below the `rows`-th largest of n, in ascending order; none where one is a NaN.
// No more than a few are sorted: of the largest of each run of outputs, the `rows`-th is a number that as many reach.
template <class E>
inline std::vector<int32_t> largest(const typename E::T* y, int64_t n, int64_t rows) {
  constexpr int64_t RUN = 64;
  rows = std::min(rows, n);
  const int64_t runs = (n + RUN - 1) / RUN;
  std::vector<float> most(static_cast<size_t>(runs));
  vi nans = {};
  for (int64_t r = 0; r < runs; r++) {
    vf top = splat(-std::numeric_limits<float>::infinity());
    for (int64_t i = r * RUN; i < std::min((r + 1) * RUN, n); i += W) {
      vf values = i + W <= n ? E::load(y + i) : top;
      if (i + W > n) {
        float last[W];
        store(last, top);
        for (int64_t k = i; k < n; k++) last[k - i] = E::to_float(y[k]);
        values = load(last);
      }
      nans |= values != values;
      top = select(values > top, values, top);
    }
    float lanes[W];
    store(lanes, top);
    most[size_t(r)] = *std::max_element(lanes, lanes + W);
  }
  std::vector<int32_t> found;
  for (int i = 0; i < W; i++)
    if (nans[i]) return found;
  auto nth = [&](std::vector<float> v) {
    std::nth_element(v.begin(), v.begin() + (rows - 1), v.end(), std::greater<>());
    return v[size_t(rows - 1)];
  };
  const float reached = runs < rows ? -std::numeric_limits<float>::infinity() : nth(most);
  std::vector<float> values;
  for (int64_t r = 0; r < runs; r++) {
    if (most[size_t(r)] < reached) continue;
    for (int64_t i = r * RUN; i < std::min((r + 1) * RUN, n); i++)
      if (const float value = E::to_float(y[i]); value >= reached) found.push_back(int32_t(i)), values.push_back(value);
  }
  const float least = nth(values);
  size_t kept = 0;
  for (size_t i = 0; i < found.size(); i++)
    if (values[i] >= least) found[kept++] = found[i];
  found.resize(kept);
  return found;
}

// y [tokens, d_out], computed from 4 bits: of each token the largest outputs again, by l.
template <class E>
void refine(Int8Linear l, const typename E::T* x, int64_t tokens, int64_t rows, const void* bias, typename E::T* y,
            int threads) {
  constexpr int64_t PIECE_ROWS = 32;
  const int64_t d_out = l.weight.count;
  for (int64_t token = 0; token < tokens; token++, x += l.d_in, y += d_out) {
    const std::vector<int32_t> list = largest<E>(y, d_out, rows);
    const auto count = int64_t(list.size());
    scratch().reserve(l.bytes(1));
    l.reserve(1);
    l.template lay<E>(0, x);
    l.only(list.data(), count);
    by_pieces((count + PIECE_ROWS - 1) / PIECE_ROWS, threads, [&](int64_t piece, int) {
      const int64_t begin = piece * PIECE_ROWS, end = std::min(begin + PIECE_ROWS, count);
      const int64_t lane = (end - begin + LANES - 1) / LANES;
      for (int64_t first = begin; first < begin + lane; first++) {
        Fetch fetch{{}, 0, l.weight.bytes};
        l.weight.at(first + 1, lane, fetch.rows);
        float sums[LANES];
        l.template tile<1>(0, first, lane, fetch, sums);
        for (int64_t n = 0, i = first; n < LANES && i < end; n++, i += lane)
          y[list[size_t(i)]] = E::from_float(l.finish(sums[n], i) + bias_at<E>(bias, list[size_t(i)]));
      }
    });
  }
}

}  // namespace
