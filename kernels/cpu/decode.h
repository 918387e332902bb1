// One token: read every active weight once, at the speed of memory, in stages of pieces:
//   router over all experts | up (and gate) over the active neurons | down over the output columns, or, where it is
//   large, over whole rows in parts of the neurons | sums of the parts
// Each number is computed by one thread in one order, so the result does not even depend on the thread count.
#pragma once

#include "pool.h"
#include "proxy.h"
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

// y[begin .. end) += part `part` of `parts` of the live neurons; begin a whole number of STEPs, y in the order of E::Stream.
template <class E>
inline void add_part(const Problem& p, const Active& active, int part, int parts, const float* h, float* y, int64_t begin,
                     int64_t end) {
  const auto [first, last] = share(active.n_live, ROWS, part, parts);
  const int32_t* live = active.live + first;
  auto row = [&](int64_t i) { return p.down.at<E>(begin, active.neurons[live[i]]); };
  add_list<typename E::Stream>(row, live, last - first, h, y + begin, end - begin);
}

// Outputs [begin, end), begin a whole number of STEPs; y: room for them in the order of E::Stream
template <class E>
inline void project_down(const Problem& p, const Active& active, const float* h, float* y, int64_t begin, int64_t end) {
  using S = typename E::Stream;
  for (int64_t o = begin; o < end; o++) y[place<S>(o)] = bias_at<E>(p.down_bias, o);
  if (p.down.row == 1) {
    add_part<E>(p, active, 0, 1, h, y, begin, end);
  } else {
    for (int64_t o = begin; o < end; o++)
      y[place<S>(o)] += dot_stretches<E>(p.down.at<E>(o, 0), active.experts, active.n_experts, p.group, h);
  }
}

constexpr int64_t LARGE = 1 << 22;  // weights of down from which parts pay for their sums
constexpr int64_t STRETCH = 1 << 20;  // bytes of weights in a piece at least: less is no long stream
constexpr int PIECES_EACH = 4;         // at most, so that a thread which comes late finds some left

// How many pieces a stage that reads `bytes` of weights is cut into: one a thread, or more where it is large.
inline int pieces_of(int64_t bytes, int threads) {
  return threads == 1 ? 1 : int(std::clamp<int64_t>(bytes / STRETCH, threads, PIECES_EACH * threads));
}

template <class E>
void decode(const Problem& p) {
  Scratch& s = scratch();
  using S = typename E::Stream;
  const int64_t padded = round_up(p.d_model, STEP<S>), padded_out = round_up(p.d_out, STEP<S>);
  const bool by_inputs = p.up.col != 1 || (p.gate.data && p.gate.col != 1);  // threads then take whole experts
  const int parts = p.down.row == 1 && p.d_out * p.d_ff >= LARGE ? DOWN_PARTS : 1;
  const int64_t stride = padded_out + W;  // of the parts' sums
  const int64_t padded_ff = by_inputs ? round_up(p.d_ff, STEP<S>) : 0;
  s.reserve(3 * Scratch::bytes_for<float>(padded) + Scratch::bytes_for<int32_t>(p.d_model) +
            Scratch::bytes_for<float>(p.n_experts) + 2 * Scratch::bytes_for<float>(p.d_ff) +
            Scratch::bytes_for<float>(padded_out) + Scratch::bytes_for<float>(parts * stride) +
            Active::bytes(p) + proxy_bytes(p, 1) +
            p.threads * (Scratch::bytes_for<float>(padded_ff) + Scratch::bytes_for<int32_t>(padded_ff)));
  float* x = s.take<float>(padded);  // as routers see it
  Input in{x, x, s.take<int32_t>(p.d_model)};
  float* logits = s.take<float>(p.n_experts);
  float* h = s.take<float>(p.d_ff);
  float* gated = s.take<float>(p.d_ff);
  float* y = std::is_same_v<E, F32> ? static_cast<float*>(p.y) : s.take<float>(padded_out);
  float* sums = s.take<float>(parts * stride);
  char* lists = s.take<char>(int64_t(Active::bytes(p)));
  float* wides = s.take<float>(p.threads * padded_ff);
  int32_t* steps = s.take<int32_t>(p.threads * padded_ff);
  const ProxyInputs proxied = proxy_inputs(p, 1, s);
  if (p.proxy) proxied.lay<E>(0, static_cast<const typename E::T*>(p.x));

  widen<E>(static_cast<const typename E::T*>(p.x), x, p.d_model);
  std::fill(x + p.d_model, x + padded, 0.0f);
  if (p.input_cut >= 0.0f) {
    in.x = in.placed = s.take<float>(padded);
    std::copy(x, x + padded, in.x);
    leave_out_small(p.input_cut, in.x, p.d_model);
  }
  if (S::PARTS > 1) {
    in.placed = s.take<float>(padded);
    for (int64_t k = 0; k < padded; k++) in.placed[place<S>(k)] = in.x[k];
  }
  for (int64_t k = 0; by_inputs && k < p.d_model; k++) {
    in.live[in.n_live] = int32_t(k);
    in.n_live += in.x[k] != 0.0f;
  }

  // f(begin, end, slot) for `pieces` runs of n items, in whole `unit`s
  auto stage = [&](int64_t n, int64_t unit, int pieces, auto&& f) {
    by_pieces(pieces, p.threads, [&](int64_t i, int slot) {
      const auto [begin, end] = share(n, unit, int(i), pieces);
      if (end > begin) f(begin, end, slot);
    });
  };
  const int64_t read = p.proxy ? p.proxy->codes.bytes * p.proxy->codes.count : p.n_experts * p.d_model * 4;
  stage(p.n_experts, ROWS, pieces_of(read, p.threads), [&](int64_t begin, int64_t end, int) {
    if (p.proxy) return proxy_scan(*p.proxy, proxied, begin, end, 0, 1, logits + begin, p.n_experts);
    dot_list<F32>([&](int64_t e) { return p.router.at<F32>(e, 0); }, begin, end, x, p.d_model, logits);
  });
  Active active(p, logits, lists);
  const int rows = pieces_of(active.n_neurons * p.d_model * int64_t(sizeof(typename E::T)) * (p.gate.data ? 2 : 1), p.threads);
  stage(active.n_neurons, by_inputs ? p.group : ROWS, rows, [&](int64_t a, int64_t b, int slot) {
    float* wide = wides + slot * padded_ff;
    int32_t* in_steps = steps + slot * padded_ff;
    project<E>(p, p.up, active, a, b, in, wide, in_steps, h);
    if (p.gate.data) project<E>(p, p.gate, active, a, b, in, wide, in_steps, gated);
    for (int64_t i = a; i < b; i++) {
      h[i] += bias_at<E>(p.up_bias, active.neurons[i]);
      if (p.gate.data) gated[i] += bias_at<E>(p.gate_bias, active.neurons[i]);
    }
    activate_row(p.act, p.gate.data ? gated + a : nullptr, h + a, b - a);
    leave_out_small(p.cut, h + a, b - a);
  });
  active.find_live(h);
  auto finish = [&](int64_t o0, int64_t o1) {
    if (!std::is_same_v<E, F32>)
      for (int64_t o = o0; o < o1; o++) static_cast<typename E::T*>(p.y)[o] = E::from_float(y[place<S>(o)]);
  };
  constexpr int64_t LINE = 32;  // outputs: threads write whole cache lines; no more pieces than threads, or rows are read in shorter ones
  if (parts > 1) {
    const int blocks = int(down_blocks(p.threads));
    by_pieces(parts * blocks, p.threads, [&](int64_t i, int) {
      const auto [c0, c1] = share(p.d_out, LINE, int(i % blocks), blocks);
      float* sum = sums + i / blocks * stride;
      std::fill(sum + c0, sum + round_up(c1, STEP<S>), 0.0f);
      add_part<E>(p, active, int(i / blocks), parts, h, sum, c0, c1);
    });
    stage(p.d_out, LINE, p.threads, [&](int64_t o0, int64_t o1, int) {
      add_parts(sums + o0, parts, stride, round_up(o1, STEP<S>) - o0);
      for (int64_t o = o0; o < o1; o++) y[place<S>(o)] = bias_at<E>(p.down_bias, o) + sums[place<S>(o)];
      finish(o0, o1);
    });
  } else {
    stage(p.d_out, LINE, p.threads, [&](int64_t o0, int64_t o1, int) {
      project_down<E>(p, active, h, y, o0, o1);
      finish(o0, o1);
    });
  }
  if (p.mask) {
    std::fill(p.mask, p.mask + p.n_experts, uint8_t(0));
    for (int64_t i = 0; i < active.n_experts; i++) p.mask[active.experts[i]] = 1;
  }
}

}  // namespace
