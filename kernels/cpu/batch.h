// Many tokens: every active expert is a small GEMM over the tokens that chose it, so that its weights are read once
// and each token keeps its own decision. Stages of pieces:
//   x widened | router | token lists | up (and gate) per expert | down per block of output columns
// With few tokens down goes by parts of the experts, so that their rows are read whole, and the parts' sums are added.
// Each number is computed by one thread in one order: bitwise repeatable for any thread count.
#pragma once

#include "hidden.h"
#include "pool.h"

namespace {

constexpr int64_t TOKEN_CHUNK = 512;   // tokens handled at a time, so that their hidden units stay small
constexpr int64_t DENSE_SPAN = 8 * TOKEN_CHUNK;  // tokens that the library's GEMMs take at a time: they like many
constexpr int64_t MANY_TOKENS = 1024;  // from here that GEMM is at its best
constexpr int64_t SMALL_GROUP = 4;  // neurons, below which few tokens' GEMMs are too small
constexpr int64_t DENSE_TOKENS = 33;  // from here the library's GEMM is worth asking (see README.md, break-even)

// Who chose experts [e0, e1), and how many tokens each has.
template <class Q>
inline void route_block(const Problem& p, const Chunk<Q>& c, int64_t e0, int64_t e1, Local& local) {
  if (!c.scores->scan(e0, e1, c.tokens, local.up, NEURON_BLOCK)) {
    for (int64_t i = 0; i < c.tokens; i++) local.rows[i] = c.x.row(i);
    project_rows<F32>(p.router, e0, e1 - e0, c.x, local.rows, c.tokens, local.up, local.block);
  }
  const int64_t n = e1 - e0;
  float bias[NEURON_BLOCK] = {};
  int32_t count[NEURON_BLOCK] = {};
  if (p.router_bias) std::copy(p.router_bias + e0, p.router_bias + e1, bias);
  for (int64_t i = 0; i < c.tokens; i++) {
    const float* logits = local.up + i * NEURON_BLOCK;
    uint8_t* mask = c.mask + i * p.n_experts + e0;
    for (int64_t e = 0; e < n; e++) {
      const bool on = logits[e] + bias[e] > p.threshold;
      mask[e] = on, count[e] += on;
    }
  }
  std::copy(count, count + n, c.count + e0);
}

// The lists of experts [e0, e1).
template <class Q>
inline void list_tokens(const Problem& p, const Chunk<Q>& c, int64_t e0, int64_t e1) {
  const int64_t n = e1 - e0;
  int32_t count[NEURON_BLOCK] = {};
  for (int64_t i = 0; i < c.tokens; i++) {
    const uint8_t* mask = c.mask + i * p.n_experts + e0;
    for (int64_t e = 0; e < n; e++) {
      c.list[(e0 + e) * c.tokens + count[e]] = int32_t(i);
      count[e] += mask[e];
    }
  }
}

// Adds expert e's hidden units h times its rows of down to output columns [c0, c0 + cols) of n tokens, local.out_rows. next:
// the expert whose rows are read after these.
template <class E>
inline void add_expert(const Problem& p, int64_t e, int64_t next, const float* h, int64_t n, int64_t c0, int64_t cols,
                       const Local& local) {
  using O = typename E::Operand;
  const int64_t padded = round_up(cols, W), width = words<O>(p.group);
  const Matrix turned{p.down.data, p.down.col, p.down.row};  // [d_ff, d_out]
  // Rows that are read side by side lie `lanes` apart, so that each of them is one long stream.
  const int64_t lanes = O::PER_WORD == 1 && n <= MAX_M && p.group % ROWS == 0 ? p.group / ROWS : 1;
  const Matrix spread{turned.at<E>(e * p.group, 0), lanes * turned.row, turned.col};
  const int64_t ahead = (next - e) * p.group;  // rows to the next expert's
  for (int64_t j = 0; j < lanes; j++) {
    const Matrix from{spread.at<E>(0, 0) + j * turned.row, spread.row, spread.col};
    const Block w = operand_columns<E>(from, 0, p.group / lanes, c0, cols, local.block, ahead);
    const int64_t step = w.data == local.block ? 0 : j + 1 < lanes ? 1 : ahead - j;  // rows to those read next
    outer_block<O>(local.out_rows, n, h + j, width, lanes, w, w.data + step * turned.row, width / lanes, padded);
  }
}

template <>
inline void add_expert<I4>(const Problem& p, int64_t e, int64_t next, const float* h, int64_t n, int64_t c0, int64_t cols,
                           const Local& local) {
  const Block w{local.block, cols + W};
  widen_neurons(p, e * p.group, p.group, next * p.group, c0, cols, local.block, w.stride);
  outer_block<F32>(local.out_rows, n, h, p.group, 1, w, w.data, p.group, cols);
}

// Adds part `part` of the experts to output columns [c0, c0 + cols): rows of `sums`, `stride` apart.
template <class E>
inline void add_experts(const Problem& p, const Chunk<E>& c, int part, int64_t c0, int64_t cols, float* sums,
                        int64_t stride, Local& local) {
  const int64_t width = words<typename E::Operand>(p.group);
  const auto [first, last] = share(c.n_active, 1, part, c.parts);
  for (int64_t i = 0; i < c.tokens; i++) std::fill(sums + i * stride, sums + i * stride + round_up(cols, W), 0.0f);
  for (int64_t a = first; a < last; a++) {
    const int64_t e = c.active[a], n = c.count[e], next = a + 1 < last ? c.active[a + 1] : e;
    for (int64_t i = 0; i < n; i++) local.out_rows[i] = sums + c.list[e * c.tokens + i] * stride;
    add_expert<E>(p, e, next, c.hidden + c.offset[e] * width, n, c0, cols, local);
  }
}

// Output columns [c0, c0 + cols) of a token: the bias and the sums of all parts, which are `step` apart and begin at c0.
template <class E>
inline void write_out(const Problem& p, float* sums, int parts, int64_t step, int64_t c0, int64_t cols, typename E::T* y) {
  add_parts(sums, parts, step, cols);
  for (int64_t k = 0; k < cols; k++) {
    const float sum = p.down_scale ? sums[k] * p.down_scale[c0 + k] : sums[k];
    y[c0 + k] = E::from_float(bias_at<E>(p.down_bias, c0 + k) + sum);
  }
}

// f(e0, e1) for all experts, in blocks
template <class F>
inline void by_experts(const Problem& p, F&& f) {
  by_pieces((p.n_experts + NEURON_BLOCK - 1) / NEURON_BLOCK, p.threads, [&](int64_t block, int slot) {
    f(block * NEURON_BLOCK, std::min((block + 1) * NEURON_BLOCK, p.n_experts), slot);
  });
}

// Memory of a chunk, and its decision. Returns the number of (token, expert) pairs.
template <class E, class Q>
inline int64_t route_chunk(const Problem& p, int64_t first, Chunk<Q>& c, std::vector<Local>& locals) {
  using O = typename Q::Operand;
  const auto* x = static_cast<const typename E::T*>(p.x) + first * p.x_stride;
  const int64_t run = (c.tokens + 4 * p.threads - 1) / (4 * p.threads);  // tokens in a piece
  by_pieces((c.tokens + run - 1) / run, p.threads, [&](int64_t piece, int slot) {
    for (int64_t i = piece * run; i < std::min((piece + 1) * run, c.tokens); i++) {
      c.scores->template lay<E>(i, x + i * p.x_stride);
      if (!IN_CODES<Q>) {
        c.x.template fill<E>(i, x + i * p.x_stride);
        if (!std::is_same_v<O, F32>) c.operands.template fill<E>(i, x + i * p.x_stride);
        continue;
      }
      float* row = locals[size_t(slot)].x;
      widen<E>(x + i * p.x_stride, row, p.d_model);
      leave_out_small(p.input_cut, row, p.d_model);
      c.up->template lay<F32>(i, row);
    }
  });
  by_experts(p, [&](int64_t e0, int64_t e1, int slot) { route_block(p, c, e0, e1, locals[size_t(slot)]); });
  if (p.input_cut >= 0.0f && !IN_CODES<Q>) {  // routers have seen all of x; up and gate do not
    auto* v = reinterpret_cast<typename O::T*>(c.operands.data);
    const int64_t n = c.operands.size() * O::PER_WORD;
    for (int64_t i = 0; i < n; i++) v[i] = std::fabs(O::to_float(v[i])) <= p.input_cut ? typename O::T(0) : v[i];
  }
  c.offset[0] = c.n_active = 0;
  for (int64_t e = 0; e < p.n_experts; e++) {
    c.offset[e + 1] = c.offset[e] + c.count[e];
    c.active[c.n_active] = int32_t(e);
    c.n_active += c.count[e] > 0;
  }
  return c.offset[p.n_experts];
}

template <class E, class Q>
inline void expert_gemms(const Problem& p, const Chunk<Q>& c, int64_t columns, typename E::T* y,
                         std::vector<Local>& locals) {
  by_experts(p, [&](int64_t e0, int64_t e1, int) { list_tokens(p, c, e0, e1); });
  const int64_t blocks = (p.group + NEURON_BLOCK - 1) / NEURON_BLOCK, spans = (p.d_out + columns - 1) / columns;
  const int64_t tasks = c.n_active * blocks;
  // Few tokens read weights as they lie, in long stretches; many look for the thread that is free.
  const int64_t together = c.tokens <= FEW_TOKENS ? std::max<int64_t>(tasks / (4 * p.threads), 1) : 1;
  auto neuron = [&](int64_t task) { return c.active[task / blocks] * p.group + task % blocks * NEURON_BLOCK; };
  by_pieces((tasks + together - 1) / together, p.threads, [&](int64_t piece, int slot) {
    for (int64_t task = piece * together; task < std::min((piece + 1) * together, tasks); task++) {
      const int64_t j = task % blocks * NEURON_BLOCK, next = neuron(std::min(task + 1, tasks - 1));
      const int64_t end = std::min(j + NEURON_BLOCK, p.group);
      hidden_block<E, Q>(p, c, c.active[task / blocks], j, end, next, locals[size_t(slot)]);
    }
  });
  if constexpr (std::is_same_v<Q, I8>)
    by_pieces(p.group % BLOCK ? (p.d_ff + BLOCK - 1) / BLOCK : 0, p.threads,
              [&](int64_t b, int slot) { round_across_experts(p, c, b, locals[size_t(slot)]); });
  by_pieces(c.parts * spans, p.threads, [&](int64_t task, int slot) {
    Local& local = locals[size_t(slot)];
    const int part = int(task / spans);
    const int64_t c0 = task % spans * columns, cols = std::min(columns, p.d_out - c0);
    if (c.sums) {
      float* sums = c.sums + part * c.tokens * c.sums_stride + c0;
      add_experts<Q>(p, c, part, c0, cols, sums, c.sums_stride, local);
    } else {
      const int64_t padded = round_up(cols, W);
      add_experts<Q>(p, c, part, c0, cols, local.y, padded, local);
      for (int64_t i = 0; i < c.tokens; i++) write_out<E>(p, local.y + i * padded, 1, 0, c0, cols, y + i * p.d_out);
    }
  });
  by_pieces(c.sums ? c.tokens : 0, p.threads, [&](int64_t i, int) {
    write_out<E>(p, c.sums + i * c.sums_stride, c.parts, c.tokens * c.sums_stride, 0, p.d_out, y + i * p.d_out);
  });
}

// dense(first, tokens, mask) computes tokens with the library's own GEMMs; it is asked where too few pairs are skipped,
// for neighbouring chunks together. E: the type of x, biases and y; Q: of the weights, E, I8 or I4.
template <class E, class Q, class Dense>
void batch(const Problem& p, Dense&& dense) {
  using O = typename Q::Operand;
  Scratch& s = scratch();
  const int64_t most = std::min(TOKEN_CHUNK, p.tokens), span = std::min(DENSE_SPAN, p.tokens);
  const bool may_be_dense = p.dense_above < 1;
  const int64_t masked = p.mask ? 0 : may_be_dense ? span : most;  // tokens whose mask is kept here
  const int64_t hidden = most * p.n_experts * words<O>(p.group);
  const auto [parts, columns] = DownTasks::of<Q>(p, most);
  const int64_t sums_stride = round_up(p.d_out, W) + W, sums = parts > 1 ? parts * most * sums_stride : 0;
  constexpr bool CODES = IN_CODES<Q>;
  auto up = codes_of<Q>(p, p.up, p.up_scale, p.up_scales), gate = codes_of<Q>(p, p.gate, p.gate_scale, p.gate_scales);
  IntegerScores scores(p, most);
  Chunk<Q> c{};
  c.up = &up, c.gate = &gate;
  c.x = {nullptr, most, p.d_model, depth_block(most)};
  c.operands = {nullptr, most, p.d_model, depth_block(most)};
  s.reserve(Scratch::bytes_for<float>(c.x.size()) + Scratch::bytes_for<float>(c.operands.size()) +
            Scratch::bytes_for<int32_t>(p.n_experts * most) + Scratch::bytes_for<int32_t>(p.n_experts) +
            Scratch::bytes_for<int32_t>(p.n_experts + 1) + Scratch::bytes_for<int64_t>(p.n_experts + 1) +
            Scratch::bytes_for<float>(hidden) + Scratch::bytes_for<float>(sums) +
            Scratch::bytes_for<uint8_t>(masked * p.n_experts) +
            p.threads * Local::bytes(p, most, columns) + scores.bytes() + (CODES ? up.bytes(most) : 0));
  c.x.data = s.take<float>(c.x.size());
  c.operands.data = std::is_same_v<O, F32> ? c.x.data : s.take<float>(c.operands.size());
  c.list = s.take<int32_t>(p.n_experts * most);
  c.count = s.take<int32_t>(p.n_experts);
  c.offset = s.take<int64_t>(p.n_experts + 1);
  c.hidden = s.take<float>(hidden);
  c.active = s.take<int32_t>(p.n_experts + 1);
  c.parts = parts;
  c.sums = sums ? s.take<float>(sums) : nullptr;
  c.sums_stride = sums_stride;
  uint8_t* own_mask = s.take<uint8_t>(masked * p.n_experts);
  scores.reserve(s);
  c.scores = &scores;
  if (CODES) up.reserve(most), gate.inputs = up.inputs;
  std::vector<Local> locals;
  for (int t = 0; t < p.threads; t++) locals.emplace_back(s, p, most, columns);
  for (int64_t start = 0; start < p.tokens; start += DENSE_SPAN) {
    const int64_t end = std::min(start + DENSE_SPAN, p.tokens);
    auto mask = [&](int64_t token) {
      if (p.mask) return p.mask + token * p.n_experts;
      return own_mask + (may_be_dense ? token - start : 0) * p.n_experts;
    };
    int64_t waiting = start;  // tokens from here to the present chunk are for the library
    auto flush = [&](int64_t to) {
      if (to > waiting) dense(waiting, to - waiting, mask(waiting));
    };
    for (int64_t first = start; first < end; first += TOKEN_CHUNK) {
      c.tokens = c.x.tokens = c.operands.tokens = std::min(TOKEN_CHUNK, end - first);
      c.mask = mask(first);
      const int64_t pairs = route_chunk<E, Q>(p, first, c, locals);
      if (double(pairs) > p.dense_above * double(c.tokens * p.n_experts)) continue;
      flush(first);
      expert_gemms<E, Q>(p, c, columns, static_cast<typename E::T*>(p.y) + first * p.d_out, locals);
      waiting = first + c.tokens;
    }
    flush(end);
  }
}

}  // namespace
