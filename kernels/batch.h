// Many tokens: every active expert is a small GEMM over the tokens that chose it, so that its weights are read once
// and each token keeps its own decision. Phases, with a barrier between:
//   router | token lists | up (and gate) per expert | down per block of output columns
// Each number is computed by one thread in one order: bitwise repeatable for any thread count.
#pragma once

#include <omp.h>

#include "problem.h"

namespace {

constexpr int MAX_M = 8;             // tokens in a register tile
constexpr int64_t NEURON_BLOCK = 32; // neurons of an expert that are widened and multiplied together
constexpr int64_t DEPTH_BLOCK = 1024;  // stretch of d_model: 8 token rows of it (32 KB) stay in a 48 KB L1
constexpr int64_t TOKEN_CHUNK = 512; // tokens handled at a time: their hidden units fit in memory that is kept

// Rows of a register tile beside M tokens: M * N accumulators and their operands in 32 (16) vector registers.
constexpr int tile_rows(int m) {
  constexpr int wide[] = {0, 8, 8, 8, 6, 5, 4, 3, 3}, narrow[] = {0, 8, 6, 4, 3, 2, 2, 1, 1};
  return W == 16 ? wide[m] : narrow[m];
}

// Calls f<m> with the constant m = tokens (1..MAX_M).
template <class F>
inline void with_m(int64_t m, F&& f) {
  switch (m) {
    case 1: return f.template operator()<1>();
    case 2: return f.template operator()<2>();
    case 3: return f.template operator()<3>();
    case 4: return f.template operator()<4>();
    case 5: return f.template operator()<5>();
    case 6: return f.template operator()<6>();
    case 7: return f.template operator()<7>();
    default: return f.template operator()<8>();
  }
}

// out[m * ldo + n] += x[m] . w[n * ldw] over depth elements
template <int M, int N>
inline void dot_tile(const float* const* x, const float* w, int64_t ldw, int64_t depth, float* out, int64_t ldo) {
  vf acc[M][N] = {};
  int64_t k = 0;
  for (; k + W <= depth; k += W) {
    vf wv[N];
    for (int n = 0; n < N; n++) wv[n] = load(w + n * ldw + k);
    for (int m = 0; m < M; m++) {
      const vf xv = load(x[m] + k);
      for (int n = 0; n < N; n++) acc[m][n] += xv * wv[n];
    }
  }
  if (k < depth)
    for (int m = 0; m < M; m++)
      for (int n = 0; n < N; n++)
        acc[m][n] += load_part<F32>(x[m] + k, depth - k) * load_part<F32>(w + n * ldw + k, depth - k);
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) out[m * ldo + n] += hsum(acc[m][n]);
}

// out[i * ldo + j] += x[i] . w[j] for `tokens` rows x and `rows` weight rows
inline void dot_block(const float* const* x, int64_t offset, int64_t tokens, const float* w, int64_t ldw, int64_t rows,
                      int64_t depth, float* out, int64_t ldo) {
  const int64_t tiles = (tokens + MAX_M - 1) / MAX_M;
  for (int64_t tile = 0; tile < tiles; tile++) {
    const auto [m0, m1] = share(tokens, 1, int(tile), int(tiles));
    const float* xs[MAX_M];
    for (int64_t m = m0; m < m1; m++) xs[m - m0] = x[m] + offset;
    with_m(m1 - m0, [&]<int M>() {
      constexpr int N = tile_rows(M);
      int64_t j = 0;
      for (; j + N <= rows; j += N) dot_tile<M, N>(xs, w + j * ldw, ldw, depth, out + m0 * ldo + j, ldo);
      for (; j < rows; j++) dot_tile<M, 1>(xs, w + j * ldw, ldw, depth, out + m0 * ldo + j, ldo);
    });
  }
}

// A block [rows, cols] of a weight as fp32 rows: where it lies, or widened (or turned) into `buffer`.
template <class E>
inline std::pair<const float*, int64_t> fp32_block(const Matrix& m, int64_t r0, int64_t rows, int64_t c0, int64_t cols,
                                                   float* buffer) {
  if constexpr (std::is_same_v<E, F32>)
    if (m.col == 1) return {m.at<E>(r0, c0), m.row};
  const int64_t ld = round_up(cols, W);
  if (m.col == 1) {
    for (int64_t r = 0; r < rows; r++) widen<E>(m.at<E>(r0 + r, c0), buffer + r * ld, cols);
  } else {
    for (int64_t c = 0; c < cols; c++)
      for (int64_t r = 0; r < rows; r++) buffer[r * ld + c] = E::to_float(*m.at<E>(r0 + r, c0 + c));
  }
  return {buffer, ld};
}

// out[i * ldo + j] = x[i] . m[r0 + j], i < tokens, j < rows
template <class E>
inline void project_rows(const Matrix& m, int64_t r0, int64_t rows, const float* const* x, int64_t tokens, int64_t depth,
                         float* out, int64_t ldo, float* buffer) {
  for (int64_t i = 0; i < tokens; i++) std::fill(out + i * ldo, out + i * ldo + rows, 0.0f);
  for (int64_t k = 0; k < depth; k += DEPTH_BLOCK) {
    const int64_t n = std::min(DEPTH_BLOCK, depth - k);
    const auto [w, ldw] = fp32_block<E>(m, r0, rows, k, n, buffer);
    dot_block(x, k, tokens, w, ldw, rows, n, out, ldo);
  }
}

// y[m][0 .. N*W) += sum over j < depth of h[m * ldh + j] * w[j * ldw ..]
template <int M, int N>
inline void outer_tile(const float* h, int64_t ldh, const float* w, int64_t ldw, int64_t depth, float* const* y) {
  vf acc[M][N];
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) acc[m][n] = load(y[m] + n * W);
  for (int64_t j = 0; j < depth; j++) {
    vf wv[N];
    for (int n = 0; n < N; n++) wv[n] = load(w + j * ldw + n * W);
    for (int m = 0; m < M; m++) {
      const vf hv = splat(h[m * ldh + j]);
      for (int n = 0; n < N; n++) acc[m][n] += hv * wv[n];
    }
  }
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) store(y[m] + n * W, acc[m][n]);
}

inline void outer_rest(const float* h, const float* w, int64_t ldw, int64_t depth, float* y, int64_t cols) {
  vf acc = load_part<F32>(y, cols);
  for (int64_t j = 0; j < depth; j++) acc += splat(h[j]) * load_part<F32>(w + j * ldw, cols);
  store_part(y, acc, cols);
}

// y[i][0 .. cols) += h[i * ldh ..] times w [depth, cols]
inline void outer_block(float* const* y, int64_t tokens, const float* h, int64_t ldh, const float* w, int64_t ldw,
                        int64_t depth, int64_t cols) {
  const int64_t tiles = (tokens + MAX_M - 1) / MAX_M;
  for (int64_t tile = 0; tile < tiles; tile++) {
    const auto [m0, m1] = share(tokens, 1, int(tile), int(tiles));
    with_m(m1 - m0, [&]<int M>() {
      constexpr int N = tile_rows(M);
      float* ys[M];
      int64_t c = 0;
      const float* hs = h + m0 * ldh;
      auto at = [&](int64_t col) {
        for (int m = 0; m < M; m++) ys[m] = y[m0 + m] + col;
        return ys;
      };
      for (; c + N * W <= cols; c += N * W) outer_tile<M, N>(hs, ldh, w + c, ldw, depth, at(c));
      for (; c + W <= cols; c += W) outer_tile<M, 1>(hs, ldh, w + c, ldw, depth, at(c));
      if (c < cols)
        for (int m = 0; m < M; m++) outer_rest(hs + m * ldh, w + c, ldw, depth, y[m0 + m] + c, cols - c);
    });
  }
}

// What the phases of one chunk share: token lists per expert and the hidden units, packed [tokens of e, group].
struct Lists {
  int32_t* tokens;    // [n_experts, chunk]
  int32_t* count;     // [n_experts]
  int64_t* offset;    // [n_experts + 1] rows of `hidden` before expert e
  float* hidden;      // [rows, group]
};

// Buffers of one thread.
struct Local {
  const float** rows;      // [chunk] pointers to token rows
  float** out_rows;        // [chunk]
  float *block, *up, *gate;  // a widened weight block; [chunk, NEURON_BLOCK] twice
  static size_t bytes(const Problem& p, int64_t chunk) {
    return 2 * Scratch::bytes_for<float*>(chunk) + Scratch::bytes_for<float>(block_size(p)) +
           2 * Scratch::bytes_for<float>(chunk * NEURON_BLOCK);
  }
  static int64_t block_size(const Problem& p) {
    return std::max(NEURON_BLOCK * DEPTH_BLOCK, p.group * round_up(column_block(p, 1), W));
  }
  // Output columns a task takes: the chunk's y block (tokens x columns) should stay in L2, and every thread gets some.
  static int64_t column_block(const Problem& p, int64_t tokens) {
    const int64_t even = round_up((p.d_out + p.threads - 1) / p.threads, 64);
    return std::clamp<int64_t>(round_up((int64_t(128) << 10) / std::max<int64_t>(tokens, 1), 64), 64, std::min<int64_t>(even, 1024));
  }
  Local(Scratch& s, const Problem& p, int64_t chunk)
      : rows(s.take<const float*>(chunk)),
        out_rows(s.take<float*>(chunk)),
        block(s.take<float>(block_size(p))),
        up(s.take<float>(chunk * NEURON_BLOCK)),
        gate(s.take<float>(chunk * NEURON_BLOCK)) {}
};

template <class E>
inline void route_block(const Problem& p, const float* x, int64_t ldx, int64_t tokens, int64_t e0, int64_t e1,
                        Lists& lists, uint8_t* mask, int64_t chunk, Local& local) {
  for (int64_t i = 0; i < tokens; i++) local.rows[i] = x + i * ldx;
  project_rows<F32>(p.router, e0, e1 - e0, local.rows, tokens, p.d_model, local.up, NEURON_BLOCK, local.block);
  for (int64_t e = e0; e < e1; e++) {
    const float bias = p.router_bias ? p.router_bias[e] : 0.0f;
    int32_t n = 0;
    for (int64_t i = 0; i < tokens; i++) {
      const bool on = local.up[i * NEURON_BLOCK + e - e0] + bias > p.threshold;
      if (mask) mask[i * p.n_experts + e] = on;
      lists.tokens[e * chunk + n] = int32_t(i);
      n += on;
    }
    lists.count[e] = n;
  }
}

template <class E>
inline void hidden_block(const Problem& p, const float* x, int64_t ldx, int64_t e, int64_t j0, int64_t j1,
                         const Lists& lists, int64_t chunk, Local& local) {
  const int64_t tokens = lists.count[e], rows = j1 - j0, neuron = e * p.group + j0;
  for (int64_t i = 0; i < tokens; i++) local.rows[i] = x + lists.tokens[e * chunk + i] * ldx;
  project_rows<E>(p.up, neuron, rows, local.rows, tokens, p.d_model, local.up, NEURON_BLOCK, local.block);
  if (p.gate.data)
    project_rows<E>(p.gate, neuron, rows, local.rows, tokens, p.d_model, local.gate, NEURON_BLOCK, local.block);
  for (int64_t i = 0; i < tokens; i++) {
    float *u = local.up + i * NEURON_BLOCK, *g = p.gate.data ? local.gate + i * NEURON_BLOCK : nullptr;
    for (int64_t j = 0; j < rows; j++) {
      u[j] += bias_at<E>(p.up_bias, neuron + j);
      if (g) g[j] += bias_at<E>(p.gate_bias, neuron + j);
    }
    activate_row(p.act, g, u, rows);
    std::copy(u, u + rows, lists.hidden + (lists.offset[e] + i) * p.group + j0);
  }
}

template <class E>
inline void down_block(const Problem& p, float* y, int64_t tokens, int64_t c0, int64_t c1, const Lists& lists,
                       int64_t chunk, Local& local) {
  for (int64_t i = 0; i < tokens; i++)
    for (int64_t c = c0; c < c1; c++) y[i * p.d_out + c] = bias_at<E>(p.down_bias, c);
  const Matrix turned{p.down.data, p.down.col, p.down.row};  // [d_ff, d_out]
  for (int64_t e = 0; e < p.n_experts; e++) {
    const int64_t n = lists.count[e];
    if (n == 0) continue;
    for (int64_t i = 0; i < n; i++) local.out_rows[i] = y + lists.tokens[e * chunk + i] * p.d_out + c0;
    const auto [w, ldw] = fp32_block<E>(turned, e * p.group, p.group, c0, c1 - c0, local.block);
    outer_block(local.out_rows, n, lists.hidden + lists.offset[e] * p.group, p.group, w, ldw, p.group, c1 - c0);
  }
}

template <class E>
void batch_chunk(const Problem& p, int64_t first, int64_t tokens) {
  const bool fp32 = std::is_same_v<E, F32>;
  Scratch& s = scratch();
  const int64_t padded = round_up(p.d_model, W);
  s.reserve(Scratch::bytes_for<float>(tokens * padded) + Scratch::bytes_for<float>(tokens * p.d_out) +
            Scratch::bytes_for<int32_t>(p.n_experts * tokens) + Scratch::bytes_for<int32_t>(p.n_experts) +
            Scratch::bytes_for<int64_t>(p.n_experts + 1) + Scratch::bytes_for<float>(tokens * p.d_ff) +
            p.threads * Local::bytes(p, tokens));
  const auto* x_in = static_cast<const typename E::T*>(p.x) + first * p.x_stride;
  const float* x = fp32 ? reinterpret_cast<const float*>(x_in) : nullptr;
  const int64_t ldx = fp32 ? p.x_stride : padded;
  auto* y_out = static_cast<typename E::T*>(p.y) + first * p.d_out;
  float* wide_x = fp32 ? nullptr : s.take<float>(tokens * padded);
  float* y = fp32 ? reinterpret_cast<float*>(y_out) : s.take<float>(tokens * p.d_out);
  if (!fp32) x = wide_x;
  Lists lists{s.take<int32_t>(p.n_experts * tokens), s.take<int32_t>(p.n_experts), s.take<int64_t>(p.n_experts + 1),
              s.take<float>(tokens * p.d_ff)};
  std::vector<Local> locals;
  for (int t = 0; t < p.threads; t++) locals.emplace_back(s, p, tokens);
  uint8_t* mask = p.mask ? p.mask + first * p.n_experts : nullptr;
  const int64_t per_expert = (p.group + NEURON_BLOCK - 1) / NEURON_BLOCK;
  const int64_t columns = Local::column_block(p, tokens);

#pragma omp parallel num_threads(p.threads) if (p.threads > 1)
  {
    Local& local = locals[size_t(omp_get_thread_num())];
    if (!fp32) {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < tokens; i++) widen<E>(x_in + i * p.x_stride, wide_x + i * padded, p.d_model);
    }
#pragma omp for schedule(dynamic)
    for (int64_t e = 0; e < p.n_experts; e += NEURON_BLOCK)
      route_block<E>(p, x, ldx, tokens, e, std::min(e + NEURON_BLOCK, p.n_experts), lists, mask, tokens, local);
#pragma omp single
    {
      lists.offset[0] = 0;
      for (int64_t e = 0; e < p.n_experts; e++) lists.offset[e + 1] = lists.offset[e] + lists.count[e];
    }
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < p.n_experts * per_expert; task++) {
      const int64_t e = task / per_expert, j = task % per_expert * NEURON_BLOCK;
      if (lists.count[e])
        hidden_block<E>(p, x, ldx, e, j, std::min(j + NEURON_BLOCK, p.group), lists, tokens, local);
    }
#pragma omp for schedule(dynamic)
    for (int64_t c = 0; c < p.d_out; c += columns)
      down_block<E>(p, y, tokens, c, std::min(c + columns, p.d_out), lists, tokens, local);
    if (!fp32) {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < tokens * p.d_out; i++) y_out[i] = E::from_float(y[i]);
    }
  }
}

template <class E>
void batch(const Problem& p) {
  for (int64_t first = 0; first < p.tokens; first += TOKEN_CHUNK)
    batch_chunk<E>(p, first, std::min(TOKEN_CHUNK, p.tokens - first));
}

}  // namespace
