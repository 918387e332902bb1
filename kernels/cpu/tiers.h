// FFNs whose weights lie in two planes of 4 bits, as ../tiers_reference.py defines them, in stages of pieces:
//   scan of gate's and up's high plane: scores, hidden units, and what the low plane adds to the best | lists of neurons,
//   token by token | rows of down, high of the kept and low of the best, by columns
// Each number is computed by one thread in one order: a token's result is the same beside any others.
#pragma once

#include "pool.h"
#include "proxy.h"

namespace {

struct Tiers {
  const Proxy& high;  // of gate and up
  Plane down, low;    // high of down's columns, as rows; low of gate, up and down
  float threshold, floor;
};

constexpr int64_t TIER_TOKENS = 64;    // whose hidden units are kept at a time
constexpr int64_t TIER_NEURONS = 64;   // of a piece: the low rows that it asks for stay in L2 until they are read
constexpr int64_t TIER_BLOCKS = 64;    // of down's outputs in a piece at most
constexpr int64_t LINE_BLOCKS = 4;     // in a cache line
constexpr int64_t SLICE_BYTES = 512 << 10;  // of down's codes, which several tokens read one after the other
constexpr int TIER_ROWS = 8;           // of down, side by side

enum Tier : uint8_t { REST, KEPT, BEST };

// W bytes, each in a lane.
inline vi widen_bytes(const void* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<vi>(_mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
  return reinterpret_cast<vi>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p))));
#else
  typedef uint8_t bytes __attribute__((vector_size(W), aligned(1), may_alias));
  return __builtin_convertvector(*static_cast<const bytes*>(p), vi);
#endif
}

// What codes in the low four bits of each lane stand for; whatever is above them.
inline vf code_values(vi v) {
#if defined(__AVX512F__)
  const __m512 values = _mm512_set_ps(7, 6, 5, 4, 3, 2, 1, 0, -1, -2, -3, -4, -5, -6, -7, -8);
  return reinterpret_cast<vf>(_mm512_permutexvar_ps(reinterpret_cast<__m512i>(v), values));
#else
  return to_float((v & 15) - 8);
#endif
}

inline void prefetch_row(const Plane& p, int64_t row) {
  const char* codes = p.codes.data + row * p.codes.stride;
  for (int64_t i = 0; i < p.codes.bytes; i += 64) __builtin_prefetch(codes + i, 0, 2);
  __builtin_prefetch(p.multipliers + row * p.blocks(), 0, 2);
}

// Of neurons [first, first + n), n <= TIER_NEURONS, and all tokens: tiers, and hidden units h; both [tokens, d_ff].
inline void tiered_units(const Tiers& t, const TokenCodes<2>& in, int64_t first, int64_t n, int64_t tokens, Tier* tiers,
                         float* h) {
  const Proxy& p = t.high;
  float z[TIER_TOKENS][2][TIER_NEURONS];
  for (int64_t i = 0; i < n; i += SCAN)
    for (int64_t token = 0; token < tokens; token++) {
      const int64_t some = std::min(SCAN, n - i);
      float units[2][SCAN] = {}, sizes[SCAN];
      proxy_units(p, first + i, some, in.row(token), in.scale(token), units);
      proxy_neurons(p, first + i, some, units, sizes);
      for (int64_t k = 0; k < p.k; k++) std::copy(units[k], units[k] + some, z[token][k] + i);
      for (int64_t j = 0; j < some; j++) {
        const int64_t neuron = first + i + j;
        const float logit = proxy_logit(p, neuron, sizes[j]);
        const Tier tier = logit > t.threshold ? BEST : logit > t.floor ? KEPT : REST;
        tiers[token * p.d_ff + neuron] = tier;
        for (int64_t k = 0; tier == BEST && k < p.k; k++) prefetch_row(t.low, k * p.d_ff + neuron);
      }
    }
  for (int64_t i = 0; i < n; i++)
    for (int64_t token = 0; token < tokens; token++)
      for (int64_t k = 0; k < p.k && tiers[token * p.d_ff + first + i] == BEST; k++) {
        const int64_t row = k * p.d_ff + first + i;
        z[token][k][i] += float(proxy_sum(t.low, row, in.row(token))) * t.low.scales[row] * in.scale(token);
      }
  for (int64_t token = 0; token < tokens; token++) {
    float* up = z[token][p.k - 1];
    activate_row(p.act, p.k == 2 ? z[token][0] : nullptr, up, n);
    std::copy(up, up + n, h + token * p.d_ff + first);
  }
}

// y[32 * blocks] += the sum over the list of h[j] times columns [b0, b0 + blocks) of row base + j; blocks <= TIER_BLOCKS
inline void add_columns(const Plane& p, int64_t base, const int32_t* list, int64_t count, const float* h, int64_t b0,
                        int64_t blocks, float* y) {
  constexpr int PARTS = int(BLOCK / 2 / W);
  float factors[TIER_ROWS][TIER_BLOCKS + W];
  auto codes = [&](int64_t i) {
    return p.codes.data + (base + list[std::min(i, count - 1)]) * p.codes.stride + b0 * (BLOCK / 2);
  };
  for (int64_t i = 0; i < count; i += TIER_ROWS) {
    const char *rows[TIER_ROWS], *next[TIER_ROWS];
    for (int r = 0; r < TIER_ROWS; r++) {
      rows[r] = codes(i + r), next[r] = codes(i + TIER_ROWS + r);
      const int64_t j = list[std::min(i + r, count - 1)], row = base + j;
      const float factor = i + r < count ? h[j] * p.scales[row] : 0.0f;  // past the end: a row once more, times 0
      const uint8_t* multipliers = p.multipliers + row * p.blocks() + b0;
      for (int64_t b = 0; b < blocks; b += W) {
        uint8_t bytes[W] = {};
        std::memcpy(bytes, multipliers + b, size_t(std::min<int64_t>(blocks - b, W)));
        store(factors[r] + b, to_float(widen_bytes(bytes)) * splat(factor));
      }
    }
    for (int64_t b = 0; b < blocks; b++) {
      vf sums[2][PARTS] = {};  // of these rows alone: fewer roundings than one sum over all
      for (int r = 0; r < TIER_ROWS; r++) {
        if (b % LINE_BLOCKS == 0) __builtin_prefetch(next[r] + b * (BLOCK / 2), 0, 2);
        const vf factor = splat(factors[r][b]);
        for (int part = 0; part < PARTS; part++) {
          const vi pairs = widen_bytes(rows[r] + b * (BLOCK / 2) + part * W);
          sums[0][part] += factor * code_values(pairs);
          sums[1][part] += factor * code_values(pairs >> 4);
        }
      }
      for (int half = 0; half < 2; half++)
        for (int part = 0; part < PARTS; part++) {
          float* to = y + b * BLOCK + half * (BLOCK / 2) + part * W;
          store(to, load(to) + sums[half][part]);
        }
    }
  }
}

// y: [tokens, d_model] of E, dense, as x is; bias: of E, or null
template <class E>
void tiered_ffn(const Tiers& t, const typename E::T* x, int64_t tokens, const void* bias, typename E::T* y, int threads) {
  const Proxy& p = t.high;
  const int64_t most = std::min(tokens, TIER_TOKENS), blocks = t.down.blocks(), width = blocks * BLOCK;
  TokenCodes<2> in(p.d_model, p.codes.bytes, most);
  Scratch& s = scratch();
  s.reserve(in.bytes() + Scratch::bytes_for<Tier>(most * p.d_ff) + Scratch::bytes_for<float>(most * p.d_ff) +
            2 * Scratch::bytes_for<int32_t>(most * p.d_ff) + 2 * Scratch::bytes_for<int64_t>(most) +
            Scratch::bytes_for<float>(most * width));
  in.reserve(s);
  Tier* tiers = s.take<Tier>(most * p.d_ff);
  float* h = s.take<float>(most * p.d_ff);
  int32_t *kept = s.take<int32_t>(most * p.d_ff), *best = s.take<int32_t>(most * p.d_ff);
  int64_t *n_kept = s.take<int64_t>(most), *n_best = s.take<int64_t>(most);
  float* sums = s.take<float>(most * width);
  const int64_t wide = most == 1 ? (blocks + threads - 1) / threads : SLICE_BYTES / (BLOCK / 2) / p.d_ff;
  const int64_t slice = std::clamp(round_up(wide, LINE_BLOCKS), LINE_BLOCKS, TIER_BLOCKS);
  const int64_t slices = (blocks + slice - 1) / slice, pieces = (p.d_ff + TIER_NEURONS - 1) / TIER_NEURONS;
  for (int64_t from = 0; from < tokens; from += most) {
    const int64_t here = std::min(most, tokens - from);
    by_pieces(here, here == 1 ? 1 : threads, [&](int64_t i, int) { in.lay<E>(i, x + (from + i) * p.d_model); });
    by_runs(pieces, threads, [&](int64_t i) {
      const int64_t first = i * TIER_NEURONS;
      tiered_units(t, in, first, std::min(TIER_NEURONS, p.d_ff - first), here, tiers, h);
    });
    by_pieces(here, here == 1 ? 1 : threads, [&](int64_t token, int) {
      const int64_t at = token * p.d_ff;
      int64_t some = 0, few = 0;
      for (int64_t j = 0; j < p.d_ff; j++) {
        kept[at + some] = best[at + few] = int32_t(j);
        some += tiers[at + j] != REST, few += tiers[at + j] == BEST;
      }
      n_kept[token] = some, n_best[token] = few;
    });
    by_runs(slices * here, threads, [&](int64_t i) {
      const int64_t token = i % here, b0 = i / here * slice, n = std::min(slice, blocks - b0), at = token * p.d_ff;
      float* sum = sums + token * width + b0 * BLOCK;
      std::fill(sum, sum + n * BLOCK, 0.0f);
      add_columns(t.down, 0, kept + at, n_kept[token], h + at, b0, n, sum);
      add_columns(t.low, p.k * p.d_ff, best + at, n_best[token], h + at, b0, n, sum);
      const int64_t end = std::min((b0 + n) * BLOCK, p.d_model);
      for (int64_t o = b0 * BLOCK; o < end; o++)
        y[(from + token) * p.d_model + o] = E::from_float(sums[token * width + o] + bias_at<E>(bias, o));
    });
  }
}

}  // namespace
