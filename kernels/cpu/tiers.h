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

inline void prefetch_row(const Plane& p, int64_t row) {
  const char* codes = p.codes.data + row * p.codes.stride;
  for (int64_t i = 0; i < p.codes.bytes; i += 64) __builtin_prefetch(codes + i, 0, 2);
  __builtin_prefetch(p.multipliers + row * p.blocks(), 0, 2);
}

// tiers[0 .. n) of SCAN neurons' sizes, from neuron `first` on; asks for the low rows of the best.
inline void decide(const Tiers& t, int64_t first, int64_t n, const float* sizes, Tier* tiers) {
  const Proxy& p = t.high;
  float weights[SCAN] = {};
  std::copy(p.weight + first, p.weight + first + n, weights);
  for (int64_t i = 0; i < n; i += W) {
    const vf logits = proxy_logits(p, load(weights + i), load(sizes + i));
    const vi best = logits > splat(t.threshold), kept = logits > splat(t.floor);
    const narrow tier = __builtin_convertvector((best & int32_t(BEST)) | (~best & kept & int32_t(KEPT)), narrow);
    std::memcpy(tiers + i, &tier, size_t(std::min<int64_t>(n - i, W)));
  }
  for (int64_t j = 0; j < n; j++)
    for (int64_t k = 0; k < p.k && tiers[j] == BEST; k++) prefetch_row(t.low, k * p.d_ff + first + j);
}

// Of neurons [first, first + n), n <= TIER_NEURONS, and all tokens: tiers, and hidden units h; both [tokens, d_ff].
inline void tiered_units(const Tiers& t, const TokenCodes<2>& in, int64_t first, int64_t n, int64_t tokens, Tier* tiers,
                         float* h) {
  const Proxy& p = t.high;
  float z[TIER_TOKENS][2][TIER_NEURONS];
  for (int64_t i = 0; i < n; i += SCAN)
    for (int64_t token = 0; token < tokens; token++) {
      const int64_t some = std::min(SCAN, n - i);
      float units[2][SCAN] = {}, sizes[SCAN] = {};
      proxy_units(p, first + i, some, in.row(token), in.scale(token), units);
      proxy_neurons(p, first + i, some, units, sizes);
      for (int64_t k = 0; k < p.k; k++) std::copy(units[k], units[k] + some, z[token][k] + i);
      decide(t, first + i, some, sizes, tiers + token * p.d_ff + first + i);
    }
  for (int64_t token = 0; token < tokens; token++) {
    int64_t best[TIER_NEURONS + 1], few = 0;
    for (int64_t i = 0; i < n; i++) best[few] = i, few += tiers[token * p.d_ff + first + i] == BEST;
    for (int64_t k = 0; k < p.k; k++)
      for (int64_t i = 0; i < few; i += LANES) {
        const int64_t base = k * p.d_ff + first;
        auto at = [&](int64_t j) { return best[std::min(i + j, few - 1)]; };
        int32_t sums[LANES];
        proxy_sums(t.low, [&](int64_t j) { return base + at(j); }, in.row(token), sums);
        for (int64_t j = 0; j < std::min<int64_t>(few - i, LANES); j++)
          z[token][k][at(j)] += float(sums[j]) * t.low.scales[base + at(j)] * in.scale(token);
      }
    float* up = z[token][p.k - 1];
    activate_row(p.act, p.k == 2 ? z[token][0] : nullptr, up, n);
    std::copy(up, up + n, h + token * p.d_ff + first);
  }
}

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

// Sums of codes times factors for TOGETHER blocks, of rows that are added one by one.
#if defined(__AVX2__) && !defined(__AVX512F__)
// No code is converted: what it stands for is a bfloat16, whose two bytes come out of tables; with zeros behind, a float.
class ColumnSums {
 public:
  static constexpr int TOGETHER = 2;
  void add(const char* codes, int64_t blocks, const float* factors) {
    const __m128i upper = _mm_set_epi64x(0x4040404040403f00, int64_t(0xbfc0c0c0c0c0c0c1));  // of 7 .. 0, of -1 .. -8
    const __m128i lower = _mm_set_epi64x(int64_t(0xe0c0a08040008000), int64_t(0x80004080a0c0e000));
    const vb pairs = blocks == TOGETHER ? load_bytes(codes) : load_last_bytes(codes, BLOCK / 2);
    const vb halves[] = {pairs & int8_t(15), reinterpret_cast<vb>(reinterpret_cast<vs>(pairs) >> 4) & int8_t(15)};
    double both;  // factors, as bits
    std::memcpy(&both, factors, sizeof both);
    const __m256i block_of_lane = _mm256_set_epi32(1, 1, 1, 1, 0, 0, 0, 0);
    const vf factor = reinterpret_cast<vf>(_mm256_permutevar_ps(_mm256_castpd_ps(_mm256_set1_pd(both)), block_of_lane));
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
      const auto at = reinterpret_cast<__m256i>(halves[half]);
      const __m256i bits = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(lower), at);
      const __m256i over = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(upper), at);
      const __m256i low = _mm256_unpacklo_epi8(bits, over), high = _mm256_unpackhi_epi8(bits, over);
      const __m256i zero = _mm256_setzero_si256();
      vf* sums = sums_ + 4 * half;
      sums[0] += factor * reinterpret_cast<vf>(_mm256_unpacklo_epi16(zero, low));
      sums[1] += factor * reinterpret_cast<vf>(_mm256_unpackhi_epi16(zero, low));
      sums[2] += factor * reinterpret_cast<vf>(_mm256_unpacklo_epi16(zero, high));
      sums[3] += factor * reinterpret_cast<vf>(_mm256_unpackhi_epi16(zero, high));
    }
  }
  void add_to(float* y, int64_t blocks) const {
    for (int64_t b = 0; b < blocks; b++)
      for (int part = 0; part < PARTS; part++) {
        const auto sum = reinterpret_cast<__m256>(sums_[part]);
        float* to = y + b * BLOCK + 4 * part;
        _mm_storeu_ps(to, _mm_loadu_ps(to) + (b == 0 ? _mm256_castps256_ps128(sum) : _mm256_extractf128_ps(sum, 1)));
      }
  }

 private:
  static constexpr int PARTS = 8;  // four numbers of each block
  vf sums_[PARTS] = {};
};
#else
// What codes in the low four bits of each lane stand for; whatever is above them.
inline vf code_values(vi v) {
#if defined(__AVX512F__)
  const __m512 values = _mm512_set_ps(7, 6, 5, 4, 3, 2, 1, 0, -1, -2, -3, -4, -5, -6, -7, -8);
  return reinterpret_cast<vf>(_mm512_permutexvar_ps(reinterpret_cast<__m512i>(v), values));
#else
  return to_float((v & 15) - 8);
#endif
}

class ColumnSums {
 public:
  static constexpr int TOGETHER = 1;
  void add(const char* codes, int64_t, const float* factors) {
    const vf factor = splat(factors[0]);
    for (int part = 0; part < PARTS; part++) {
      const vi pairs = widen_bytes(codes + part * W);
      sums_[0][part] += factor * code_values(pairs);
      sums_[1][part] += factor * code_values(pairs >> 4);
    }
  }
  void add_to(float* y, int64_t) const {
    for (int half = 0; half < 2; half++)
      for (int part = 0; part < PARTS; part++, y += W) store(y, load(y) + sums_[half][part]);
  }

 private:
  static constexpr int PARTS = int(BLOCK / 2 / W);
  vf sums_[2][PARTS] = {};
};
#endif

// to[i] = factor * from[i], for i < n; what a whole vector holds beyond is not of these
inline void scale_bytes(const uint8_t* from, int64_t n, float factor, float* to) {
  auto scaled = [&](const uint8_t* bytes) INLINE { return to_float(widen_bytes(bytes)) * splat(factor); };
  if (n < W) {
    uint8_t bytes[W] = {};
    std::memcpy(bytes, from, size_t(n));
    return store(to, scaled(bytes));
  }
  for (int64_t i = 0; i < n; i += W) {
    const int64_t at = std::min(i, n - W);  // the last ones of whole vectors: some are stored twice
    store(to + at, scaled(from + at));
  }
}

// y[32 * blocks] += the sum over the list of h[j] times columns [b0, b0 + blocks) of row base + j; blocks <= TIER_BLOCKS
inline void add_columns(const Plane& p, int64_t base, const int32_t* list, int64_t count, const float* h, int64_t b0,
                        int64_t blocks, float* y) {
  float factors[TIER_ROWS][TIER_BLOCKS + W] = {};
  auto codes = [&](int64_t i) {
    return p.codes.data + (base + list[std::min(i, count - 1)]) * p.codes.stride + b0 * (BLOCK / 2);
  };
  for (int64_t i = 0; i < count; i += TIER_ROWS) {
    const char *rows[TIER_ROWS], *next[TIER_ROWS];
    for (int r = 0; r < TIER_ROWS; r++) {
      rows[r] = codes(i + r), next[r] = codes(i + TIER_ROWS + r);
      const int64_t j = list[std::min(i + r, count - 1)], row = base + j;
      // past the end: a row once more, times 0
      const float factor = i + r < count ? h[j] * p.scales[row] : 0.0f;
      scale_bytes(p.multipliers + row * p.blocks() + b0, blocks, factor, factors[r]);
    }
    for (int64_t b = 0; b < blocks; b += ColumnSums::TOGETHER) {
      const int64_t some = std::min<int64_t>(blocks - b, ColumnSums::TOGETHER);
      ColumnSums sums;  // of these rows alone: fewer roundings than one sum over all
      for (int r = 0; r < TIER_ROWS; r++) {
        if (b % LINE_BLOCKS == 0) __builtin_prefetch(next[r] + b * (BLOCK / 2), 0, 2);
        sums.add(rows[r] + b * (BLOCK / 2), some, factors[r] + b);
      }
      sums.add_to(y + b * BLOCK, some);
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
