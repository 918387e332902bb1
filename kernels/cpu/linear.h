// Linears over few tokens: each row of the weight is read once, where it lies, and multiplied with all of them.
// A piece is a run of rows, small enough that a thread which comes late holds nobody up: whoever is free takes the next.
// Each thread goes through its share in a few lanes, which are long streams for the hardware.
// Every output is summed by one thread in one order, the same for any number of threads and of tokens.
#pragma once

#include "pool.h"
#include "problem.h"

namespace {

// A register tile: M tokens by LANES rows, so that sums and operands fit in 32 (16) vector registers.
constexpr int LINEAR_TOKENS = W == 16 ? 6 : 3;
constexpr int LANES = 4;  // more streams than these a core's prefetchers follow less well
// Left to itself GCC may call what a loop and its rest share, and then keeps the sums in memory.
#define INLINE __attribute__((always_inline))
// And a tile that it does not call has few registers left.
#define ALONE __attribute__((noinline))
constexpr int64_t PIECE = 128 << 10;          // bytes of weights that a thread takes at a time, about
constexpr int64_t LINE_AHEAD = 1 << 10;       // bytes that are asked for before they are read
constexpr int64_t DEEP = 2;                   // rows of each lane that all tokens are multiplied with in turn
constexpr int64_t WORTH_A_THREAD = 48 << 10;  // bytes of weights, times tokens: less takes less time than to wake one
constexpr int64_t TOKENS_AT_ONCE = 32;       // whose operands stay in L2 while a piece goes by

// f<M>() for a tile that holds m tokens; M - m of its places stay empty, which costs less than code for each m.
template <class F>
inline void with_tokens(int64_t m, F&& f) {
  if (m == 1) return f.template operator()<1>();
  if (m == 2) return f.template operator()<2>();
  if (m <= 4 && LINEAR_TOKENS > 4) return f.template operator()<std::min(4, LINEAR_TOKENS)>();
  return f.template operator()<LINEAR_TOKENS>();
}

// Where a tile asks for what is read later: at bytes of its own rows in [from, to), for the same of these.
struct Fetch {
  const char* rows[LANES];
  int64_t from, to;
  void operator()(int64_t byte) const {
    if (byte < from || byte >= to) return;
#pragma GCC unroll 16
    for (int n = 0; n < LANES; n++) __builtin_prefetch(rows[n] + byte, 0, 2);
  }
};

// The rows of a weight, as bytes; of a list of them, row i is list[i].
struct Rows {
  const char* data;
  int64_t stride, bytes, count;  // bytes from one to the next, and of each
  const int32_t* list = nullptr;
  int64_t place(int64_t i) const { return list ? list[i] : i; }
  // LANES of them, `gap` apart; past the last one, the last one again: its sums are not used.
  void at(int64_t first, int64_t gap, const char** to) const {
#pragma GCC unroll 16
    for (int n = 0; n < LANES; n++) to[n] = data + place(std::min(first + n * gap, count - 1)) * stride;
  }
};

// sums[m * LANES + n] of the accumulators of a tile
template <int M>
inline void sum_lanes(const vf (&acc)[M][LANES], float* sums) {
  static_assert(LANES == 4);
  std::fill(sums, sums + M * LANES, 0.0f);
#pragma GCC unroll 16
  for (int m = 0; m < M; m++) add_hsum4(acc[m], sums + m * LANES);
}

// How rows of E are read and multiplied: VECTORS of operands at a time, from VECTORS * LANES elements.
template <class E, bool UNITS = std::is_same_v<E, typename E::Operand> && E::Operand::PER_WORD == 2>
struct Operands {
  using S = typename E::Stream;
  static constexpr int VECTORS = S::PARTS;
  static constexpr int64_t ELEMENTS = STEP<S>;
  static void read(const typename E::T* p, vf* out) { S::load_parts(p, out); }
  static vf multiply_add(vf sum, vf w, vf x) { return sum + w * x; }
  // n elements, zeros behind them up to whole vectors
  static void lay(const typename E::T* from, float* to, int64_t n) {
    std::fill(to, to + round_up(n, ELEMENTS), 0.0f);
    for (int64_t i = 0; i < n; i++) to[place<S>(i)] = E::to_float(from[i]);
  }
};

// As they are, where the CPU multiplies them.
template <class E>
struct Operands<E, true> {
  static constexpr int VECTORS = 1;
  static constexpr int64_t ELEMENTS = W * E::PER_WORD;
  static void read(const typename E::T* p, vf* out) { out[0] = load(reinterpret_cast<const float*>(p)); }
  static vf multiply_add(vf sum, vf w, vf x) { return E::multiply_add(sum, w, x); }
  static void lay(const typename E::T* from, float* to, int64_t n) {
    std::fill(to, to + round_up(n, ELEMENTS) / E::PER_WORD, 0.0f);
    std::memcpy(to, from, size_t(n) * sizeof(from[0]));
  }
};

template <>
struct Operands<F32, false> {
  static constexpr int VECTORS = 1;
  static constexpr int64_t ELEMENTS = W;
  static void read(const float* p, vf* out) { out[0] = load(p); }
  static vf multiply_add(vf sum, vf w, vf x) { return sum + w * x; }
  static void lay(const float* from, float* to, int64_t n) {
    std::memcpy(to, from, size_t(n) * 4);
    std::fill(to + n, to + round_up(n, W), 0.0f);
  }
};

// Weights of E against tokens of E.
template <class E>
struct FloatLinear {
  using O = Operands<E>;
  using T = typename E::T;
  using Input = E;
  Rows weight;
  int64_t d_in;
  float* x;  // [tokens, x_stride] operands
  int64_t x_stride() const { return round_up(d_in, O::ELEMENTS) / O::ELEMENTS * O::VECTORS * W + W; }
  size_t bytes(int64_t tokens) const { return Scratch::bytes_for<float>(tokens * x_stride()); }
  void reserve(int64_t tokens) { x = scratch().take<float>(tokens * x_stride()); }
  template <class X>
  void lay(int64_t token, const T* from) const { O::lay(from, x + token * x_stride(), d_in); }

  template <int M>
  ALONE void tile(int64_t token, int64_t row, int64_t gap, const Fetch& fetch, float* sums) const {
    const char* rows[LANES];
    weight.at(row, gap, rows);
    const float* xs[M];
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) xs[m] = x + (token + m) * x_stride();
    vf acc[M][LANES] = {};
    auto add = [&](int64_t at, auto&& element) INLINE {
#pragma GCC unroll 2
      for (int v = 0; v < O::VECTORS; v++) {
        vf xv[M];
#pragma GCC unroll 16
        for (int m = 0; m < M; m++) xv[m] = load(xs[m] + at + v * W);
#pragma GCC unroll 16
        for (int n = 0; n < LANES; n++) {
          vf wv[O::VECTORS];
          O::read(element(n), wv);
          KEEP_IN_REGISTER(wv[v]);
#pragma GCC unroll 16
          for (int m = 0; m < M; m++) acc[m][n] = O::multiply_add(acc[m][n], wv[v], xv[m]);
        }
      }
    };
    constexpr int64_t STEP_BYTES = O::ELEMENTS * int64_t(sizeof(T));
    int64_t k = 0, at = 0;
    for (; k + O::ELEMENTS <= d_in; k += O::ELEMENTS, at += O::VECTORS * W) {
      if (STEP_BYTES >= 64 || k * int64_t(sizeof(T)) % 64 == 0) fetch(k * int64_t(sizeof(T)));
      add(at, [&](int n) { return reinterpret_cast<const T*>(rows[n]) + k; });
    }
    if (k < d_in) {
      T rest[LANES][O::ELEMENTS] = {};
#pragma GCC unroll 16
      for (int n = 0; n < LANES; n++) std::memcpy(rest[n], reinterpret_cast<const T*>(rows[n]) + k, size_t(d_in - k) * sizeof(T));
      add(at, [&](int n) { return rest[n]; });
    }
    sum_lanes(acc, sums);
  }
  float finish(float sum, int64_t) const { return sum; }
};

// y[tokens, rows] = the sums of all tokens and rows, and the bias.
template <class E, class L>
void linear(L& l, const typename E::T* x, int64_t tokens, const void* bias, typename E::T* y, int threads) {
  Scratch& s = scratch();
  const int64_t room = tokens + LINEAR_TOKENS;  // tiles may have empty places at the end
  s.reserve(l.bytes(room));
  l.reserve(room);
  const Rows& w = l.weight;
  threads = int(std::clamp<int64_t>(w.count * w.bytes * tokens / WORTH_A_THREAD, 1, threads));
  const int64_t share = (w.count + threads - 1) / threads, pieces = 1 + share * w.bytes / PIECE;
  by_pieces(tokens, tokens < TOKENS_AT_ONCE ? 1 : threads, [&](int64_t i, int) { l.template lay<E>(i, x + i * l.d_in); });
  auto tile = [&]<int M>(int64_t token, int64_t here, int64_t row, int64_t gap, int64_t end, const Fetch& fetch) {
    float sums[M * LANES];
    l.template tile<M>(token, row, gap, fetch, sums);
    for (int64_t m = 0; m < here; m++)
      for (int64_t n = 0, r = row; n < LANES && r < end; n++, r += gap)
        y[(token + m) * w.count + r] = E::from_float(l.finish(sums[m * LANES + n], r) + bias_at<E>(bias, r));
  };
  // LANES streams that the hardware follows, each an equal part of rows [begin, end). Rows from `at` to `to` of each are
  // read now, DEEP at a time, which stay in the cache until the last token: tiles of all tokens share the asking ahead.
  auto stream = [&](int64_t begin, int64_t end, int64_t at, int64_t to, int64_t first, int64_t last) {
    const int64_t lane = (end - begin + LANES - 1) / LANES;
    const int64_t all = last - first, tiles = (all + LINEAR_TOKENS - 1) / LINEAR_TOKENS;
    const int64_t size = all <= 8 ? (all + tiles - 1) / tiles : LINEAR_TOKENS;  // two of 4 rather than 6 and 2
    const int64_t ahead = tiles == 1 ? LINE_AHEAD : DEEP * w.stride;
    for (int64_t row = at; row < to; row += DEEP)
      for (int64_t i = 0; i < tiles; i++) {
        const int64_t token = first + i * size, here = std::min(size, last - token);
        with_tokens(here, [&]<int M>() {
          for (int64_t r = row; r < std::min(row + DEEP, to); r++) {
            Fetch fetch{{}, w.bytes * i / tiles, w.bytes * (i + 1) / tiles};
            w.at(r, lane, fetch.rows);
            for (const char*& p : fetch.rows) p += ahead;
            tile.template operator()<M>(token, here, r, lane, end, fetch);
          }
        });
      }
  };
  by_runs(threads * pieces, threads, [&](int64_t i) {
    const int64_t part = i % pieces, begin = i / pieces * share, end = std::min(begin + share, w.count);
    if (begin >= end) return;
    const int64_t lane = (end - begin + LANES - 1) / LANES;
    for (int64_t first = 0; first < tokens; first += TOKENS_AT_ONCE)
      stream(begin, end, begin + lane * part / pieces, begin + lane * (part + 1) / pieces, first,
             std::min(first + TOKENS_AT_ONCE, tokens));
  });
}

}  // namespace
