// Rows of down in 4 bits, a neuron each, with a scale a block of 32 outputs: added up at the speed of memory, and widened.
#pragma once

#include "quantised.h"
#include "rows.h"

namespace {

// W bytes as fp32: what their low halves mean, and their high ones.
inline void load_nibbles(const uint8_t* p, vf& low, vf& high) {
#if defined(__AVX512F__)
  const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m512 values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  low = reinterpret_cast<vf>(_mm512_permutexvar_ps(bytes, values));  // looks at four bits alone
  high = reinterpret_cast<vf>(_mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), values));
#else
  typedef uint8_t bytes_mem __attribute__((vector_size(W), aligned(1), may_alias));
  const vi bytes = __builtin_convertvector(*reinterpret_cast<const bytes_mem*>(p), vi);
  low = to_float((bytes & 15) - 8);
  high = to_float((bytes >> 4) - 8);
#endif
}

// h times the scales of the n blocks from `scales` on, of W at most.
inline vf factors_of(const uint16_t* scales, int64_t n, float h) {
  return splat(h) * (n >= W ? F16::load(scales) : load_last_halves(scales, n));
}

// to[0 .. 32 * blocks) = a row
inline void widen_nibbles(const uint8_t* row, const uint16_t* scales, int64_t blocks, float* to) {
  float factors[W];
  for (int64_t b = 0; b < blocks; b++, row += BLOCK / 2, to += BLOCK) {
    if (b % W == 0) store(factors, factors_of(scales + b, blocks - b, 1.0f));
    for (int64_t i = 0; i < BLOCK / 2; i += W) {
      vf low, high;
      load_nibbles(row + i, low, high);
      store(to + i, low * factors[b % W]);
      store(to + BLOCK / 2 + i, high * factors[b % W]);
    }
  }
}

// Output columns [c0, c0 + cols), whole blocks, of n neurons from `neuron` on, rows `stride` apart; as many from `next` on
// are asked for meanwhile.
inline void widen_neurons(const Problem& p, int64_t neuron, int64_t n, int64_t next, int64_t c0, int64_t cols, float* to,
                          int64_t stride) {
  for (int64_t i = 0; i < n; i++) {
    const uint8_t* then = p.down.at<I4>(c0 / 2, next + i);
    for (int64_t k = 0; k < cols / 2; k += 64) __builtin_prefetch(then + k, 0, 2);
    widen_nibbles(p.down.at<I4>(c0 / 2, neuron + i), p.down_scales.at<F16>(c0 / BLOCK, neuron + i), cols / BLOCK,
                  to + i * stride);
  }
}

// y[0 .. 32 * blocks) += the sum over r of h[r] * row r; next: the rows that are read after these.
template <int R>
inline void add_nibble_rows(const uint8_t* const* rows, const uint8_t* const* next, const uint16_t* const* scales,
                            const float* h, float* y, int64_t blocks) {
  const int64_t bytes = blocks * (BLOCK / 2), ahead = std::min(AHEAD, bytes);
  float factors[R][W];
  for (int64_t b = 0; b < blocks; b++) {
    const int64_t k = b * (BLOCK / 2);
    if (b % W == 0)
      for (int r = 0; r < R; r++) store(factors[r], factors_of(scales[r] + b, blocks - b, h[r]));
    if (k % 64 == 0)
      for (int r = 0; r < R; r++)
        __builtin_prefetch(k + ahead < bytes ? rows[r] + k + ahead : next[r] + (k + ahead - bytes), 0, 2);
    for (int64_t i = 0; i < BLOCK / 2; i += W) {
      float *first = y + b * BLOCK + i, *second = first + BLOCK / 2;
      vf lows = load(first), highs = load(second);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) {
        vf low, high;
        load_nibbles(rows[r] + k + i, low, high);
        lows += low * factors[r][b % W];
        highs += high * factors[r][b % W];
      }
      store(first, lows);
      store(second, highs);
    }
  }
}

// y += the sum of h[at[i]] * neuron i's outputs from `begin` on, a multiple of 32, over i in [0, count)
template <class Neuron>
inline void add_nibbles_of(const Problem& p, Neuron&& neuron, const int32_t* at, int64_t count, const float* h,
                           int64_t begin, float* y, int64_t blocks) {
  auto row = [&](int64_t i) { return p.down.at<I4>(begin / 2, neuron(i)); };
  by_rows<I4>(row, 0, count, [&]<int R>(int64_t i, int64_t lane, auto rows, auto next) {
    const uint16_t* scales[R];
    float factors[R];
    for (int r = 0; r < R; r++) {
      factors[r] = h[at[i + r * lane]];
      scales[r] = p.down_scales.at<F16>(begin / BLOCK, neuron(i + r * lane));
      __builtin_prefetch(p.down_scales.at<F16>(begin / BLOCK, neuron(std::min(i + r * lane + 1, count - 1))), 0, 2);
    }
    add_nibble_rows<R>(rows, next, scales, factors, y, blocks);
  });
}

}  // namespace
