// The two products of an expert, summed in fp32 registers: x . w^T over long rows, and h w into long rows. Factors lie as
// operands (see operands.h): fp32, or pairs of bf16 where the CPU multiplies those. Depths and strides are in their words.
#pragma once

#include "operands.h"

namespace {

constexpr int64_t NEURON_BLOCK = 32;  // neurons that are multiplied together, an even number
// Stretch of d_model: 6 token rows of it (24 KB) and 4 of a weight fit in L1. With few tokens reading the weights takes
// longest, which is faster in longer stretches, and the tokens come from L2 in time.
constexpr int64_t FEW_TOKENS = 32;
constexpr int64_t depth_block(int64_t tokens) { return tokens <= FEW_TOKENS ? 2048 : 1024; }
constexpr int64_t AHEAD_WORDS = AHEAD / 4;
constexpr int64_t COLUMN_PIECE = 128;  // fp32 columns of down that all tokens take before the next: 32 rows of them fit in L1

// A register tile: M tokens by tile_rows(M) neurons, so that accumulators and operands fit in 32 (16) vector registers.
constexpr int MAX_M = W == 16 ? 6 : 3;
constexpr int tile_rows(int m) { return m == 1 || (W == 16 && m <= 3) ? 8 : 4; }

template <class F>
inline void with_m(int64_t m, F&& f) {
  switch (m) {
    case 1: return f.template operator()<1>();
    case 2: return f.template operator()<2>();
    case 3: return f.template operator()<3>();
    case 4: return f.template operator()<std::min(4, MAX_M)>();
    case 5: return f.template operator()<std::min(5, MAX_M)>();
    default: return f.template operator()<MAX_M>();
  }
}

// Calls f<M>(first) for consecutive tiles that cover `tokens`, of nearly equal sizes.
template <class F>
inline void by_tiles(int64_t tokens, F&& f) {
  const int64_t tiles = (tokens + MAX_M - 1) / MAX_M;
  for (int64_t tile = 0; tile < tiles; tile++) {
    const auto [m0, m1] = share(tokens, 1, int(tile), int(tiles));
    with_m(m1 - m0, [&]<int M>() { f.template operator()<M>(m0); });
  }
}

// Asks for the cache line at p + k, once where vectors are shorter than lines.
inline void fetch_line(const float* p, int64_t k) {
  if (k % 16 == 0) __builtin_prefetch(p + k, 0, 2);
}

// out[m * NEURON_BLOCK + n * step] += x[m] . w[n] over depth words, a whole number of vectors. FETCH: the rows are
// asked for AHEAD of their use, and at their end the rows at `next`.
template <class O, int M, int N, bool STREAMS, bool FETCH = STREAMS>
inline void dot_tile(const float* const* x, const float* w, const float* next, int64_t ldw, int64_t depth, float* out,
                     int64_t step) {
  vf acc[M][N] = {};
  const int64_t turn = std::max<int64_t>(depth - AHEAD_WORDS, 0);
  for (int64_t k = 0; k < depth; k += W) {
    vf xv[M], wv[N];
    if constexpr (FETCH) {
      const float* fetch = k < turn ? w + AHEAD_WORDS : next - turn;
#pragma GCC unroll 16
      for (int n = 0; n < N; n++) fetch_line(fetch + n * ldw, k);
    }
    if constexpr (M < N) {  // the shorter side stays in registers, the longer one passes through one
#pragma GCC unroll 16
      for (int m = 0; m < M; m++) {
        xv[m] = load(x[m] + k);
        KEEP_IN_REGISTER(xv[m]);
      }
#pragma GCC unroll 16
      for (int n = 0; n < N; n++) {
        wv[n] = load(w + n * ldw + k);
        KEEP_IN_REGISTER(wv[n]);
#pragma GCC unroll 16
        for (int m = 0; m < M; m++) acc[m][n] = O::multiply_add(acc[m][n], xv[m], wv[n]);
      }
    } else {
#pragma GCC unroll 16
      for (int n = 0; n < N; n++) {
        wv[n] = load(w + n * ldw + k);
        KEEP_IN_REGISTER(wv[n]);
      }
#pragma GCC unroll 16
      for (int m = 0; m < M; m++) {
        xv[m] = load(x[m] + k);
        KEEP_IN_REGISTER(xv[m]);
#pragma GCC unroll 16
        for (int n = 0; n < N; n++) acc[m][n] = O::multiply_add(acc[m][n], xv[m], wv[n]);
      }
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; m++) {
    float sums[N] = {}, *to = STREAMS ? sums : out + m * NEURON_BLOCK;
    int n = 0;
#pragma GCC unroll 16
    for (; n + 4 <= N; n += 4) add_hsum4(acc[m] + n, to + n);
#pragma GCC unroll 16
    for (; n < N; n++) to[n] += hsum(acc[m][n]);
    if (STREAMS)
      for (n = 0; n < N; n++) out[m * NEURON_BLOCK + n * step] += sums[n];
  }
}

// out[i * NEURON_BLOCK + j] += x[i] . w[j] for i < tokens, j < rows, from `offset` of x on. streams: a tile's rows lie
// apart, so that the next tile's follow them in memory and each is one long stream; `following` is read after `w`.
template <class O>
inline void dot_block(const float* const* x, int64_t offset, int64_t tokens, const Block& w, const float* following,
                      int64_t rows, int64_t depth, bool streams, float* out) {
  by_tiles(tokens, [&]<int M>(int64_t first) {
    constexpr int N = tile_rows(M);
    const float* xs[M];
    for (int i = 0; i < M; i++) xs[i] = x[first + i] + offset;
    float* to = out + first * NEURON_BLOCK;
    const int64_t tiles = rows / N;
    for (int64_t t = 0; t < tiles; t++) {
      if (streams) {
        const float *at = w.data + t * w.stride, *next = t + 1 < tiles ? at + w.stride : following;
        if (first == 0)
          dot_tile<O, M, N, true>(xs, at, next, tiles * w.stride, depth, to + t, tiles);
        else
          dot_tile<O, M, N, true, false>(xs, at, next, tiles * w.stride, depth, to + t, tiles);
      } else {
        const float* at = w.data + t * N * w.stride;
        if (first == 0 && t + 1 < tiles)
          for (int64_t n = N; n < 2 * N; n++)
            for (int64_t k = 0; k < 96; k += 16) __builtin_prefetch(at + n * w.stride + k);
        dot_tile<O, M, N, false>(xs, at, nullptr, w.stride, depth, to + t * N, 1);
      }
    }
    for (int64_t j = N * tiles; j < rows; j++)
      dot_tile<O, M, 1, false>(xs, w.data + j * w.stride, nullptr, w.stride, depth, to + j, 1);
  });
}

// out[i * NEURON_BLOCK + j] = x[i] . m[r0 + j] for i < tokens, j < rows; x holds the rows' first stretches. following:
// the rows that are read next where they lie, null where that is not known.
template <class E, class O = typename E::Operand>
inline void project_rows(const Matrix& m, int64_t r0, int64_t rows, const Blocked<O>& from, const float* const* x,
                         int64_t tokens, float* out, float* buffer, const float* following = nullptr) {
  std::fill(out, out + tokens * NEURON_BLOCK, 0.0f);
  const int64_t block = from.block * O::PER_WORD;
  for (int64_t k = 0; k < from.depth; k += block) {
    const int64_t cols = std::min(block, from.depth - k), depth = words<O>(cols);
    const Block w = operand_rows<E>(m, r0, rows, k, cols, buffer);
    const float* next = k + cols < from.depth ? w.data + depth : following;
    dot_block<O>(x, k / block * from.next_block(), tokens, w, next ? next : w.data, rows, round_up(depth, W),
                 from.tokens <= FEW_TOKENS, out);
  }
}

// y[m][0 .. N*W) += sum over j < depth of h[m * ldh + j * step] * w[j * ldw ..]
template <class O, int M, int N>
inline void outer_tile(const float* h, int64_t ldh, int64_t step, const float* w, int64_t ldw, int64_t depth,
                       float* const* y) {
  vf acc[M][N];
#pragma GCC unroll 16
  for (int m = 0; m < M; m++)
#pragma GCC unroll 16
    for (int n = 0; n < N; n++) acc[m][n] = load(y[m] + n * W);
  for (int64_t j = 0; j < depth; j++) {
    vf wv[N];
#pragma GCC unroll 16
    for (int n = 0; n < N; n++) {
      wv[n] = load(w + j * ldw + n * W);
      KEEP_IN_REGISTER(wv[n]);
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
      vf hv = splat_word(h + m * ldh + j * step);
      KEEP_IN_REGISTER(hv);
#pragma GCC unroll 16
      for (int n = 0; n < N; n++) acc[m][n] = O::multiply_add(acc[m][n], hv, wv[n]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; m++)
#pragma GCC unroll 16
    for (int n = 0; n < N; n++) store(y[m] + n * W, acc[m][n]);
}

// y[m][0 .. cols) += the same over ROWS rows, which are read line by line side by side, AHEAD of their use: at the speed
// of memory, which tiles do not reach. following: the rows that are read after these.
template <class O, int M>
inline void outer_rows(const float* h, int64_t ldh, int64_t step, const float* w, const float* following, int64_t ldw,
                       int64_t cols, float* const* y) {
  vf hv[M][ROWS];
#pragma GCC unroll 16
  for (int m = 0; m < M; m++)
#pragma GCC unroll 16
    for (int j = 0; j < ROWS; j++) hv[m][j] = splat_word(h + m * ldh + j * step);
  auto stretch = [&](int64_t from, int64_t to, const float* fetch) {
    for (int64_t c = from; c < to; c += W) {
      vf acc[M];
#pragma GCC unroll 16
      for (int m = 0; m < M; m++) acc[m] = load(y[m] + c);
#pragma GCC unroll 16
      for (int j = 0; j < ROWS; j++) {
        fetch_line(fetch + j * ldw, c);
        vf wv = load(w + j * ldw + c);
        KEEP_IN_REGISTER(wv);
#pragma GCC unroll 16
        for (int m = 0; m < M; m++) acc[m] = O::multiply_add(acc[m], hv[m][j], wv);
      }
#pragma GCC unroll 16
      for (int m = 0; m < M; m++) store(y[m] + c, acc[m]);
    }
  };
  const int64_t turn = std::max<int64_t>(cols - AHEAD_WORDS, 0);
  stretch(0, turn, w + (cols - turn));
  stretch(turn, cols, following - turn);
}

// y[i][0 .. cols) += h[i * ldh + j * step] times w [depth, cols] for words j < depth, cols a whole number of vectors.
// following: the rows that are read after these.
template <class O>
inline void outer_block(float* const* y, int64_t tokens, const float* h, int64_t ldh, int64_t step, const Block& w,
                        const float* following, int64_t depth, int64_t cols) {
  if (tokens <= MAX_M && depth == ROWS) {
    with_m(tokens, [&]<int M>() { outer_rows<O, M>(h, ldh, step, w.data, following, w.stride, cols, y); });
    return;
  }
  constexpr int64_t PIECE = COLUMN_PIECE * O::PER_WORD;
  for (int64_t c0 = 0; c0 < cols; c0 += PIECE) {
    const int64_t c1 = std::min(c0 + PIECE, cols);
    by_tiles(tokens, [&]<int M>(int64_t first) {
      constexpr int N = tile_rows(M);
      const float* hs = h + first * ldh;
      float* ys[M];
      auto at = [&](int64_t col) {
        for (int m = 0; m < M; m++) ys[m] = y[first + m] + col;
        return ys;
      };
      int64_t c = c0;
      for (; c + N * W <= c1; c += N * W) outer_tile<O, M, N>(hs, ldh, step, w.data + c, w.stride, depth, at(c));
      for (; c < c1; c += W) outer_tile<O, M, 1>(hs, ldh, step, w.data + c, w.stride, depth, at(c));
    });
  }
}

}  // namespace
