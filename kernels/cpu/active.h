// One token's active neurons, and the products of their rows of up and gate with it.
#pragma once

#include "quantised.h"
#include "rows.h"

namespace {

// The decision: active experts in ascending order, and their neurons.
struct Active {
  int32_t *experts, *neurons, *live;
  int64_t n_experts = 0, n_neurons = 0, n_live = 0;
  static size_t bytes(const Problem& p) {
    return Scratch::bytes_for<int32_t>(p.n_experts) + 2 * Scratch::bytes_for<int32_t>(p.d_ff);
  }
  Active(const Problem& p, const float* logits, char* memory)
      : experts(reinterpret_cast<int32_t*>(memory)),
        neurons(reinterpret_cast<int32_t*>(memory + Scratch::bytes_for<int32_t>(p.n_experts))),
        live(neurons + Scratch::bytes_for<int32_t>(p.d_ff) / sizeof(int32_t)) {
    for (int64_t e = 0; e < p.n_experts; e++) {
      if (!(logits[e] + (p.router_bias ? p.router_bias[e] : 0.0f) > p.threshold)) continue;
      experts[n_experts++] = int32_t(e);
      for (int64_t j = 0; j < p.group; j++) neurons[n_neurons++] = int32_t(e * p.group + j);
    }
  }
  // Places in `neurons` whose hidden unit is not 0: a ReLU or a cut leaves few, and the others' rows of down add nothing.
  void find_live(const float* h) {
    for (int64_t i = 0; i < n_neurons; i++) {
      live[n_live] = int32_t(i);
      n_live += h[i] != 0.0f;
    }
  }
};

// x in its own order, in that of E::Stream, and where it is not 0, as routers or as up and gate see it.
struct Input {
  float *x, *placed;
  int32_t* live;
  int64_t n_live = 0;
};

// Up or gate stored with a row for each input: sums of the live inputs' rows, over the STEPs of a row in which experts
// [a0, a1) of the list have neurons. A small input's row is not read.
template <class E>
inline void project_by_inputs(const Matrix& w, const Active& active, int64_t a0, int64_t a1, int64_t group, int64_t d_ff,
                              const Input& in, float* wide, int32_t* steps, float* h) {
  using S = typename E::Stream;
  constexpr int64_t STEP_ = STEP<S>;
  int64_t n = 0;
  for (int64_t a = a0; a < a1; a++) {
    const int64_t first = active.experts[a] * group / STEP_, last = (active.experts[a] * group + group - 1) / STEP_;
    for (int64_t s = n && steps[n - 1] == first ? first + 1 : first; s <= last; s++) steps[n++] = int32_t(s);
  }
  std::fill(wide, wide + n * STEP_, 0.0f);
  constexpr int64_t AHEAD_STEPS = AHEAD / (STEP_ * int64_t(sizeof(typename E::T)));
  const int64_t turn = std::max<int64_t>(n - AHEAD_STEPS, 0);
  auto row = [&](int64_t i) { return w.at<E>(0, in.live[std::min(i, in.n_live - 1)]); };
  auto rows_of = [&]<int R>(int64_t i) {
    const typename E::T *rows[R], *next[R];
    vf factors[R];
    for (int r = 0; r < R; r++) rows[r] = row(i + r), next[r] = row(i + R + r), factors[r] = splat(in.x[in.live[i + r]]);
    auto stretch = [&](int64_t from, int64_t to, const typename E::T* const* fetch, int64_t shift) {
      for (int64_t s = from; s < to; s++) {
        const int64_t k = steps[s] * STEP_, ahead = steps[s + shift] * STEP_;
        for (int r = 0; r < R; r++) __builtin_prefetch(fetch[r] + ahead, 0, 2);
        add_step<S, R>(rows, k, factors, wide + s * STEP_, d_ff);
      }
    };
    stretch(0, turn, rows, n - turn);
    stretch(turn, n, next, -turn);
  };
  int64_t i = 0;
  for (; i + ROWS <= in.n_live; i += ROWS) rows_of.template operator()<ROWS>(i);
  for (; i < in.n_live; i++) rows_of.template operator()<1>(i);
  for (int64_t a = a0, s = 0; a < a1; a++)
    for (int64_t j = 0; j < group; j++) {
      const int64_t neuron = active.experts[a] * group + j;
      while (steps[s] < neuron / STEP_) s++;
      h[a * group + j] = wide[s * STEP_ + place<S>(neuron % STEP_)];
    }
}

// h[i] = codes[neuron i of the list] . x for i in [begin, end), in LANES streams as linear.h has them
template <class L>
inline void project_codes(const L& l, int64_t begin, int64_t end, float* h) {
  const int64_t lane = (end - begin + LANES - 1) / LANES, ahead = std::max<int64_t>(LINE_AHEAD / l.weight.bytes, 1);
  for (int64_t first = begin; first < begin + lane; first++) {
    Fetch fetch{{}, 0, l.weight.bytes};
    l.weight.at(first + ahead, lane, fetch.rows);
    for (int n = 0; n < LANES; n++) l.fetch_scales(std::min(first + ahead + n * lane, l.weight.count - 1));
    float sums[LANES];
    l.template tile<1>(0, first, lane, fetch, sums);
    for (int64_t n = 0, i = first; n < LANES && i < end; n++, i += lane) h[i] = l.finish(sums[n], i);
  }
}

// h[i] = weight[neuron i of the list] . x for i in [begin, end): whole experts where the weight has a row for each input
template <class E>
inline void project(const Problem& p, const Matrix& w, const Active& active, int64_t begin, int64_t end, const Input& in,
                    float* wide, int32_t* steps, float* h) {
  if (w.col != 1) {
    project_by_inputs<E>(w, active, begin / p.group, end / p.group, p.group, p.d_ff, in, wide, steps, h);
    return;
  }
  auto row = [&](int64_t i) { return w.at<E>(active.neurons[i], 0); };
  dot_list<typename E::Stream>(row, begin, end, in.placed, p.d_model, h);
}

}  // namespace
