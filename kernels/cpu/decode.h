// One token: read every active weight once, at the speed of memory, in stages of pieces:
//   router over all experts | up (and gate) over the active neurons | down over the output columns, or, where it is
//   large, over whole rows in parts of the neurons | sums of the parts
// Each number is computed by one thread in one order, so the result does not even depend on the thread count.
#pragma once

#include "active.h"
#include "pool.h"
#include "integer_scores.h"
#include "nibble_rows.h"

namespace {

// y[begin .. end) += part `part` of `parts` of the live neurons; begin a whole number of STEPs, y in the order of Q::Stream.
template <class Q>
inline void add_part(const Problem& p, const Active& active, int part, int parts, const float* h, float* y, int64_t begin,
                     int64_t end) {
  const auto [first, last] = share(active.n_live, ROWS, part, parts);
  const int32_t* live = active.live + first;
  if constexpr (std::is_same_v<Q, I4>) {
    auto neuron = [&](int64_t i) { return active.neurons[live[i]]; };
    return add_nibbles_of(p, neuron, live, last - first, h, begin, y + begin, (end - begin) / BLOCK);
  } else {
    auto row = [&](int64_t i) { return p.down.at<Q>(begin, active.neurons[live[i]]); };
    add_list<typename Q::Stream>(row, live, last - first, h, y + begin, end - begin);
  }
}

// What an output's sum begins with. Sums of codes have their scale and their bias at the end.
template <class E, class Q>
inline float start_of(const Problem& p, int64_t o) {
  return IN_CODES<Q> ? 0.0f : bias_at<E>(p.down_bias, o);
}

// A sum of codes by the scale of its output, where it has one.
template <class Q>
inline float scaled(const Problem& p, float sum, int64_t o) {
  return std::is_same_v<Q, I8> ? sum * p.down_scale[o] : sum;
}

// Outputs [begin, end), begin a whole number of STEPs; y: room for them in the order of Q::Stream
template <class E, class Q>
inline void project_down(const Problem& p, const Active& active, const float* h, float* y, int64_t begin, int64_t end) {
  using S = typename Q::Stream;
  for (int64_t o = begin; o < end; o++) y[place<S>(o)] = start_of<E, Q>(p, o);
  if (p.down.row == 1 || std::is_same_v<Q, I4>) return add_part<Q>(p, active, 0, 1, h, y, begin, end);
  if constexpr (!std::is_same_v<Q, I4>) {
    for (int64_t o = begin; o < end; o++)
      y[place<S>(o)] += dot_stretches<Q>(p.down.at<Q>(o, 0), active.experts, active.n_experts, p.group, h);
  }
}

constexpr int64_t LARGE = 1 << 22;  // weights of down from which parts pay for their sums
constexpr int64_t STRETCH = 1 << 20;  // bytes of weights in a piece at least: less is no long stream
constexpr int PIECES_EACH = 4;         // at most, so that a thread which comes late finds some left

// How many pieces a stage that reads `bytes` of weights is cut into: as many for each thread, or one would wait for the
// other's odd piece; more than one where the stage is large.
inline int pieces_of(int64_t bytes, int threads) {
  return threads == 1 ? 1 : threads * int(std::clamp<int64_t>(bytes / (STRETCH * threads), 1, PIECES_EACH));
}

// E: the type of x, biases and y; Q: of the weights, E, I8 or I4
template <class E, class Q = E>
void decode(const Problem& p) {
  Scratch& s = scratch();
  using S = typename Q::Stream;
  constexpr bool CODES = IN_CODES<Q>;
  const int64_t padded = round_up(p.d_model, STEP<S>), padded_out = round_up(p.d_out, STEP<S>);
  const bool by_inputs = p.up.col != 1 || (p.gate.data && p.gate.col != 1);  // threads then take whole experts
  const int parts = p.down.row == 1 && p.d_out * p.d_ff >= LARGE ? DOWN_PARTS : 1;
  const int64_t stride = padded_out + W;  // of the parts' sums
  const int64_t padded_ff = by_inputs ? round_up(p.d_ff, STEP<S>) : 0;
  auto up = codes_of<Q>(p, p.up, p.up_scale, p.up_scales), gate = codes_of<Q>(p, p.gate, p.gate_scale, p.gate_scales);
  IntegerScores scores(p, 1);
  s.reserve(3 * Scratch::bytes_for<float>(padded) + Scratch::bytes_for<int32_t>(p.d_model) +
            Scratch::bytes_for<float>(p.n_experts) + 2 * Scratch::bytes_for<float>(p.d_ff) +
            Scratch::bytes_for<float>(padded_out) + Scratch::bytes_for<float>(parts * stride) +
            Active::bytes(p) + scores.bytes() + (CODES ? up.bytes(1) : 0) +
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
  scores.reserve(s);
  scores.template lay<E>(0, static_cast<const typename E::T*>(p.x));

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
  if (CODES) {
    up.reserve(1);
    up.template lay<F32>(0, in.x);
    gate.inputs = up.inputs;
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
  const int64_t read = p.proxy ? p.proxy->codes.bytes * p.proxy->codes.count : p.n_experts * p.d_model * (CODES ? 1 : 4);
  stage(p.n_experts, ROWS, pieces_of(read, p.threads), [&](int64_t begin, int64_t end, int) {
    if (scores.scan(begin, end, 1, logits + begin, p.n_experts)) return;
    dot_list<F32>([&](int64_t e) { return p.router.at<F32>(e, 0); }, begin, end, x, p.d_model, logits);
  });
  Active active(p, logits, lists);
  up.only(active.neurons, active.n_neurons);
  gate.only(active.neurons, active.n_neurons);
  const int64_t row_bytes = CODES ? up.weight.bytes : p.d_model * int64_t(sizeof(typename Q::T));
  const int rows = pieces_of(active.n_neurons * row_bytes * (p.gate.data ? 2 : 1), p.threads);
  stage(active.n_neurons, by_inputs ? p.group : ROWS, rows, [&](int64_t a, int64_t b, int slot) {
    float* wide = wides + slot * padded_ff;
    int32_t* in_steps = steps + slot * padded_ff;
    auto onto = [&](const Matrix& w, const auto& l, float* to) {
      if constexpr (CODES)
        project_codes(l, a, b, to);
      else
        project<E>(p, w, active, a, b, in, wide, in_steps, to);
    };
    onto(p.up, up, h);
    if (p.gate.data) onto(p.gate, gate, gated);
    for (int64_t i = a; i < b; i++) {
      h[i] += bias_at<E>(p.up_bias, active.neurons[i]);
      if (p.gate.data) gated[i] += bias_at<E>(p.gate_bias, active.neurons[i]);
    }
    activate_row(p.act, p.gate.data ? gated + a : nullptr, h + a, b - a);
    leave_out_small(p.cut, h + a, b - a);
  });
  if constexpr (std::is_same_v<Q, I8>) round_units(active.neurons, active.n_neurons, h);
  active.find_live(h);
  auto finish = [&](int64_t o0, int64_t o1) {
    if (std::is_same_v<E, F32> && !CODES) return;
    for (int64_t o = o0; o < o1; o++) {
      const float sum = y[place<S>(o)];
      static_cast<typename E::T*>(p.y)[o] =
          E::from_float(CODES ? scaled<Q>(p, sum, o) + bias_at<E>(p.down_bias, o) : sum);
    }
  };
  constexpr int64_t LINE = 32;  // outputs: threads write whole cache lines; no more pieces than threads, or rows are read in shorter ones
  if (parts > 1) {
    const int blocks = int(down_blocks(p.threads));
    by_pieces(parts * blocks, p.threads, [&](int64_t i, int) {
      const auto [c0, c1] = share(p.d_out, LINE, int(i % blocks), blocks);
      float* sum = sums + i / blocks * stride;
      std::fill(sum + c0, sum + round_up(c1, STEP<S>), 0.0f);
      add_part<Q>(p, active, int(i / blocks), parts, h, sum, c0, c1);
    });
    stage(p.d_out, LINE, p.threads, [&](int64_t o0, int64_t o1, int) {
      add_parts(sums + o0, parts, stride, round_up(o1, STEP<S>) - o0);
      for (int64_t o = o0; o < o1; o++) y[place<S>(o)] = start_of<E, Q>(p, o) + sums[place<S>(o)];
      finish(o0, o1);
    });
  } else {
    stage(p.d_out, LINE, p.threads, [&](int64_t o0, int64_t o1, int) {
      project_down<E, Q>(p, active, h, y, o0, o1);
      finish(o0, o1);
    });
  }
  if (p.mask) {
    std::fill(p.mask, p.mask + p.n_experts, uint8_t(0));
    for (int64_t i = 0; i < active.n_experts; i++) p.mask[active.experts[i]] = 1;
  }
}

}  // namespace
