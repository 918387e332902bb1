// Rows of a weight read once, several side by side, at the speed of memory: products with a vector, and their sums.
#pragma once

#include "problem.h"

namespace {

// Walks R rows of n elements in cache lines, and fetches each AHEAD bytes before the arithmetic; past its end, the head of
// the row that follows in its lane. step(k) handles STEP elements at k, rest(k) the last n % STEP.
template <class E, int R, class Step, class Rest>
inline void walk(const typename E::T* const* rows, const typename E::T* const* next, int64_t n, Step&& step, Rest&& rest) {
  constexpr int64_t LINE = std::max<int64_t>(64 / sizeof(typename E::T), STEP<E>);
  const int64_t ahead = std::min<int64_t>(AHEAD / int64_t(sizeof(typename E::T)), n);
  auto stretch = [&](int64_t from, int64_t to, const typename E::T* const* target, int64_t shift) {
    const typename E::T* fetch[R];
    for (int r = 0; r < R; r++) fetch[r] = target[r] + shift;
    int64_t k = from;
    for (; k + LINE <= to; k += LINE) {
      for (int r = 0; r < R; r++) __builtin_prefetch(fetch[r] + k, 0, 2);
      for (int64_t u = 0; u < LINE; u += STEP<E>) step(k + u);
    }
    return k;
  };
  int64_t k = stretch(0, n - ahead, rows, ahead);
  k = stretch(k, n, next, ahead - n);
  for (; k + STEP<E> <= n; k += STEP<E>) step(k);
  if (k < n) rest(k);
}

// out[r] = rows[r] . x, x in the order of load_parts, padded with zeros to whole STEPs.
template <class E, int R>
inline void dot_rows(const typename E::T* const* rows, const typename E::T* const* next, const float* x, int64_t n, float* out) {
  vf acc[R] = {};
  auto add = [&](int64_t k, auto&& parts) {
    vf xv[E::PARTS], wv[E::PARTS];
    for (int i = 0; i < E::PARTS; i++) xv[i] = load(x + k + i * W);
    for (int r = 0; r < R; r++) {
      parts(rows[r] + k, wv);
      for (int i = 0; i < E::PARTS; i++) acc[r] += wv[i] * xv[i];
    }
  };
  auto step = [&](int64_t k) { add(k, E::load_parts); };
  auto rest = [&](int64_t k) {
    add(k, [&](const typename E::T* row, vf* wv) { load_last_parts<E>(row, n - k, wv); });
  };
  walk<E, R>(rows, next, n, step, rest);
  for (int r = 0; r < R; r++) out[r] = hsum(acc[r]);
}

// y[0 .. STEP) += sum over r of h[r] * rows[r][k .. k + STEP), rows of n elements; y in the order of load_parts.
template <class E, int R>
inline void add_step(const typename E::T* const* rows, int64_t k, const vf* h, float* y, int64_t n) {
  vf acc[E::PARTS], wv[E::PARTS];
  for (int i = 0; i < E::PARTS; i++) acc[i] = load(y + i * W);
  for (int r = 0; r < R; r++) {
    if (k + STEP<E> <= n)
      E::load_parts(rows[r] + k, wv);
    else
      load_last_parts<E>(rows[r] + k, n - k, wv);
    for (int i = 0; i < E::PARTS; i++) acc[i] += h[r] * wv[i];
  }
  for (int i = 0; i < E::PARTS; i++) store(y + i * W, acc[i]);
}

// y[k] += sum over r of h[r] * rows[r][k], y in the order of load_parts.
template <class E, int R>
inline void add_rows(const typename E::T* const* rows, const typename E::T* const* next, const float* h, float* y, int64_t n) {
  vf hv[R];
  for (int r = 0; r < R; r++) hv[r] = splat(h[r]);
  auto add = [&](float* to, int64_t k, auto&& parts) {
    vf acc[E::PARTS], wv[E::PARTS];
    for (int i = 0; i < E::PARTS; i++) acc[i] = load(to + i * W);
    for (int r = 0; r < R; r++) {
      parts(rows[r] + k, wv);
      for (int i = 0; i < E::PARTS; i++) acc[i] += hv[r] * wv[i];
    }
    for (int i = 0; i < E::PARTS; i++) store(to + i * W, acc[i]);
  };
  auto step = [&](int64_t k) { add(y + k, k, E::load_parts); };
  auto rest = [&](int64_t k) {
    float last[STEP<E>] = {};
    const size_t bytes = size_t(E::PARTS == 1 ? n - k : STEP<E>) * 4;  // y is padded where its order is another
    std::memcpy(last, y + k, bytes);
    add(last, k, [&](const typename E::T* row, vf* wv) { load_last_parts<E>(row, n - k, wv); });
    std::memcpy(y + k, last, bytes);
  };
  walk<E, R>(rows, next, n, step, rest);
}

// Calls f<R>(i, lane, rows, next) for the list [begin, end): R rows at i, i + lane, i + 2 lane ... and those after them.
// ROWS lanes of neighbouring rows, so that each lane is one long stream for the hardware; then what is left over.
template <class E, class Row, class F>
inline void by_rows(Row&& row, int64_t begin, int64_t end, F&& f) {
  auto lanes = [&]<int R>(int64_t from, int64_t lane) {
    const typename E::T *rows[R], *next[R];
    auto fill = [&](const typename E::T** to, int64_t i) {
      for (int r = 0; r < R; r++) to[r] = row(std::min(i + r * lane, end - 1));
    };
    fill(rows, from);
    for (int64_t i = from; i < from + lane; i++) {
      fill(next, i + 1);
      f.template operator()<R>(i, lane, rows, next);
      std::copy(next, next + R, rows);
    }
  };
  const int64_t lane = (end - begin) / ROWS;
  if (lane) lanes.template operator()<ROWS>(begin, lane);
  int64_t i = begin + ROWS * lane;
  if (i + 4 <= end) lanes.template operator()<4>(i, 1), i += 4;
  if (i + 2 <= end) lanes.template operator()<2>(i, 1), i += 2;
  if (i < end) lanes.template operator()<1>(i, 1);
}

// out[i] = row(i) . x for i in [begin, end)
template <class E, class Row>
inline void dot_list(Row&& row, int64_t begin, int64_t end, const float* x, int64_t n, float* out) {
  by_rows<E>(row, begin, end, [&]<int R>(int64_t i, int64_t lane, auto rows, auto next) {
    float dots[R];
    dot_rows<E, R>(rows, next, x, n, dots);
    for (int r = 0; r < R; r++) out[i + r * lane] = dots[r];
  });
}

// y += the sum of h[at[i]] * row(i) over i in [0, count)
template <class E, class Row>
inline void add_list(Row&& row, const int32_t* at, int64_t count, const float* h, float* y, int64_t n) {
  by_rows<E>(row, 0, count, [&]<int R>(int64_t i, int64_t lane, auto rows, auto next) {
    float factors[R];
    for (int r = 0; r < R; r++) factors[r] = h[at[i + r * lane]];
    add_rows<E, R>(rows, next, factors, y, n);
  });
}

// A dot product where the weight is stored the other way round, so that only stretches of a row are wanted: expert e is
// elements [e * group, (e + 1) * group) of every row. Slower (short stretches), and copies nothing.
template <class E>
inline float dot_stretches(const typename E::T* row, const int32_t* experts, int64_t count, int64_t group, const float* h) {
  vf acc = {};
  for (int64_t a = 0; a < count; a++) {
    const typename E::T* w = row + experts[a] * group;
    if (a + 8 < count) __builtin_prefetch(row + experts[a + 8] * group, 0, 2);
    int64_t k = 0;
    for (; k + W <= group; k += W) acc += E::load(w + k) * load(h + a * group + k);
    if (k < group) acc += load_part<E>(w + k, group - k) * load_part<F32>(h + a * group + k, group - k);
  }
  return hsum(acc);
}

}  // namespace
