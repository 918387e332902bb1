// The tokens that are handled at a time: what the phases of a chunk share, and the buffers of a thread.
#pragma once

#include "gemm.h"
#include "integer_scores.h"
#include "nibble_rows.h"

namespace {

// What the phases of one chunk share.
// Q: of the weights.
template <class Q>
struct Chunk {
  using O = typename Q::Operand;
  int64_t tokens;
  Blocked<F32> x;       // for the router
  Blocked<O> operands;  // for up and gate: x itself where they are fp32
  int32_t* list;        // [n_experts, tokens] the tokens of each expert
  int32_t* count;       // [n_experts]
  int32_t* active;      // [n_active] experts that some token chose
  int64_t n_active;
  int64_t* offset;      // [n_experts + 1] rows of `hidden` before expert e
  float* hidden;        // [rows, group] as operands of down, each row in whole words
  uint8_t* mask;        // [tokens, n_experts]
  int parts;            // of the active experts, in the down phase
  float* sums;          // [parts, tokens, sums_stride] where there are several, else null
  const IntegerScores* scores;
  const LinearOf<Q>*up, *gate;  // of weights in codes, with x as they see it
  int64_t sums_stride;  // against rows of a whole number of pages, as in Blocked
};

// Down's tasks: parts of the experts by blocks of output columns. One cut for every chunk of a call, though the last one
// has fewer tokens.
struct DownTasks {
  int parts;
  int64_t columns;
  template <class E>
  static DownTasks of(const Problem& p, int64_t tokens) {
    const Matrix turned{p.down.data, p.down.col, p.down.row};
    const bool in_place = lies_ready<E>(turned) && E::Operand::PER_WORD == 1;
    if (tokens <= FEW_TOKENS && (in_place || IN_CODES<E>)) {
      const int64_t blocks = down_blocks(p.threads);
      return {DOWN_PARTS, std::max<int64_t>(round_up((p.d_out + blocks - 1) / blocks, 64), 256)};
    }
    // The block of y (tokens x columns) should stay in L2, and every thread gets some.
    const int64_t even = round_up((p.d_out + p.threads - 1) / p.threads, 64);
    const int64_t in_cache = round_up((int64_t(128) << 10) / std::max<int64_t>(tokens, 1), 64);
    return {1, std::clamp<int64_t>(in_cache, 64, std::min<int64_t>(even, 1024))};
  }
};

// Buffers of one thread.
struct Local {
  const float** rows;  // [tokens]
  float** out_rows;    // [tokens]
  float *block, *up, *gate, *y, *x;  // x: of one token
  static size_t bytes(const Problem& p, int64_t tokens, int64_t columns) {
    return 2 * Scratch::bytes_for<float*>(tokens) + Scratch::bytes_for<float>(block_size(p, tokens, columns)) +
           2 * Scratch::bytes_for<float>(tokens * NEURON_BLOCK) + Scratch::bytes_for<float>(tokens * columns) +
           Scratch::bytes_for<float>(p.d_model);
  }
  static int64_t block_size(const Problem& p, int64_t tokens, int64_t columns) {
    return std::max(NEURON_BLOCK * (depth_block(tokens) + W), p.group * (columns + W));
  }
  Local(Scratch& s, const Problem& p, int64_t tokens, int64_t columns)
      : rows(s.take<const float*>(tokens)),
        out_rows(s.take<float*>(tokens)),
        block(s.take<float>(block_size(p, tokens, columns))),
        up(s.take<float>(tokens * NEURON_BLOCK)),
        gate(s.take<float>(tokens * NEURON_BLOCK)),
        y(s.take<float>(tokens * columns)),
        x(s.take<float>(p.d_model)) {}
};

}  // namespace
