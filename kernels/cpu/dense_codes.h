// With weights in codes, where too few pairs are skipped: all neurons as linears of few bits, the mask, and down.
#pragma once

#include "dense.h"
#include "linear_tensors.h"

namespace {

constexpr int64_t DOWN_COLUMNS = 64, DOWN_NEURONS = 256;  // that are widened at a time, and stay in L2 while tokens go by

Tensor as_float(const Tensor& t) {
  return t.scalar_type() == ScalarType::Float ? t : torch::stable::to(t, ScalarType::Float);
}

// x [tokens, d_model] fp32 -> [tokens, d_ff] fp32
template <class Q>
Tensor linear_of_codes(const Tensor& x, const LinearOf<Q>& l, const OptionalTensor& bias) {
  return apply(l, x, bias ? OptionalTensor(as_float(*bias)) : std::nullopt);
}

// Down in int8, a neuron a row: linears want a row an output.
struct NeuronRows {
  static constexpr int PER_BLOCK = 0;
  struct {
    int64_t count;
  } weight;  // outputs
  struct {
    int64_t blocks;
  } inputs;
  int64_t d_in;
  Matrix rows;
  const float* scale;
  explicit NeuronRows(const Problem& p)
      : weight{p.d_out}, inputs{(p.d_ff + BLOCK - 1) / BLOCK}, d_in(p.d_ff), rows(p.down), scale(p.down_scale) {}
  float finish(float sum, int64_t output) const { return sum * scale[output]; }
  // Outputs [output, output + cols) of a neuron, zeros behind them and past the last neuron; padded: room for STRIP.
  const int8_t* at(int64_t neuron, int64_t output, int64_t cols, int8_t* padded) const {
    if (neuron < d_in && cols == STRIP) return rows.at<I8>(output, neuron);
    std::memset(padded, 0, STRIP);
    if (neuron < d_in) std::memcpy(padded, rows.at<I8>(output, neuron), size_t(cols));
    return padded;
  }
};

// Blocks [b, b + n) of neurons of the strip of outputs from `output` on: codes of as many neurons as a word holds.
inline void turn_strip(const NeuronRows& l, int64_t output, int64_t b, int64_t n, const Strip& s) {
  const int64_t cols = std::min(STRIP, l.weight.count - output);
  int8_t padded[IN_A_WORD][STRIP];
  for (int64_t k = 0; k < n; k++) {
    auto words_of = [&](int64_t r) { return s.words + (r / TILE_ROWS * TOGETHER + k) * WORDS * TILE_ROWS + r % TILE_ROWS; };
    for (int64_t word = 0; word < WORDS; word++) {
      const int64_t neuron = (b + k) * BLOCK + word * IN_A_WORD;
      const int8_t* rows[IN_A_WORD];
      for (int64_t j = 0; j < IN_A_WORD; j++) {
        rows[j] = l.at(neuron + j, output, cols, padded[j]);
        __builtin_prefetch(l.rows.at<I8>(output, std::min(neuron + j + TOGETHER * BLOCK, l.d_in - 1)), 0, 2);
      }
      for (int64_t r = 0; r < STRIP; r += W) {
        auto* to = reinterpret_cast<WeightCode*>(words_of(r) + word * TILE_ROWS);
        for (int64_t i = 0; i < W; i++)
          for (int64_t j = 0; j < IN_A_WORD; j++) to[i * IN_A_WORD + j] = rows[j][r + i];
      }
    }
    for (int64_t r = 0; r < STRIP && RAISED; r += W)
      start_sums(words_of(r), s.starts + (r / TILE_ROWS * TOGETHER + k) * TILE_ROWS + r % TILE_ROWS);
  }
}

// y [tokens, d_out] = h [tokens, d_ff] times down in 4 bits, and its bias; a chunk of tokens at a time, a piece a strip of
// columns, which is widened a stretch of neurons at a time.
template <class E>
void down_of_nibbles(const Problem& p, const float* h, int64_t tokens, typename E::T* y) {
  const int64_t strips = (p.d_out + DOWN_COLUMNS - 1) / DOWN_COLUMNS, stretches = (p.d_ff + DOWN_NEURONS - 1) / DOWN_NEURONS;
  const int64_t most = std::min(TOKEN_CHUNK, tokens), stride = DOWN_COLUMNS + W;
  struct Buffers {
    float *block, *sums, **rows;
  };
  Scratch& s = scratch();
  s.reserve(Scratch::bytes_for<float>(stretches * most * DOWN_NEURONS) +
            size_t(p.threads) * (Scratch::bytes_for<float>(DOWN_NEURONS * stride) + Scratch::bytes_for<float*>(most) +
                                 Scratch::bytes_for<float>(most * stride)));
  // Stretches one after the other: rows of a power of two of neurons would meet in the same cache sets.
  float* hidden = s.take<float>(stretches * most * DOWN_NEURONS);
  std::vector<Buffers> locals;
  for (int t = 0; t < p.threads; t++) {
    locals.push_back({s.take<float>(DOWN_NEURONS * stride), s.take<float>(most * stride), s.take<float*>(most)});
    for (int64_t i = 0; i < most; i++) locals.back().rows[i] = locals.back().sums + i * stride;
  }
  for (int64_t first = 0; first < tokens; first += TOKEN_CHUNK) {
    const int64_t here = std::min(TOKEN_CHUNK, tokens - first);
    by_pieces(here, p.threads, [&](int64_t i, int) {
      for (int64_t n0 = 0; n0 < p.d_ff; n0 += DOWN_NEURONS)
        std::copy_n(h + (first + i) * p.d_ff + n0, std::min(DOWN_NEURONS, p.d_ff - n0), hidden + n0 * most + i * DOWN_NEURONS);
    });
    by_pieces(strips, p.threads, [&](int64_t piece, int slot) {
      const auto& [block, sums, rows] = locals[size_t(slot)];
      const int64_t c0 = piece * DOWN_COLUMNS, cols = std::min(DOWN_COLUMNS, p.d_out - c0);
      std::fill(sums, sums + here * stride, 0.0f);
      for (int64_t n0 = 0; n0 < p.d_ff; n0 += DOWN_NEURONS) {
        const int64_t n = std::min(DOWN_NEURONS, p.d_ff - n0);
        const Block w{block, cols + W};
        widen_neurons(p, n0, n, std::min(n0 + n, p.d_ff - n), c0, cols, block, w.stride);
        outer_block<F32>(rows, here, hidden + n0 * most, DOWN_NEURONS, 1, w, w.data, n, round_up(cols, W));
      }
      for (int64_t i = 0; i < here; i++) write_out<E>(p, rows[i], 1, 0, c0, cols, y + (first + i) * p.d_out);
    });
  }
}

// The same of any codes.
template <class E, class Q>
void dense_down(const Problem& p, const float* h, int64_t tokens, typename E::T* y) {
  if constexpr (std::is_same_v<Q, I4>) {
    down_of_nibbles<E>(p, h, tokens, y);
  } else {
    auto product = [&](const auto& l) { long_linear<E, F32>(l, h, tokens, p.down_bias, y, p.threads); };
    if (p.down.row == 1) return product(NeuronRows(p));
    product(Int8Linear({static_cast<const char*>(p.down.data), p.down.row, p.d_ff, p.d_out}, p.d_ff, p.down_scale));
  }
}

// p.mask is not null.
template <class E, class Q>
void dense_codes(const Problem& p, const Tensor& x, const Weights& w, int64_t first, int64_t tokens) {
  const Tensor rows = as_float(seen<E>(p, x, first, tokens));
  const Tensor h = linear_of_codes<Q>(rows, codes_of<Q>(p, p.up, p.up_scale, p.up_scales), w.up_bias);
  OptionalTensor gate;
  if (w.gate) gate = linear_of_codes<Q>(rows, codes_of<Q>(p, p.gate, p.gate_scale, p.gate_scales), w.gate_bias);
  auto* hidden = static_cast<float*>(h.data_ptr());
  activate_and_mask<F32>(p, hidden, gate ? static_cast<const float*>(gate->data_ptr()) : nullptr,
                         p.mask + first * p.n_experts, tokens);
  dense_down<E, Q>(p, hidden, tokens, static_cast<typename E::T*>(p.y) + first * p.d_out);
}

}  // namespace
