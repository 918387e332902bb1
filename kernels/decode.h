// One token: read every active weight once, at the speed of memory. One parallel region:
//   router over all experts | up (and gate) over the active neurons | down over the output columns
// Each number is computed by one thread in one order, so the result does not even depend on the thread count.
#pragma once

#include <omp.h>

#include "problem.h"

namespace {

// Eight weight rows at a time: one row's stream keeps a core at 9-11 GB/s, eight at 13-14 (Ice Lake Xeon 2.8 GHz,
// 4096 x 11008 fp32, cold); fewer rows only at the end of a list.
constexpr int ROWS = 8;
constexpr int PREFETCH_BYTES = 512;  // ahead in each row: +5 % on one thread at 256-1024, slower from 2048 (same machine)

// out[r] = rows[r] . x, x padded with zeros to whole vectors.
template <class E, int R>
inline void dot_rows(const typename E::T* const* rows, const float* x, int64_t n, float* out) {
  constexpr int AHEAD = PREFETCH_BYTES / sizeof(typename E::T);
  vf acc[R] = {};
  int64_t k = 0;
  for (; k + W <= n; k += W) {
    const vf xv = load(x + k);
    for (int r = 0; r < R; r++) {
      __builtin_prefetch(rows[r] + k + AHEAD, 0, 2);
      acc[r] += E::load(rows[r] + k) * xv;
    }
  }
  if (k < n)
    for (int r = 0; r < R; r++) acc[r] += load_part<E>(rows[r] + k, n - k) * load(x + k);
  for (int r = 0; r < R; r++) out[r] = hsum(acc[r]);
}

// y[k] += sum over r of h[r] * rows[r][k]
template <class E, int R>
inline void add_rows(const typename E::T* const* rows, const float* h, float* y, int64_t n) {
  constexpr int AHEAD = PREFETCH_BYTES / sizeof(typename E::T);
  int64_t k = 0;
  for (; k + W <= n; k += W) {
    vf acc = load(y + k);
    for (int r = 0; r < R; r++) {
      __builtin_prefetch(rows[r] + k + AHEAD, 0, 2);
      acc += splat(h[r]) * E::load(rows[r] + k);
    }
    store(y + k, acc);
  }
  if (k < n) {
    vf acc = load_part<F32>(y + k, n - k);
    for (int r = 0; r < R; r++) acc += splat(h[r]) * load_part<E>(rows[r] + k, n - k);
    store_part(y + k, acc, n - k);
  }
}

// Calls f<8>, then f<4>, f<2>, f<1>, for i in [begin, end).
template <class F>
inline void by_rows(int64_t begin, int64_t end, F&& f) {
  int64_t i = begin;
  for (; i + 8 <= end; i += 8) f.template operator()<8>(i);
  if (i + 4 <= end) f.template operator()<4>(i), i += 4;
  if (i + 2 <= end) f.template operator()<2>(i), i += 2;
  if (i < end) f.template operator()<1>(i);
}

// out[i] = row(i) . x for i in [begin, end)
template <class E, class Row>
inline void dot_list(Row&& row, int64_t begin, int64_t end, const float* x, int64_t n, float* out) {
  by_rows(begin, end, [&]<int R>(int64_t i) {
    const typename E::T* rows[R];
    for (int r = 0; r < R; r++) rows[r] = row(i + r);
    dot_rows<E, R>(rows, x, n, out + i);
  });
}

template <class E, class Row>
inline void add_list(Row&& row, int64_t begin, int64_t end, const float* h, float* y, int64_t n) {
  by_rows(begin, end, [&]<int R>(int64_t i) {
    const typename E::T* rows[R];
    for (int r = 0; r < R; r++) rows[r] = row(i + r);
    add_rows<E, R>(rows, h + i, y, n);
  });
}

// The same two sums where the weight is stored the other way round, so that only stretches of a row are wanted:
// expert e is elements [e * group, (e + 1) * group) of every row. Slower (short stretches), and copies nothing.
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

template <class E, int R>
inline void add_stretches(const typename E::T* const* rows, const float* x, const int32_t* experts, int64_t first,
                          int64_t last, int64_t group, float* h) {
  for (int64_t a = first; a < last; a++) {
    const typename E::T* from[R];
    for (int r = 0; r < R; r++) {
      from[r] = rows[r] + experts[a] * group;
      if (a + 4 < last) __builtin_prefetch(rows[r] + experts[a + 4] * group, 0, 2);
    }
    add_rows<E, R>(from, x, h + a * group, group);
  }
}

// The decision: active experts in ascending order, and their neurons.
struct Active {
  int32_t *experts, *neurons;
  int64_t n_experts = 0, n_neurons = 0;
  static size_t bytes(const Problem& p) {
    return Scratch::bytes_for<int32_t>(p.n_experts) + Scratch::bytes_for<int32_t>(p.d_ff);
  }
  Active(const Problem& p, const float* logits, char* memory)
      : experts(reinterpret_cast<int32_t*>(memory)),
        neurons(reinterpret_cast<int32_t*>(memory + Scratch::bytes_for<int32_t>(p.n_experts))) {
    for (int64_t e = 0; e < p.n_experts; e++) {
      if (!(logits[e] + (p.router_bias ? p.router_bias[e] : 0.0f) > p.threshold)) continue;
      experts[n_experts++] = int32_t(e);
      for (int64_t j = 0; j < p.group; j++) neurons[n_neurons++] = int32_t(e * p.group + j);
    }
  }
};

// h[i] = weight[neuron i of the list] . x for i in [begin, end)
template <class E>
inline void project(const Matrix& w, const Active& active, int64_t begin, int64_t end, int64_t group, const float* x,
                    int64_t d_model, float* h) {
  if (w.col == 1) {
    auto row = [&](int64_t i) { return w.at<E>(active.neurons[i], 0); };
    dot_list<E>(row, begin, end, x, d_model, h);
    return;
  }
  std::fill(h + begin, h + end, 0.0f);  // whole experts here, see decode()
  by_rows(0, d_model, [&]<int R>(int64_t k) {
    const typename E::T* rows[R];
    for (int r = 0; r < R; r++) rows[r] = w.at<E>(0, k + r);
    add_stretches<E, R>(rows, x + k, active.experts, begin / group, end / group, group, h);
  });
}

template <class E>
inline void project_down(const Problem& p, const Active& active, const float* h, float* y, int64_t begin, int64_t end) {
  for (int64_t o = begin; o < end; o++) y[o] = bias_at<E>(p.down_bias, o);
  if (p.down.row == 1) {
    auto row = [&](int64_t i) { return p.down.at<E>(begin, active.neurons[i]); };
    add_list<E>(row, 0, active.n_neurons, h, y + begin, end - begin);
  } else {
    for (int64_t o = begin; o < end; o++)
      y[o] += dot_stretches<E>(p.down.at<E>(o, 0), active.experts, active.n_experts, p.group, h);
  }
}

template <class E>
void decode(const Problem& p) {
  Scratch& s = scratch();
  const int64_t padded = round_up(p.d_model, W);
  s.reserve(Scratch::bytes_for<float>(padded) + Scratch::bytes_for<float>(p.n_experts) +
            2 * Scratch::bytes_for<float>(p.d_ff) + Scratch::bytes_for<float>(p.d_out) +
            p.threads * Active::bytes(p));
  float* x = s.take<float>(padded);
  float* logits = s.take<float>(p.n_experts);
  float* h = s.take<float>(p.d_ff);
  float* gated = s.take<float>(p.d_ff);
  float* y = std::is_same_v<E, F32> ? static_cast<float*>(p.y) : s.take<float>(p.d_out);
  char* lists = s.take<char>(p.threads * int64_t(Active::bytes(p)));
  const bool whole_experts = p.up.col != 1 || (p.gate.data && p.gate.col != 1);

  widen<E>(static_cast<const typename E::T*>(p.x), x, p.d_model);
  std::fill(x + p.d_model, x + padded, 0.0f);

#pragma omp parallel num_threads(p.threads) if (p.threads > 1)
  {
    const int t = omp_get_thread_num(), of = omp_get_num_threads();
    const auto [e0, e1] = share(p.n_experts, ROWS, t, of);
    dot_list<F32>([&](int64_t e) { return p.router.at<F32>(e, 0); }, e0, e1, x, p.d_model, logits);
#pragma omp barrier
    // Every thread makes the same list for itself: cheaper than a second barrier.
    const Active active(p, logits, lists + t * Active::bytes(p));
    const auto [a, b] = share(active.n_neurons, whole_experts ? p.group : ROWS, t, of);
    project<E>(p.up, active, a, b, p.group, x, p.d_model, h);
    if (p.gate.data) project<E>(p.gate, active, a, b, p.group, x, p.d_model, gated);
    for (int64_t i = a; i < b; i++) {
      h[i] += bias_at<E>(p.up_bias, active.neurons[i]);
      if (p.gate.data) gated[i] += bias_at<E>(p.gate_bias, active.neurons[i]);
    }
    if (b > a) activate_row(p.act, p.gate.data ? gated + a : nullptr, h + a, b - a);
#pragma omp barrier
    const auto [o0, o1] = share(p.d_out, 32, t, of);  // 32 elements: threads write whole cache lines
    project_down<E>(p, active, h, y, o0, o1);
    if (!std::is_same_v<E, F32>)
      for (int64_t o = o0; o < o1; o++) static_cast<typename E::T*>(p.y)[o] = E::from_float(y[o]);
    if (t == 0 && p.mask) {
      std::fill(p.mask, p.mask + p.n_experts, uint8_t(0));
      for (int64_t i = 0; i < active.n_experts; i++) p.mask[active.experts[i]] = 1;
    }
  }
}

}  // namespace
