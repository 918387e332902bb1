// Linears of quantised weights: x is quantised to int8 in blocks of 32, and integer sums within a block are scaled to
// fp32 lane by lane. The formats are in ../weight_formats.py.
#pragma once

#include "linear.h"
#include "quantised_inputs.h"

namespace {

inline vf to_float(vi v) { return __builtin_convertvector(v, vf); }

// int8 weights with a scale a row.
struct Int8Linear {
  using Input = void;  // of any type
  static constexpr int PER_BLOCK = 0;  // scales and minima that a block has of its own
  Rows weight;
  int64_t d_in;
  const float* scale;
  Inputs<1> inputs;
  Int8Linear(Rows w, int64_t n, const float* s) : weight(w), d_in(n), scale(s) {
    // Whole blocks, also where a vector holds half of one: what is laid behind n would be the next token's.
    inputs = {nullptr, round_up(n, std::max(BLOCK, VB)) / VB, (n + BLOCK - 1) / BLOCK, nullptr};
  }
  size_t bytes(int64_t tokens) const { return inputs.bytes(tokens); }
  void reserve(int64_t tokens) { inputs.reserve(tokens); }
  template <class E>
  void lay(int64_t token, const typename E::T* from) const { inputs.template lay<E>(token, from, d_in, -ADDED<true>); }

  template <int M>
  void tile(int64_t token, int64_t row, int64_t gap, const Fetch& fetch, float* sums) const {
    const char* xs[M];
    for (int m = 0; m < M; m++) xs[m] = inputs.row(token + m);
    tile_of<M>(xs, row, gap, fetch, sums);
  }
  // xs: any M rows of the inputs
  template <int M>
  ALONE void tile_of(const char* const* xs, int64_t row, int64_t gap, const Fetch& fetch, float* sums) const {
    const char* rows[LANES];
    weight.at(row, gap, rows);
    vf acc[M][LANES] = {};
    auto add = [&](int64_t chunk, auto&& bytes) INLINE {
      vb w[LANES];
#pragma GCC unroll 16
      for (int n = 0; n < LANES; n++) w[n] = raised<true>(bytes(n));
#pragma GCC unroll 16
      for (int m = 0; m < M; m++) {
        const char* x = xs[m] + chunk * Inputs<1>::CHUNK;
        const vb codes = load_bytes(x);
        const vi start = *reinterpret_cast<const vi_mem*>(x + VB);
        const vf scales = load(reinterpret_cast<const float*>(x + 2 * VB));
#pragma GCC unroll 16
        for (int n = 0; n < LANES; n++) acc[m][n] += scales * to_float(add_products<true>(start, w[n], codes));
      }
    };
    int64_t k = 0;
    for (; k + VB <= d_in; k += VB) {
      if (VB >= 64 || k % 64 == 0) fetch(k);
      add(k / VB, [&](int n) { return load_bytes(rows[n] + k); });
    }
    if (k < d_in) add(k / VB, [&](int n) { return load_last_bytes(rows[n] + k, d_in - k); });
    sum_lanes(acc, sums);
  }
  float finish(float sum, int64_t row) const { return sum * scale[weight.place(row)]; }
  // Of the rows that a list names.
  void only(const int32_t* list, int64_t count) { weight.list = list, weight.count = count; }
  void fetch_scales(int64_t) const {}  // the hardware does
};

// fp16 scales of the blocks of a vector of 4-bit codes, each in the lanes of its block.
inline vf spread(uint64_t halves) {
#if defined(__AVX512F__)
  const __m128 scales = _mm_cvtph_ps(_mm_cvtsi64_si128(int64_t(halves)));
  const __m512i lanes = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
  return reinterpret_cast<vf>(_mm512_permutexvar_ps(lanes, _mm512_castps128_ps512(scales)));
#elif defined(__AVX2__) && defined(__F16C__)
  const __m128 scales = _mm_cvtph_ps(_mm_cvtsi32_si128(int32_t(halves)));
  const __m256i lanes = _mm256_set_epi32(1, 1, 1, 1, 0, 0, 0, 0);
  return reinterpret_cast<vf>(_mm256_permutevar8x32_ps(_mm256_castps128_ps256(scales), lanes));
#else
  vf out;
  for (int b = 0; b < W / 4; b++) {
    const float scale = F16::to_float(F16::T(halves >> 16 * b));
    for (int i = 0; i < 4; i++) out[4 * b + i] = scale;
  }
  return out;
#endif
}

// The last n < W halves of a row, zeros behind them.
inline vf load_last_halves(const uint16_t* p, int64_t n) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  return reinterpret_cast<vf>(_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p)));
#else
  return load_part<F16>(p, n);
#endif
}

// 4-bit weights in blocks of 32, with a scale each and, where MINIMUM, the value of code 0 (else of code 8: 0).
template <bool MINIMUM>
struct Int4Linear {
  using Input = void;  // of any type
  static constexpr int PER_BLOCK = MINIMUM ? 2 : 1;
  static constexpr int64_t BLOCKS = W / 4;  // in a vector of codes
  Rows weight;
  int64_t d_in;
  Rows scale, minimum;
  Inputs<2> inputs;
  Int4Linear(Rows w, Rows s, Rows m) : weight(w), d_in(2 * w.bytes), scale(s), minimum(m) {
    const int64_t blocks = d_in / BLOCK;
    inputs = {nullptr, (blocks + BLOCKS - 1) / BLOCKS, blocks, nullptr};
  }
  size_t bytes(int64_t tokens) const { return inputs.bytes(tokens); }
  void reserve(int64_t tokens) { inputs.reserve(tokens); }
  template <class E>
  void lay(int64_t token, const typename E::T* from) const { inputs.template lay<E>(token, from, d_in, MINIMUM ? 0 : -8); }

  template <int M>
  void tile(int64_t token, int64_t row, int64_t gap, const Fetch& fetch, float* sums) const {
    const char* xs[M];
    for (int m = 0; m < M; m++) xs[m] = inputs.row(token + m);
    tile_of<M>(xs, row, gap, fetch, sums);
  }
  // xs: any M rows of the inputs
  template <int M>
  ALONE void tile_of(const char* const* xs, int64_t row, int64_t gap, const Fetch& fetch, float* sums) const {
    const char *rows[LANES], *scales[LANES];
    weight.at(row, gap, rows);
    scale.at(row, gap, scales);
    vf acc[M][LANES] = {};
    auto halves = [](const char* p, int64_t chunk, int64_t blocks) INLINE {
      uint64_t bits = 0;
      p += 2 * chunk * BLOCKS;
      if (blocks == BLOCKS)
        std::memcpy(&bits, p, 2 * BLOCKS);
      else  // no buffer: what is written in parts and then read as a whole waits for the writes
        for (int64_t b = 0; b < blocks; b++) bits |= uint64_t(reinterpret_cast<const uint16_t*>(p)[b]) << 16 * b;
      return bits;
    };
    auto add = [&](int64_t chunk, auto&& bytes, auto&& scale_of) INLINE {
#pragma GCC unroll 16
      for (int n = 0; n < LANES; n++) {
        const vb pairs = bytes(n), low = pairs & int8_t(15);
        const vb high = reinterpret_cast<vb>(reinterpret_cast<vs>(pairs) >> 4) & int8_t(15);
        const vf s = spread(scale_of(n));
#pragma GCC unroll 16
        for (int m = 0; m < M; m++) {
          const char* x = xs[m] + chunk * Inputs<2>::CHUNK;
          const vi start = *reinterpret_cast<const vi_mem*>(x + 2 * VB);
          const vi sum = add_products_of_nibbles(start, low, load_bytes(x), high, load_bytes(x + VB));
          acc[m][n] += to_float(sum) * load(reinterpret_cast<const float*>(x + 3 * VB)) * s;
        }
      }
    };
    int64_t k = 0, chunk = 0;
    for (; k + VB <= weight.bytes; k += VB, chunk++) {
      if (VB >= 64 || k % 64 == 0) fetch(k);
      add(chunk, [&](int n) { return load_bytes(rows[n] + k); },
          [&](int n) { return halves(scales[n], chunk, BLOCKS); });
    }
    if (const int64_t left = inputs.blocks - chunk * BLOCKS; left > 0)
      add(chunk, [&](int n) { return load_last_bytes(rows[n] + k, weight.bytes - k); },
          [&](int n) { return halves(scales[n], chunk, left); });
    if (MINIMUM) add_minimum(xs, row, gap, acc);
    sum_lanes(acc, sums);
  }

  template <int M>
  void add_minimum(const char* const* xs, int64_t row, int64_t gap, vf (&acc)[M][LANES]) const {
    const char* rows[LANES];
    minimum.at(row, gap, rows);
    for (int64_t b = 0; b < inputs.blocks; b += W)
#pragma GCC unroll 16
      for (int n = 0; n < LANES; n++) {
        const auto* from = reinterpret_cast<const uint16_t*>(rows[n]) + b;
        const vf least = b + W <= inputs.blocks ? F16::load(from) : load_last_halves(from, inputs.blocks - b);
#pragma GCC unroll 16
        for (int m = 0; m < M; m++) acc[m][n] += least * load(inputs.sums_of(xs[m]) + b);
      }
  }
  float finish(float sum, int64_t) const { return sum; }
  void only(const int32_t* list, int64_t count) {
    weight.list = scale.list = minimum.list = list, weight.count = scale.count = minimum.count = count;
  }
  void fetch_scales(int64_t row) const { __builtin_prefetch(scale.data + scale.place(row) * scale.stride, 0, 2); }
};

// Up or gate of a call, in int8 where it has a scale an output.
template <class Q>
using LinearOf = std::conditional_t<std::is_same_v<Q, I4>, Int4Linear<false>, Int8Linear>;
template <class Q>
inline LinearOf<Q> codes_of(const Problem& p, const Matrix& m, const float* scale, const Matrix& scales) {
  const auto* data = static_cast<const char*>(m.data);
  if constexpr (std::is_same_v<Q, I4>)
    return {{data, m.row, p.d_model / 2, p.d_ff},
            {static_cast<const char*>(scales.data), 2 * scales.row, p.d_model / BLOCK * 2, p.d_ff},
            {}};
  else
    return {{data, m.row, p.d_model, p.d_ff}, p.d_model, scale};
}

}  // namespace
