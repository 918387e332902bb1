// Hidden units of one expert for the tokens that chose it: rows of up and gate times those tokens, in floats or in codes.
#pragma once

#include "chunk.h"

namespace {

// Rows of up and gate from `neuron` on, times the n listed tokens, into `local`. next: the neuron that is likely to follow.
template <class E>
inline void project_floats(const Problem& p, const Chunk<E>& c, int64_t neuron, int64_t rows, const int32_t* list,
                           int64_t n, int64_t next, Local& local) {
  for (int64_t i = 0; i < n; i++) local.rows[i] = c.operands.row(list[i]);
  auto rows_at = [](const Matrix& m, int64_t row) { return lies_ready<E>(m) ? words_at<E>(m, row, 0) : nullptr; };
  const float *then = rows_at(p.up, next), *gate = p.gate.data ? rows_at(p.gate, neuron) : then;
  project_rows<E>(p.up, neuron, rows, c.operands, local.rows, n, local.up, local.block, gate);
  if (p.gate.data) project_rows<E>(p.gate, neuron, rows, c.operands, local.rows, n, local.gate, local.block, then);
}

// out[i * NEURON_BLOCK + j] = row neuron + j of l . token list[i]; rows of `then` from `next` on are asked for meanwhile.
template <class L>
inline void project_codes(L l, int64_t neuron, int64_t rows, const int32_t* list, int64_t n, const Rows& then,
                          int64_t next, float* out) {
  l.only(nullptr, neuron + rows);
  const int64_t lane = (rows + LANES - 1) / LANES;
  for (int64_t r = 0; r < lane; r++)
    for (int64_t first = 0; first < n; first += LINEAR_TOKENS)
      with_tokens(std::min<int64_t>(n - first, LINEAR_TOKENS), [&]<int M>() {
        const char* xs[M];
        for (int64_t m = 0; m < M; m++) xs[m] = l.inputs.row(list[std::min(first + m, n - 1)]);
        Fetch fetch{{}, 0, first == 0 ? l.weight.bytes : 0};
        r + 1 < lane ? l.weight.at(neuron + r + 1, lane, fetch.rows) : then.at(next, lane, fetch.rows);
        float sums[M * LANES];
        l.template tile_of<M>(xs, neuron + r, lane, fetch, sums);
        for (int64_t m = 0; m < std::min<int64_t>(M, n - first); m++)
          for (int64_t i = 0, j = r; i < LANES && j < rows; i++, j += lane)
            out[(first + m) * NEURON_BLOCK + j] = l.finish(sums[m * LANES + i], neuron + j);
      });
}

// Rows of up and gate, as either is stored.
template <class Q>
inline void project_both(const Problem& p, const Chunk<Q>& c, int64_t neuron, int64_t rows, const int32_t* list, int64_t n,
                         int64_t next, Local& local) {
  if constexpr (!IN_CODES<Q>) {
    project_floats(p, c, neuron, rows, list, n, next, local);
  } else {
    const Rows& then = c.up->weight;
    if (!p.gate.data) return project_codes(*c.up, neuron, rows, list, n, then, next, local.up);
    project_codes(*c.up, neuron, rows, list, n, c.gate->weight, neuron, local.up);
    project_codes(*c.gate, neuron, rows, list, n, then, next, local.gate);
  }
}

// Hidden units [j0, j1) of expert e, for the tokens that chose it. next: the neuron that is likely to follow.
template <class E, class Q>
inline void hidden_block(const Problem& p, const Chunk<Q>& c, int64_t e, int64_t j0, int64_t j1, int64_t next,
                         Local& local) {
  using O = typename Q::Operand;
  const int64_t tokens = c.count[e], rows = j1 - j0, neuron = e * p.group + j0;
  project_both<Q>(p, c, neuron, rows, c.list + e * c.tokens, tokens, next, local);
  constexpr bool ROUNDED = std::is_same_v<Q, I8>;
  for (int64_t i = 0; i < tokens; i++) {
    float *u = local.up + i * NEURON_BLOCK, *g = p.gate.data ? local.gate + i * NEURON_BLOCK : nullptr;
    for (int64_t j = 0; j < rows; j++) {
      u[j] += bias_at<E>(p.up_bias, neuron + j);
      if (g) g[j] += bias_at<E>(p.gate_bias, neuron + j);
    }
    activate_row(p.act, g, u, rows);
    leave_out_small(p.cut, u, rows);
    if (ROUNDED && p.group % BLOCK == 0) round_block(u, rows);
    lay<F32, O>(u, c.hidden + (c.offset[e] + i) * words<O>(p.group) + words<O>(j0), rows, words<O>(rows));
  }
}

// Where blocks of neurons hold parts of several experts: block b of all tokens, from their experts' units and back.
inline void round_across_experts(const Problem& p, const Chunk<I8>& c, int64_t b, Local& local) {
  static_assert(NEURON_BLOCK == BLOCK);
  const int64_t begin = b * BLOCK, end = std::min(begin + BLOCK, p.d_ff);
  float* units = local.up;  // [tokens, BLOCK]
  auto each = [&](auto&& f) {
    for (int64_t e = begin / p.group; e * p.group < end; e++) {
      const int64_t j0 = std::max(e * p.group, begin), j1 = std::min((e + 1) * p.group, end);
      for (int64_t i = 0; i < c.count[e]; i++)
        f(c.hidden + (c.offset[e] + i) * p.group + j0 - e * p.group, units + c.list[e * c.tokens + i] * BLOCK + j0 - begin,
          j1 - j0);
    }
  };
  std::fill(units, units + c.tokens * BLOCK, 0.0f);
  each([](float* own, float* block, int64_t n) { std::copy_n(own, n, block); });
  for (int64_t i = 0; i < c.tokens; i++) round_block(units + i * BLOCK, BLOCK);
  each([](float* own, float* block, int64_t n) { std::copy_n(block, n, own); });
}

}  // namespace
